//! Everything the agent knows, and what follows from an event.

use std::collections::BTreeMap;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::feed::Feed;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::mesh::Role;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestSpec, Service, ServiceKind};
use sovereign_protocol::v1::ClockCorrection;

use super::apply::Application;
use super::brief::Brief;
use super::clock::{Adjustment, Discipline};
use super::former::Ended;
use super::judge::{self, Miss};
use super::net::Order;
use super::service::{self, Action, Machine, Progress, State};
use crate::facts::BootFacts;

/// Between ticks while something is not settled.
pub const TICK_FAST_MS: u64 = 50;
/// Between ticks otherwise.
pub const TICK_STEADY_MS: u64 = 1_000;
/// Between looks at disk, loopback and kernel.
pub const LOOK_MS: u64 = 5_000;
/// How long such a verdict holds.
pub const LOOK_VALID_MS: u64 = 3 * LOOK_MS;
/// How long a verdict on the clock holds; the host measures at the latest every 64 s.
const CLOCK_VALID_MS: u64 = 150_000;
/// After this time a shutdown goes on without the services.
const SHUTDOWN_MS: u64 = 35_000;

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// The host wants this; it was admitted before. The ticket comes back in [`Effect::Answer`].
    Apply(Box<GuestSpec>, u64),
    /// The order to the network with this number was carried out, or the old state was restored for this reason.
    NetworkTaken(u64, Result<(), String>),
    /// The data disk was looked at.
    Disk(Verdict),
    /// Somebody looked; what is `None` is not spoken of any more. In order: what was wrong before how it is now.
    Seen(Vec<(Key, Option<Verdict>)>),
    /// The kernel was looked at.
    Kernel(Vec<Miss>),
    /// The host measured our clock.
    Correction(ClockCorrection),
    /// The clock could not be adjusted.
    ClockFailed(String),
    /// The host's way out is another one, and connections of the former one were ended.
    FormerEnded(Ended),
    /// Something happened to a service.
    Service(Name, service::Event),
    /// Stop everything in order and power off.
    Shutdown,
    /// Time passes.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Name this guest.
    Hostname(Name),
    /// For a service that is, or was, specified like this.
    Service(Box<Brief>, Action),
    /// Set or steer the clock.
    Clock(Adjustment),
    /// Make the interface like this; answered by [`Event::NetworkTaken`].
    Network(Order),
    /// What the host says of its way out, with our own networks.
    Ways(Box<InterfaceSpec>),
    /// Watch Tailscale, or stop that.
    Tailscale(bool),
    /// Tell who applied with this ticket: the revision, or why all is as before.
    Answer(u64, Result<u64, String>),
    /// Ask PID 1 to power off.
    PowerOff,
}

/// Everything the agent knows.
#[derive(Debug)]
pub struct World {
    /// What is true, for readers.
    pub feed: Feed,
    pub(super) application: Application,
    pub(super) services: BTreeMap<Name, Kept>,
    facts: BootFacts,
    misses: Option<Vec<Miss>>,
    clock: Discipline,
    pub(super) disk: Status,
    pub(super) shutdown_ms: Option<u64>,
    powered_off: bool,
}

/// A service and what it was last told to be.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) brief: Brief,
    pub(super) machine: Machine,
    /// The brief of which every client is known to have its role and database.
    granted: Option<Brief>,
}

impl Kept {
    pub(super) fn new(brief: Brief) -> Self {
        Self {
            brief,
            machine: Machine::default(),
            granted: None,
        }
    }

    /// Tells it anew; the roles that are not its clients' any more.
    pub(super) fn replace(&mut self, brief: Brief) -> Vec<Role> {
        let old = std::mem::replace(&mut self.brief, brief).clients.into_iter();
        let stays = |role: &Role| self.brief.clients.iter().any(|(client, _)| client.role == *role);
        old.map(|(client, _)| client.role)
            .filter(|role| !stays(role))
            .collect()
    }

    /// Whether each client may log in.
    fn clients(&mut self) -> Vec<(Role, Verdict)> {
        if !self.brief.clients.is_empty() && self.machine.progress() == Progress::Reached {
            self.granted = Some(self.brief.clone());
        }
        let granted = self.granted.as_ref().map_or(&[][..], |brief| &brief.clients);
        let judged = self.brief.clients.iter().map(|client| {
            let (role, from) = (&client.0.role, &client.0.from);
            let from: Vec<String> = from.iter().map(ToString::to_string).collect();
            let verdict = match granted.contains(client) {
                true => Verdict::yes("Granted", format!("it may log in from {}", from.join(", "))),
                false => Verdict::unknown("Granting", "role and database are being made"),
            };
            (role.clone(), verdict)
        });
        judged.collect()
    }
}

