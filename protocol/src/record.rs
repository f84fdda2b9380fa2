//! One event as people and programs read it: a line of `sovereign events`.

use serde::{Deserialize, Serialize};

use crate::condition::{Layer, Status};
use crate::event::Event;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Counts the host's events, from 1, with gaps after a crash of the host agent.
    pub seq: u64,
    /// When it happened, RFC 3339 UTC.
    pub time: String,
    /// The guest; empty for the host's own.
    pub guest: String,
    /// The layer.
    pub layer: Layer,
    /// What of the layer.
    pub subject: String,
    /// The status before; absent when it was seen for the first time.
    pub from: Option<Status>,
    /// The status since; absent when the subject went away.
    pub status: Option<Status>,
    /// Code for programs.
    pub reason: String,
    /// What was seen.
    pub evidence: String,
}

impl Record {
    /// An event of the host's journal that happened at `time`.
    #[must_use]
    pub fn new(event: Event, time: String) -> Self {
        let (guest, subject) = event
            .key
            .subject
            .split_once('/')
            .unwrap_or(("", &event.key.subject));
        let (status, reason, evidence) = match event.to {
            Some(to) => (Some(to.status), to.reason, to.evidence),
            None => (None, "Removed".to_owned(), String::new()),
        };
        Self {
            seq: event.seq,
            time,
            guest: guest.to_owned(),
            layer: event.key.layer,
            subject: subject.to_owned(),
            from: event.from,
            status,
            reason,
            evidence,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::{Key, Verdict};

    #[test]
    fn a_record_names_guest_and_subject_apart() {
        let event = |subject: &str, to| Event {
            seq: 3,
            key: Key::new(Layer::Service, subject),
            from: Some(Status::True),
            to,
            age_ms: 0,
        };
        let record = Record::new(event("sql/postgres", Some(Verdict::no("Ended", "x"))), "T".into());
        assert_eq!(
            serde_json::to_string(&record).unwrap(),
            r#"{"seq":3,"time":"T","guest":"sql","layer":"service","subject":"postgres","from":"True","status":"False","reason":"Ended","evidence":"x"}"#
        );
        let record = Record::new(event("agent", None), "T".into());
        assert_eq!(
            (
                record.guest.as_str(),
                record.subject.as_str(),
                record.reason.as_str()
            ),
            ("", "agent", "Removed")
        );
    }
}
