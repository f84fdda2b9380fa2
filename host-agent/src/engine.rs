//! The one task that owns the world: one bounded queue in, effects out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context;
use sovereign_protocol::event::{self, Events, Journal, Start};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::HOST_EVENTS;
use sovereign_protocol::mesh::{Requirement, ServiceRef};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Exposed, GuestConfig, HostSpec, Service};
use sovereign_protocol::status::StatusReport;
use sovereign_protocol::v1::{Applied, Refusal};
use sovereign_reconcile::finding::FindingsView;
use sovereign_reconcile::resolver::HostResolver;
use sovereign_reconcile::view::NetworkView;
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::{Anchor, boottime_ms, wall_ns};
use crate::core::{Effect, Event, Ties, World};
use crate::document;
use crate::forward::{Claim, Forward};
use crate::guest;
use crate::link::{Target, Wanted};
use crate::net::{Network, NetworkSpec, Removal, RemoveMode};
use crate::secrets::Secrets;
use crate::store::{self, Batch, Kept, Store, Writer};

mod forwards;
mod network;
mod shared_ports;
mod start;

/// Events and requests that may wait.
pub const QUEUE: usize = 256;
/// The longest wait without looking at the clock.
const IDLE: Duration = Duration::from_secs(60);

/// What the control socket asks of the engine.
#[derive(Debug)]
pub enum Request {
    /// Replace the wanted state.
    Apply(Vec<u8>, oneshot::Sender<Result<Applied, Refusal>>),
    /// What is wanted, as a document.
    Wanted(oneshot::Sender<Vec<u8>>),
    /// What changed after a cursor.
    Changes(Option<Cursor>, oneshot::Sender<Changes>),
    /// What happened.
    Events(Start, oneshot::Sender<Events>),
    /// Everything.
    Status(oneshot::Sender<StatusReport>),
    /// A guest's agent.
    Target(Name, oneshot::Sender<Option<Target>>),
    /// What is there of the network.
    Network(oneshot::Sender<NetworkView>),
    /// What others did to it.
    Findings(oneshot::Sender<Result<FindingsView, Refusal>>),
    /// Remove leftovers of these names.
    RemoveLeftovers(Vec<String>, RemoveMode, oneshot::Sender<Result<Removal, Refusal>>),
    /// Stop all guests and end.
    Stop,
}

/// The engine and its adapters.
pub struct Engine {
    layout: Layout,
    world: World,
    secrets: Secrets,
    guests: BTreeMap<Name, guest::Handle>,
    forwards: BTreeMap<(Name, Name), (std::net::SocketAddr, Forward)>,
    /// Forwards that the kernel translates and whose ports nobody else has.
    translated: BTreeMap<(Name, Name), Claim>,
    /// What those take of this host, for who looks whether others wait there.
    claimed: watch::Sender<shared_ports::Claimed>,
    events: mpsc::Sender<Event>,
    news: watch::Sender<(Cursor, Cursor)>,
    anchor: Anchor,
    store: Writer,
    /// What of the journal was handed to the store.
    saved: Cursor,
    /// How many displaced events the store was told of.
    saved_displaced: u64,
    saved_read: BTreeMap<Name, Cursor>,
    resumed: Option<HostSpec>,
    network: Option<OpenNetwork>,
    /// Guests that boot, or were found, with a card, or are to have one as soon as their TAP can be opened.
    cards: BTreeSet<Name>,
}

/// The network while it is there.
struct OpenNetwork {
    network: Network,
    wanted: watch::Sender<NetworkSpec>,
}

/// What is said to who asks while all is stopped.
pub(crate) fn stopping() -> Refusal {
    Refusal::Conflict("the host agent is stopping".to_owned())
}

/// Numbers that events of the last agent may have had without being kept.
const UNSAVED: u64 = 1_000;

/// A spec of another version is not ours to guess at: `up` gives the next one.
fn wanted_spec(kept: &Kept) -> Option<HostSpec> {
    let store::Wanted::Spec(document) = &kept.wanted else {
        return None;
    };
    HostSpec::parse(document)
        .inspect_err(
            |error| tracing::warn!(%error, "the kept specification cannot be read: nothing is wanted"),
        )
        .ok()
}

fn restore(kept: &Kept, anchor: &Anchor, now_ms: u64) -> Journal {
    let mut journal = Journal::new(kept.incarnation, HOST_EVENTS);
    let now = anchor.wall_ms(now_ms);
    for (event, wall_ms) in &kept.events {
        let age_ms = now.saturating_sub(*wall_ms);
        journal.restore(
            event::Event {
                age_ms,
                ..event.clone()
            },
            now_ms,
        );
    }
    if !kept.events.is_empty() {
        journal.skip(UNSAVED);
    }
    journal
}

