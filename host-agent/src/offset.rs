//! What four timestamps say about a guest's clock.

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::v1::Pong;

/// A guest's clock against ours, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// Guest minus host.
    pub offset_ns: i64,
    /// The true offset is within this of [`Self::offset_ns`].
    pub bound_ns: i64,
}

/// An offset that is surely beyond this is wrong; the guest steps it away.
const TOLERANCE_NS: i64 = 100_000_000;

impl Offset {
    /// From one exchange: when we sent and received, and what the guest said (RFC 5905 section 8).
    #[must_use]
    pub fn measure(sent_ns: i64, pong: Pong, received_ns: i64) -> Self {
        let out = i128::from(pong.guest_received_ns) - i128::from(sent_ns);
        let back = i128::from(pong.guest_sent_ns) - i128::from(received_ns);
        let round_trip = (out - back).max(0);
        let clamp = |v: i128| i64::try_from(v).unwrap_or(if v < 0 { i64::MIN } else { i64::MAX });
        Self {
            offset_ns: clamp((out + back) / 2),
            bound_ns: clamp(round_trip / 2),
        }
    }

    /// The better one of two: the shorter way knows more (RFC 5905 section 10).
    #[must_use]
    pub fn best(self, other: Self) -> Self {
        if other.bound_ns < self.bound_ns {
            other
        } else {
            self
        }
    }

    /// True when the clock is surely off by more than is steered away.
    #[must_use]
    pub fn is_far(self) -> bool {
        self.offset_ns.saturating_abs().saturating_sub(self.bound_ns) > TOLERANCE_NS
    }

    /// Whether the guest's clock is right, with the figures.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        let ms = |ns: i64| ns as f64 / 1e6;
        let evidence = format!("{:+.1} ms ±{:.1} ms", ms(self.offset_ns), ms(self.bound_ns));
        if self.is_far() {
            Verdict::no("Off", evidence)
        } else {
            Verdict::yes("Measured", evidence)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::condition::Status;

    #[test]
    fn four_timestamps_give_offset_and_bound() {
        let pong = Pong {
            guest_received_ns: 5_100,
            guest_sent_ns: 5_200,
        };
        let offset = Offset::measure(1_000, pong, 1_300);
        assert_eq!(
            offset,
            Offset {
                offset_ns: 4_000,
                bound_ns: 100
            }
        );
    }

    #[test]
    fn a_lying_guest_overflows_nothing() {
        for (received, sent) in [(i64::MIN, i64::MAX), (i64::MAX, i64::MIN)] {
            let pong = Pong {
                guest_received_ns: received,
                guest_sent_ns: sent,
            };
            let _ = Offset::measure(i64::MAX, pong, i64::MIN).verdict();
        }
        let far = |guest_ns: i64, host_ns: i64| {
            let pong = Pong {
                guest_received_ns: guest_ns,
                guest_sent_ns: guest_ns,
            };
            Offset::measure(host_ns, pong, host_ns).offset_ns
        };
        assert_eq!(
            (far(i64::MIN, i64::MAX), far(i64::MAX, i64::MIN)),
            (i64::MIN, i64::MAX)
        );
    }

    #[test]
    fn what_is_surely_far_off_is_false() {
        let verdict = |offset_ns| {
            Offset {
                offset_ns,
                bound_ns: 1,
            }
            .verdict()
            .status
        };
        assert_eq!(
            verdict(100_000_001),
            Status::True,
            "it may be within the tolerance"
        );
        assert_eq!(verdict(-100_000_002), Status::False);
        assert_eq!(verdict(i64::MIN), Status::False);
    }

    #[test]
    fn the_figures_are_milliseconds() {
        let offset = Offset {
            offset_ns: -1_500_000,
            bound_ns: 240_000,
        };
        assert_eq!(offset.verdict().evidence, "-1.5 ms ±0.2 ms");
    }

    #[test]
    fn the_exchange_with_the_shortest_way_counts() {
        let near = Offset {
            offset_ns: 5,
            bound_ns: 1,
        };
        let vague = Offset {
            offset_ns: 9,
            bound_ns: 2,
        };
        assert_eq!((near.best(vague), vague.best(near)), (near, near));
    }
}
