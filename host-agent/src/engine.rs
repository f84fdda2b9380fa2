//! The one task that owns the world: one bounded queue in, effects out.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;
use sovereign_protocol::condition::Verdict;
use sovereign_protocol::event::{Events, Start};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, GuestSpec, HostSpec, ServiceKind, VERSION};
use sovereign_protocol::status::StatusReport;
use sovereign_protocol::v1::{Applied, Refusal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::clock::{Anchor, boottime_ms, wall_ns};
use crate::core::{Effect, Event, World};
use crate::files;
use crate::forward::Forward;
use crate::guest;
use crate::link::{Target, Wanted};
use crate::secrets::Secrets;
use crate::shim::contract::{Paths, ShimConfig};

/// Events and requests that may wait.
pub const QUEUE: usize = 256;
/// The longest wait without looking at the clock.
const IDLE: Duration = Duration::from_secs(60);

/// What the control socket asks of the engine.
#[derive(Debug)]
pub enum Request {
    /// Replace the wanted state.
    Apply(Vec<u8>, oneshot::Sender<Result<Applied, Refusal>>),
    /// What changed after a cursor.
    Changes(Option<Cursor>, oneshot::Sender<Changes>),
    /// What happened.
    Events(Start, oneshot::Sender<Events>),
    /// Everything.
    Status(oneshot::Sender<StatusReport>),
    /// A guest's agent.
    Target(Name, oneshot::Sender<Option<Target>>),
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
    events: mpsc::Sender<Event>,
    news: watch::Sender<(Cursor, Cursor)>,
    anchor: Anchor,
}

impl Engine {
    /// An engine for an instance; the receiver tells watchers that feed or journal went on.
    ///
    /// # Errors
    /// When the secrets cannot be read.
    pub fn new(
        layout: Layout,
        incarnation: u64,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<(Self, watch::Receiver<(Cursor, Cursor)>)> {
        let world = World::new(incarnation);
        let (news, receiver) = watch::channel(world.cursors());
        let engine = Self {
            secrets: Secrets::load(&layout.secrets())?,
            layout,
            world,
            guests: BTreeMap::new(),
            forwards: BTreeMap::new(),
            events,
            news,
            anchor: Anchor::new(wall_ns(), boottime_ms()),
        };
        Ok((engine, receiver))
    }

    /// Runs until everything was stopped on request.
    ///
    /// # Errors
    /// When a spec that was kept can no longer be read.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut requests: mpsc::Receiver<Request>,
    ) -> anyhow::Result<()> {
        if let Some(document) = files::read_optional(&self.layout.wanted())? {
            let spec = HostSpec::parse(&document).with_context(|| {
                format!(
                    "{} is damaged: `sovereign up` replaces it",
                    self.layout.wanted().display()
                )
            });
            match spec {
                Ok(spec) => self.accept(spec).await,
                Err(error) => tracing::warn!(error = format!("{error:#}"), "starting with nothing wanted"),
            }
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
        files::remove(&self.layout.wanted())
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
            Request::Changes(cursor, reply) => {
                let _ = reply.send(self.world.changes(cursor, boottime_ms()));
            }
            Request::Events(start, reply) => {
                let _ = reply.send(self.world.events(start, boottime_ms()));
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
            Request::Stop => self.take(Event::StopAll).await,
        }
    }

    async fn apply(&mut self, document: &[u8]) -> Result<Applied, Refusal> {
        let spec = HostSpec::parse(document).map_err(|error| Refusal::Invalid(error.to_string()))?;
        files::replace(&self.layout.wanted(), document)
            .map_err(|error| Refusal::Failed(format!("{error:#}")))?;
        self.accept(spec).await;
        Ok(Applied {
            revision: self.world.revision(),
        })
    }

    async fn accept(&mut self, spec: HostSpec) {
        let verdicts = self.reserve_forwards(&spec);
        self.take(Event::Applied(spec)).await;
        for event in verdicts {
            self.take(event).await;
        }
    }

    async fn take(&mut self, event: Event) {
        let effects = self.world.step(event, boottime_ms());
        for effect in effects {
            self.act(effect).await;
        }
        let now = self.world.cursors();
        self.news
            .send_if_modified(|news| std::mem::replace(news, now) != now);
    }

    async fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Start(name, config, revision) => self.start(name, &config, revision).await,
            Effect::Push(name, config, revision) => match self.document(&name, &config, revision) {
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
            Effect::Forwards(name, serve) => self.switch_forwards(&name, serve).await,
        }
    }

    async fn start(&mut self, name: Name, config: &GuestConfig, revision: u64) {
        let wanted = match self.document(&name, config, revision) {
            Ok(wanted) => wanted,
            Err(error) => return self.report(Event::SpecRefused(name, format!("{error:#}"))).await,
        };
        let shim = ShimConfig {
            paths: Paths::of(&self.layout, &name),
            guest: name.clone(),
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            data_mib: config.data_mib,
            image: config.image.clone(),
        };
        let handle = guest::start(shim, wanted, self.events.clone());
        self.guests.insert(name, handle);
    }

    /// Feeds back what an effect came to; the queue may be full of guests' events meanwhile.
    async fn report(&mut self, event: Event) {
        let events = self.events.clone();
        tokio::spawn(async move { events.send(event).await });
    }

    fn document(&mut self, name: &Name, config: &GuestConfig, revision: u64) -> anyhow::Result<Wanted> {
        let mut secrets = BTreeMap::new();
        for service in &config.services {
            let ServiceKind::Postgres { .. } = service.kind;
            secrets.insert(
                service.name.to_string(),
                self.secrets.password(name, &service.name)?,
            );
        }
        let spec = GuestSpec {
            version: VERSION,
            revision,
            hostname: name.clone(),
            services: config.services.clone(),
            secrets,
            interface: None,
            tailscale: None,
        };
        Ok(Wanted {
            document: serde_json::to_vec(&spec)?,
            revision,
            shutdown: false,
        })
    }

    /// Reserves what is new, releases what is gone; conflicts become conditions.
    fn reserve_forwards(&mut self, spec: &HostSpec) -> Vec<Event> {
        let wanted: BTreeMap<(Name, Name), std::net::SocketAddr> = spec
            .guests
            .iter()
            .flat_map(|(guest, config)| {
                config
                    .forwards
                    .iter()
                    .map(|f| ((guest.clone(), f.name.clone()), f.listen))
            })
            .collect();
        self.forwards
            .retain(|key, (listen, _)| wanted.get(key) == Some(listen));
        let mut verdicts = Vec::new();
        for (key, listen) in wanted {
            if self.forwards.contains_key(&key) {
                continue;
            }
            let verdict = match Forward::reserve(listen) {
                Ok(forward) => {
                    self.forwards.insert(key.clone(), (listen, forward));
                    Verdict::unknown("Reserved", format!("{listen} opens when the guest is ready"))
                }
                Err(error) => Verdict::no("PortUnavailable", format!("{listen}: {error}")),
            };
            verdicts.push(Event::Forward(key.0, key.1.to_string(), verdict));
        }
        verdicts
    }

    async fn switch_forwards(&mut self, guest: &Name, serve: bool) {
        let Some(target) = self.guests.get(guest).map(|handle| handle.target.clone()) else {
            return;
        };
        let ports = self.world.forward_ports(guest);
        let mut verdicts = Vec::new();
        for ((owner, name), (listen, forward)) in &mut self.forwards {
            let Some(port) = ports.get(name).filter(|_| owner == guest) else {
                continue;
            };
            let switched = if serve {
                forward.open(*port, target.clone())
            } else {
                forward.close().await
            };
            let verdict = match switched {
                Ok(()) if serve => Verdict::yes("Listening", format!("{listen} leads to port {port}")),
                Ok(()) => Verdict::no(
                    "NotListening",
                    format!("{listen} refuses: the guest is not ready"),
                ),
                Err(error) => Verdict::no("PortUnavailable", format!("{listen}: {error}")),
            };
            verdicts.push(Event::Forward(guest.clone(), name.to_string(), verdict));
        }
        for event in verdicts {
            self.report(event).await;
        }
    }
}