impl Engine {
    /// An engine for an instance; the receiver tells watchers that feed or journal went on.
    ///
    /// # Errors
    /// When store or secrets cannot be read.
    pub fn new(
        layout: Layout,
        incarnation: u64,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<(Self, watch::Receiver<(Cursor, Cursor)>)> {
        let store = Store::open(&layout.store())?;
        let kept = store.load()?;
        let now_ms = boottime_ms();
        let anchor = Anchor::new(wall_ns(), now_ms);
        let spec = wanted_spec(&kept);
        let journal = restore(&kept, &anchor, now_ms);
        let saved = journal.cursor();
        let world = World::resume(
            incarnation,
            journal,
            kept.read.clone(),
            kept.revision,
            spec.clone(),
        );
        let (news, receiver) = watch::channel(world.cursors());
        let engine = Self {
            secrets: Secrets::load(&layout.secrets())?,
            layout,
            world,
            guests: BTreeMap::new(),
            forwards: BTreeMap::new(),
            translated: BTreeMap::new(),
            claimed: watch::Sender::default(),
            events,
            news,
            anchor,
            store: Writer::start(store).context("cannot start the store's thread")?,
            saved,
            saved_displaced: 0,
            saved_read: kept.read,
            resumed: spec,
            network: None,
            cards: BTreeSet::new(),
        };
        Ok((engine, receiver))
    }

    /// Takes in what this host asks itself, before anything is started.
    #[must_use]
    pub fn knowing(mut self, resolver: HostResolver) -> Self {
        self.world.know_resolver(resolver);
        self
    }

    /// Runs until everything was stopped on request.
    ///
    /// # Errors
    /// When it cannot be kept that nothing is wanted any more.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut requests: mpsc::Receiver<Request>,
    ) -> anyhow::Result<()> {
        self.take(Event::Started(format!(
            "sovereign-host {} pid {}",
            env!("CARGO_PKG_VERSION"),
            std::process::id()
        )))
        .await;
        tokio::spawn(shared_ports::watch(self.claimed.subscribe(), self.events.clone()));
        let running = start::running_shims(&self.layout.run);
        let names = running.iter().map(|shim| shim.guest.clone()).collect();
        self.take(Event::Running(names)).await;
        if let Some(spec) = self.resumed.take() {
            self.accept(spec).await;
        }
        for shim in running {
            self.take(Event::Found(shim.guest.clone(), shim.bare_guest()))
                .await;
        }
        while !self.world.is_done() {
            let pause = self.pause();
            // Each arm is cancel safe and only takes one value.
            tokio::select! {
                Some(event) = events.recv() => self.take(event).await,
                Some(request) = requests.recv() => self.answer(request).await,
                () = tokio::time::sleep(pause) => self.take(Event::Tick).await,
            }
        }
        self.end_network().await.context("the network does not end")?;
        self.keep_wanted(self.world.revision(), store::Wanted::Nothing)
            .await
    }

    fn pause(&self) -> Duration {
        let due = self
            .world
            .next_tick_ms()
            .map(|at| at.saturating_sub(boottime_ms()));
        due.map_or(IDLE, |ms| Duration::from_millis(ms).min(IDLE))
    }

    async fn answer(&mut self, request: Request) {
        // A caller that is gone needs no answer.
        match request {
            Request::Apply(document, reply) => {
                let applied = self.apply(&document).await;
                let _ = reply.send(applied);
            }
            Request::Wanted(reply) => {
                let document = self.world.spec().map(serde_json::to_vec);
                let _ = reply.send(document.and_then(Result::ok).unwrap_or_default());
            }
            Request::Changes(cursor, reply) => {
                let _ = reply.send(self.world.changes(cursor, boottime_ms()));
            }
            Request::Events(start, reply) => {
                let now_ms = boottime_ms();
                let wall_ms = self.anchor.wall_ms(now_ms);
                let _ = reply.send(self.world.events(start, now_ms, wall_ms));
            }
            Request::Status(reply) => {
                let now_ms = boottime_ms();
                self.anchor.follow(wall_ns(), now_ms);
                let when = |ms| self.anchor.rfc3339(ms);
                let _ = reply.send(self.world.report(&self.layout.instance, now_ms, when));
            }
            Request::Target(name, reply) => {
                let target = self
                    .guests
                    .get(&name)
                    .and_then(|handle| handle.target.borrow().clone());
                let _ = reply.send(target);
            }
            Request::Network(reply) => self.network_view(reply),
            Request::Findings(reply) => self.findings(reply),
            Request::RemoveLeftovers(names, mode, reply) => self.remove_leftovers(names, mode, reply),
            Request::Stop => self.take(Event::StopAll).await,
        }
    }

    async fn apply(&mut self, document: &[u8]) -> Result<Applied, Refusal> {
        let spec = HostSpec::parse(document).map_err(|error| Refusal::Invalid(error.to_string()))?;
        if self.world.is_stopping() {
            return Err(stopping());
        }
        if let Some(why) = self.world.network_in_the_way(&spec) {
            return Err(Refusal::Conflict(why));
        }
        if !self.world.wants(&spec) {
            let revision = self.world.revision() + 1;
            let kept = self
                .keep_wanted(revision, store::Wanted::Spec(document.to_vec()))
                .await;
            kept.map_err(|error| Refusal::Failed(format!("{error:#}")))?;
        }
        self.accept(spec).await;
        Ok(Applied {
            revision: self.world.revision(),
        })
    }

