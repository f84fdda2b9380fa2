//! Everything the agent knows, and what follows from an event.

use std::collections::BTreeMap;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::feed::Feed;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestSpec, Service, ServiceKind};
use sovereign_protocol::v1::ClockCorrection;

use super::clock::{Adjustment, Discipline};
use super::judge::{self, Miss};
use super::service::{self, Action, Machine, State};
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
/// Settings that the agent itself must know, or that would read other files.
const RESERVED: &[&str] = &[
    "config_file",
    "data_directory",
    "external_pid_file",
    "hba_file",
    "ident_file",
    "include",
    "include_dir",
    "include_if_exists",
    "port",
    "unix_socket_directories",
];

/// What happens.
#[derive(Debug)]
pub enum Event {
    /// The host wants this; it was admitted before.
    Apply(GuestSpec),
    /// The data disk was looked at.
    Disk(Verdict),
    /// The loopback was dialled.
    Loopback(Verdict),
    /// The kernel was looked at.
    Kernel(Vec<Miss>),
    /// The host measured our clock.
    Correction(ClockCorrection),
    /// The clock could not be adjusted.
    ClockFailed(String),
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
    Service(Service, Action),
    /// Set or steer the clock.
    Clock(Adjustment),
    /// Ask PID 1 to power off.
    PowerOff,
}

/// Everything the agent knows.
#[derive(Debug)]
pub struct World {
    /// What is true, for readers.
    pub feed: Feed,
    wanted: Option<GuestSpec>,
    services: BTreeMap<Name, (Service, Machine)>,
    facts: BootFacts,
    misses: Option<Vec<Miss>>,
    clock: Discipline,
    disk: Status,
    shutdown_ms: Option<u64>,
    powered_off: bool,
}

