//! The life of one service, as a state machine.
//!
//! ```text
//! Waiting -> Launching -> Starting -> Up
//!               |  ^         |        |      ended: Pausing -> Launching, 5 times in 60 s: Stuck
//!               v  |         v        v
//!              Pausing <-----+--------+      stop: Stopping -> Stopped (or Launching for a restart)
//! ```

use std::collections::VecDeque;

use sovereign_protocol::condition::{Status, Verdict};

use super::brief::Required;
pub use super::outcome::{Adjusted, LaunchError, Probe, Progress};

/// Ends within [`CRASH_WINDOW_MS`] that make a crash loop.
const CRASHES: usize = 5;
/// See [`CRASHES`].
const CRASH_WINDOW_MS: u64 = 60_000;
const FIRST_PAUSE_MS: u64 = 200;
const LONGEST_PAUSE_MS: u64 = 10_000;
/// Between looks whether what it needs can be reached.
const NOT_YET_MS: u64 = 1_000;
/// Between tries of an adjustment that fails.
const ADJUST_AGAIN_MS: u64 = 60_000;
/// Between probes while the service is not ready.
const PROBE_FAST_MS: u64 = 100;
/// Between probes of a ready service.
const PROBE_STEADY_MS: u64 = 5_000;
/// Silent probes before a service counts as not ready.
const SILENT: u32 = 3;
/// A fast stop that takes longer becomes a kill.
const STOP_MS: u64 = 30_000;
/// How long a verdict on a service holds without a new probe.
pub const VALID_MS: u64 = 3 * PROBE_STEADY_MS;

/// Where a service is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The data disk is not known to be good, or what it needs of another guest cannot be used.
    Waiting,
    /// Its data directory and configuration are made, its process is started or adopted.
    Launching,
    /// Its process runs and has not yet answered.
    Starting,
    /// It answered.
    Up,
    /// It ended or could not be started; the next launch is at this time.
    Pausing {
        /// The time.
        until_ms: u64,
    },
    /// It is not started again until its specification changes.
    Stuck,
    /// It was told to stop.
    Stopping {
        /// When.
        since_ms: u64,
        /// It is launched again afterwards.
        again: bool,
    },
    /// It is not to run.
    Stopped,
}

/// What happens to a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The data disk was looked at.
    Disk(Status),
    /// A launch ended.
    Launched(Result<(), LaunchError>),
    /// During a launch: its process ended before this agent was there; how, in words.
    Missed(String),
    /// The process ended; how, in words.
    Ended(String),
    /// A probe ended.
    Probed(Probe),
    /// An adjustment ended.
    Adjusted(Adjusted),
    /// Its specification is another one now.
    Changed,
    /// Whether what it needs of another guest can be used; `None` when it needs nothing.
    Required(Option<Required>),
    /// It is to stop.
    Stop,
    /// Time passes.
    Tick,
}

/// What is to be done for a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Make what is missing and start or adopt the process; answered by [`Event::Launched`], later by [`Event::Ended`].
    Launch,
    /// Look whether it is ready; answered by [`Event::Probed`].
    Probe,
    /// Make the running service as specified; answered by [`Event::Adjusted`].
    Adjust,
    /// Ask the process to end soon.
    Stop,
    /// End all its processes now.
    Kill,
}

/// One service.
#[derive(Debug)]
pub struct Machine {
    state: State,
    disk: Status,
    required: Option<Required>,
    /// It was looked for a process that an earlier agent started.
    looked: bool,
    verdict: Verdict,
    ends_ms: VecDeque<u64>,
    silent: u32,
    probing: bool,
    next_probe_ms: u64,
    adjusted: bool,
    adjusting: bool,
    next_adjust_ms: u64,
    /// Why the service is not as specified although it runs.
    unadjusted: Option<String>,
    killed: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            state: State::Waiting,
            disk: Status::Unknown,
            required: None,
            looked: false,
            verdict: Verdict::unknown("Waiting", "the data disk was not looked at yet"),
            ends_ms: VecDeque::new(),
            silent: 0,
            probing: false,
            next_probe_ms: 0,
            adjusted: false,
            adjusting: false,
            next_adjust_ms: 0,
            unadjusted: None,
            killed: false,
        }
    }
}

