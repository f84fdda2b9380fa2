//! The clocks that the agent reads, and what four timestamps say about a guest's.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use sovereign_protocol::condition::Verdict;
use sovereign_protocol::v1::Pong;

/// Milliseconds since the machine started, counting sleep (CLOCK_BOOTTIME).
#[must_use]
pub fn boottime_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000 + nanoseconds / 1_000_000
}

/// Nanoseconds since 1970 UTC (CLOCK_REALTIME).
#[must_use]
pub fn wall_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Which wall time a boottime was: the same instant always reads the same.
#[derive(Debug)]
pub struct Anchor {
    /// Wall time minus boottime.
    ahead_ms: i128,
}

/// A wall clock that moved by more was set, not slewed.
const ANCHOR_TOLERANCE_MS: i128 = 50;

impl Anchor {
    /// An anchor at this pair of clock readings.
    #[must_use]
    pub fn new(wall_ns: i64, boottime_ms: u64) -> Self {
        Self {
            ahead_ms: Self::ahead(wall_ns, boottime_ms),
        }
    }

    /// Follows a wall clock that was set.
    pub fn follow(&mut self, wall_ns: i64, boottime_ms: u64) {
        let now = Self::ahead(wall_ns, boottime_ms);
        if (now - self.ahead_ms).abs() > ANCHOR_TOLERANCE_MS {
            self.ahead_ms = now;
        }
    }

    /// RFC 3339 UTC of a boottime, to the millisecond.
    #[must_use]
    pub fn rfc3339(&self, boottime_ms: u64) -> String {
        let wall = u64::try_from(i128::from(boottime_ms) + self.ahead_ms).unwrap_or_default();
        let then = UNIX_EPOCH + std::time::Duration::from_millis(wall);
        humantime::format_rfc3339_millis(then).to_string()
    }

    fn ahead(wall_ns: i64, boottime_ms: u64) -> i128 {
        i128::from(wall_ns / 1_000_000) - i128::from(boottime_ms)
    }
}

/// A guest's clock against ours, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offset {
    /// Guest minus host.
    pub offset_ns: i64,
    /// The true offset is within this of [`Self::offset_ns`].
    pub bound_ns: i64,
}

/// An offset beyond this is reported as wrong.
const TOLERANCE_NS: i64 = 1_000_000_000;

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

    /// Whether the guest's clock is right, with the figures.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        let ms = |ns: i64| ns as f64 / 1e6;
        let evidence = format!("{:+.1} ms ±{:.1} ms", ms(self.offset_ns), ms(self.bound_ns));
        if self.offset_ns.saturating_abs() <= TOLERANCE_NS {
            Verdict::yes("Measured", evidence)
        } else {
            Verdict::no("Off", evidence)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::condition::Status;

    #[test]
    fn the_same_instant_always_reads_the_same_until_the_clock_is_set() {
        let mut anchor = Anchor::new(1_000_000_000_000, 500);
        assert_eq!(anchor.rfc3339(1_500), "1970-01-01T00:16:41.000Z");
        anchor.follow(1_000_010_000_000, 509); // a millisecond of rounding
        assert_eq!(anchor.rfc3339(1_500), "1970-01-01T00:16:41.000Z");
        anchor.follow(1_060_000_000_000, 500);
        assert_eq!(anchor.rfc3339(1_500), "1970-01-01T00:17:41.000Z");
        assert_eq!(Anchor::new(0, u64::MAX).rfc3339(0), "1970-01-01T00:00:00.000Z");
    }

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
    }

    #[test]
    fn a_second_off_is_false() {
        let verdict = |offset_ns| {
            Offset {
                offset_ns,
                bound_ns: 1,
            }
            .verdict()
            .status
        };
        assert_eq!(verdict(1_000_000_000), Status::True);
        assert_eq!(verdict(-1_000_000_001), Status::False);
        assert_eq!(verdict(i64::MIN), Status::False);
    }
}
