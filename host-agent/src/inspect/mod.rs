//! One look at an instance past its host agent: locks, sockets, shims, exit records, consoles, fresh dials.
//!
//! Changes nothing and waits for nobody longer than a few seconds. Boot keys stay in this process: they prove a fresh
//! dial and are in nothing that is returned. Works with the agent, a shim or a guest dead.

mod agent;
mod guest;

pub(crate) use agent::lock_holder;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::SystemTime;

use sovereign_protocol::inspection::{Inspection, Process, SCHEMA};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use tokio::task::JoinSet;

use crate::shim::contract::Paths;

/// Guests that one look takes in; more are left out.
const GUESTS: usize = 1_024;
/// Guests that are looked at together.
const TOGETHER: usize = 64;
/// Characters of a quoted line.
const LINE_CHARS: usize = 200;

/// Looks at everything that the directories of an instance lead to.
pub async fn inspect(layout: &Layout) -> Inspection {
    let mut waiting = guests(layout).into_iter();
    let mut looks = JoinSet::new();
    let mut seen = Vec::new();
    loop {
        while looks.len() < TOGETHER
            && let Some(name) = waiting.next()
        {
            let layout = layout.clone();
            looks.spawn(async move { guest::look(&layout, name).await });
        }
        match looks.join_next().await {
            Some(look) => seen.extend(look), // a look that panicked saw nothing
            None => break,
        }
    }
    seen.sort_by(|a, b| a.name.cmp(&b.name));
    Inspection {
        schema: SCHEMA.to_owned(),
        agent: agent::look(layout).await,
        guests: seen,
    }
}

/// Guests that left a lasting directory or something of a shim.
fn guests(layout: &Layout) -> BTreeSet<Name> {
    let directories = |parent: &Path| {
        let entries = fs::read_dir(parent).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names = directories.filter_map(|entry| Name::parse(entry.file_name().to_str()?).ok());
        names.take(GUESTS).collect::<Vec<Name>>()
    };
    let mut names = BTreeSet::from_iter(directories(&layout.state.join("guests")));
    names.extend(directories(&layout.run).into_iter().filter(|name| {
        let paths = Paths::of(layout, name);
        paths.shim().exists() || paths.config().exists()
    }));
    names.into_iter().take(GUESTS).collect()
}

/// A process and its state (proc_pid_stat(5)).
fn process(pid: u32) -> Process {
    let state = crate::process::state(pid);
    Process { pid, state }
}

/// Milliseconds since a file was written to.
fn age_ms(path: &Path) -> Option<u64> {
    let written = fs::metadata(path).and_then(|file| file.modified()).ok()?;
    let age = SystemTime::now().duration_since(written).unwrap_or_default();
    Some(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

/// The end of a text file, with control characters replaced.
fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut end = Vec::new();
        file.take(bytes).read_to_end(&mut end)?;
        Ok(end)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { ' ' } else { c })
        .collect()
}

/// The last lines that say something.
fn last_lines(text: &str, count: usize) -> Vec<String> {
    let mut lines: Vec<String> = text
        .lines()
        .rev()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .take(count)
        .map(|line| line.chars().take(LINE_CHARS).collect())
        .collect();
    lines.reverse();
    lines
}

#[cfg(test)]
mod tests;
