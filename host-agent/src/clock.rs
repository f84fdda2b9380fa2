//! The clocks that the agent reads.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since the machine started, counting sleep (CLOCK_BOOTTIME).
#[must_use]
pub fn boottime_ms() -> u64 {
    milliseconds(ClockId::Boottime)
}

fn milliseconds(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000 + nanoseconds / 1_000_000
}

/// Milliseconds since the machine started, without sleep (CLOCK_MONOTONIC).
#[must_use]
pub fn monotonic_ms() -> u64 {
    milliseconds(ClockId::Monotonic)
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

/// RFC 3339 UTC of milliseconds since 1970.
#[must_use]
pub fn rfc3339(wall_ms: u64) -> String {
    // Beyond the year 9999 the format ends; such a clock is wrong anyway.
    let then = UNIX_EPOCH + std::time::Duration::from_millis(wall_ms.min(LAST_MS));
    humantime::format_rfc3339_millis(then).to_string()
}

/// The last millisecond of the year 9999.
const LAST_MS: u64 = 253_402_300_799_999;

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

    /// Milliseconds since 1970 of a boottime.
    #[must_use]
    pub fn wall_ms(&self, boottime_ms: u64) -> u64 {
        u64::try_from(i128::from(boottime_ms) + self.ahead_ms).unwrap_or_default()
    }

    /// RFC 3339 UTC of a boottime, to the millisecond.
    #[must_use]
    pub fn rfc3339(&self, boottime_ms: u64) -> String {
        rfc3339(self.wall_ms(boottime_ms))
    }

    fn ahead(wall_ns: i64, boottime_ms: u64) -> i128 {
        i128::from(wall_ns / 1_000_000) - i128::from(boottime_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn the_anchor_follows_a_clock_that_was_set_by_more_than_its_tolerance() {
        let mut anchor = Anchor::new(1_000_000_000_000, 500);
        anchor.follow(1_000_050_000_000, 500);
        assert_eq!(anchor.wall_ms(500), 1_000_000);
        anchor.follow(1_000_051_000_000, 500);
        assert_eq!(anchor.wall_ms(500), 1_000_051);
    }

    /// The readings themselves: the machine's own account of its time is another one.
    #[test]
    fn the_clocks_are_those_they_say() {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let (boottime, monotonic) = (boottime_ms(), monotonic_ms());
        assert!(
            (boottime as f64 / 1e3 - uptime).abs() < 30.0,
            "{boottime} {uptime}"
        );
        assert!(monotonic > 1 && monotonic <= boottime_ms());
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        assert!((wall_ns() / 1_000_000_000 - seconds).abs() < 30);
    }
}
