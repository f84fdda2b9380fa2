//! The agent's picture of its guests, and the one function that changes it.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::condition::{Key, Layer, MACHINE, Status, Verdict};
use sovereign_protocol::event::{Events, Journal, Start};
use sovereign_protocol::feed::{Changes, Cursor, Feed};
use sovereign_protocol::limits::{EVENTS_BATCH, HOST_CONDITIONS, HOST_EVENTS};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, HostSpec, RestartWhen};
use sovereign_protocol::status::{Phase, VmmStatus};
use sovereign_reconcile::view::NetworkMode;

use super::backoff::{Backoff, Next};
use super::event::{Edition, Effect, Event};
use super::mesh::{self, Edge};
use super::network::Network;
use super::observe::forget_forwards;
use super::wedge::Wedge;
use crate::document::concerns_guest;
use crate::shim::contract::{ExitReason, ExitRecord, Machine};

/// A condition that holds until it is told otherwise: the largest integer that every JSON reader keeps.
pub(super) const LASTING_MS: u64 = (1 << 53) - 1;

#[derive(Debug)]
pub(super) struct Guest {
    pub(super) config: GuestConfig,
    pub(super) wanted: bool,
    pub(super) phase: Phase,
    /// The document that it is to take over.
    pub(super) given: Edition,
    /// The document that it took over last in this boot.
    pub(super) applied: Edition,
    pub(super) boot: Option<(String, VmmStatus)>,
    pub(super) machine: Option<Machine>,
    /// Why this boot has no card, where one was meant to.
    pub(super) cardless: Option<String>,
    pub(super) ready: Status,
    pub(super) ready_since_ms: u64,
    pub(super) start_at_ms: Option<u64>,
    backoff: Backoff,
    pub(super) serving: bool,
    pub(super) wedge: Wedge,
    /// It reports more conditions than are taken, which was told.
    pub(super) crowded: bool,
}

/// All guests and the feed of their conditions.
#[derive(Debug)]
pub struct World {
    pub(super) guests: BTreeMap<Name, Guest>,
    pub(super) feed: Feed,
    pub(super) revision: u64,
    /// How far each guest's journal was read; outlives boots and agents.
    pub(super) read: BTreeMap<Name, Cursor>,
    pub(super) network: Network,
    /// What services need of other guests, by guest and service.
    pub(super) edges: BTreeMap<(Name, Name), Edge>,
    spec: Option<HostSpec>,
    stopping: bool,
}

impl World {
    /// No guests, nothing wanted.
    #[must_use]
    pub fn new(incarnation: u64) -> Self {
        Self {
            guests: BTreeMap::new(),
            feed: Feed::new(incarnation, HOST_EVENTS).holding(HOST_CONDITIONS),
            revision: 0,
            read: BTreeMap::new(),
            network: Network::default(),
            edges: BTreeMap::new(),
            spec: None,
            stopping: false,
        }
    }

    /// A world that goes on where another agent ended; what it wanted is still to be applied.
    #[must_use]
    pub fn resume(
        incarnation: u64,
        journal: Journal,
        read: BTreeMap<Name, Cursor>,
        revision: u64,
        spec: Option<HostSpec>,
    ) -> Self {
        Self {
            feed: Feed::with_journal(incarnation, journal).holding(HOST_CONDITIONS),
            read,
            revision,
            spec,
            ..Self::new(incarnation)
        }
    }

    /// What is wanted.
    #[must_use]
    pub fn spec(&self) -> Option<&HostSpec> {
        self.spec.as_ref()
    }

    /// True when exactly this is wanted already.
    #[must_use]
    pub fn wants(&self, spec: &HostSpec) -> bool {
        self.spec.as_ref() == Some(spec)
    }

    /// How far each guest's journal was read.
    #[must_use]
    pub fn read(&self) -> &BTreeMap<Name, Cursor> {
        &self.read
    }

