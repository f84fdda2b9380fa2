//! When a guest counts as wedged, and how often that may end it. Silence alone never ends a guest (DESIGN section 4).

/// So long it must be silent.
const PATIENCE_MS: u64 = 30_000;
/// At most so many ends within [`WINDOW_MS`].
const ENDS: usize = 3;
const WINDOW_MS: u64 = 3_600_000;

/// What of a guest is silent, and the wedges that were ended.
#[derive(Debug, Default)]
pub(super) struct Wedge {
    vmm_ms: Option<u64>,
    dial_ms: Option<u64>,
    ends_ms: Vec<u64>,
}

impl Wedge {
    /// Whether its VMM answers.
    pub(super) fn vmm(&mut self, silent: bool, now_ms: u64) {
        self.vmm_ms = silent.then(|| self.vmm_ms.unwrap_or(now_ms));
    }

    /// Whether fresh connections are answered.
    pub(super) fn dial(&mut self, silent: bool, now_ms: u64) {
        self.dial_ms = silent.then(|| self.dial_ms.unwrap_or(now_ms));
    }

    /// The boot is over.
    pub(super) fn ended(&mut self) {
        (self.vmm_ms, self.dial_ms) = (None, None);
    }

    /// When it is to be ended; `None` while it speaks or after too many ends.
    #[must_use]
    pub(super) fn due_ms(&self) -> Option<u64> {
        let since = [self.vmm_ms, self.dial_ms].into_iter().flatten().min()?;
        let due = since + PATIENCE_MS;
        let recent = self
            .ends_ms
            .iter()
            .filter(|end| due.saturating_sub(**end) < WINDOW_MS);
        (recent.count() < ENDS).then_some(due)
    }

    /// True once when it is to be ended now.
    pub(super) fn take(&mut self, now_ms: u64) -> bool {
        let due = self.due_ms().is_some_and(|due| due <= now_ms);
        if due {
            self.ends_ms.retain(|end| now_ms.saturating_sub(*end) < WINDOW_MS);
            self.ends_ms.push(now_ms);
            self.ended();
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lasting_silence_ends_a_guest_and_not_for_ever() {
        let mut wedge = Wedge::default();
        wedge.dial(true, 0);
        wedge.dial(true, 10_000);
        assert!(!wedge.take(29_999));
        wedge.dial(false, 29_999);
        assert!(!wedge.take(60_000), "it spoke");
        let mut now = 100_000;
        for _ in 0..ENDS {
            wedge.vmm(true, now);
            now += PATIENCE_MS;
            assert!(wedge.take(now));
            assert!(!wedge.take(now), "once");
        }
        wedge.vmm(true, now);
        assert!(!wedge.take(now + PATIENCE_MS), "the budget of the hour is spent");
        wedge.ended();
        wedge.vmm(true, now + WINDOW_MS);
        assert!(wedge.take(now + WINDOW_MS + PATIENCE_MS));
    }

    #[test]
    fn an_end_counts_for_exactly_the_window() {
        let spent = |first_ms: u64| {
            let mut wedge = Wedge::default();
            for end in [first_ms, first_ms + 1, first_ms + 2] {
                wedge.ends_ms.push(end);
            }
            wedge.vmm(true, WINDOW_MS - PATIENCE_MS);
            wedge
        };
        assert_eq!(
            spent(0).due_ms(),
            Some(WINDOW_MS),
            "the first has just left the window"
        );
        assert_eq!(spent(1).due_ms(), None);
        let mut wedge = spent(0);
        assert!(wedge.take(WINDOW_MS));
        assert_eq!(wedge.ends_ms, [1, 2, WINDOW_MS]);
    }
}
