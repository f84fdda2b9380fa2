//! The change feed: conditions with a cursor, as both agents serve it to `watch`.
//!
//! Pure: `now_ms` is the caller's monotonic clock in milliseconds.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::condition::{Condition, Key, Status, Verdict};
use crate::event::Journal;
use crate::limits::{CONDITIONS, TOMBSTONES};

/// A place in one feed's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Random per feed: a restarted agent has another.
    pub incarnation: u64,
    /// Counts changes; 0 is before the first.
    pub revision: u64,
}

/// What changed after a cursor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Where the next `watch` goes on.
    pub cursor: Cursor,
    /// True when everything is listed and what is not listed is gone.
    pub reset: bool,
    /// Conditions that changed, in key order.
    pub conditions: Vec<Condition>,
    /// Keys that went away.
    pub removed: Vec<Key>,
}

#[derive(Debug)]
struct Entry {
    verdict: Verdict,
    observed_ms: u64,
    since_ms: u64,
    valid_ms: u64,
    revision: u64,
}

/// Conditions by key, each with the revision of its last change.
#[derive(Debug)]
pub struct Feed {
    incarnation: u64,
    revision: u64,
    /// Cursors older than this get a reset: tombstones up to here are forgotten.
    floor: u64,
    entries: BTreeMap<Key, Entry>,
    tombstones: VecDeque<(u64, Key)>,
    journal: Journal,
    limit: usize,
}

impl Feed {
    /// An empty feed whose journal keeps `events` transitions.
    #[must_use]
    pub fn new(incarnation: u64, events: usize) -> Self {
        Self::with_journal(incarnation, Journal::new(incarnation, events))
    }

    /// An empty feed that goes on with a journal.
    #[must_use]
    pub fn with_journal(incarnation: u64, journal: Journal) -> Self {
        Self {
            journal,
            incarnation,
            revision: 0,
            floor: 0,
            entries: BTreeMap::new(),
            tombstones: VecDeque::new(),
            limit: CONDITIONS,
        }
    }

    /// The same feed with room for so many conditions; what comes when it is full is not taken.
    #[must_use]
    pub fn holding(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    /// Records an observation made at `now_ms`; true when the verdict changed.
    ///
    /// An equal verdict renews its age; it counts as a change for readers only
    /// when half of the old validity has passed, so that idle feeds stay quiet
    /// and readers still never see a live condition go stale.
    ///
    /// A new status or reason is a transition and goes into the journal; new evidence is not.
    pub fn observe(&mut self, key: Key, verdict: Verdict, valid_ms: u64, now_ms: u64) -> bool {
        let old = self.entries.get(&key).map(|e| &e.verdict);
        let from = old.map(|old| old.status);
        if old.is_none_or(|old| (old.status, &old.reason) != (verdict.status, &verdict.reason)) {
            self.journal
                .append(key.clone(), from, Some(verdict.clone()), now_ms);
        }
        self.mirror(key, verdict, valid_ms, now_ms)
    }

    /// As [`Feed::observe`] for a condition whose transitions are journalled by somebody else.
    pub fn mirror(&mut self, key: Key, verdict: Verdict, valid_ms: u64, now_ms: u64) -> bool {
        let old = self.entries.get(&key);
        if old.is_none() && self.entries.len() >= self.limit {
            return false;
        }
        let changed = old.is_none_or(|e| e.verdict != verdict);
        let renewed = old.is_some_and(|e| now_ms.saturating_sub(e.observed_ms) >= e.valid_ms / 2);
        let since_ms = match old {
            Some(e) if e.verdict.status == verdict.status => e.since_ms,
            _ => now_ms,
        };
        if !changed && !renewed {
            return false;
        }
        self.revision += 1;
        let revision = self.revision;
        self.entries.insert(
            key,
            Entry {
                verdict,
                observed_ms: now_ms,
                since_ms,
                valid_ms,
                revision,
            },
        );
        changed
    }

    /// The transitions so far.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The journal, for transitions that were observed elsewhere.
    pub fn journal_mut(&mut self) -> &mut Journal {
        &mut self.journal
    }

    /// Forgets a key; true when it was there.
    pub fn remove(&mut self, key: &Key) -> bool {
        if self.entries.remove(key).is_none() {
            return false;
        }
        self.revision += 1;
        self.tombstones.push_back((self.revision, key.clone()));
        if self.tombstones.len() > TOMBSTONES
            && let Some((forgotten, _)) = self.tombstones.pop_front()
        {
            self.floor = forgotten;
        }
        true
    }

    /// Where the feed stands now.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor {
            incarnation: self.incarnation,
            revision: self.revision,
        }
    }

    /// The verdict on a key as last observed, stale or not.
    #[must_use]
    pub fn verdict(&self, key: &Key) -> Option<&Verdict> {
        self.entries.get(key).map(|e| &e.verdict)
    }

    /// One condition as it reads at `now_ms`.
    #[must_use]
    pub fn condition(&self, key: &Key, now_ms: u64) -> Option<Condition> {
        Some(self.entries.get(key)?.condition(key, now_ms))
    }

    /// All conditions as they read at `now_ms`.
    pub fn snapshot(&self, now_ms: u64) -> impl Iterator<Item = Condition> + '_ {
        self.entries.iter().map(move |(key, e)| e.condition(key, now_ms))
    }

    /// As [`Feed::snapshot`] for some keys; what is not wanted is not copied.
    pub fn matching(&self, now_ms: u64, wanted: impl Fn(&Key) -> bool) -> impl Iterator<Item = Condition> {
        let entries = self.entries.iter().filter(move |(key, _)| wanted(key));
        entries.map(move |(key, e)| e.condition(key, now_ms))
    }

    /// All keys, each with its status as it reads at `now_ms`; copies nothing.
    pub fn statuses(&self, now_ms: u64) -> impl Iterator<Item = (&Key, Status)> {
        self.entries.iter().map(move |(key, e)| (key, e.status(now_ms)))
    }

    /// What changed after `cursor`, or everything when the cursor is not of this feed or too old.
    #[must_use]
    pub fn since(&self, cursor: Option<Cursor>, now_ms: u64) -> Changes {
        let known = cursor.filter(|c| {
            c.incarnation == self.incarnation && (self.floor..=self.revision).contains(&c.revision)
        });
        let after = known.map_or(0, |c| c.revision);
        let reset = known.is_none();
        let conditions = self.entries.iter().filter(|(_, e)| reset || e.revision > after);
        let removed = self
            .tombstones
            .iter()
            .filter(|(revision, key)| !reset && *revision > after && !self.entries.contains_key(key));
        Changes {
            cursor: self.cursor(),
            reset,
            conditions: conditions.map(|(key, e)| e.condition(key, now_ms)).collect(),
            removed: removed.map(|(_, key)| key.clone()).collect(),
        }
    }
}

