//! `gc`: removes what dead host agents left in this machine's network, found by its marks alone.

use std::process::Stdio;

use serde::Deserialize;
use serde_json::json;

use crate::agent::Binaries;
use crate::cli;
use crate::context::{Context, data, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::shims;

/// What `sovereign-host gc` says.
#[derive(Debug, Deserialize)]
struct Collected {
    removed: Vec<String>,
    failed: Vec<String>,
    used: Vec<String>,
    left: Vec<String>,
}

pub(super) async fn run(context: &Context, args: &cli::Gc) -> Result<(), CommandError> {
    let layout = &context.layout;
    let runs = Link::connect_if_running(layout).await?.is_some() || !shims::running(layout).is_empty();
    if runs && !args.all {
        let message = format!("instance {} runs, so nothing of it is left over", layout.instance);
        return Err(CommandError::new(Kind::Refused, "Running", message).next("sovereign down"));
    }
    let collected = collect(context, args.all, args.dry_run).await?;
    let what = if args.dry_run {
        "would be removed"
    } else {
        "removed"
    };
    let evidence = format!("{} {what}", collected.removed.len());
    if !context.json {
        collected
            .removed
            .iter()
            .try_for_each(|line| data(&escaped(line)))?;
        if collected.removed.is_empty() && collected.failed.is_empty() {
            data("nothing is left over")?;
        }
        collected.left.iter().for_each(|line| talk(&escaped(line)));
        if args.all && !collected.used.is_empty() {
            talk(&format!("in use, left alone: {}", collected.used.join(", ")));
        }
    }
    if collected.failed.is_empty() {
        let more = [
            ("removed", json!(collected.removed)),
            ("used", json!(collected.used)),
            ("left", json!(collected.left)),
        ];
        let reason = if args.dry_run { "Planned" } else { "Collected" };
        return context.done_with(reason, &evidence, "sovereign up", &more);
    }
    let failed = escaped(&collected.failed.join("; "));
    Err(CommandError::new(Kind::NotReached, "NotRemoved", failed).next("sudo sovereign gc"))
}

/// How much is left over of this instance; nothing is changed.
///
/// # Errors
/// When it cannot be looked for.
pub(super) async fn left_over(context: &Context) -> Result<usize, CommandError> {
    Ok(collect(context, false, true).await?.removed.len())
}

async fn collect(context: &Context, all: bool, dry_run: bool) -> Result<Collected, CommandError> {
    let failed = |error: String| {
        CommandError::new(Kind::Internal, "NotCollected", "leftovers cannot be looked for")
            .because(std::io::Error::other(error))
            .next("sudo sovereign gc --dry-run")
    };
    let mut command = tokio::process::Command::new(&Binaries::find()?.host);
    command.arg("gc").stdin(Stdio::null()).kill_on_drop(true);
    if all {
        // Beside our own, which lies where an agent of the same user would look.
        let states = context.layout.state.parent();
        states.map(|states| command.arg("--states").arg(states));
    } else {
        command.arg("--instance").arg(context.layout.instance.as_str());
        command.arg("--switched").arg(context.layout.switched());
    }
    if dry_run {
        command.arg("--dry-run");
    }
    let output = command
        .output()
        .await
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(escaped(&String::from_utf8_lossy(&output.stderr))));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}
