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
    /// The sender's wall clock when it counted the ages, in milliseconds since 1970; a guest's is not to be believed.
    pub wall_ms: u64,
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
    /// May lie before the clock's zero: the event is from an earlier boot of the machine.
    at_ms: i64,
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
        self.push(Kept {
            seq: self.next,
            key,
            from,
            to,
            at_ms: signed(at_ms),
        });
    }

    /// Takes back an event that was kept elsewhere, with its age at `now_ms`; events come in order of `seq`.
    pub fn restore(&mut self, event: Event, now_ms: u64) {
        self.push(Kept {
            seq: event.seq.max(self.next),
            key: event.key,
            from: event.from,
            to: event.to,
            at_ms: signed(now_ms).saturating_sub(signed(event.age_ms)),
        });
    }

    /// Leaves out `count` numbers: they may have been read by somebody before they could be kept.
    pub fn skip(&mut self, count: u64) {
        self.next = self.next.saturating_add(count);
    }

    fn push(&mut self, kept: Kept) {
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
        }
        self.next = kept.seq.saturating_add(1);
        self.ring.push_back(kept);
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
    pub fn read(&self, start: Start, most: usize, now_ms: u64, wall_ms: u64) -> Events {
        let last = self.next - 1;
        let seen = match start {
            Start::After(cursor) if cursor.incarnation == self.incarnation => cursor.revision.min(last),
            Start::After(_) | Start::Oldest => 0,
            Start::Last(count) => last.saturating_sub(count),
        };
        let first = self.ring.front().map_or(self.next, |kept| kept.seq);
        let from = self.ring.partition_point(|kept| kept.seq <= seen);
        let kept = self.ring.iter().skip(from).take(most);
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
            wall_ms,
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
            age_ms: now_ms.saturating_add_signed(self.at_ms.saturating_neg()),
        }
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
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
        let first = journal.read(Start::Oldest, 2, 10, 0);
        assert_eq!((first.lost, first.events.len(), first.cursor.revision), (0, 2, 2));
        assert_eq!(first.events[0].age_ms, 10);
        let rest = journal.read(Start::After(first.cursor), 2, 10, 0);
        assert_eq!(seqs(&rest), [3]);
        assert!(
            journal
                .read(Start::After(rest.cursor), 2, 10, 0)
                .events
                .is_empty()
        );
    }

    #[test]
    fn a_reader_may_begin_with_the_last_few_or_with_what_comes() {
        let journal = journal(10);
        assert_eq!(seqs(&journal.read(Start::Last(2), 9, 0, 0)), [9, 10]);
        assert_eq!(seqs(&journal.read(Start::Last(99), 9, 0, 0)), [8, 9, 10]);
        let now = journal.read(Start::Last(0), 9, 0, 0);
        assert_eq!((seqs(&now), now.cursor), (vec![], journal.cursor()));
    }

    #[test]
    fn what_is_no_longer_kept_is_counted() {
        let journal = journal(10);
        let events = journal.read(after(4), 9, 0, 0);
        assert_eq!((events.lost, events.events[0].seq), (3, 8));
        assert_eq!(
            journal.read(after(99), 9, 0, 0).events,
            [],
            "a cursor of the future is now"
        );
        let foreign = Cursor {
            incarnation: 8,
            revision: 9,
        };
        let events = journal.read(Start::After(foreign), 9, 0, 0);
        assert_eq!((events.lost, events.events.len()), (7, 3));
    }

    #[test]
    fn a_restored_journal_goes_on_after_a_gap_and_knows_older_ages() {
        let mut journal = Journal::new(7, 3);
        for seq in 4..=5 {
            let event = Event {
                seq,
                key: Key::new(Layer::Disk, "data"),
                from: None,
                to: None,
                age_ms: 1_000,
            };
            journal.restore(event, 100);
        }
        journal.skip(10);
        journal.append(Key::new(Layer::Disk, "data"), None, None, 150);
        let events = journal.read(after(4), 9, 200, 0);
        assert_eq!((seqs(&events), events.lost), (vec![5, 16], 0));
        assert_eq!((events.events[0].age_ms, events.events[1].age_ms), (1_100, 50));
        let raced = journal.read(after(9), 9, 200, 0); // it read 9 before the journal was cut off after 5
        assert_eq!((seqs(&raced), raced.lost), (vec![16], 0));
    }
}
