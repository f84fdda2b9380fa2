//! When the agent is killed and when it is started again. Pure: times are milliseconds since boot.

/// Silence after which the agent counts as stuck.
pub const SILENCE_MS: u64 = 20_000;
/// The first pause before another start.
pub const FIRST_PAUSE_MS: u64 = 100;
/// The longest pause.
pub const LONGEST_PAUSE_MS: u64 = 5_000;
/// A run of this length makes the next pause the first one again.
const STEADY_MS: u64 = 60_000;

/// The agent as PID 1 sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Agent {
    /// It runs; it was last heard at this time.
    Running {
        /// When it was started.
        since_ms: u64,
        /// When it last spoke.
        heard_ms: u64,
    },
    /// It does not run; start it at this time.
    Waiting {
        /// The time.
        until_ms: u64,
    },
}

/// What PID 1 does now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Start the agent.
    Start,
    /// Kill the agent: it was silent for too long.
    Kill,
    /// Nothing for so many milliseconds.
    Sleep(u64),
}

/// Watches over one agent.
#[derive(Debug)]
pub struct Watchdog {
    agent: Agent,
    pause_ms: u64,
}

impl Watchdog {
    /// An agent that is to be started at once.
    #[must_use]
    pub fn new(now_ms: u64) -> Self {
        Self {
            agent: Agent::Waiting { until_ms: now_ms },
            pause_ms: FIRST_PAUSE_MS,
        }
    }

    /// What to do now.
    #[must_use]
    pub fn turn(&self, now_ms: u64) -> Turn {
        match self.agent {
            Agent::Waiting { until_ms } if now_ms >= until_ms => Turn::Start,
            Agent::Waiting { until_ms } => Turn::Sleep(until_ms - now_ms),
            Agent::Running { heard_ms, .. } => match (heard_ms + SILENCE_MS).checked_sub(now_ms) {
                None | Some(0) => Turn::Kill,
                Some(left) => Turn::Sleep(left),
            },
        }
    }

    /// The agent was started.
    pub fn started(&mut self, now_ms: u64) {
        self.agent = Agent::Running {
            since_ms: now_ms,
            heard_ms: now_ms,
        };
    }

    /// The agent spoke.
    pub fn heard(&mut self, now_ms: u64) {
        if let Agent::Running { heard_ms, .. } = &mut self.agent {
            *heard_ms = now_ms;
        }
    }

    /// The agent ended, or could not be started; the next start waits.
    pub fn ended(&mut self, now_ms: u64) {
        if let Agent::Running { since_ms, .. } = self.agent
            && now_ms.saturating_sub(since_ms) >= STEADY_MS
        {
            self.pause_ms = FIRST_PAUSE_MS;
        }
        self.agent = Agent::Waiting {
            until_ms: now_ms + self.pause_ms,
        };
        self.pause_ms = (self.pause_ms * 2).min(LONGEST_PAUSE_MS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_kills_and_a_word_postpones() {
        let mut watchdog = Watchdog::new(0);
        assert_eq!(watchdog.turn(0), Turn::Start);
        watchdog.started(0);
        assert_eq!(watchdog.turn(19_999), Turn::Sleep(1));
        watchdog.heard(19_999);
        assert_eq!(watchdog.turn(20_000), Turn::Sleep(19_999));
        assert_eq!(watchdog.turn(39_999), Turn::Kill);
    }

    #[test]
    fn pauses_double_to_a_limit_and_a_steady_run_forgives() {
        let mut watchdog = Watchdog::new(0);
        let mut now = 0;
        let mut pauses = Vec::new();
        for _ in 0..8 {
            watchdog.started(now);
            watchdog.ended(now);
            let Turn::Sleep(pause) = watchdog.turn(now) else {
                panic!("no pause")
            };
            pauses.push(pause);
            now += pause;
            assert_eq!(watchdog.turn(now), Turn::Start);
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000]);
        watchdog.started(now);
        watchdog.ended(now + 60_000);
        assert_eq!(watchdog.turn(now + 60_000), Turn::Sleep(100));
    }
}