impl World {
    /// A world in which nothing but the boot has happened.
    #[must_use]
    pub fn new(mut feed: Feed, facts: BootFacts) -> Self {
        let clock = format!(
            "the host has not measured it yet; at boot the clock was moved forward by {} ms",
            facts.clock_step_ns / 1_000_000
        );
        feed.observe(
            Key::new(Layer::Clock, "realtime"),
            Verdict::unknown("NotMeasured", clock),
            CLOCK_VALID_MS,
            0,
        );
        Self {
            feed,
            application: Application::default(),
            services: BTreeMap::new(),
            facts,
            misses: None,
            clock: Discipline::default(),
            disk: Status::Unknown,
            shutdown_ms: None,
            powered_off: false,
        }
    }

    /// What PID 1 found.
    #[must_use]
    pub fn facts(&self) -> &BootFacts {
        &self.facts
    }

    /// What is wanted.
    #[must_use]
    pub fn wanted(&self) -> Option<&GuestSpec> {
        self.application.wanted()
    }

    /// Milliseconds until the next tick must come at the latest.
    #[must_use]
    pub fn tick_ms(&self) -> u64 {
        let settled = self.services.values().all(|kept| kept.machine.at_rest());
        if settled && !self.application.is_changing() && self.shutdown_ms.is_none() {
            TICK_STEADY_MS
        } else {
            TICK_FAST_MS
        }
    }

    /// One event; what is to be done about it.
    pub fn step(&mut self, event: Event, now_ms: u64) -> Vec<Effect> {
        let mut effects = match event {
            Event::Apply(spec, ticket) => self.apply(*spec, ticket, now_ms),
            Event::NetworkTaken(attempt, outcome) => self.network_taken(attempt, outcome, now_ms),
            Event::Disk(verdict) => self.disk(verdict, now_ms),
            Event::Seen(verdicts) => {
                for (key, verdict) in verdicts {
                    self.seen(key, verdict, now_ms);
                }
                Vec::new()
            }
            Event::Kernel(misses) => {
                self.misses = Some(misses);
                self.judge_kernel(now_ms);
                Vec::new()
            }
            Event::Correction(correction) => self.correct(correction, now_ms).into_iter().collect(),
            Event::ClockFailed(error) => {
                self.clock.failed();
                self.judge_clock(Verdict::no("NotAdjusted", error), now_ms);
                Vec::new()
            }
            Event::FormerEnded(ended) => {
                let journal = self.feed.journal_mut();
                journal.append(Ended::key(), None, Some(ended.verdict()), now_ms);
                Vec::new()
            }
            Event::Service(name, event) => self.service(&name, event, now_ms).into_iter().collect(),
            Event::Shutdown => self.shutdown(now_ms),
            Event::Tick => self.each_service(|_| Some(service::Event::Tick), now_ms),
        };
        effects.extend(self.go_on(now_ms));
        effects.extend(self.finish_shutdown(now_ms));
        effects
    }

    fn seen(&mut self, key: Key, verdict: Option<Verdict>, now_ms: u64) {
        match verdict {
            Some(verdict) => {
                self.feed.observe(key, verdict, LOOK_VALID_MS, now_ms);
            }
            None => {
                self.feed.remove(&key);
            }
        }
    }

    fn disk(&mut self, verdict: Verdict, now_ms: u64) -> Vec<Effect> {
        self.disk = verdict.status;
        self.feed
            .observe(Key::new(Layer::Disk, "data"), verdict, LOOK_VALID_MS, now_ms);
        let status = self.disk;
        self.each_service(|_| Some(service::Event::Disk(status)), now_ms)
    }

    pub(super) fn judge_kernel(&mut self, now_ms: u64) {
        let Some(misses) = &self.misses else { return };
        let mut wanted = vec!["agent"];
        if let Some(spec) = self.application.wanted() {
            let postgres = |service: &Service| matches!(service.kind, ServiceKind::Postgres { .. });
            wanted.extend(spec.services.iter().any(postgres).then_some("postgresql"));
            wanted.extend(spec.tailscale.is_some().then_some("tailscale"));
        }
        let verdict = judge::kernel(misses, &wanted, &self.facts);
        self.feed.observe(
            Key::new(Layer::Kernel, "contract"),
            verdict,
            LOOK_VALID_MS,
            now_ms,
        );
    }