    /// Takes an event in and says what to do about it.
    pub fn step(&mut self, event: Event, now_ms: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        let is_around = matches!(
            event,
            Event::Applied(_) | Event::NetworkMode(_) | Event::Network(_) | Event::Resolver(_)
        );
        match event {
            Event::Applied(spec) if !self.stopping => self.apply(spec, now_ms, &mut effects),
            Event::Applied(_) => {}
            Event::StopAll => self.stop_all(&mut effects),
            Event::Found(name, config) => self.stop_leftover(name, config, now_ms, &mut effects),
            Event::Ended(name, record) => self.ended(&name, &record, now_ms),
            Event::Tick => {}
            Event::NoCard(name, why) => self.goes_without_card(&name, why, &mut effects),
            Event::Running(names) => self.network.running = names,
            Event::NetworkMode(mode) => {
                if mode.is_there() {
                    effects.push(Effect::OpenNetwork);
                }
                self.network.mode = mode;
            }
            Event::Network(event) => self.network_event(event, now_ms),
            Event::Resolver(resolver) => self.know_resolver(resolver),
            Event::SharedPorts(found) => self.share_ports(&found, now_ms),
            other => self.observe(other, now_ms),
        }
        self.stop_due(&mut effects);
        self.start_due(now_ms, &mut effects);
        self.end_wedged(now_ms, &mut effects);
        self.judge_machines(now_ms);
        self.judge_cards(now_ms);
        self.judge_edges(now_ms, &mut effects);
        if is_around {
            self.judge_surroundings(now_ms, &mut effects);
        }
        self.judge_ready(now_ms, &mut effects);
        self.judge_translations(now_ms);
        effects
    }

    /// What changed after a cursor.
    #[must_use]
    pub fn changes(&self, cursor: Option<Cursor>, now_ms: u64) -> Changes {
        self.feed.since(cursor, now_ms)
    }

    /// What happened, in the order in which it became known.
    #[must_use]
    pub fn events(&self, start: Start, now_ms: u64, wall_ms: u64) -> Events {
        self.feed.journal().read(start, EVENTS_BATCH, now_ms, wall_ms)
    }

    /// The journal's displaced events; see [`Journal::displaced`].
    #[must_use]
    pub fn displaced(&self, seen: u64) -> (u64, Vec<u64>) {
        self.feed.journal().displaced(seen)
    }

    /// Where feed and journal stand.
    #[must_use]
    pub fn cursors(&self) -> (Cursor, Cursor) {
        (self.feed.cursor(), self.feed.journal().cursor())
    }

    /// The revision of the wanted state.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// The document that a guest is to take over now.
    #[must_use]
    pub fn edition(&self, guest: &Name) -> Edition {
        self.guests
            .get(guest)
            .map(|guest| guest.given)
            .unwrap_or_default()
    }

    /// The guest's ports that forwards lead to, by forward.
    #[must_use]
    pub fn forward_ports(&self, guest: &Name) -> BTreeMap<Name, u16> {
        let forwards = self
            .guests
            .get(guest)
            .map(|guest| guest.config.forwards.as_slice());
        let ports = forwards.unwrap_or_default().iter();
        ports
            .map(|forward| (forward.name.clone(), forward.port))
            .collect()
    }

    /// The guests whose forwards are to listen.
    #[must_use]
    pub fn serving(&self) -> Vec<Name> {
        let serving = self.guests.iter().filter(|(_, guest)| guest.serving);
        serving.map(|(name, _)| name.clone()).collect()
    }