/// Why a valid spec is not taken: path and problem.
///
/// # Errors
/// The first conflict in words.
pub fn admit(spec: &GuestSpec) -> Result<(), String> {
    if spec.services.len() > 1 {
        return Err("services: one PostgreSQL per guest is what this agent can run".to_owned());
    }
    for (index, service) in spec.services.iter().enumerate() {
        let ServiceKind::Postgres { settings, port } = &service.kind;
        if *port == 0 {
            return Err(format!("services[{index}].port: 0 is no port"));
        }
        if let Some(key) = settings
            .keys()
            .find(|key| RESERVED.contains(&key.to_ascii_lowercase().as_str()))
        {
            return Err(format!(
                "services[{index}].settings.{key}: this setting belongs to the agent"
            ));
        }
    }
    Ok(())
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
            wanted: None,
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
        self.wanted.as_ref()
    }

    /// Milliseconds until the next tick must come at the latest.
    #[must_use]
    pub fn tick_ms(&self) -> u64 {
        let settled = self.services.values().all(|(_, machine)| machine.at_rest());
        if settled && self.shutdown_ms.is_none() {
            TICK_STEADY_MS
        } else {
            TICK_FAST_MS
        }
    }

    /// One event; what is to be done about it.
    pub fn step(&mut self, event: Event, now_ms: u64) -> Vec<Effect> {
        let mut effects = match event {
            Event::Apply(spec) => self.apply(spec, now_ms),
            Event::Disk(verdict) => self.disk(verdict, now_ms),
            Event::Loopback(verdict) => {
                self.feed
                    .observe(Key::new(Layer::Loopback, "lo"), verdict, LOOK_VALID_MS, now_ms);
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
            Event::Service(name, event) => self.service(&name, event, now_ms).into_iter().collect(),
            Event::Shutdown => self.shutdown(now_ms),
            Event::Tick => self.each_service(|_| Some(service::Event::Tick), now_ms),
        };
        effects.extend(self.finish_shutdown(now_ms));
        effects
    }

    fn apply(&mut self, spec: GuestSpec, now_ms: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let old = self.wanted.as_ref();
        if old.is_none_or(|old| old.hostname != spec.hostname) {
            effects.push(Effect::Hostname(spec.hostname.clone()));
        }
        let mut changed = Vec::new();
        for service in &spec.services {
            let secret = |spec: &GuestSpec| spec.secrets.get(service.name.as_str()).cloned();
            let same = old.is_some_and(|old| old.services.contains(service) && secret(old) == secret(&spec));
            match self.services.get_mut(&service.name) {
                Some((kept, _)) => {
                    kept.clone_from(service);
                    if !same {
                        changed.push((service.name.clone(), service::Event::Changed));
                    }
                }
                None => {
                    self.services
                        .insert(service.name.clone(), (service.clone(), Machine::default()));
                    changed.push((service.name.clone(), service::Event::Disk(self.disk)));
                }
            }
        }
        let gone = self
            .services
            .keys()
            .filter(|name| !spec.services.iter().any(|s| s.name == **name));
        changed.extend(gone.map(|name| (name.clone(), service::Event::Stop)));
        self.wanted = Some(spec);
        for (name, event) in changed {
            effects.extend(self.service(&name, event, now_ms));
        }
        self.judge_kernel(now_ms);
        effects
    }

    fn disk(&mut self, verdict: Verdict, now_ms: u64) -> Vec<Effect> {
        self.disk = verdict.status;
        self.feed
            .observe(Key::new(Layer::Disk, "data"), verdict, LOOK_VALID_MS, now_ms);
        let status = self.disk;
        self.each_service(|_| Some(service::Event::Disk(status)), now_ms)
    }

    fn judge_kernel(&mut self, now_ms: u64) {
        let Some(misses) = &self.misses else { return };
        let mut wanted = vec!["agent"];
        if self
            .wanted
            .iter()
            .flat_map(|spec| &spec.services)
            .any(|s| matches!(s.kind, ServiceKind::Postgres { .. }))
        {
            wanted.push("postgresql");
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
        let running = self.services.values().any(|(_, machine)| machine.has_begun());
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
            if let Some(event) = self.services.get(&name).and_then(|(_, machine)| event(machine)) {
                effects.extend(self.service(&name, event, now_ms));
            }
        }
        effects
    }

    fn service(&mut self, name: &Name, event: service::Event, now_ms: u64) -> Option<Effect> {
        // While shutting down nothing starts again.
        if self.shutdown_ms.is_some() && matches!(event, service::Event::Disk(_) | service::Event::Changed) {
            return None;
        }
        // Only these tell something new about the service; the rest passes time.
        let seen = !matches!(event, service::Event::Tick | service::Event::Disk(_));
        let (service, machine) = self.services.get_mut(name)?;
        let before = machine.verdict().clone();
        let action = machine.step(event, now_ms);
        let effect = action.map(|action| Effect::Service(service.clone(), action));
        let key = Key::new(Layer::Service, name.as_str());
        let config = Key::new(Layer::Service, format!("{name}.config"));
        if machine.state() == &State::Stopped && !is_wanted(self.wanted.as_ref(), name) {
            self.services.remove(name);
            self.feed.remove(&key);
            self.feed.remove(&config);
            return effect;
        }
        let rests = !matches!(machine.state(), State::Up | State::Starting);
        if seen || rests || *machine.verdict() != before || self.feed.verdict(&key).is_none() {
            self.feed
                .observe(key, machine.verdict().clone(), service::VALID_MS, now_ms);
        }
        match machine.unadjusted() {
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
            .wanted
            .iter()
            .flat_map(|spec| &spec.services)
            .map(|s| s.name.clone())
            .rev()
            .collect();
        names.extend(
            self.services
                .keys()
                .filter(|name| !is_wanted(self.wanted.as_ref(), name))
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
            .all(|(_, machine)| machine.state() == &State::Stopped);
        (stopped || now_ms.saturating_sub(begun) >= SHUTDOWN_MS).then(|| {
            self.powered_off = true;
            Effect::PowerOff
        })
    }
}

fn is_wanted(spec: Option<&GuestSpec>, name: &Name) -> bool {
    spec.is_some_and(|spec| spec.services.iter().any(|service| service.name == *name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::service::Probe;
    use sovereign_protocol::secret::Secret;
    use sovereign_protocol::spec::Exposed;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn spec(port: u16) -> GuestSpec {
        GuestSpec {
            version: 1,
            revision: 1,
            hostname: name("sql"),
            services: vec![Service {
                name: name("postgres"),
                kind: ServiceKind::Postgres {
                    settings: BTreeMap::new(),
                    port,
                },
                limits: None,
            }],
            secrets: BTreeMap::new(),
            interface: None,
            tailscale: None,
        }
    }

    fn world() -> World {
        World::new(Feed::new(1, 16), BootFacts::default())
    }

    fn actions(effects: Vec<Effect>) -> Vec<Action> {
        let action = |effect| {
            if let Effect::Service(_, action) = effect {
                Some(action)
            } else {
                None
            }
        };
        effects.into_iter().filter_map(action).collect()
    }

    fn event(world: &mut World, event: service::Event, now: u64) -> Vec<Action> {
        actions(world.step(Event::Service(name("postgres"), event), now))
    }

    fn ready() -> World {
        let mut world = world();
        world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
        assert_eq!(actions(world.step(Event::Apply(spec(5432)), 0)), [Action::Launch]);
        event(&mut world, service::Event::Launched(Ok(())), 0);
        event(&mut world, service::Event::Probed(Probe::Ready("1".into())), 0);
        event(&mut world, service::Event::Adjusted(service::Adjusted::Done), 0);
        world
    }

    fn verdict(world: &World) -> &Verdict {
        world.feed.verdict(&Key::new(Layer::Service, "postgres")).unwrap()
    }

    #[test]
    fn a_spec_before_the_disk_and_after_it_both_launch_once() {
        let mut world = world();
        assert!(actions(world.step(Event::Apply(spec(5432)), 0)).is_empty());
        assert_eq!(verdict(&world).status, Status::Unknown);
        assert_eq!(
            actions(world.step(Event::Disk(Verdict::yes("Mounted", "")), 1)),
            [Action::Launch]
        );
        assert!(actions(world.step(Event::Disk(Verdict::yes("Mounted", "")), 2)).is_empty());
        assert!(actions(world.step(Event::Apply(spec(5432)), 3)).is_empty());
    }

    #[test]
    fn applying_the_same_spec_again_does_nothing_and_a_change_adjusts() {
        let mut world = ready();
        assert!(world.step(Event::Apply(spec(5432)), 1).is_empty());
        assert_eq!(actions(world.step(Event::Apply(spec(5433)), 1)), [Action::Adjust]);
        event(&mut world, service::Event::Adjusted(service::Adjusted::Done), 1);
        let mut secret = spec(5433);
        secret
            .secrets
            .insert("postgres".into(), Exposed(Secret::new("s".into())));
        assert_eq!(actions(world.step(Event::Apply(secret), 1)), [Action::Adjust]);
    }

    #[test]
    fn a_service_that_is_not_wanted_any_more_is_stopped_and_forgotten() {
        let mut world = ready();
        let empty = GuestSpec {
            services: Vec::new(),
            ..spec(1)
        };
        assert_eq!(actions(world.step(Event::Apply(empty), 1)), [Action::Stop]);
        event(&mut world, service::Event::Ended("0".into()), 2);
        assert!(
            world
                .feed
                .verdict(&Key::new(Layer::Service, "postgres"))
                .is_none()
        );
    }

    #[test]
    fn a_shutdown_powers_off_when_services_have_stopped_and_only_once() {
        let mut world = ready();
        let effects = world.step(Event::Shutdown, 1);
        assert!(!effects.contains(&Effect::PowerOff));
        assert_eq!(actions(effects), [Action::Stop]);
        assert!(world.step(Event::Shutdown, 2).is_empty());
        assert!(world.step(Event::Disk(Verdict::yes("Mounted", "")), 2).is_empty());
        assert_eq!(
            world.step(
                Event::Service(name("postgres"), service::Event::Ended("0".into())),
                3
            ),
            [Effect::PowerOff]
        );
        assert!(world.step(Event::Tick, 99_999).is_empty());
    }

    #[test]
    fn a_shutdown_does_not_wait_for_ever() {
        let mut world = ready();
        world.step(Event::Shutdown, 0);
        assert!(
            !world
                .step(Event::Tick, SHUTDOWN_MS - 1)
                .contains(&Effect::PowerOff)
        );
        assert!(world.step(Event::Tick, SHUTDOWN_MS).contains(&Effect::PowerOff));
        assert_eq!(world.step(Event::Shutdown, SHUTDOWN_MS), []);
    }

    #[test]
    fn without_services_a_shutdown_is_at_once() {
        assert_eq!(world().step(Event::Shutdown, 0), [Effect::PowerOff]);
    }

    #[test]
    fn a_ready_service_that_is_not_probed_any_more_goes_stale() {
        let mut world = ready();
        let mut now = 0;
        while now < 2 * service::VALID_MS {
            now += 1_000;
            world.step(Event::Tick, now); // the probe that it asks for never ends
        }
        let stale = world
            .feed
            .snapshot(now)
            .find(|c| c.key.layer == Layer::Service)
            .unwrap();
        assert_eq!(
            (stale.verdict.status, stale.verdict.reason.as_str()),
            (Status::Unknown, "Stale")
        );
    }

    #[test]
    fn a_stuck_service_stays_false_and_fresh() {
        let mut world = world();
        world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
        world.step(Event::Apply(spec(5432)), 0);
        let hopeless = service::LaunchError::Hopeless("OtherVersion", "16".into());
        event(&mut world, service::Event::Launched(Err(hopeless)), 0);
        for now in (0..100_000).step_by(1_000) {
            world.step(Event::Tick, now);
            assert!(
                world
                    .feed
                    .snapshot(now)
                    .all(|c| c.key.layer != Layer::Service || c.verdict.reason == "OtherVersion")
            );
        }
    }

    #[test]
    fn the_clock_is_unknown_until_the_host_has_measured_it() {
        let clock = Key::new(Layer::Clock, "realtime");
        let ahead = ClockCorrection {
            offset_ns: 5_000_000_000,
            bound_ns: 1,
            woke: false,
        };
        let mut before = world();
        assert_eq!(before.feed.verdict(&clock).unwrap().status, Status::Unknown);
        let effects = before.step(Event::Correction(ahead), 1);
        assert!(matches!(
            effects[..],
            [Effect::Clock(Adjustment {
                step_ns: -5_000_000_000,
                ..
            })]
        ));
        assert_eq!(before.feed.verdict(&clock).unwrap().status, Status::True);
        before.step(Event::ClockFailed("EPERM".into()), 2);
        assert_eq!(before.feed.verdict(&clock).unwrap().reason, "NotAdjusted");

        let mut running = ready();
        assert_eq!(running.step(Event::Correction(ahead), 1), []);
        assert_eq!(running.feed.verdict(&clock).unwrap().reason, "Ahead");
    }

    #[test]
    fn reserved_settings_and_a_second_database_are_refused() {
        assert!(admit(&spec(5432)).is_ok());
        let mut taken = spec(5432);
        taken.services[0].kind = ServiceKind::Postgres {
            settings: BTreeMap::from([("Port".into(), "1".into())]),
            port: 1,
        };
        assert_eq!(
            admit(&taken).unwrap_err(),
            "services[0].settings.Port: this setting belongs to the agent"
        );
        let mut two = spec(5432);
        two.services.push(two.services[0].clone());
        assert!(admit(&two).is_err());
        assert!(admit(&spec(0)).is_err());
    }
}
