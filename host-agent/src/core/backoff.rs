//! When to start again after an end, and when to stop trying.

/// Ends within [`WINDOW_MS`] that make a crash loop.
const LOOP_ENDS: usize = 5;
const WINDOW_MS: u64 = 120_000;
const FIRST_PAUSE_MS: u64 = 250;
const LONGEST_PAUSE_MS: u64 = 10_000;

/// The recent ends of one guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backoff {
    ends_ms: Vec<u64>,
}

/// What to do after an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Start at this time.
    StartAt(u64),
    /// It ended too often: do not start by itself.
    CrashLoop,
}

impl Backoff {
    /// Records an end and decides.
    pub fn ended(&mut self, now_ms: u64) -> Next {
        self.ends_ms.retain(|end| now_ms.saturating_sub(*end) < WINDOW_MS);
        self.ends_ms.push(now_ms);
        if self.ends_ms.len() >= LOOP_ENDS {
            return Next::CrashLoop;
        }
        let doublings = self.ends_ms.len() as u32 - 1;
        let pause = (FIRST_PAUSE_MS << doublings).min(LONGEST_PAUSE_MS);
        Next::StartAt(now_ms + pause)
    }

    /// Forgets all ends: somebody asked for a start.
    pub fn forget(&mut self) {
        self.ends_ms.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_a_loop_ends() {
        let mut backoff = Backoff::default();
        let steps: Vec<Next> = (0..5).map(|n| backoff.ended(1_000 * n)).collect();
        assert_eq!(
            steps,
            [
                Next::StartAt(250),
                Next::StartAt(1_500),
                Next::StartAt(3_000),
                Next::StartAt(5_000),
                Next::CrashLoop
            ]
        );
        backoff.forget();
        assert_eq!(backoff.ended(9_000), Next::StartAt(9_250));
    }

    #[test]
    fn old_ends_do_not_count() {
        let mut backoff = Backoff::default();
        for n in 0..20 {
            assert_eq!(
                backoff.ended(n * WINDOW_MS),
                Next::StartAt(n * WINDOW_MS + FIRST_PAUSE_MS)
            );
        }
    }
}