    /// True when a stop was asked for: nothing new is wanted any more.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// True when a stop was asked for and no guest runs any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.stopping && self.guests.values().all(|guest| guest.phase == Phase::Stopped)
    }

    /// When [`Event::Tick`] is due at the latest.
    #[must_use]
    pub fn next_tick_ms(&self) -> Option<u64> {
        let wedges = self.guests.values().filter(|guest| guest.config.restart.wedged);
        let starts = self
            .guests
            .iter()
            .filter_map(|(name, guest)| guest.start_at_ms.map(|at| self.network.start_ms(name, guest, at)));
        starts
            .chain(wedges.filter_map(|guest| guest.wedge.due_ms()))
            .min()
    }

    fn apply(&mut self, spec: HostSpec, now_ms: u64, effects: &mut Vec<Effect>) {
        let old = self.spec.clone();
        let before = old.as_ref().and_then(|spec| spec.network.clone());
        let tied = |name: &Name| {
            let old = old.as_ref().map(|old| mesh::ties(old, name));
            old.is_some_and(|old| old != mesh::ties(&spec, name))
        };
        let tied: BTreeSet<Name> = spec.guests.keys().filter(|name| tied(name)).cloned().collect();
        if !self.wants(&spec) {
            self.revision += 1;
            self.spec = Some(spec.clone());
        }
        if let Some(network) = &spec.network
            && !self.network.mode.is_there()
            && (self.network.mode == NetworkMode::Undecided || before.as_ref() != Some(network))
        {
            effects.push(Effect::DecideNetwork(network.namespace));
        }
        for (name, guest) in &mut self.guests {
            if !spec.guests.contains_key(name) {
                guest.wanted = false;
                guest.start_at_ms = None;
            }
        }
        self.stop_due(effects);
        for (name, config) in spec.guests {
            let guest = self
                .guests
                .entry(name.clone())
                .or_insert_with(|| Guest::new(config.clone(), now_ms));
            let is_tied = tied.contains(&name);
            if guest.config != config || guest.given.revision == 0 || is_tied {
                forget_forwards(&mut self.feed, &name, &guest.config, &config);
                let told =
                    guest.given.revision == 0 || is_tied || concerns_guest(&name, &guest.config, &config);
                if told {
                    guest.given.revision = self.revision;
                }
                guest.config = config;
                if told && matches!(guest.phase, Phase::Starting | Phase::Running) {
                    effects.push(Effect::Push(name.clone(), guest.config.clone()));
                }
            }
            guest.wanted = true;
            if matches!(guest.phase, Phase::Stopped | Phase::Failed | Phase::CrashLoop) {
                guest.backoff.forget();
                guest.start_at_ms = Some(now_ms);
            }
        }
    }

    /// Says what waits for another boot, and takes it back when nothing does.
    pub(super) fn judge_machines(&mut self, now_ms: u64) {
        for (name, guest) in &self.guests {
            let differs = guest.machine.as_ref().and_then(|machine| {
                let networked = match self.network.mode {
                    NetworkMode::Undecided => machine.card, // not known yet whether another boot would differ
                    NetworkMode::Off(_) => false,
                    NetworkMode::Private | NetworkMode::Host => true,
                };
                machine.differs(&Machine::wanted(&guest.config, networked))
            });
            let key = host_key(Layer::Vmm, name, MACHINE);
            match differs {
                Some(what) => {
                    let text = format!("{what}: in force after `sovereign down {name}` and `sovereign up`");
                    self.feed
                        .observe(key, Verdict::no("RestartNeeded", text), LASTING_MS, now_ms);
                }
                None => {
                    self.feed.remove(&key);
                }
            }
        }
    }

    /// Adopts a guest in order to stop it.
    fn stop_leftover(&mut self, name: Name, config: GuestConfig, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.guests.contains_key(&name) {
            return;
        }
        let mut guest = Guest::new(config.clone(), now_ms);
        guest.wanted = false;
        guest.phase = Phase::Stopping;
        self.guests.insert(name.clone(), guest);
        effects.push(Effect::Start(name.clone(), config));
        effects.push(Effect::Stop(name));
    }

    fn stop_all(&mut self, effects: &mut Vec<Effect>) {
        self.stopping = true;
        for guest in self.guests.values_mut() {
            guest.wanted = false;
            guest.start_at_ms = None;
        }
        self.stop_due(effects);
    }

    fn start_due(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        for (name, guest) in &mut self.guests {
            let due = guest.start_at_ms.map(|at| self.network.start_ms(name, guest, at));
            if due.is_some_and(|at| at <= now_ms) {
                guest.start_at_ms = None;
                guest.phase = Phase::Starting;
                effects.push(Effect::Start(name.clone(), guest.config.clone()));
            }
        }
    }

    /// A wedged guest is ended only where its configuration says so; its restart is that of any failure.
    fn end_wedged(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        for (name, guest) in &mut self.guests {
            let lives = matches!(guest.phase, Phase::Starting | Phase::Running);
            if guest.config.restart.wedged && lives && guest.wedge.take(now_ms) {
                effects.push(Effect::Kill(name.clone()));
            }
        }
    }

    fn ended(&mut self, name: &Name, record: &ExitRecord, now_ms: u64) {
        let stale: Vec<Key> = self.guest_conditions(name, now_ms).map(|c| c.key).collect();
        let Some(guest) = self.guests.get_mut(name) else {
            return;
        };
        guest.boot = None;
        guest.machine = None;
        guest.cardless = None;
        self.network.running.remove(name);
        guest.wedge.ended();
        guest.crowded = false;
        guest.applied = Edition::default();
        guest.start_at_ms = None;
        for key in stale {
            self.feed.remove(&key);
        }
        guest.phase = match (guest.wanted, record.reason) {
            (false, _) => Phase::Stopped,
            (true, _) if guest.phase == Phase::Stopping => {
                guest.start_at_ms = Some(now_ms); // wanted again while it was being stopped
                Phase::Stopped
            }
            (true, ExitReason::PoweredOff) if guest.config.restart.when != RestartWhen::Always => {
                Phase::Stopped // somebody in the guest meant it
            }
            (true, ExitReason::GuestRebooted) => {
                guest.start_at_ms = Some(now_ms);
                Phase::Starting
            }
            (true, _) if guest.config.restart.when == RestartWhen::Never => Phase::Failed,
            (true, _) => match guest.backoff.ended(now_ms) {
                Next::StartAt(at) => {
                    guest.start_at_ms = Some(at);
                    Phase::Failed
                }
                Next::CrashLoop => Phase::CrashLoop,
            },
        };
        let code = if guest.phase == Phase::CrashLoop {
            "CrashLoop".to_owned()
        } else {
            format!("{:?}", record.reason)
        };
        let verdict = Verdict::no(code, &record.evidence);
        self.feed
            .observe(host_key(Layer::Vmm, name, "vmm"), verdict, LASTING_MS, now_ms);
    }

    fn judge_ready(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        for (name, ready) in self.readiness(now_ms) {
            let Some(guest) = self.guests.get_mut(&name) else {
                continue;
            };
            if guest.ready != ready {
                guest.ready = ready;
                guest.ready_since_ms = now_ms;
            }
            let serve = ready == Status::True && guest.wanted;
            if guest.serving != serve {
                guest.serving = serve;
                effects.push(Effect::Forwards(name, serve));
            }
        }
    }
}

