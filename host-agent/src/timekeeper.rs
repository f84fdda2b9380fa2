//! Keeps a guest's clock near the host's: measures it, tells the guest how far it is off.
//!
//! The host measures because its clock is the reference and a guest's may be anything; the guest decides between
//! step and steering, because only it knows what runs on its clock.

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::limits::CALL;
use sovereign_protocol::service::GuestClient;
use sovereign_protocol::v1::{ClockCorrection, Ping};

use crate::clock::{boottime_ms, monotonic_ms, wall_ns};
use crate::link::{PING, call};
use crate::offset::Offset;

/// Pings of one exchange; the one with the shortest way counts.
const PINGS: usize = 8;
/// A stepped clock is measured again, so often at most.
const ROUNDS: usize = 3;
/// Pauses between exchanges, in milliseconds: 1, 2, 4 .. 64 s.
const PAUSES_MS: (u64, u64) = (1_000, 64_000);
/// A host whose boottime went ahead of its monotonic time by this was suspended, in milliseconds.
const SUSPENDED_MS: u64 = 1_000;

/// When the guest's clock is measured next: soon after something happened, then ever more rarely.
#[derive(Debug)]
pub struct Schedule {
    due_ms: u64,
    pause_ms: u64,
    /// Boottime minus monotonic time: grows while the host sleeps.
    asleep_ms: u64,
}

impl Schedule {
    /// The first exchange was just made; times are boottime and monotonic time in milliseconds.
    #[must_use]
    pub fn new(boottime_ms: u64, monotonic_ms: u64) -> Self {
        Self {
            due_ms: boottime_ms + PAUSES_MS.0,
            pause_ms: PAUSES_MS.0,
            asleep_ms: boottime_ms.saturating_sub(monotonic_ms),
        }
    }

    /// True once after each time that the host slept.
    pub fn woke(&mut self, boottime_ms: u64, monotonic_ms: u64) -> bool {
        let asleep_ms = boottime_ms.saturating_sub(monotonic_ms);
        let woke = asleep_ms >= self.asleep_ms + SUSPENDED_MS;
        if woke {
            self.asleep_ms = asleep_ms;
        }
        woke
    }

    /// True when an exchange is due.
    #[must_use]
    pub fn is_due(&self, boottime_ms: u64) -> bool {
        self.due_ms <= boottime_ms
    }

    /// An exchange was made; one out of turn begins the schedule anew.
    pub fn exchanged(&mut self, in_turn: bool, boottime_ms: u64) {
        self.pause_ms = if in_turn {
            (self.pause_ms * 2).min(PAUSES_MS.1)
        } else {
            PAUSES_MS.0
        };
        self.due_ms = boottime_ms + self.pause_ms;
    }
}

/// The clock of one guest during one session.
#[derive(Debug)]
pub struct Timekeeper<'a> {
    client: &'a GuestClient,
    schedule: Schedule,
}

impl<'a> Timekeeper<'a> {
    /// The clock of the guest that `client` speaks to.
    #[must_use]
    pub fn new(client: &'a GuestClient) -> Self {
        Self {
            client,
            schedule: Schedule::new(boottime_ms(), monotonic_ms()),
        }
    }

    /// Measures and corrects the guest's clock; how far it is off then.
    ///
    /// # Errors
    /// When a ping is not answered.
    pub async fn exchange(&mut self, woke: bool) -> anyhow::Result<Verdict> {
        let mut best = self.measure().await?;
        for _ in 0..ROUNDS {
            let correction = ClockCorrection {
                offset_ns: best.offset_ns,
                bound_ns: best.bound_ns,
                woke,
            };
            let answer = call(CALL, |context| self.client.correct_clock(context, correction)).await?;
            if let Err(refusal) = answer {
                tracing::warn!(%refusal, "the guest does not correct its clock");
            }
            if !best.is_far() {
                break;
            }
            best = self.measure().await?;
        }
        Ok(best.verdict())
    }

    /// One ping, for liveness; when the clock is due for it, or a jump shows, an exchange as well.
    ///
    /// # Errors
    /// When a ping is not answered.
    pub async fn look(&mut self) -> anyhow::Result<Option<Verdict>> {
        let now = self.ping().await?;
        let woke = self.schedule.woke(boottime_ms(), monotonic_ms());
        let jumped = woke || now.is_far();
        if !jumped && !self.schedule.is_due(boottime_ms()) {
            return Ok(None);
        }
        let verdict = self.exchange(woke).await?;
        self.schedule.exchanged(!jumped, boottime_ms());
        Ok(Some(verdict))
    }

    async fn measure(&self) -> anyhow::Result<Offset> {
        let mut best = self.ping().await?;
        for _ in 1..PINGS {
            best = best.best(self.ping().await?);
        }
        Ok(best)
    }

    async fn ping(&self) -> anyhow::Result<Offset> {
        let host_sent_ns = wall_ns();
        let ping = Ping { host_sent_ns };
        let pong = call(PING, |context| self.client.ping(context, ping)).await?;
        Ok(Offset::measure(host_sent_ns, pong, wall_ns()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_come_ever_more_rarely_until_something_happens() {
        let mut schedule = Schedule::new(0, 0);
        let mut at = Vec::new();
        for now in 0..260_000 {
            if schedule.is_due(now) {
                schedule.exchanged(true, now);
                at.push(now / 1_000);
            }
        }
        assert_eq!(at, [1, 3, 7, 15, 31, 63, 127, 191, 255]);
        schedule.exchanged(false, 260_000);
        assert!(!schedule.is_due(260_999) && schedule.is_due(261_000));
    }

    #[test]
    fn a_host_that_slept_is_seen_once() {
        let mut schedule = Schedule::new(10_000, 9_000);
        assert!(!schedule.woke(12_000, 11_000));
        assert!(schedule.woke(20_000, 12_000));
        assert!(!schedule.woke(20_500, 12_500));
    }
}
