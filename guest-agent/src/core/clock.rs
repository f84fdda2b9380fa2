//! The clock's discipline: from an offset that the host measured to a step or a frequency.
//!
//! A scalar Kalman filter estimates how fast the guest's clock drifts against the host's. Between corrections the
//! frequency cancels the drift and takes the rest of the offset away.

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::v1::ClockCorrection;

/// Offsets beyond this are stepped, others steered away.
const STEP_NS: i64 = 100_000_000;
/// A step back by more would break services that run.
const BACK_NS: i64 = 1_000_000_000;
/// A steered offset goes away in twice the time since the last correction (the host measures again after at most
/// twice that time, so it never overshoots), within these limits in seconds.
const HORIZON_S: (f64, f64) = (16.0, 128.0);
/// The kernel's own limit of a frequency, in parts per billion (adjtimex(2)).
const FREQUENCY_PPB: f64 = 500_000.0;
/// What an oscillator may be off before anything is known, in parts per billion.
const UNKNOWN_DRIFT_PPB: f64 = 100_000.0;
/// How much an oscillator wanders between two corrections, in parts per billion.
const WANDER_PPB: f64 = 300.0;

/// What is to be done to the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adjustment {
    /// Added to the clock at once, in nanoseconds; 0 is no step.
    pub step_ns: i64,
    /// How much faster it runs from then on, in parts per billion.
    pub frequency_ppb: i64,
}

/// What is known about the guest's clock.
#[derive(Debug, Clone)]
pub struct Discipline {
    last: Option<Last>,
    drift_ppb: f64,
    variance: f64,
    frequency_ppb: i64,
}

#[derive(Debug, Clone, Copy)]
struct Last {
    at_ms: u64,
    /// What was left of the offset after the adjustment.
    left_ns: i64,
    bound_ns: i64,
}

impl Default for Discipline {
    fn default() -> Self {
        Self {
            last: None,
            drift_ppb: 0.0,
            variance: UNKNOWN_DRIFT_PPB * UNKNOWN_DRIFT_PPB,
            frequency_ppb: 0,
        }
    }
}

impl Discipline {
    /// What a measured offset means; `running` is true when services would see a step back.
    pub fn correct(
        &mut self,
        correction: ClockCorrection,
        running: bool,
        now_ms: u64,
    ) -> (Verdict, Option<Adjustment>) {
        let ClockCorrection {
            offset_ns,
            bound_ns,
            woke,
        } = correction;
        let figures = format!("{:+.3} ms ±{:.3} ms", millis(offset_ns), millis(bound_ns));
        if offset_ns > BACK_NS && running && !woke {
            self.last = None;
            let text = format!("{figures} ahead of the host: not stepped back while services run");
            return (Verdict::no("Ahead", text), None);
        }
        self.learn(offset_ns, bound_ns, now_ms);
        let pause_s = self
            .last
            .map_or(0.0, |last| now_ms.saturating_sub(last.at_ms) as f64 / 1e3);
        let horizon_s = (2.0 * pause_s).clamp(HORIZON_S.0, HORIZON_S.1);
        let stepped = offset_ns.saturating_abs() > STEP_NS;
        let left_ns = if stepped { 0 } else { offset_ns };
        let wanted = -self.drift_ppb - left_ns as f64 / horizon_s;
        self.frequency_ppb = wanted.clamp(-FREQUENCY_PPB, FREQUENCY_PPB) as i64;
        self.last = Some(Last {
            at_ms: now_ms,
            left_ns,
            bound_ns,
        });
        let adjustment = Adjustment {
            step_ns: if stepped { offset_ns.saturating_neg() } else { 0 },
            frequency_ppb: self.frequency_ppb,
        };
        let verdict = if stepped {
            Verdict::yes("Stepped", format!("was {figures} from the host"))
        } else {
            let ppm = self.frequency_ppb as f64 / 1e3;
            Verdict::yes("Steered", format!("{figures} from the host, {ppm:+.1} ppm"))
        };
        (verdict, Some(adjustment))
    }

    /// The adjustment could not be made: nothing of it counts.
    pub fn failed(&mut self) {
        *self = Self::default();
    }

    fn learn(&mut self, offset_ns: i64, bound_ns: i64, now_ms: u64) {
        let Some(last) = self.last else { return };
        let seconds = now_ms.saturating_sub(last.at_ms) as f64 / 1e3;
        let moved_ns = offset_ns.saturating_sub(last.left_ns);
        if seconds < 0.5 || moved_ns.saturating_abs() > STEP_NS {
            return; // no baseline, or somebody else set a clock
        }
        let seen_ppb = moved_ns as f64 / seconds - self.frequency_ppb as f64;
        let error_ppb = bound_ns.saturating_add(last.bound_ns) as f64 / seconds;
        self.variance += WANDER_PPB * WANDER_PPB;
        let gain = self.variance / (self.variance + error_ppb * error_ppb);
        self.drift_ppb += gain * (seen_ppb - self.drift_ppb);
        self.variance *= 1.0 - gain;
    }
}

