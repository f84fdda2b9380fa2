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

/// RFC 3339 UTC of `ago_ms` milliseconds ago.
#[must_use]
pub fn rfc3339_ago(ago_ms: u64) -> String {
    let then = SystemTime::now()
        .checked_sub(std::time::Duration::from_millis(ago_ms))
        .unwrap_or(UNIX_EPOCH);
    humantime::format_rfc3339_millis(then).to_string()
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
