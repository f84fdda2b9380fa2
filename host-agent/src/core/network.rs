//! The network as the world sees it: whether there is one, and whose card is attached.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Forward, GuestConfig, HostSpec, Namespace};
use sovereign_protocol::status::Phase;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::filter::PortForward;
use sovereign_reconcile::finding::Code;
use sovereign_reconcile::uplink::{Exit, NoExit};
use sovereign_reconcile::view::NetworkMode;

use super::world::{Guest, LASTING_MS, World, host_key};
use crate::net::{NetworkEvent, Part, Stop};

/// A guest waits so long for its network, and then boots without a card: vsock needs none.
const PATIENCE_MS: u64 = 5_000;
/// The subject of a guest's card in [`Layer::Tap`].
const CARD: &str = "card";

/// The subject of what is true of the network as a whole.
const NETWORK: &str = "network";

/// By which way guests leave; nothing is said where none is wanted.
fn judge_exits(exits: &BTreeMap<Family, Exit>) -> Option<Verdict> {
    let wanted = exits
        .iter()
        .filter(|(_, exit)| !matches!(exit, Exit::None(NoExit::Unwanted)));
    let told: Vec<String> = wanted
        .clone()
        .map(|(family, exit)| match exit {
            Exit::None(why) => format!("{family}: {why}"),
            Exit::Main(link) => format!("{family} by {link}"),
            Exit::Table(table, link) => format!("{family} by {link} (table {table})"),
            Exit::Own(link, _) => format!("{family} by {link}, chosen by name"),
        })
        .collect();
    let first = wanted.clone().next()?;
    Some(match first {
        _ if wanted.clone().any(|(_, exit)| exit.link().is_some()) => Verdict::yes("WayOut", told.join("; ")),
        (_, Exit::None(NoExit::Blocked)) => Verdict::no("Blocked", told.join("; ")),
        _ => Verdict::no("NoWayOut", told.join("; ")),
    })
}

/// What the kernel is to do for a forward, if it is the kernel's.
fn translation(config: &GuestConfig, forward: &Forward) -> Option<PortForward> {
    forward.translated?;
    let listen = forward.listen.ip();
    Some(PortForward {
        transport: forward.transport(),
        listen: Some(listen).filter(|ip| !ip.is_unspecified()),
        ports: forward.ports()?,
        to: config.address_of(listen)?,
        to_port: forward.port,
    })
}

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) mode: NetworkMode,
    ready: BTreeSet<Name>,
    failed: BTreeMap<Part, String>,
    /// What of others surely stops guests' packets, as of the last look.
    stopped: BTreeMap<Part, (Code, String)>,
    /// By what packets are filtered, if they are.
    filtered: Option<String>,
    exits: BTreeMap<Family, Exit>,
    carriers: BTreeMap<Name, bool>,
    /// Guests that run already, to be adopted: they have their card, or none.
    pub(super) running: BTreeSet<Name>,
}

impl Network {
    /// When a guest that is due at `due_ms` may boot; later only while its network is still made.
    pub(super) fn start_ms(&self, name: &Name, guest: &Guest, due_ms: u64) -> u64 {
        let decided = match self.mode {
            NetworkMode::Undecided => false,
            NetworkMode::Off(_) => true,
            NetworkMode::Private | NetworkMode::Host => self.ready.contains(name),
        };
        match guest.config.interface {
            Some(_) if !decided && !self.running.contains(name) => due_ms.saturating_add(PATIENCE_MS),
            _ => due_ms,
        }
    }

    fn judge(&self, name: &Name, guest: &Guest) -> Option<Verdict> {
        let interface = guest.config.interface.as_ref()?;
        let addresses: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
        let addresses = addresses.join(", ");
        match &self.mode {
            NetworkMode::Undecided => return None,
            NetworkMode::Off(why) => return Some(Verdict::yes("NoNetwork", why.as_str())),
            NetworkMode::Private | NetworkMode::Host => {}
        }
        let machine = guest.machine.as_ref();
        Some(
            match (self.failed.get(&Part::Links), machine, self.carriers.get(name)) {
                (Some(failed), ..) => Verdict::no("NetworkFailed", failed.as_str()),
                (None, None, _) => return None,
                (None, Some(machine), _) if !machine.card => {
                    Verdict::no("NoCard", "the network was not there when the guest booted")
                }
                (None, Some(_), Some(true)) => {
                    let private = match self.mode {
                        NetworkMode::Private => " (private)",
                        _ => "",
                    };
                    Verdict::yes("Attached", format!("{addresses}{private}, its TAP has carrier"))
                }
                (None, Some(_), Some(false)) => Verdict::no("NoCarrier", "no process holds the TAP"),
                (None, Some(_), None) => return None, // nobody has looked yet
            },
        )
    }
}