impl Guest {
    fn new(config: GuestConfig, now_ms: u64) -> Self {
        Self {
            config,
            wanted: true,
            phase: Phase::Stopped,
            given: Edition::default(),
            applied: Edition::default(),
            boot: None,
            machine: None,
            cardless: None,
            ready: Status::Unknown,
            ready_since_ms: now_ms,
            start_at_ms: None,
            backoff: Backoff::default(),
            serving: false,
            wedge: Wedge::default(),
            crowded: false,
        }
    }

    pub(super) fn stop(&mut self, name: &Name, effects: &mut Vec<Effect>) {
        self.start_at_ms = None;
        match self.phase {
            Phase::Starting | Phase::Running => {
                self.phase = Phase::Stopping;
                effects.push(Effect::Stop(name.clone()));
            }
            Phase::Failed | Phase::CrashLoop => self.phase = Phase::Stopped,
            Phase::Stopped | Phase::Stopping => {}
        }
    }
}

/// A clock measurement says nothing about the clock after this time.
pub(super) const CLOCK_VALID_MS: u64 = 200_000;

/// The subject of a guest's clock as the host measured it, in [`Layer::Clock`].
pub(super) const OFFSET: &str = "offset";

/// What the host judges itself, whatever a guest may claim; the subject is the guest's own.
pub(super) fn host_owned(layer: Layer, subject: &str) -> bool {
    match layer {
        Layer::Vmm | Layer::Session | Layer::Tap | Layer::Routing | Layer::Nat | Layer::Forward => true,
        Layer::Clock => subject == OFFSET,
        Layer::Service => mesh::is_requirement(subject),
        _ => false,
    }
}

pub(super) fn host_key(layer: Layer, guest: &Name, subject: &str) -> Key {
    Key::new(layer, format!("{guest}/{subject}"))
}

#[cfg(test)]
#[path = "world_tests.rs"]
pub(super) mod tests;
