//! The agent inside a guest.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use nix::sys::signal::SigSet;
use sovereign_guest_agent::core::net::Order;
use sovereign_guest_agent::core::world::{Effect, Event, World};
use sovereign_guest_agent::engine::{self, Hands, Request};
use sovereign_guest_agent::facts::BootFacts;
use sovereign_guest_agent::handover::{self, Handover};
use sovereign_guest_agent::miniflux::Miniflux;
use sovereign_guest_agent::net::{self, former, kernel::Files};
use sovereign_guest_agent::postgres::Postgres;
use sovereign_guest_agent::server::Server;
use sovereign_guest_agent::{clock, log, observe, places, spawn, tailscale};
use sovereign_protocol::feed::Feed;
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::limits::GUEST_EVENTS;
use sovereign_protocol::spec::ServiceKind;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, watch};

/// Events of one service that may wait for the engine.
const SERVICE_EVENTS: usize = 4;
/// Orders to the network that may wait; the world has one on its way.
const ORDERS: usize = 4;

fn main() {
    // PID 1 blocks the signals that it reads; a blocked SIGTERM would be inherited down to every service.
    if let Err(error) = SigSet::empty().thread_set_mask() {
        log::line("signals stay blocked", &[("error", &error)]);
    }
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    if let [verb, rest @ ..] = &arguments[..]
        && verb == spawn::VERB
    {
        let error = spawn::enter(rest);
        log::line("cannot become a service", &[("error", &error)]);
        std::process::exit(127);
    }
    if let Err(error) = run() {
        log::line("the agent cannot run", &[("error", &format!("{error:#}"))]);
        std::process::exit(1);
    }
}

fn run() -> anyhow::Result<()> {
    let init = handover::agent_end().context("fd 0")?;
    let handover = Handover::receive(&init)
        .context("the handover on fd 0: only PID 1 of a guest starts this program")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("runtime")?;
    runtime.block_on(agent(init, handover))
}

async fn agent(init: UnixStream, handover: Handover) -> anyhow::Result<()> {
    let _ = clock::agent_since_ms(); // the first call counts
    let facts = BootFacts::read(Path::new(places::FACTS)).unwrap_or_else(|error| {
        log::line("no boot facts", &[("error", &error)]);
        BootFacts::default()
    });
    let incarnation = u64::from_str_radix(&random_hex::<8>()?, 16)?;
    let (engine, handle) = engine::new(World::new(Feed::new(incarnation, GUEST_EVENTS), facts.clone()));
    init.set_nonblocking(true)?;
    let writer = init.try_clone()?;
    tokio::spawn(hear_init(
        tokio::net::UnixStream::from_std(init)?,
        handle.requests(),
    ));
    tokio::spawn(observe::run(facts, handle.requests()));
    let (orders, queue) = mpsc::channel(ORDERS);
    tokio::spawn(net::run(Files::default(), queue, handle.requests()));
    let (tailscale, wanted) = watch::channel(false);
    tokio::spawn(tailscale::run(
        tailscale::Places::default(),
        wanted,
        handle.requests(),
    ));
    let (ways, told) = watch::channel(None);
    tokio::spawn(former::run(places::WAYS.into(), told, handle.requests()));
    let server = Server::new(handover.identity(), handle.clone());
    tokio::spawn(server.run_vsock(handover.port));
    let hands = RealHands {
        init: writer,
        requests: handle.requests(),
        orders,
        tailscale,
        ways,
    };
    log::line(
        "agent started",
        &[
            ("boot", &handover.boot_id),
            ("version", &env!("CARGO_PKG_VERSION")),
        ],
    );
    engine.run(hands).await; // for ever: this function holds a handle
    drop(handle);
    Ok(())
}

/// PID 1 asks for a stop when it gets a signal; it never goes away before us.
async fn hear_init(mut init: tokio::net::UnixStream, requests: mpsc::Sender<Request>) {
    while let Ok(byte) = init.read_u8().await {
        if byte == handover::STOP && requests.send(Request::Event(Event::Shutdown)).await.is_err() {
            return;
        }
    }
}

struct RealHands {
    init: UnixStream,
    requests: mpsc::Sender<Request>,
    orders: mpsc::Sender<Order>,
    tailscale: watch::Sender<bool>,
    ways: watch::Sender<Option<InterfaceSpec>>,
}

impl RealHands {
    /// The queue is bounded and this is the engine's own task, which must not wait for itself.
    fn tell(&self, event: Event) {
        if self.requests.try_send(Request::Event(event)).is_err() {
            log::line("an event was lost", &[]);
        }
    }
}

impl Hands for RealHands {
    fn begin(&mut self, effect: Effect) {
        match effect {
            Effect::Hostname(name) => note("hostname", set_hostname(name.as_str())),
            Effect::Clock(adjustment) => {
                if adjustment.step_ns != 0 {
                    log::line("the clock is stepped", &[("by_ns", &adjustment.step_ns)]);
                }
                if let Err(error) = clock::adjust(adjustment) {
                    log::line("the clock cannot be adjusted", &[("error", &error)]);
                    // If this is lost, the next correction fails again.
                    self.tell(Event::ClockFailed(format!("{adjustment:?}: {error}")));
                }
            }
            Effect::Network(order) => {
                let attempt = order.attempt;
                if self.orders.try_send(order).is_err() {
                    let why = "the network's task does not take orders".to_owned();
                    self.tell(Event::NetworkTaken(attempt, Err(why)));
                }
            }
            Effect::Tailscale(wanted) => {
                let _ = self.tailscale.send(wanted); // its task ends only with this one
            }
            Effect::Ways(interface) => drop(self.ways.send(Some(*interface))), // as with Tailscale's
            Effect::Answer(..) => {}                                           // the engine's own
            Effect::PowerOff => note("power off", self.init.write_all(&[handover::POWER_OFF])),
            Effect::Service(brief, action) => {
                let (events, mut queue) = mpsc::channel(SERVICE_EVENTS);
                let (name, requests) = (brief.service.name.clone(), self.requests.clone());
                match &brief.service.kind {
                    ServiceKind::Postgres { .. } => tokio::spawn(Postgres::new(*brief).act(action, events)),
                    ServiceKind::Miniflux { .. } => tokio::spawn(Miniflux::new(*brief).act(action, events)),
                };
                tokio::spawn(async move {
                    while let Some(event) = queue.recv().await {
                        let request = Request::Event(Event::Service(name.clone(), event));
                        if requests.send(request).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    }

    fn alive(&mut self) {
        // A full socket means that PID 1 has not read for long; it counts what it reads.
        let _ = self.init.write_all(&[handover::ALIVE]);
    }
}

fn note(what: &str, outcome: std::io::Result<()>) {
    if let Err(error) = outcome {
        log::line("failed", &[("what", &what), ("error", &error)]);
    }
}

fn set_hostname(name: &str) -> std::io::Result<()> {
    nix::unistd::sethostname(name)?;
    let etc = Path::new(places::ETC);
    std::fs::write(etc.join("hostname"), format!("{name}\n"))?;
    std::fs::write(
        etc.join("hosts"),
        format!("127.0.0.1 localhost {name}\n::1 localhost\n"),
    )
}
