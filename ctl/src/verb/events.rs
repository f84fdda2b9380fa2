//! `events`: what happened, from the host's journal; with no agent, from its store.

use std::process::Stdio;
use std::time::{Duration, SystemTime};

use sovereign_protocol::event::{Event, Events, Start};
use sovereign_protocol::limits::WATCH_HOLD;
use sovereign_protocol::name::Name;
use sovereign_protocol::record::Record;

use crate::agent::Binaries;
use crate::cli;
use crate::clock::rfc3339;
use crate::context::{Context, data, data_json, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::picture::mark;

pub(super) async fn run(context: &Context, args: &cli::Events) -> Result<(), CommandError> {
    let start = args.last.map_or(Start::Oldest, Start::Last);
    let guest = args.guest.as_ref();
    match Link::connect_if_running(&context.layout).await? {
        Some(link) if args.follow => {
            context.when_interrupted("events ended", "sovereign status");
            follow(context, &link, start, guest).await
        }
        Some(link) => history(context, &link, start, guest).await,
        None => stored(context, args).await,
    }
}

/// Prints what happens from `start` on until it is interrupted.
///
/// # Errors
/// The link's own, and a closed stdout.
pub(super) async fn follow(
    context: &Context,
    link: &Link,
    mut start: Start,
    guest: Option<&Name>,
) -> Result<(), CommandError> {
    loop {
        let events = link.events(start, WATCH_HOLD).await?;
        start = Start::After(events.cursor);
        print(context, events, guest)?;
    }
}

async fn history(
    context: &Context,
    link: &Link,
    mut start: Start,
    guest: Option<&Name>,
) -> Result<(), CommandError> {
    loop {
        let events = link.events(start, Duration::ZERO).await?;
        if events.events.is_empty() {
            return Ok(());
        }
        start = Start::After(events.cursor);
        print(context, events, guest)?;
    }
}

fn print(context: &Context, events: Events, guest: Option<&Name>) -> Result<(), CommandError> {
    let counted = SystemTime::UNIX_EPOCH + Duration::from_millis(events.wall_ms);
    if events.lost > 0 {
        let lost = events.lost;
        match context.json {
            true => data_json(&serde_json::json!({ "lost": lost }))?,
            false => data(&format!("({lost} older events are no longer kept)"))?,
        }
    }
    for event in events.events {
        print_record(context, &record(event, counted), guest)?;
    }
    Ok(())
}

/// `counted` is when the event's age was counted.
fn record(event: Event, counted: SystemTime) -> Record {
    let at = counted.checked_sub(Duration::from_millis(event.age_ms));
    let time = rfc3339(at.unwrap_or(SystemTime::UNIX_EPOCH));
    Record::new(event, time)
}

fn print_record(context: &Context, record: &Record, guest: Option<&Name>) -> Result<(), CommandError> {
    if guest.is_some_and(|guest| guest.as_str() != record.guest) {
        return Ok(());
    }
    match context.json {
        true => data_json(record),
        false => data(&line(record)),
    }
}

fn line(record: &Record) -> String {
    let mark = record.status.map_or('-', mark);
    let Record {
        time,
        guest,
        layer,
        subject,
        reason,
        evidence,
        ..
    } = record;
    let guest = if guest.is_empty() { "(host)" } else { guest };
    let text = format!("{time}  {guest}  {mark} {layer:<9} {subject}  {reason}: {evidence}");
    escaped(text.trim_end_matches([':', ' '])).replace('\n', " ")
}

/// The store belongs to the host agent's program; it reads it for us while no agent has it.
async fn stored(context: &Context, args: &cli::Events) -> Result<(), CommandError> {
    talk(&format!(
        "nothing running, so these are the kept events; next: {}",
        context.spell("sovereign up")
    ));
    let failed = |error: String| {
        CommandError::new(
            Kind::Internal,
            "StoreUnreadable",
            "the kept events cannot be read",
        )
        .because(std::io::Error::other(error))
        .next("sovereign up")
    };
    let child = tokio::process::Command::new(&Binaries::find()?.host)
        .arg("events")
        .arg("--state-dir")
        .arg(&context.layout.state)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = child.await.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(escaped(&String::from_utf8_lossy(&output.stderr))));
    }
    let records: Vec<Record> = output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).map_err(|error| failed(error.to_string())))
        .collect::<Result<_, _>>()?;
    let last = args
        .last
        .and_then(|last| usize::try_from(last).ok())
        .unwrap_or(usize::MAX);
    for record in &records[records.len().saturating_sub(last)..] {
        print_record(context, record, args.guest.as_ref())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::condition::{Key, Layer, Status, Verdict};

    #[test]
    fn a_line_is_one_line_whatever_the_guest_says() {
        let event = |subject: &str, to| Event {
            seq: 1,
            key: Key::new(Layer::Service, subject),
            from: None,
            to,
            age_ms: 1_000,
        };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(61);
        let told = |event| line(&record(event, at));
        assert_eq!(
            told(event(
                "sql/postgres",
                Some(Verdict::new(Status::False, "Ended", "e\x1b[m\nx"))
            )),
            "1970-01-01T00:01:00.000Z  sql  ✗ service   postgres  Ended: e [m x"
        );
        assert_eq!(
            told(event("agent", None)),
            "1970-01-01T00:01:00.000Z  (host)  - service   agent  Removed"
        );
    }
}