impl World {
    /// Guests that have a card, or will have one.
    #[must_use]
    pub fn carded(&self) -> BTreeMap<Name, BTreeSet<IpAddr>> {
        let lives = |guest: &Guest| guest.wanted || guest.phase != Phase::Stopped;
        let has = |guest: &Guest| {
            guest.config.interface.is_some() || guest.machine.as_ref().is_some_and(|m| m.card)
        };
        let carded = self.guests.iter().filter(|(_, guest)| lives(guest) && has(guest));
        let addresses = |guest: &Guest| {
            let interface = guest.config.interface.as_ref();
            let prefixes = interface.into_iter().flat_map(|interface| &interface.addresses);
            prefixes.map(Prefix::address).collect()
        };
        carded
            .map(|(name, guest)| (name.clone(), addresses(guest)))
            .collect()
    }

    /// Guests whose VMM has a card now.
    #[must_use]
    pub fn holding_cards(&self) -> BTreeSet<Name> {
        let holds = |guest: &Guest| guest.machine.as_ref().is_some_and(|machine| machine.card);
        let holding = self.guests.iter().filter(|(_, guest)| holds(guest));
        holding.map(|(name, _)| name.clone()).collect()
    }

    /// Why a document cannot be taken over while the network is where it is: its links and the guests' cards would have
    /// to be made anew elsewhere.
    #[must_use]
    pub fn network_in_the_way(&self, spec: &HostSpec) -> Option<String> {
        let wanted = spec.network.as_ref()?.namespace;
        let (is, asked) = match (&self.network.mode, wanted) {
            (NetworkMode::Private, Namespace::Host) => ("a namespace of its own", "the host's"),
            (NetworkMode::Host, Namespace::Auto | Namespace::Private) => {
                ("the host's namespace", "one of its own")
            }
            _ => return None,
        };
        Some(format!(
            "the network is in {is} and moves to {asked} only with nothing running: sovereign down, then sovereign up"
        ))
    }

    /// Whether there is a network.
    #[must_use]
    pub fn network_mode(&self) -> NetworkMode {
        self.network.mode.clone()
    }

    pub(super) fn network_event(&mut self, event: NetworkEvent, now_ms: u64) {
        let key = Key::new(Layer::Tap, NETWORK);
        match event {
            NetworkEvent::Ready { guests } => {
                self.network.failed.remove(&Part::Links);
                self.network.ready = guests;
            }
            NetworkEvent::Works { part, how, forwards } => {
                self.network.failed.remove(&part);
                match part {
                    Part::Filter => {
                        self.network.filtered = how;
                        self.judge_filter(now_ms);
                        self.judge_translations(&forwards, now_ms);
                    }
                    Part::Links | Part::Routing => self.judge_routing(now_ms),
                }
            }
            NetworkEvent::Failed { part, step, evidence } if part != Part::Links => {
                self.network.failed.insert(part, format!("{step}: {evidence}"));
                match part {
                    Part::Filter => {
                        self.network.filtered = None;
                        self.judge_filter(now_ms);
                    }
                    Part::Links | Part::Routing => self.judge_routing(now_ms),
                }
            }
            NetworkEvent::Failed { step, evidence, .. } => {
                let text = format!("{step}: {evidence}");
                self.feed
                    .journal_mut()
                    .append(key, None, Some(Verdict::no("Failed", text.as_str())), now_ms);
                self.network.failed.insert(Part::Links, text);
            }
            NetworkEvent::Carrier { guest, attached } => {
                self.network.carriers.insert(guest, attached);
            }
            NetworkEvent::Exits { exits } => {
                self.network.exits = exits;
                self.judge_routing(now_ms);
            }
            NetworkEvent::Stopped { by } => {
                let cause = |stop: Stop| (stop.part, (stop.code, stop.evidence));
                self.network.stopped = by.into_iter().map(cause).collect();
                self.judge_routing(now_ms);
                self.judge_filter(now_ms);
            }
            NetworkEvent::Removed { what } => {
                let verdict = Verdict::yes("LeftoverRemoved", what.join("; "));
                self.feed.journal_mut().append(key, None, Some(verdict), now_ms);
            }
            NetworkEvent::Repaired { what } => {
                let verdict = Verdict::yes("Repaired", what.join("; "));
                self.feed
                    .journal_mut()
                    .append(key, Some(Status::False), Some(verdict), now_ms);
            }
            NetworkEvent::Fight { what, repairs } => {
                let text = format!(
                    "somebody undoes it: {repairs} repairs in 10 s; {}",
                    what.join("; ")
                );
                self.feed
                    .journal_mut()
                    .append(key, None, Some(Verdict::no("Fight", text)), now_ms);
            }
        }
    }