    async fn keep_wanted(&self, revision: u64, wanted: store::Wanted) -> anyhow::Result<()> {
        let batch = Batch {
            wanted: Some((revision, wanted)),
            ..Batch::default()
        };
        Ok(self.store.keep_now(batch).await?)
    }

    /// Hands new events to the store; what it does not take now goes with the next ones.
    fn keep_events(&mut self) {
        loop {
            let now_ms = boottime_ms();
            let fresh = self.world.events(Start::After(self.saved), now_ms, 0);
            let read = self.world.read();
            let changed = |(name, cursor): &(&Name, &Cursor)| self.saved_read.get(*name) != Some(*cursor);
            let (displaced_count, displaced) = self.world.displaced(self.saved_displaced);
            let batch = Batch {
                wanted: None,
                displaced: displaced.into_iter().collect(),
                events: fresh
                    .events
                    .into_iter()
                    .map(|event| {
                        let at_ms = now_ms.saturating_sub(event.age_ms);
                        (event, self.anchor.wall_ms(at_ms))
                    })
                    .collect(),
                read: read
                    .iter()
                    .filter(changed)
                    .map(|(name, cursor)| (name.clone(), *cursor))
                    .collect(),
            };
            if batch.is_empty() || !self.store.keep(batch) {
                return;
            }
            self.saved = fresh.cursor;
            self.saved_displaced = displaced_count;
            self.saved_read.clone_from(read);
        }
    }

    async fn accept(&mut self, spec: HostSpec) {
        let verdicts = self.reserve_forwards(&spec);
        self.take(Event::Applied(spec)).await;
        for event in verdicts {
            self.take(event).await;
        }
        // A forward that is new to a guest that serves opens at once; one that leads elsewhere turns.
        for guest in self.world.serving() {
            self.switch_forwards(&guest, true).await;
        }
    }

    async fn take(&mut self, event: Event) {
        if let Event::NoCard(name, _) = &event {
            self.cards.remove(name);
        }
        let effects = self.world.step(event, boottime_ms());
        for effect in effects {
            self.act(effect).await;
        }
        self.want_cards();
        self.keep_events();
        let now = self.world.cursors();
        self.news
            .send_if_modified(|news| std::mem::replace(news, now) != now);
    }

    async fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Start(name, config) => self.start(name, &config).await,
            Effect::Push(name, config) => match self.document(&name, &config) {
                Ok(wanted) => {
                    if let Some(handle) = self.guests.get(&name) {
                        handle.wanted.send_replace(wanted);
                    }
                }
                Err(error) => self.report(Event::SpecRefused(name, format!("{error:#}"))).await,
            },
            Effect::Stop(name) => {
                if let Some(handle) = self.guests.get(&name) {
                    handle.wanted.send_modify(|wanted| wanted.shutdown = true);
                }
            }
            Effect::DecideNetwork(namespace) => self.decide_network(namespace),
            Effect::OpenNetwork => self.open_network(),
            Effect::Kill(name) => {
                if let Some(handle) = self.guests.get(&name) {
                    handle.wanted.send_modify(|wanted| wanted.kill = true);
                }
            }
            Effect::Forwards(name, serve) => self.switch_forwards(&name, serve).await,
        }
    }

    /// Feeds back what an effect came to; the queue may be full of guests' events meanwhile.
    async fn report(&mut self, event: Event) {
        let events = self.events.clone();
        tokio::spawn(async move { events.send(event).await });
    }

    fn document(&mut self, name: &Name, config: &GuestConfig) -> anyhow::Result<Wanted> {
        let edition = self.world.edition(name);
        let ties = self.world.ties(name);
        let secrets = self.secrets_of(name, config, &ties)?;
        let interface = self.world.interface(config).filter(|_| self.cards.contains(name));
        let spec = document::guest_spec(name, config, ties, edition.revision, secrets, interface);
        Ok(Wanted {
            document: serde_json::to_vec(&spec)?,
            edition,
            shutdown: false,
            kill: false,
        })
    }

    /// Each service's own, those of who logs in to it, and that of what it needs.
    fn secrets_of(
        &mut self,
        name: &Name,
        config: &GuestConfig,
        ties: &Ties,
    ) -> anyhow::Result<BTreeMap<String, Exposed>> {
        let mut secrets = BTreeMap::new();
        for Service { name: service, .. } in &config.services {
            secrets.insert(service.to_string(), self.secrets.password(name, service)?);
            if let Some(needed) = ties.requirements.get(service) {
                let value = self.secrets.credential(&needed.of, &needed.role)?;
                secrets.insert(Requirement::secret(service), value);
            }
            let of = ServiceRef {
                guest: name.clone(),
                service: service.clone(),
            };
            for client in ties.clients.get(service).into_iter().flatten() {
                let value = self.secrets.credential(&of, &client.role)?;
                secrets.insert(client.secret(service), value);
            }
        }
        Ok(secrets)
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