impl Machine {
    /// Where it is.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What is true of it.
    #[must_use]
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Why it is not as specified although it runs.
    #[must_use]
    pub fn unadjusted(&self) -> Option<&str> {
        self.unadjusted.as_deref()
    }

    /// How far it is with its specification.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let up = self.state == State::Up && self.verdict.status == Status::True;
        match (&self.unadjusted, &self.state) {
            (Some(why), _) => Progress::Failed(why.clone()),
            // What it needs lives elsewhere: going back to an older specification would not help it.
            (None, State::Pausing { .. }) if self.required.is_some() => Progress::Pending,
            (None, State::Pausing { .. } | State::Stuck) => Progress::Failed(self.verdict.evidence.clone()),
            (None, State::Stopped) => Progress::Reached,
            (None, _) if up && self.adjusted && !self.adjusting => Progress::Reached,
            (None, _) => Progress::Pending,
        }
    }

    /// True when nothing about it is due within a second.
    #[must_use]
    pub fn at_rest(&self) -> bool {
        match self.state {
            State::Up => self.verdict.status == Status::True,
            State::Stuck | State::Stopped | State::Waiting => true,
            State::Launching | State::Starting | State::Pausing { .. } | State::Stopping { .. } => false,
        }
    }

    /// True when a process of it may be there, which would see the clock go back.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        match self.state {
            State::Launching | State::Starting | State::Up | State::Stopping { .. } => true,
            State::Waiting | State::Pausing { .. } | State::Stuck | State::Stopped => false,
        }
    }

    /// One event; what is to be done about it.
    pub fn step(&mut self, event: Event, now_ms: u64) -> Option<Action> {
        match event {
            Event::Disk(status) => self.disk(status),
            Event::Launched(outcome) => self.launched(outcome, now_ms),
            Event::Missed(how) => self.missed(&how, now_ms),
            Event::Ended(how) => self.ended(&how, now_ms),
            Event::Probed(probe) => self.probed(probe, now_ms),
            Event::Adjusted(outcome) => self.adjusted(outcome, now_ms),
            Event::Changed => self.changed(),
            Event::Required(required) => self.required(required, now_ms),
            Event::Stop => self.stop(now_ms, false),
            Event::Tick => self.tick(now_ms),
        }
    }

    fn disk(&mut self, status: Status) -> Option<Action> {
        self.disk = status;
        // A running service is left alone: it knows best what it can still do.
        match self.state {
            State::Waiting => self.begin(),
            _ => None,
        }
    }

    /// Launches, or waits for what a launch needs. What runs already is adopted in any case.
    fn begin(&mut self) -> Option<Action> {
        self.state = State::Waiting;
        match (self.disk, &self.required) {
            (Status::True, None | Some((Status::True, _))) => return Some(self.launch()),
            (Status::True, Some((status, why))) => {
                self.verdict = Verdict::new(*status, "WaitsFor", format!("not started: {why}"));
                if !self.looked {
                    return Some(self.look());
                }
            }
            (Status::False, _) => {
                self.verdict = Verdict::no(
                    "DiskMissing",
                    "not started: the data disk is not good (see layer disk)",
                );
            }
            (Status::Unknown, _) => {}
        }
        None
    }

    fn required(&mut self, required: Option<Required>, now_ms: u64) -> Option<Action> {
        self.required = required;
        match self.state {
            State::Waiting => self.begin(),
            State::Stuck if self.can_use() => {
                self.ends_ms.clear();
                self.begin()
            }
            // It goes on by itself; a look tells sooner how it is.
            State::Starting | State::Up => {
                self.next_probe_ms = self.next_probe_ms.min(now_ms);
                self.adjust_if_due(now_ms)
            }
            _ => None,
        }
    }

    /// Nothing is needed of another guest, or it can be used.
    fn can_use(&self) -> bool {
        self.required
            .as_ref()
            .is_none_or(|(status, _)| *status == Status::True)
    }

    fn launch(&mut self) -> Action {
        let action = self.look();
        if self.verdict.status != Status::False {
            self.verdict = Verdict::no("Launching", "its data directory and configuration are made");
        }
        action
    }

    fn look(&mut self) -> Action {
        self.state = State::Launching;
        self.adjusted = false;
        self.silent = 0;
        self.killed = false;
        self.looked = true;
        Action::Launch
    }

    fn launched(&mut self, outcome: Result<(), LaunchError>, now_ms: u64) -> Option<Action> {
        if !matches!(self.state, State::Launching | State::Stopping { .. }) {
            return None; // of a launch that is over
        }
        if let State::Stopping { .. } = self.state {
            return match outcome {
                Ok(()) => Some(Action::Stop),
                Err(_) => self.stopped(),
            };
        }
        match outcome {
            Ok(()) => {
                self.state = State::Starting;
                self.next_probe_ms = now_ms;
                self.verdict = Verdict::no("Starting", "its process runs and has not answered yet");
            }
            Err(LaunchError::Hopeless(reason, evidence)) => {
                self.state = State::Stuck;
                self.verdict = Verdict::no(reason, evidence);
            }
            Err(LaunchError::Failed(evidence)) => self.pause("LaunchFailed", &evidence, now_ms),
            Err(LaunchError::Waits) => return self.begin(), // perhaps it can be used by now
            Err(LaunchError::NotYet(evidence)) => {
                self.state = State::Pausing {
                    until_ms: now_ms + NOT_YET_MS,
                };
                self.verdict = Verdict::no("Unreachable", format!("not started: {evidence}"));
            }
        }
        None
    }

    /// It counts as an end, but what follows is under way already.
    fn missed(&mut self, how: &str, now_ms: u64) -> Option<Action> {
        if self.state == State::Launching && self.ends_ms.is_empty() {
            self.ends_ms.push_back(now_ms);
            self.verdict = Verdict::no("Ended", format!("{how}, while no agent was there; started again"));
        }
        None
    }

    fn ended(&mut self, how: &str, now_ms: u64) -> Option<Action> {
        match self.state {
            State::Stopping { again: true, .. } => self.begin(),
            State::Stopping { again: false, .. } => self.stopped(),
            State::Launching | State::Starting | State::Up => {
                self.pause("Ended", how, now_ms);
                None
            }
            State::Waiting | State::Pausing { .. } | State::Stuck | State::Stopped => None,
        }
    }

    fn stopped(&mut self) -> Option<Action> {
        self.state = State::Stopped;
        self.verdict = Verdict::no("Stopped", "it was told to stop");
        None
    }

    fn pause(&mut self, reason: &str, how: &str, now_ms: u64) {
        self.ends_ms.push_back(now_ms);
        while self
            .ends_ms
            .front()
            .is_some_and(|at| now_ms.saturating_sub(*at) > CRASH_WINDOW_MS)
        {
            self.ends_ms.pop_front();
        }
        let ends = self.ends_ms.len();
        if ends >= CRASHES {
            self.state = State::Stuck;
            self.verdict = Verdict::no(
                "CrashLoop",
                format!(
                    "{ends} failures within {} s, the last: {how}; apply a changed spec to try again",
                    CRASH_WINDOW_MS / 1_000
                ),
            );
            return;
        }
        let doublings = u32::try_from(ends.saturating_sub(1)).unwrap_or(0);
        let pause = (FIRST_PAUSE_MS << doublings.min(10)).min(LONGEST_PAUSE_MS);
        self.state = State::Pausing {
            until_ms: now_ms + pause,
        };
        self.verdict = Verdict::no(reason, format!("{how}; started again after {pause} ms"));
    }

    fn probed(&mut self, probe: Probe, now_ms: u64) -> Option<Action> {
        self.probing = false;
        if !matches!(self.state, State::Starting | State::Up) {
            return None;
        }
        let was_up = self.state == State::Up;
        self.silent = if matches!(probe, Probe::Silent(_)) {
            self.silent + 1
        } else {
            0
        };
        let verdict = match probe {
            Probe::Ready(evidence) => {
                self.state = State::Up;
                Verdict::yes("Ready", evidence)
            }
            Probe::Recovering(evidence) => Verdict::no("Recovering", evidence),
            Probe::Refused(evidence) if was_up => Verdict::no("NotListening", evidence),
            Probe::Refused(evidence) => Verdict::no("Starting", evidence),
            Probe::Silent(evidence) if self.silent < SILENT => Verdict::unknown("Silent", evidence),
            Probe::Silent(evidence) => Verdict::no("Silent", format!("{} probes: {evidence}", self.silent)),
            Probe::Broken(evidence) => Verdict::no("Broken", evidence),
        };
        let ready = verdict.status == Status::True;
        self.verdict = verdict;
        self.next_probe_ms = now_ms + if ready { PROBE_STEADY_MS } else { PROBE_FAST_MS };
        self.adjust_if_due(now_ms)
    }

    fn adjust_if_due(&mut self, now_ms: u64) -> Option<Action> {
        // One that needs another guest's may be unwell because it is to be changed: its database is elsewhere now.
        let due = (self.verdict.status == Status::True || self.required.is_some())
            && self.can_use() // else it would be restarted without what it needs
            && !self.adjusted
            && !self.adjusting
            && now_ms >= self.next_adjust_ms;
        due.then(|| {
            self.adjusting = true;
            self.adjusted = true; // a change from now on makes it false again
            Action::Adjust
        })
    }

    fn adjusted(&mut self, outcome: Adjusted, now_ms: u64) -> Option<Action> {
        self.adjusting = false;
        self.unadjusted = None;
        match outcome {
            Adjusted::Done => self.adjust_if_due(now_ms),
            Adjusted::Restart(why) => {
                self.verdict = Verdict::no("Restarting", why);
                self.stop(now_ms, true)
            }
            // It was changed again meanwhile: what failed is not wanted any more.
            Adjusted::Failed(_) if !self.adjusted => self.adjust_if_due(now_ms),
            Adjusted::Failed(why) => {
                self.unadjusted = Some(why);
                self.adjusted = false;
                self.next_adjust_ms = now_ms + ADJUST_AGAIN_MS;
                None
            }
        }
    }

    fn changed(&mut self) -> Option<Action> {
        self.adjusted = false;
        self.next_adjust_ms = 0;
        self.unadjusted = None;
        match self.state {
            State::Up => self.adjust_if_due(0),
            State::Stuck | State::Stopped => {
                self.ends_ms.clear();
                self.begin()
            }
            State::Pausing { .. } => {
                self.ends_ms.clear();
                None
            }
            // It was not wanted for a while, or restarts anyway.
            State::Stopping { since_ms, .. } => {
                self.state = State::Stopping {
                    since_ms,
                    again: true,
                };
                None
            }
            State::Waiting | State::Launching | State::Starting => None,
        }
    }

    fn stop(&mut self, now_ms: u64, again: bool) -> Option<Action> {
        match self.state {
            State::Starting | State::Up => {
                self.state = State::Stopping {
                    since_ms: now_ms,
                    again,
                };
                if !again {
                    self.verdict = Verdict::no("Stopping", "it was told to stop");
                }
                Some(Action::Stop)
            }
            State::Launching => {
                self.state = State::Stopping {
                    since_ms: now_ms,
                    again,
                };
                None // it is stopped when the launch has ended
            }
            State::Stopping { since_ms, .. } => {
                self.state = State::Stopping { since_ms, again };
                None
            }
            State::Waiting | State::Pausing { .. } | State::Stuck | State::Stopped => self.stopped(),
        }
    }

    fn tick(&mut self, now_ms: u64) -> Option<Action> {
        match self.state {
            State::Pausing { until_ms } if now_ms >= until_ms => self.begin(),
            State::Stopping { since_ms, .. }
                if !self.killed && now_ms.saturating_sub(since_ms) >= STOP_MS =>
            {
                self.killed = true;
                Some(Action::Kill)
            }
            State::Starting | State::Up if !self.probing && now_ms >= self.next_probe_ms => {
                self.probing = true;
                Some(Action::Probe)
            }
            State::Up => self.adjust_if_due(now_ms),
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
