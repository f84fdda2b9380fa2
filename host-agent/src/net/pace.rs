//! How fast foreign changes are repaired: the first at once, then more slowly. Pure.

use std::collections::VecDeque;

/// Repairs further back than this do not slow the next one.
const WINDOW_MS: u64 = 10_000;
/// The pause before the second of two repairs; each further one waits twice as long.
pub(super) const FIRST_PAUSE_MS: u64 = 20;
const LONGEST_PAUSE_MS: u64 = 2_000;
/// Repairs within the window that make a fight.
const FIGHT: usize = 6;
/// A fight that goes on is reported again after this time.
const AGAIN_MS: u64 = 60_000;

/// The recent repairs of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pace {
    first_pause_ms: u64,
    repairs_ms: VecDeque<u64>,
    reported_ms: Option<u64>,
}

impl Pace {
    /// No repair yet; the second one waits so long.
    pub(super) fn new(first_pause_ms: u64) -> Self {
        Self {
            first_pause_ms,
            repairs_ms: VecDeque::new(),
            reported_ms: None,
        }
    }

    /// When the next repair may be made.
    pub(super) fn due_ms(&self, now_ms: u64) -> u64 {
        let recent = self
            .repairs_ms
            .iter()
            .filter(|at| now_ms.saturating_sub(**at) < WINDOW_MS);
        match (recent.count(), self.repairs_ms.back()) {
            (0, _) | (_, None) => now_ms,
            (count, Some(last)) => {
                let pause = self.first_pause_ms << (count - 1).min(16);
                last + pause.min(LONGEST_PAUSE_MS)
            }
        }
    }

    /// Notes a repair; the number of recent ones when it is time to report a fight.
    pub(super) fn repaired(&mut self, now_ms: u64) -> Option<usize> {
        self.repairs_ms
            .retain(|at| now_ms.saturating_sub(*at) < WINDOW_MS);
        self.repairs_ms.push_back(now_ms);
        let count = self.repairs_ms.len();
        if count == 1 {
            self.reported_ms = None; // the last fight is over
        }
        let is_news = self
            .reported_ms
            .is_none_or(|at| now_ms.saturating_sub(at) >= AGAIN_MS);
        if count < FIGHT || !is_news {
            return None;
        }
        self.reported_ms = Some(now_ms);
        Some(count)
    }
}

/// The pauses between attempts that failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Retry {
    failures: u32,
}

impl Retry {
    const FIRST_MS: u64 = 250;
    const LONGEST_MS: u64 = 30_000;

    /// Notes a failure; the pause before the next attempt.
    pub(super) fn failed(&mut self) -> u64 {
        let pause = Self::FIRST_MS << self.failures.min(16);
        self.failures += 1;
        pause.min(Self::LONGEST_MS)
    }

    /// Notes that all is well, or that somebody asked for something else.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_repair_is_made_at_once_and_then_ever_more_slowly() {
        let mut pace = Pace::new(FIRST_PAUSE_MS);
        let mut now = 1_000;
        let mut pauses = Vec::new();
        for _ in 0..9 {
            let due = pace.due_ms(now);
            pauses.push(due - now);
            now = due;
            pace.repaired(now);
        }
        assert_eq!(pauses, [0, 20, 40, 80, 160, 320, 640, 1_280, 2_000]);
        assert_eq!(pace.due_ms(now + WINDOW_MS), now + WINDOW_MS);
    }

    #[test]
    fn a_change_now_and_then_is_always_repaired_at_once() {
        let mut pace = Pace::new(FIRST_PAUSE_MS);
        for n in 0..100 {
            let now = n * WINDOW_MS;
            assert_eq!(pace.due_ms(now), now);
            assert_eq!(pace.repaired(now), None);
        }
    }

    #[test]
    fn a_fight_is_reported_once_a_minute_and_again_when_it_comes_back() {
        let mut pace = Pace::new(FIRST_PAUSE_MS);
        let mut reports = Vec::new();
        let mut now = 0;
        while now < 130_000 {
            now = pace.due_ms(now);
            if pace.repaired(now).is_some() {
                reports.push(now);
            }
        }
        assert_eq!(reports.len(), 3, "{reports:?}");
        now += WINDOW_MS;
        let again = (0..FIGHT).filter(|_| {
            now = pace.due_ms(now);
            pace.repaired(now).is_some()
        });
        assert_eq!(again.count(), 1);
    }

    #[test]
    fn pauses_between_failures_double_up_to_a_limit() {
        let mut retry = Retry::default();
        let pauses: Vec<u64> = (0..9).map(|_| retry.failed()).collect();
        assert_eq!(
            pauses,
            [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]
        );
        retry.reset();
        assert_eq!(retry.failed(), 250);
    }
}