    fn correct(&mut self, correction: ClockCorrection, now_ms: u64) -> Option<Effect> {
        let running = self.services.values().any(|kept| kept.machine.has_begun());
        let (verdict, adjustment) = self.clock.correct(correction, running, now_ms);
        self.judge_clock(verdict, now_ms);
        adjustment.map(Effect::Clock)
    }

    fn judge_clock(&mut self, verdict: Verdict, now_ms: u64) {
        let key = Key::new(Layer::Clock, "realtime");
        self.feed.observe(key, verdict, CLOCK_VALID_MS, now_ms);
    }

    fn each_service(
        &mut self,
        event: impl Fn(&Machine) -> Option<service::Event>,
        now_ms: u64,
    ) -> Vec<Effect> {
        let names: Vec<Name> = self.services.keys().cloned().collect();
        let mut effects = Vec::new();
        for name in names {
            if let Some(event) = self.services.get(&name).and_then(|kept| event(&kept.machine)) {
                effects.extend(self.service(&name, event, now_ms));
            }
        }
        effects
    }

    pub(super) fn service(&mut self, name: &Name, event: service::Event, now_ms: u64) -> Option<Effect> {
        // While shutting down nothing starts again.
        if self.shutdown_ms.is_some() && matches!(event, service::Event::Disk(_) | service::Event::Changed) {
            return None;
        }
        // Only these tell something new about the service; the rest passes time.
        let seen = !matches!(event, service::Event::Tick | service::Event::Disk(_));
        let kept = self.services.get_mut(name)?;
        let before = kept.machine.verdict().clone();
        let action = kept.machine.step(event, now_ms);
        let effect = action.map(|action| Effect::Service(Box::new(kept.brief.clone()), action));
        let clients = kept.clients();
        let machine = &kept.machine;
        let key = Key::new(Layer::Service, name.as_str());
        let config = config_key(name);
        if machine.state() == &State::Stopped && !is_wanted(self.application.wanted(), name) {
            self.services.remove(name);
            for (role, _) in &clients {
                self.feed.remove(&client_key(name, role));
            }
            self.feed.remove(&key);
            self.feed.remove(&config);
            return effect;
        }
        let rests = !matches!(machine.state(), State::Up | State::Starting);
        if seen || rests || *machine.verdict() != before || self.feed.verdict(&key).is_none() {
            self.feed
                .observe(key, machine.verdict().clone(), service::VALID_MS, now_ms);
            for (role, verdict) in clients {
                let key = client_key(name, &role);
                self.feed.observe(key, verdict, service::VALID_MS, now_ms);
            }
        }
        match machine.unadjusted().or_else(|| self.application.refusal(&config)) {
            Some(why) => {
                let verdict = Verdict::no("NotApplied", why);
                self.feed.observe(config, verdict, service::VALID_MS, now_ms);
            }
            None => {
                self.feed.remove(&config);
            }
        }
        effect
    }

    fn shutdown(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.shutdown_ms.is_some() {
            return Vec::new();
        }
        self.shutdown_ms = Some(now_ms);
        // In reverse order of start.
        let mut names: Vec<Name> = self
            .application
            .wanted()
            .iter()
            .flat_map(|spec| &spec.services)
            .map(|s| s.name.clone())
            .rev()
            .collect();
        let wanted = self.application.wanted();
        names.extend(
            self.services
                .keys()
                .filter(|name| !is_wanted(wanted, name))
                .cloned(),
        );
        names
            .iter()
            .filter_map(|name| self.service(name, service::Event::Stop, now_ms))
            .collect()
    }

    fn finish_shutdown(&mut self, now_ms: u64) -> Option<Effect> {
        let begun = self.shutdown_ms.filter(|_| !self.powered_off)?;
        let stopped = self
            .services
            .values()
            .all(|kept| kept.machine.state() == &State::Stopped);
        (stopped || now_ms.saturating_sub(begun) >= SHUTDOWN_MS).then(|| {
            self.powered_off = true;
            Effect::PowerOff
        })
    }
}

/// The condition of a service's specification, there only while it is not what runs.
pub(super) fn config_key(service: &Name) -> Key {
    Key::new(Layer::Service, format!("{service}.config"))
}

/// The condition of a service of another guest that logs in to this one.
pub(super) fn client_key(service: &Name, role: &Role) -> Key {
    Key::new(Layer::Service, format!("{service}.{role}"))
}

pub(super) fn is_wanted(spec: Option<&GuestSpec>, name: &Name) -> bool {
    spec.is_some_and(|spec| spec.services.iter().any(|service| service.name == *name))
}

#[cfg(test)]
#[path = "world_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "ties_tests.rs"]
mod ties_tests;