    fn judge_routing(&mut self, now_ms: u64) {
        let failed = self.network.failed.get(&Part::Routing);
        let verdict = match (failed, self.network.stopped.get(&Part::Routing)) {
            (Some(failed), _) => Some(Verdict::no("RoutingFailed", failed.as_str())),
            (None, Some((code, evidence))) => Some(Verdict::no(code.as_str(), evidence.as_str())),
            (None, None) => judge_exits(&self.network.exits),
        };
        self.tell_network(Layer::Routing, verdict, now_ms);
    }

    fn judge_filter(&mut self, now_ms: u64) {
        let failed = self.network.failed.get(&Part::Filter);
        let verdict = match (failed, self.network.stopped.get(&Part::Filter)) {
            (Some(failed), _) => Some(Verdict::no("FilterFailed", failed.as_str())),
            (None, Some((code, evidence))) => Some(Verdict::no(code.as_str(), evidence.as_str())),
            (None, None) => {
                let how = self.network.filtered.as_deref();
                how.map(|how| Verdict::yes("Filtered", how))
            }
        };
        self.tell_network(Layer::Nat, verdict, now_ms);
    }

    /// Forwards of the kernel that were asked for and are in its tables now.
    fn judge_translations(&mut self, there: &BTreeSet<PortForward>, now_ms: u64) {
        for ((guest, name), forward) in self.translations() {
            if there.contains(&forward) {
                let text = format!(
                    "{} {} leads to {}:{}",
                    forward.transport, forward.ports, forward.to, forward.to_port
                );
                let key = host_key(Layer::Forward, &guest, name.as_str());
                self.feed
                    .observe(key, Verdict::yes("Translated", text), LASTING_MS, now_ms);
            }
        }
    }

    /// The forwards of guests that are ready which the kernel is to translate.
    #[must_use]
    pub fn translations(&self) -> BTreeMap<(Name, Name), PortForward> {
        let mut translations = BTreeMap::new();
        for (guest, state) in self.guests.iter().filter(|(_, guest)| guest.serving) {
            for forward in &state.config.forwards {
                let translation = translation(&state.config, forward);
                translations.extend(translation.map(|to| ((guest.clone(), forward.name.clone()), to)));
            }
        }
        translations
    }

    fn tell_network(&mut self, layer: Layer, verdict: Option<Verdict>, now_ms: u64) {
        let key = Key::new(layer, NETWORK);
        match verdict {
            Some(verdict) => {
                self.feed.observe(key, verdict, LASTING_MS, now_ms);
            }
            None => {
                self.feed.remove(&key);
            }
        }
    }

    /// Brings the cards' conditions up to date.
    pub(super) fn judge_cards(&mut self, now_ms: u64) {
        for (name, guest) in &self.guests {
            let key = host_key(Layer::Tap, name, CARD);
            match self.network.judge(name, guest) {
                Some(verdict) => {
                    self.feed.observe(key, verdict, LASTING_MS, now_ms);
                }
                None => {
                    self.feed.remove(&key);
                }
            }
        }
    }
}
