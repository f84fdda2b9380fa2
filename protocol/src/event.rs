//! Events: the journal of transitions, bounded, with an explicit count of what was lost.
//!
//! Pure: `now_ms` is the caller's monotonic clock in milliseconds.

use std::collections::{BTreeMap, VecDeque};

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
    key: Key,
    from: Option<Status>,
    to: Option<Verdict>,
    /// May lie before the clock's zero: the event is from an earlier boot of the machine.
    at_ms: i64,
}

/// The last transitions, oldest first.
///
/// A host's journal holds the events of all its guests. When it is full, the guest that takes most of it makes room with
/// its own oldest event: one that never stops talking displaces its own history, not that of others.
#[derive(Debug)]
pub struct Journal {
    incarnation: u64,
    next: u64,
    capacity: usize,
    kept: BTreeMap<u64, Kept>,
    /// The numbers in `kept` by owner, oldest first; no queue is empty.
    shares: BTreeMap<String, VecDeque<u64>>,
    /// How many were displaced so far, and the last of them.
    displaced: (u64, VecDeque<u64>),
}

/// Whose the event is: the guest of `sql/postgres`; the agent's own is nobody's.
fn owner(key: &Key) -> &str {
    key.subject.split_once('/').map_or("", |(guest, _)| guest)
}

impl Journal {
    /// An empty journal that keeps `capacity` events.
    #[must_use]
    pub fn new(incarnation: u64, capacity: usize) -> Self {
        Self {
            incarnation,
            next: 1,
            capacity,
            kept: BTreeMap::new(),
            shares: BTreeMap::new(),
            displaced: (0, VecDeque::new()),
        }
    }

    /// Appends a transition that happened at `at_ms`.
    pub fn append(&mut self, key: Key, from: Option<Status>, to: Option<Verdict>, at_ms: u64) {
        let at_ms = signed(at_ms);
        self.push(self.next, Kept { key, from, to, at_ms });
    }

    /// Takes back an event that was kept elsewhere, with its age at `now_ms`; events come in order of `seq`.
    pub fn restore(&mut self, event: Event, now_ms: u64) {
        let kept = Kept {
            key: event.key,
            from: event.from,
            to: event.to,
            at_ms: signed(now_ms).saturating_sub(signed(event.age_ms)),
        };
        self.push(event.seq.max(self.next), kept);
    }

    /// Leaves out `count` numbers: they may have been read by somebody before they could be kept.
    pub fn skip(&mut self, count: u64) {
        self.next = self.next.saturating_add(count);
    }

    fn push(&mut self, seq: u64, kept: Kept) {
        self.next = seq.saturating_add(1);
        self.shares
            .entry(owner(&kept.key).to_owned())
            .or_default()
            .push_back(seq);
        self.kept.insert(seq, kept);
        if self.kept.len() > self.capacity {
            self.displace();
        }
    }

    /// The oldest event of who has most; among equals, of who has the oldest.
    fn displace(&mut self) {
        let most = self.shares.iter_mut().max_by_key(|(_, seqs)| {
            let oldest = seqs.front().copied().unwrap_or(u64::MAX);
            (seqs.len(), u64::MAX - oldest)
        });
        let Some(seq) = most.and_then(|(_, seqs)| seqs.pop_front()) else {
            return;
        };
        self.shares.retain(|_, seqs| !seqs.is_empty());
        self.kept.remove(&seq);
        let (count, last) = &mut self.displaced;
        *count += 1;
        last.push_back(seq);
        if last.len() > self.capacity {
            last.pop_front();
        }
    }

    /// How many events were displaced so far, and the numbers of those after the first `seen`, as far as they are known.
    #[must_use]
    pub fn displaced(&self, seen: u64) -> (u64, Vec<u64>) {
        let (count, last) = &self.displaced;
        let fresh = usize::try_from(count.saturating_sub(seen)).unwrap_or(usize::MAX);
        let known = last.len().saturating_sub(fresh);
        (*count, last.iter().skip(known).copied().collect())
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
            Start::Last(0) => last,
            Start::Last(count) => {
                let before = usize::try_from(count).unwrap_or(usize::MAX);
                self.kept.keys().rev().nth(before).copied().unwrap_or(0)
            }
        };
        let kept = self.kept.range(seen.saturating_add(1)..).take(most);
        let events: Vec<Event> = kept.map(|(seq, kept)| kept.event(*seq, now_ms)).collect();
        let revision = events.last().map_or(last, |event| event.seq);
        let lost = match start {
            Start::After(_) => self.lost(seen, revision),
            Start::Oldest | Start::Last(_) => 0,
        };
        Events {
            cursor: Cursor {
                incarnation: self.incarnation,
                revision,
            },
            wall_ms,
            lost,
            events,
        }
    }
}

impl Journal {
    /// Events after `seen` up to `read` that are no longer kept.
    fn lost(&self, seen: u64, read: u64) -> u64 {
        let first = self.kept.keys().next().copied().unwrap_or(self.next);
        let displaced = self.displaced.1.iter();
        let between = displaced.filter(|seq| **seq > first.max(seen) && **seq <= read);
        first.saturating_sub(seen.saturating_add(1)) + between.count() as u64
    }
}

impl Kept {
    fn event(&self, seq: u64, now_ms: u64) -> Event {
        Event {
            seq,
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

    #[test]
    fn who_talks_most_displaces_its_own_history_only() {
        let mut journal = Journal::new(7, 10);
        let tell = |journal: &mut Journal, subject: &str| {
            journal.append(Key::new(Layer::Service, subject), None, None, 0);
        };
        for subject in ["agent", "quiet/a", "quiet/b", "other/a"] {
            tell(&mut journal, subject);
        }
        let before = journal.cursor();
        for _ in 0..1_000 {
            tell(&mut journal, "loud/a");
        }
        let all = journal.read(Start::Oldest, 99, 0, 0);
        assert_eq!(seqs(&all), [1, 2, 3, 4, 999, 1_000, 1_001, 1_002, 1_003, 1_004]);
        let behind = journal.read(Start::After(before), 99, 0, 0);
        assert_eq!(
            (behind.events.len(), behind.lost),
            (6, 10),
            "as many as are still known"
        );
        assert_eq!(seqs(&journal.read(Start::Last(7), 9, 0, 0))[0], 4);
        let half = journal.read(after(989), 1, 0, 0);
        assert_eq!((seqs(&half), half.lost), (vec![999], 9));
        let (count, last) = journal.displaced(990);
        assert_eq!((count, last), (994, vec![995, 996, 997, 998]));

        for _ in 0..10 {
            tell(&mut journal, "third/a");
        }
        let all = journal.read(Start::Oldest, 99, 0, 0);
        assert_eq!(seqs(&all), [1, 2, 3, 4, 1_002, 1_003, 1_004, 1_012, 1_013, 1_014]);
    }
}
