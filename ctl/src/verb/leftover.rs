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
