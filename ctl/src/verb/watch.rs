//! `watch`: each condition when it changes, until Ctrl-C.

use std::collections::BTreeMap;
use std::time::SystemTime;

use serde::Serialize;
use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::limits::WATCH_HOLD;
use sovereign_protocol::v1::{Changes, Condition};

use crate::clock::rfc3339;
use crate::context::{Context, data, data_json, escaped};
use crate::error::CommandError;
use crate::link::Link;
use crate::picture::mark;

/// One line.
#[derive(Debug, Serialize)]
struct Line {
    time: String,
    guest: String,
    layer: Layer,
    subject: String,
    /// Absent when the condition went away.
    status: Option<Status>,
    reason: String,
    evidence: String,
    age_ms: u64,
    valid_ms: u64,
}

pub(super) async fn run(context: &Context) -> Result<(), CommandError> {
    let link = Link::connect(&context.layout).await?;
    context.when_interrupted("watch ended", "sovereign status");
    let mut cursor = None;
    let mut seen = Seen::default();
    loop {
        let changes = link.watch(cursor, WATCH_HOLD).await?;
        cursor = Some(changes.cursor);
        for line in seen.news(changes, &rfc3339(SystemTime::now())) {
            if context.json {
                data_json(&line)?
            } else {
                data(&line.human())?
            }
        }
    }
}

/// What was printed last, so that a mere renewal is no line.
#[derive(Debug, Default)]
struct Seen(BTreeMap<(Layer, String), (Status, String)>);

impl Seen {
    fn news(&mut self, changes: Changes, time: &str) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut gone = changes.removed;
        if changes.reset {
            let listed = |key: &(Layer, String)| {
                changes
                    .conditions
                    .iter()
                    .any(|c| (c.layer, &c.subject) == (key.0, &key.1))
            };
            gone = self.0.keys().filter(|key| !listed(key)).cloned().collect();
        }
        for key in gone {
            if self.0.remove(&key).is_some() {
                lines.push(Line::removed(key, time));
            }
        }
        for condition in changes.conditions {
            let key = (condition.layer, condition.subject.clone());
            let now = (condition.status, condition.reason.clone());
            if self.0.get(&key) != Some(&now) {
                self.0.insert(key, now);
                lines.push(Line::of(condition, time));
            }
        }
        lines
    }
}

impl Line {
    fn of(c: Condition, time: &str) -> Self {
        let (guest, subject) = split(&c.subject);
        Self {
            time: time.to_owned(),
            guest,
            layer: c.layer,
            subject,
            status: Some(c.status),
            reason: c.reason,
            evidence: c.evidence,
            age_ms: c.age_ms,
            valid_ms: c.valid_ms,
        }
    }

    fn removed((layer, subject): (Layer, String), time: &str) -> Self {
        let (guest, subject) = split(&subject);
        Self {
            time: time.to_owned(),
            guest,
            layer,
            subject,
            status: None,
            reason: "Removed".to_owned(),
            evidence: String::new(),
            age_ms: 0,
            valid_ms: 0,
        }
    }

    fn human(&self) -> String {
        let mark = self.status.map_or('-', mark);
        let Self {
            time,
            guest,
            layer,
            subject,
            reason,
            evidence,
            ..
        } = self;
        escaped(&format!(
            "{time}  {guest}  {mark} {layer:<9} {subject}  {reason}: {evidence}"
        ))
        .replace('\n', " ")
    }
}

/// `guest/subject`; a subject without a guest is the host's own.
fn split(subject: &str) -> (String, String) {
    let (guest, subject) = subject.split_once('/').unwrap_or(("", subject));
    (guest.to_owned(), subject.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::v1::Cursor;

    fn changes(status: Option<Status>, reset: bool) -> Changes {
        let condition = |status| Condition {
            layer: Layer::Service,
            subject: "sql/postgres".into(),
            status,
            reason: "R".into(),
            evidence: "e\x1b[m".into(),
            age_ms: 1,
            valid_ms: 2,
            since_ms: 3,
        };
        Changes {
            cursor: Cursor {
                incarnation: 1,
                revision: 1,
            },
            reset,
            conditions: status.map(condition).into_iter().collect(),
            removed: vec![],
        }
    }

    #[test]
    fn a_renewal_is_no_line_a_change_and_a_removal_are() {
        let mut seen = Seen::default();
        let mut told = |changes| {
            seen.news(changes, "T")
                .iter()
                .map(Line::human)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            told(changes(Some(Status::True), true)),
            ["T  sql  ✓ service   postgres  R: e\\x1b[m"]
        );
        assert!(told(changes(Some(Status::True), false)).is_empty());
        assert!(
            told(changes(Some(Status::True), true)).is_empty(),
            "a restarted agent repeats itself"
        );
        assert_eq!(
            told(changes(Some(Status::False), false)),
            ["T  sql  ✗ service   postgres  R: e\\x1b[m"]
        );
        assert_eq!(
            told(changes(None, true)),
            ["T  sql  - service   postgres  Removed: "]
        );
    }
}
