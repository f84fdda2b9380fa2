//! Events: the journal of transitions, bounded, with an explicit count of what was lost.
//!
//! Pure: `now_ms` is the caller's monotonic clock in milliseconds.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::condition::{Key, Status, Verdict};
use crate::feed::Cursor;

/// One transition of one condition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the journal's events, from 1.
    pub seq: u64,
    /// What changed.
    pub key: Key,
    /// The status before; `None` when it was seen for the first time.
    pub from: Option<Status>,
    /// What was found; `None` when the subject went away.
    pub to: Option<Verdict>,
    /// Milliseconds since it happened, when the message was made.
    pub age_ms: u64,
}

/// Where a reader begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// With the oldest event that is kept.
    Oldest,
    /// With the last so many; 0 is "what comes from now on".
    Last(u64),
    /// After what was read before.
    After(Cursor),
}

/// What happened after a reader's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Events {
    /// Where the next read goes on; `revision` is the last `seq`.
    pub cursor: Cursor,
    /// Events between the reader's cursor and the first one here that are no longer kept.
    pub lost: u64,
    /// In order of `seq`.
    pub events: Vec<Event>,
}

#[derive(Debug, Clone)]
struct Kept {
    seq: u64,
    key: Key,
    from: Option<Status>,
    to: Option<Verdict>,
    at_ms: u64,
}

/// The last transitions, oldest first.
#[derive(Debug)]
pub struct Journal {
    incarnation: u64,
    next: u64,
    capacity: usize,
    ring: VecDeque<Kept>,
}

impl Journal {
    /// An empty journal that keeps `capacity` events.
    #[must_use]
    pub fn new(incarnation: u64, capacity: usize) -> Self {
        Self {
            incarnation,
            next: 1,
            capacity,
            ring: VecDeque::new(),
        }
    }

    /// Appends a transition that happened at `at_ms`.
    pub fn append(&mut self, key: Key, from: Option<Status>, to: Option<Verdict>, at_ms: u64) {
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
        }
        let seq = self.next;
        self.next += 1;
        self.ring.push_back(Kept {
            seq,
            key,
            from,
            to,
            at_ms,
        });
    }

    /// Where the journal stands now.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor {
            incarnation: self.incarnation,
            revision: self.next - 1,
        }
    }

    /// At most `most` events from `start` on; a reader with a foreign cursor gets all that is kept.
    #[must_use]
    pub fn read(&self, start: Start, most: usize, now_ms: u64) -> Events {
        let last = self.next - 1;
        let seen = match start {
            Start::After(cursor) if cursor.incarnation == self.incarnation => cursor.revision.min(last),
            Start::After(_) | Start::Oldest => 0,
            Start::Last(count) => last.saturating_sub(count),
        };
        let first = self.ring.front().map_or(self.next, |kept| kept.seq);
        let skip = usize::try_from((seen + 1).saturating_sub(first)).unwrap_or(usize::MAX);
        let kept = self.ring.iter().skip(skip).take(most);
        let events: Vec<Event> = kept.map(|kept| kept.event(now_ms)).collect();
        let lost = match start {
            Start::After(_) => first.saturating_sub(seen + 1),
            Start::Oldest | Start::Last(_) => 0,
        };
        Events {
            cursor: Cursor {
                incarnation: self.incarnation,
                revision: events.last().map_or(last, |event| event.seq),
            },
            lost,
            events,
        }
    }
}

impl Kept {
    fn event(&self, now_ms: u64) -> Event {
        Event {
            seq: self.seq,
            key: self.key.clone(),
            from: self.from,
            to: self.to.clone(),
            age_ms: now_ms.saturating_sub(self.at_ms),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::Layer;

    fn journal(events: u64) -> Journal {
        let mut journal = Journal::new(7, 3);
        for n in 0..events {
            let to = Verdict::yes("R", n.to_string());
            journal.append(Key::new(Layer::Disk, "data"), None, Some(to), n);
        }
        journal
    }

    fn after(revision: u64) -> Start {
        Start::After(Cursor {
            incarnation: 7,
            revision,
        })
    }

    fn seqs(events: &Events) -> Vec<u64> {
        events.events.iter().map(|event| event.seq).collect()
    }

    #[test]
    fn each_event_is_read_once_in_order() {
        let journal = journal(3);
        let first = journal.read(Start::Oldest, 2, 10);
        assert_eq!((first.lost, first.events.len(), first.cursor.revision), (0, 2, 2));
        assert_eq!(first.events[0].age_ms, 10);
        let rest = journal.read(Start::After(first.cursor), 2, 10);
        assert_eq!(seqs(&rest), [3]);
        assert!(journal.read(Start::After(rest.cursor), 2, 10).events.is_empty());
    }

    #[test]
    fn a_reader_may_begin_with_the_last_few_or_with_what_comes() {
        let journal = journal(10);
        assert_eq!(seqs(&journal.read(Start::Last(2), 9, 0)), [9, 10]);
        assert_eq!(seqs(&journal.read(Start::Last(99), 9, 0)), [8, 9, 10]);
        let now = journal.read(Start::Last(0), 9, 0);
        assert_eq!((seqs(&now), now.cursor), (vec![], journal.cursor()));
    }

    #[test]
    fn what_is_no_longer_kept_is_counted() {
        let journal = journal(10);
        let events = journal.read(after(4), 9, 0);
        assert_eq!((events.lost, events.events[0].seq), (3, 8));
        assert_eq!(
            journal.read(after(99), 9, 0).events,
            [],
            "a cursor of the future is now"
        );
        let foreign = Cursor {
            incarnation: 8,
            revision: 9,
        };
        let events = journal.read(Start::After(foreign), 9, 0);
        assert_eq!((events.lost, events.events.len()), (7, 3));
    }
}
