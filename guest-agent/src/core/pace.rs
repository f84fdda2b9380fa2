//! How often something is repaired when somebody else keeps breaking it.

use std::collections::VecDeque;

/// Repairs within [`WINDOW_MS`] that are made at once.
pub const BURST: usize = 5;
/// See [`BURST`].
pub const WINDOW_MS: u64 = 10_000;
/// The first pause after the burst; each one doubles.
pub const FIRST_PAUSE_MS: u64 = 1_000;
/// The longest pause.
pub const LONGEST_PAUSE_MS: u64 = 30_000;
/// After this time without a repair all is forgotten.
pub const CALM_MS: u64 = 60_000;

/// The repairs of one subject.
#[derive(Debug, Default)]
pub struct Pace {
    repairs_ms: VecDeque<u64>,
    pause_ms: u64,
    until_ms: u64,
}

impl Pace {
    /// Whether a repair may be made now; else when, in milliseconds of the same clock.
    ///
    /// # Errors
    /// The time to wait for.
    pub fn may(&self, now_ms: u64) -> Result<(), u64> {
        if now_ms >= self.until_ms {
            Ok(())
        } else {
            Err(self.until_ms)
        }
    }

    /// Repairs within the window.
    #[must_use]
    pub fn recent(&self, now_ms: u64) -> usize {
        let recent = |at: &&u64| now_ms.saturating_sub(**at) <= WINDOW_MS;
        self.repairs_ms.iter().filter(recent).count()
    }

    /// A repair was made.
    pub fn repaired(&mut self, now_ms: u64) {
        let last = self.repairs_ms.back().copied();
        if last.is_some_and(|last| now_ms.saturating_sub(last) >= CALM_MS) {
            *self = Self::default();
        }
        self.repairs_ms.push_back(now_ms);
        if self.repairs_ms.len() > BURST {
            self.repairs_ms.pop_front();
        }
        if self.pause_ms > 0 || self.recent(now_ms) >= BURST {
            self.pause_ms = (self.pause_ms * 2).clamp(FIRST_PAUSE_MS, LONGEST_PAUSE_MS);
            self.until_ms = now_ms + self.pause_ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_then_pauses_double_to_a_limit() {
        let mut pace = Pace::default();
        let mut now = 0;
        let mut waits = Vec::new();
        for _ in 0..12 {
            let begun = now;
            while let Err(until) = pace.may(now) {
                assert!(until > now);
                now = until;
            }
            waits.push(now - begun);
            pace.repaired(now);
        }
        assert_eq!(waits[..5], [0; 5]);
        assert_eq!(waits[5..], [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
    }

    #[test]
    fn rare_repairs_are_always_at_once_and_calm_forgives() {
        let mut pace = Pace::default();
        for n in 0..50 {
            assert_eq!(pace.may(n * 2_501), Ok(()), "{n}");
            pace.repaired(n * 2_501);
        }
        let mut pace = Pace::default();
        (0..BURST).for_each(|_| pace.repaired(0));
        assert_eq!(pace.may(999), Err(1_000));
        pace.repaired(1_000);
        assert_eq!(pace.may(2_999), Err(3_000));
        pace.repaired(1_000 + CALM_MS);
        assert_eq!(pace.may(1_000 + CALM_MS), Ok(()));
        assert_eq!(pace.recent(1_000 + CALM_MS), 1);
    }
}
