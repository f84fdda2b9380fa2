//! Reading the clocks. The decision what to do with them is in `core`.

use std::sync::OnceLock;

use clock_steering::unix::UnixClock;
use clock_steering::{Clock, TimeOffset};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::core::clock::Adjustment;

const NANOS: i64 = 1_000_000_000;

/// Milliseconds since boot, time in suspend included.
#[must_use]
pub fn boot_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).unwrap_or(TimeSpec::new(0, 0));
    u64::try_from(now.tv_sec() * 1_000 + now.tv_nsec() / 1_000_000).unwrap_or(0)
}

/// When this agent began, in milliseconds since boot; the first call says when.
#[must_use]
pub fn agent_since_ms() -> u64 {
    static BEGUN: OnceLock<u64> = OnceLock::new();
    *BEGUN.get_or_init(boot_ms)
}

/// Nanoseconds since 1970 by the guest's clock.
#[must_use]
pub fn wall_ns() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_REALTIME).unwrap_or(TimeSpec::new(0, 0));
    now.tv_sec().saturating_mul(NANOS).saturating_add(now.tv_nsec())
}

/// Sets the guest's clock.
///
/// # Errors
/// The system's own.
pub fn set_wall_ns(to: i64) -> nix::Result<()> {
    let time = TimeSpec::new(to.div_euclid(NANOS), to.rem_euclid(NANOS));
    clock_settime(ClockId::CLOCK_REALTIME, time)
}

/// Steps the guest's clock and sets its frequency.
///
/// # Errors
/// The system's own, in words.
pub fn adjust(adjustment: Adjustment) -> Result<(), String> {
    let clock = UnixClock::CLOCK_REALTIME;
    if adjustment.step_ns != 0 {
        let step = TimeOffset {
            seconds: adjustment.step_ns.div_euclid(NANOS),
            nanos: u32::try_from(adjustment.step_ns.rem_euclid(NANOS)).unwrap_or(0), // below 10^9
        };
        clock.step_clock(step).map_err(|error| format!("step: {error}"))?;
    }
    // Parts per million, whatever its documentation says (FACTS section 11).
    let ppm = adjustment.frequency_ppb as f64 / 1e3;
    clock
        .set_frequency(ppm)
        .map_err(|error| format!("frequency: {error}"))?;
    Ok(())
}