impl Entry {
    /// As [`Condition::aged`] has it, without a copy.
    fn status(&self, now_ms: u64) -> Status {
        match now_ms.saturating_sub(self.observed_ms) > self.valid_ms {
            true => Status::Unknown,
            false => self.verdict.status,
        }
    }

    fn condition(&self, key: &Key, now_ms: u64) -> Condition {
        Condition {
            key: key.clone(),
            verdict: self.verdict.clone(),
            age_ms: 0,
            valid_ms: self.valid_ms,
            since_ms: self.observed_ms.saturating_sub(self.since_ms),
        }
        .aged(now_ms.saturating_sub(self.observed_ms))
    }
}

impl Changes {
    /// True when there is nothing to say.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.reset && self.conditions.is_empty() && self.removed.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::condition::Layer;

    fn key(n: usize) -> Key {
        Key::new(Layer::Service, format!("s{n}"))
    }

    #[test]
    fn a_reader_with_no_or_a_foreign_cursor_gets_everything() {
        let mut feed = Feed::new(7, 16);
        feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 0);
        let foreign = Cursor {
            incarnation: 8,
            revision: 1,
        };
        let future = Cursor {
            incarnation: 7,
            revision: 9,
        };
        for cursor in [None, Some(foreign), Some(future)] {
            let changes = feed.since(cursor, 5);
            assert!(changes.reset);
            assert_eq!(changes.conditions.len(), 1);
            assert_eq!(changes.conditions[0].age_ms, 5);
        }
    }

    #[test]
    fn a_reader_sees_each_change_once_and_removals() {
        let mut feed = Feed::new(7, 16);
        feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 0);
        feed.observe(key(2), Verdict::yes("Ready", ""), 1_000, 0);
        let at = feed.cursor();
        assert!(feed.since(Some(at), 1).is_empty());
        assert!(feed.observe(key(2), Verdict::no("Down", "x"), 1_000, 10));
        feed.remove(&key(1));
        let changes = feed.since(Some(at), 10);
        assert_eq!(changes.conditions.len(), 1);
        assert_eq!(changes.conditions[0].verdict.status, Status::False);
        assert_eq!(changes.removed, vec![key(1)]);
        assert!(feed.since(Some(changes.cursor), 10).is_empty());
    }

    #[test]
    fn an_equal_verdict_keeps_since_and_is_told_again_before_it_goes_stale() {
        let mut feed = Feed::new(7, 16);
        feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 0);
        let at = feed.cursor();
        assert!(!feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 400));
        assert!(feed.since(Some(at), 400).is_empty());
        assert!(!feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 500));
        let changes = feed.since(Some(at), 600);
        assert_eq!(
            (changes.conditions[0].age_ms, changes.conditions[0].since_ms),
            (100, 600)
        );
    }

    #[test]
    fn a_cursor_older_than_the_kept_tombstones_is_reset() {
        let mut feed = Feed::new(7, 16);
        let start = feed.cursor();
        for n in 0..=TOMBSTONES {
            feed.observe(key(n), Verdict::yes("Ready", ""), 1_000, 0);
            feed.remove(&key(n));
        }
        assert!(feed.since(Some(start), 0).reset);
        assert!(!feed.since(Some(feed.cursor()), 0).reset);
    }

    #[test]
    fn transitions_are_journalled_once_and_new_evidence_is_not() {
        let mut feed = Feed::new(7, 16);
        for (verdict, now) in [
            (Verdict::no("Starting", "a"), 1),
            (Verdict::no("Starting", "b"), 2),
            (Verdict::no("Recovering", "b"), 3),
            (Verdict::yes("Ready", "c"), 4),
        ] {
            feed.observe(key(1), verdict, 1_000, now);
        }
        feed.mirror(key(2), Verdict::no("Elsewhere", ""), 1_000, 5);
        let events = feed.journal().read(crate::event::Start::Oldest, 16, 10, 0).events;
        let told: Vec<_> = events
            .iter()
            .filter_map(|e| Some((e.from, e.to.as_ref()?.reason.as_str())))
            .collect();
        assert_eq!(
            told,
            [
                (None, "Starting"),
                (Some(Status::False), "Recovering"),
                (Some(Status::False), "Ready")
            ]
        );
        assert_eq!(events[2].age_ms, 6);
    }

    #[test]
    fn stale_conditions_read_unknown_in_a_snapshot() {
        let mut feed = Feed::new(7, 16);
        feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 0);
        assert!(feed.snapshot(1_001).all(|c| c.verdict.status == Status::Unknown));
    }

    #[test]
    fn a_removal_alone_is_a_change_and_kept_as_long_as_the_limit_says() {
        let mut feed = Feed::new(7, 16);
        for n in 0..TOMBSTONES {
            feed.observe(key(n), Verdict::yes("Ready", ""), 1_000, 0);
        }
        let before = feed.cursor();
        assert!(feed.remove(&key(0)) && !feed.remove(&key(0)));
        assert_eq!(feed.since(Some(before), 0).removed, [key(0)]);
        for n in 1..TOMBSTONES {
            feed.remove(&key(n));
        }
        let changes = feed.since(Some(before), 0);
        assert_eq!((changes.reset, changes.removed.len()), (false, TOMBSTONES));
    }

    #[test]
    fn since_begins_again_with_another_status_only() {
        let mut feed = Feed::new(7, 16);
        feed.observe(key(1), Verdict::yes("Ready", "a"), 1_000, 0);
        feed.observe(key(1), Verdict::yes("Ready", "b"), 1_000, 100);
        assert_eq!(feed.snapshot(100).next().unwrap().since_ms, 100);
        feed.observe(key(1), Verdict::no("Down", ""), 1_000, 300);
        assert_eq!(feed.snapshot(300).next().unwrap().since_ms, 0);
        assert_eq!(feed.verdict(&key(1)).unwrap().reason, "Down");
        assert_eq!(feed.verdict(&key(2)), None);
    }

    #[test]
    fn changes_are_empty_only_when_each_part_is() {
        let mut feed = Feed::new(7, 16);
        let empty = feed.since(Some(feed.cursor()), 0);
        assert!(empty.is_empty());
        assert!(
            !feed.since(None, 0).is_empty(),
            "a reset without conditions empties the reader"
        );
        feed.observe(key(1), Verdict::yes("Ready", ""), 1_000, 0);
        let listed = feed.since(Some(empty.cursor), 0);
        assert!(!listed.is_empty());
        feed.remove(&key(1));
        assert!(!feed.since(Some(listed.cursor), 0).is_empty());
    }

    #[test]
    fn statuses_are_those_of_the_snapshot_at_any_time() {
        let mut feed = Feed::new(1, 8);
        for (subject, status) in [("a", Status::True), ("b", Status::False), ("c", Status::Unknown)] {
            let verdict = Verdict::new(status, "X", "e");
            feed.observe(Key::new(Layer::Service, subject), verdict, 100, 10);
        }
        for now_ms in [0, 10, 110, 111, u64::MAX] {
            let whole: Vec<_> = feed.snapshot(now_ms).map(|c| (c.key, c.verdict.status)).collect();
            let lean: Vec<_> = feed
                .statuses(now_ms)
                .map(|(key, status)| (key.clone(), status))
                .collect();
            assert_eq!(whole, lean, "at {now_ms}");
        }
        let one: Vec<_> = feed.matching(10, |key| key.subject == "b").collect();
        assert!(matches!(&one[..], [b] if b.key.subject == "b"));
    }
}
