//! `doctor --fix=NAME`: has the host agent remove a leftover of a script, and nothing else.

use serde_json::json;

use crate::cli;
use crate::context::{Context, data, escaped};
use crate::error::{CommandError, Kind};
use crate::link::Link;

pub(super) async fn run(context: &Context, args: &cli::Doctor) -> Result<(), CommandError> {
    let names: Vec<String> = args.fix.iter().filter(|name| !name.is_empty()).cloned().collect();
    let link = Link::connect(&context.layout).await?;
    let removal = link.remove_leftovers(&names, args.dry_run).await?;
    if !context.json {
        removal.removed.iter().try_for_each(|line| data(&escaped(line)))?;
    }
    if !removal.failed.is_empty() {
        let failed = escaped(&removal.failed.join("; "));
        return Err(CommandError::new(Kind::NotReached, "NotRemoved", failed).next("sovereign doctor"));
    }
    let (reason, what) = match args.dry_run {
        true => ("Planned", "would be removed"),
        false => ("Removed", "removed"),
    };
    let evidence = format!("{} {what}", removal.removed.len());
    context.done_with(
        reason,
        &evidence,
        "sovereign doctor",
        &[("removed", json!(removal.removed))],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_host::FakeHost;

    fn args(fix: &[&str], dry_run: bool) -> cli::Doctor {
        cli::Doctor {
            fix: fix.iter().map(|name| (*name).to_owned()).collect(),
            dry_run,
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_name_that_is_not_there_is_refused_with_those_that_are() {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::in_dir(dir.path());
        let none = run(&context, &args(&["rule-lookup-main"], true))
            .await
            .unwrap_err();
        assert_eq!(none.kind, Kind::Unreachable, "no host agent");
        let host = FakeHost::start_empty(&context.layout);
        host.state().leftovers.insert("rule-lookup-main".to_owned());
        let other = run(&context, &args(&["default-in-main"], false))
            .await
            .unwrap_err();
        assert_eq!(other.kind, Kind::Refused);
        assert!(other.json().contains("rule-lookup-main"), "{}", other.json());
        run(&context, &args(&["", "rule-lookup-main"], true))
            .await
            .unwrap();
        assert_eq!(host.state().leftovers.len(), 1, "a dry run changes nothing");
        run(&context, &args(&["rule-lookup-main"], false)).await.unwrap();
        assert!(host.state().leftovers.is_empty());
    }
}