fn millis(ns: i64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: i64 = 1_000_000;

    fn told(offset_ns: i64) -> ClockCorrection {
        ClockCorrection {
            offset_ns,
            bound_ns: 100_000,
            woke: false,
        }
    }

    fn reason(correction: ClockCorrection, running: bool) -> (String, Option<i64>) {
        let (verdict, adjustment) = Discipline::default().correct(correction, running, 0);
        (verdict.reason, adjustment.map(|a| a.step_ns))
    }

    #[test]
    fn far_offsets_are_stepped_near_ones_steered_and_services_never_see_a_long_step_back() {
        let woke = ClockCorrection {
            woke: true,
            ..told(5_000 * MS)
        };
        for (correction, running, expected, step) in [
            (told(-900 * MS), true, "Stepped", Some(900 * MS)),
            (told(-3_600_000 * MS), true, "Stepped", Some(3_600_000 * MS)),
            (told(101 * MS), true, "Stepped", Some(-101 * MS)),
            (told(100 * MS), true, "Steered", Some(0)),
            (told(1_000 * MS), true, "Stepped", Some(-1_000 * MS)),
            (told(1_001 * MS), true, "Ahead", None),
            (told(1_001 * MS), false, "Stepped", Some(-1_001 * MS)),
            (woke, true, "Stepped", Some(-5_000 * MS)),
        ] {
            assert_eq!(
                reason(correction, running),
                (expected.to_owned(), step),
                "{correction:?}"
            );
        }
    }

    /// By hand: what is seen of the drift, how far it is believed, and how the rest of the offset goes away.
    #[test]
    fn the_filter_learns_the_drift_and_believes_good_measurements_more() {
        let mut discipline = Discipline::default();
        let mut told = |offset_ns, bound_ns, now_s: u64| {
            let correction = ClockCorrection {
                offset_ns,
                bound_ns,
                woke: false,
            };
            let (verdict, adjustment) = discipline.correct(correction, true, now_s * 1_000);
            (adjustment.unwrap().frequency_ppb, verdict.evidence)
        };
        assert_eq!(told(0, 0, 0).0, 0);
        assert_eq!(told(1_000_000, 0, 10).0, -150_000); // 100 us a second, and the millisecond within 20 s
        assert_eq!(told(500_000, 0, 20).0, -125_000);
        let (frequency, evidence) = told(350_000, 50_000, 30);
        assert_eq!(frequency, -117_535);
        assert_eq!(evidence, "+0.350 ms ±0.050 ms from the host, -117.5 ppm");
        assert_eq!(told(1_175_000, 50_000, 40).0, -158_965);
        assert_eq!(told(900_000, 50_000, 100).0, -112_503);
    }

    #[test]
    fn nothing_is_learnt_without_a_baseline_from_a_clock_that_was_set_or_of_what_failed() {
        let exactly = |offset_ns| ClockCorrection {
            bound_ns: 0,
            ..told(offset_ns)
        };
        let second = |first: i64, then: i64, now_ms| {
            let mut discipline = Discipline::default();
            discipline.correct(exactly(first), true, 0);
            let (_, adjustment) = discipline.correct(exactly(then), true, now_ms);
            adjustment.unwrap().frequency_ppb
        };
        assert_eq!(
            second(0, MS, 499),
            -62_500,
            "only the rest of the offset, within 16 s"
        );
        assert_eq!(second(0, MS, 500), -500_000);
        assert_eq!(second(-50 * MS, 50 * MS, 10_000_000), 99_375);
        assert_eq!(second(-50 * MS, 50 * MS + 1, 10_000_000), -390_625);

        let mut failed = Discipline::default();
        failed.correct(exactly(0), true, 0);
        failed.correct(exactly(MS), true, 10_000);
        failed.failed();
        let (_, adjustment) = failed.correct(exactly(MS), true, 20_000);
        assert_eq!(adjustment.unwrap().frequency_ppb, -62_500);
    }

    /// A simulated clock that drifts, corrected at 1, 2, 4 .. 64 s.
    fn simulate(drift_ppb: f64, noise: impl Fn(u64) -> i64) -> (f64, f64) {
        let (mut discipline, mut offset, mut frequency) = (Discipline::default(), -700.0 * 1e6, 0.0);
        let (mut now, mut pause, mut worst) = (0u64, 1u64, 0.0f64);
        while now < 1_200_000 {
            let measured = offset as i64 + noise(now);
            let (_, adjustment) = discipline.correct(told(measured), true, now);
            let adjustment = adjustment.unwrap();
            offset += adjustment.step_ns as f64;
            frequency = adjustment.frequency_ppb as f64;
            offset += (drift_ppb + frequency) * pause as f64;
            now += pause * 1_000;
            pause = (pause * 2).min(64);
            if now > 300_000 {
                worst = worst.max(offset.abs());
            }
        }
        (worst, frequency + drift_ppb)
    }

    #[test]
    fn a_drifting_clock_settles_within_the_error_of_its_measurements() {
        for drift in [-80_000.0, 0.0, 12_345.0, 200_000.0] {
            let (worst, _) = simulate(drift, |now| if now % 3_000 == 0 { 60_000 } else { -60_000 });
            assert!(worst < 1.5e6, "{drift}: {worst}");
            let (worst, rest) = simulate(drift, |_| 0);
            assert!(worst < 3e5 && rest.abs() < 20_000.0, "{drift}: {worst} {rest}");
        }
    }

    proptest! {
        #[test]
        fn no_offset_and_no_bound_breaks_it(offsets in proptest::collection::vec((any::<i64>(), any::<i64>(), any::<bool>(), 0u64..1 << 40), 1..20)) {
            let mut discipline = Discipline::default();
            for (offset_ns, bound_ns, woke, now) in offsets {
                let (_, adjustment) = discipline.correct(ClockCorrection { offset_ns, bound_ns, woke }, woke, now);
                if let Some(a) = adjustment {
                    prop_assert!(a.frequency_ppb.abs() <= 500_000);
                }
                prop_assert!(discipline.drift_ppb.is_finite());
            }
        }
    }
}
