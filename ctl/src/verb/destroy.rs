//! `destroy`: removes what a stopped guest left: data disk, logs, secrets.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;

use super::secret;
use crate::cli::Destroy;
use crate::context::{Context, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::shims;

pub(super) async fn run(context: &Context, args: &Destroy) -> Result<(), CommandError> {
    let Destroy { name, yes } = args;
    if Link::connect_if_running(&context.layout).await?.is_some() {
        let message = format!("the host agent runs; {name} can only be destroyed when all is stopped");
        return Err(CommandError::new(Kind::Refused, "Running", message).next("sovereign down"));
    }
    let _lock = nobody_else(&context.layout)?;
    if shims::runs(&context.layout, name) {
        let message = format!("{name} runs, without a host agent; a guest that runs is not destroyed");
        return Err(CommandError::new(Kind::Refused, "Running", message).next("sovereign down"));
    }
    let dir = context.layout.guest_state(name);
    if !dir.exists() && !secret::any_of(&context.layout, name)? {
        let evidence = format!("guest {name} has left nothing");
        talk(&evidence);
        return context.done("NothingThere", &evidence, "sovereign status");
    }
    if !yes && !confirmed(&dir, name)? {
        return Err(CommandError::new(
            Kind::Refused,
            "NotConfirmed",
            "not confirmed; nothing was removed",
        ));
    }
    context.when_interrupted(
        "interrupted while removing",
        format!("sovereign destroy {name} --yes"),
    );
    remove(&dir)?;
    forget_secrets(context, name)?;
    let evidence = format!("removed {} and its secrets", dir.display());
    talk(&evidence);
    context.done("Destroyed", &evidence, "sovereign up")
}

/// The lock of the host agent: none begins while data go. `None` when nothing ever ran.
fn nobody_else(layout: &Layout) -> Result<Option<File>, CommandError> {
    let path = layout.lock();
    let file = match OpenOptions::new().write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            let message = format!("cannot open {}", path.display());
            return Err(CommandError::new(Kind::Internal, "Io", message).because(error));
        }
    };
    file.try_lock().map_err(|_| {
        CommandError::new(
            Kind::Refused,
            "Running",
            "a host agent is just starting or ending",
        )
        .next("sovereign down")
    })?;
    Ok(Some(file))
}

fn confirmed(dir: &Path, name: &Name) -> Result<bool, CommandError> {
    if !io::stdin().is_terminal() {
        let message = format!("destroy removes {name}'s data; without a terminal it needs --yes");
        return Err(CommandError::new(Kind::Usage, "NeedsYes", message)
            .next(format!("sovereign destroy {name} --yes")));
    }
    talk(&format!(
        "This removes {} for ever: {name}'s data disk, logs and secrets.",
        dir.display()
    ));
    talk(&format!("Type {name} to go on:"));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|error| {
        CommandError::new(Kind::Usage, "NeedsYes", "cannot read the answer").because(error)
    })?;
    Ok(answer.trim() == name.as_str())
}

/// Renamed first, so that a half-removed guest is never taken for a whole one.
fn remove(dir: &Path) -> Result<(), CommandError> {
    let failed = |error: io::Error| {
        CommandError::new(Kind::Internal, "Io", format!("cannot remove {}", dir.display())).because(error)
    };
    let doomed = dir.with_extension("destroyed"); // a name never holds a dot
    match fs::remove_dir_all(&doomed) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    match fs::rename(dir, &doomed) {
        Ok(()) => fs::remove_dir_all(&doomed).map_err(failed),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

fn forget_secrets(context: &Context, name: &Name) -> Result<(), CommandError> {
    let path = context.layout.secrets();
    let mut secrets = secret::read(&context.layout)?;
    let before = secrets.len();
    secrets.retain(|key, _| !secret::belongs(key, name));
    if secrets.len() == before {
        return Ok(());
    }
    let kept: serde_json::Map<String, serde_json::Value> = secrets
        .iter()
        .map(|(key, value)| (key.clone(), value.reveal().into()))
        .collect();
    let failed = |error: io::Error| {
        CommandError::new(Kind::Internal, "Io", format!("cannot write {}", path.display())).because(error)
    };
    let fresh = path.with_extension("new");
    let bytes = serde_json::to_vec(&kept).map_err(|error| failed(error.into()))?;
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)
        .map_err(failed)?;
    file.write_all(&bytes)
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    fs::rename(&fresh, &path).map_err(failed)
}
