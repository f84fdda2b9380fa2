//! How often something may happen that a guest can bring about: some times at once, then at a steady pace.

/// What is left of it (the generic cell rate algorithm: one time instead of a counter and a clock).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowance {
    burst_ms: u64,
    every_ms: u64,
    /// When all of it will be there again.
    full_ms: u64,
}

impl Allowance {
    /// `burst` times at once, and once more after each `every_ms`.
    #[must_use]
    pub fn new(burst: u32, every_ms: u64) -> Self {
        Self {
            burst_ms: every_ms.saturating_mul(burst.into()),
            every_ms,
            full_ms: 0,
        }
    }

    /// It happened once; the pause in milliseconds before it may happen again.
    pub fn spend(&mut self, now_ms: u64) -> u64 {
        self.full_ms = self.full_ms.max(now_ms).saturating_add(self.every_ms);
        (self.full_ms - now_ms).saturating_sub(self.burst_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_then_each_time_has_its_pause() {
        let mut allowance = Allowance::new(3, 1_000);
        let mut now = 50_000;
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let pause = allowance.spend(now);
            now += pause;
            pauses.push(pause);
        }
        assert_eq!(pauses, [0, 0, 0, 1_000, 1_000, 1_000]);
        now += 2_000;
        assert_eq!(
            [allowance.spend(now), allowance.spend(now)],
            [0, 0],
            "two came back"
        );
        assert_eq!(allowance.spend(now), 1_000);
    }
}
