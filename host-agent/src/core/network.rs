//! The network as the world sees it: whether there is one, and whose card is attached.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{HostSpec, Namespace};
use sovereign_protocol::status::Phase;
use sovereign_protocol::ways::Ways;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::Code;
use sovereign_reconcile::resolver::{Advice, HostResolver};
use sovereign_reconcile::uplink::{Exit, NoExit};
use sovereign_reconcile::view::NetworkMode;

use super::event::Effect;
use super::translations::Translated;
use super::world::{Guest, LASTING_MS, World, host_key};
use crate::net::{NetworkEvent, Part, Stop, UNFILTERED};

/// A guest waits so long for its network, and then boots without a card: vsock needs none.
const PATIENCE_MS: u64 = 5_000;
/// The subject of a guest's card in [`Layer::Tap`].
const CARD: &str = "card";

/// The subject of what is true of the network as a whole.
const NETWORK: &str = "network";

/// By which way guests leave. A private namespace knows one: by pasta.
fn judge_exits(mode: &NetworkMode, exits: &BTreeMap<Family, Exit>) -> Option<Verdict> {
    let private = *mode == NetworkMode::Private;
    let wanted = exits
        .iter()
        .filter(|(_, exit)| !matches!(exit, Exit::None(NoExit::Unwanted)));
    let told: Vec<String> = wanted
        .clone()
        .map(|(family, exit)| match exit {
            Exit::None(NoExit::NoDefault) if private => format!("{family}: pasta has found none outside"),
            Exit::None(why) => format!("{family}: {why}"),
            Exit::Main(link) if private => format!("{family} by pasta ({link})"),
            Exit::Main(link) => format!("{family} by {link}"),
            Exit::Table(table, link) => format!("{family} by {link} (table {table})"),
            Exit::Own(link, _) => format!("{family} by {link}, chosen by name"),
        })
        .collect();
    let Some(first) = wanted.clone().next() else {
        let none = "guests have no way out: network.uplink is none";
        return (!exits.is_empty()).then(|| Verdict::yes("NoUplink", none));
    };
    Some(match first {
        _ if wanted.clone().any(|(_, exit)| exit.link().is_some()) => Verdict::yes("WayOut", told.join("; ")),
        (_, Exit::None(NoExit::Blocked)) => Verdict::no("Blocked", told.join("; ")),
        _ => Verdict::no("NoWayOut", told.join("; ")),
    })
}

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) mode: NetworkMode,
    ready: BTreeSet<Name>,
    pub(super) failed: BTreeMap<Part, String>,
    /// What of others surely stops guests' packets, as of the last look.
    stopped: BTreeMap<Part, (Code, String)>,
    /// By what packets are filtered, if they are.
    filtered: Option<String>,
    /// Families in which the host has no address.
    lacking: BTreeMap<Family, String>,
    pub(super) translated: Translated,
    exits: BTreeMap<Family, Exit>,
    /// The numbers of the ways by which guests leave.
    pub(super) ways: Ways,
    pub(super) uplink_mtu: Option<u32>,
    /// What this host asks itself.
    pub(super) resolver: HostResolver,
    /// What guests were told of it last.
    pub(super) advised: Advice,
    /// The interface that each guest was last given.
    pub(super) told: BTreeMap<Name, InterfaceSpec>,
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

    /// Why the host has no address of the same family.
    fn lack_of(&self, own: &Prefix) -> Option<String> {
        let family = Family::of(own.address());
        let why = self.lacking.get(&family)?;
        Some(format!("{family}: {why}"))
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
        let lacks: BTreeSet<String> = interface
            .addresses
            .iter()
            .filter_map(|own| self.lack_of(own))
            .collect();
        let lacks: Vec<String> = lacks.into_iter().collect();
        Some(
            match (self.failed.get(&Part::Links), machine, self.carriers.get(name)) {
                (Some(failed), ..) => Verdict::no("NetworkFailed", failed.as_str()),
                _ if !lacks.is_empty()
                    && interface.addresses.iter().all(|own| self.lack_of(own).is_some()) =>
                {
                    Verdict::no("NetworkFailed", lacks.join("; "))
                }
                (None, None, _) => return None,
                (None, Some(machine), _) if !machine.card => {
                    let unknown = "the network was not there when the guest booted";
                    Verdict::no("NoCard", guest.cardless.as_deref().unwrap_or(unknown))
                }
                (None, Some(_), Some(true)) => {
                    let private = match self.mode {
                        NetworkMode::Private => " (private)",
                        _ => "",
                    };
                    let without: String = lacks.iter().map(|lack| format!("; no {lack}")).collect();
                    let text = format!("{addresses}{private}, its TAP has carrier{without}");
                    Verdict::yes("Attached", text)
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

    /// A guest that is being started gets no card: nor does its document speak of one.
    pub(super) fn goes_without_card(&mut self, name: &Name, why: String, effects: &mut Vec<Effect>) {
        let Some(guest) = self.guests.get_mut(name) else {
            return;
        };
        guest.cardless = Some(why);
        if guest.phase == Phase::Starting {
            effects.push(Effect::Push(name.clone(), guest.config.clone()));
        }
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
            NetworkEvent::Ready { guests, lacking } => {
                self.network.failed.remove(&Part::Links);
                self.network.ready = guests;
                self.lacks(lacking, now_ms);
            }
            NetworkEvent::Works {
                part,
                how,
                forwards: there,
                refused,
            } => {
                self.network.failed.remove(&part);
                match part {
                    Part::Filter => {
                        self.network.filtered = how;
                        self.judge_filter(now_ms);
                        self.network.translated = Translated { there, refused };
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
                self.network.lacking.clear();
            }
            NetworkEvent::Carrier { guest, attached } => {
                self.network.carriers.insert(guest, attached);
            }
            NetworkEvent::Exits { exits, mtu } => {
                // A way that is gone for a moment takes nothing away.
                let unwanted = |exit: &Exit| matches!(exit, Exit::None(NoExit::Unwanted));
                if mtu.is_some() || exits.values().all(unwanted) {
                    self.network.uplink_mtu = mtu;
                }
                self.network.exits = exits;
                self.judge_routing(now_ms);
            }
            NetworkEvent::Ways { ways } => self.network.ways = ways,
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

    /// Each family that is in trouble is in the journal once.
    fn lacks(&mut self, lacking: BTreeMap<Family, String>, now_ms: u64) {
        let key = Key::new(Layer::Tap, NETWORK);
        for (family, why) in lacking
            .iter()
            .filter(|(f, why)| self.network.lacking.get(f) != Some(why))
        {
            let verdict = Verdict::no("Failed", format!("{family} only: {why}"));
            self.feed
                .journal_mut()
                .append(key.clone(), None, Some(verdict), now_ms);
        }
        self.network.lacking = lacking;
        self.judge_routing(now_ms);
    }

    fn judge_routing(&mut self, now_ms: u64) {
        let failed = self.network.failed.get(&Part::Routing);
        let verdict = match (failed, self.network.stopped.get(&Part::Routing)) {
            (Some(failed), _) => Some(Verdict::no("RoutingFailed", failed.as_str())),
            (None, Some((code, evidence))) => Some(Verdict::no(code.as_str(), evidence.as_str())),
            (None, None) => {
                let mut exits = self.network.exits.clone();
                exits.retain(|family, _| !self.network.lacking.contains_key(family));
                judge_exits(&self.network.mode, &exits)
            }
        };
        self.tell_network(Layer::Routing, verdict, now_ms);
    }

    fn judge_filter(&mut self, now_ms: u64) {
        let failed = self.network.failed.get(&Part::Filter);
        let verdict = match (failed, self.network.stopped.get(&Part::Filter)) {
            (Some(failed), _) => Some(Verdict::no("FilterFailed", failed.as_str())),
            (None, Some((code, evidence))) => Some(Verdict::no(code.as_str(), evidence.as_str())),
            (None, None) => self
                .network
                .filtered
                .as_deref()
                .map(|how| match how.strip_prefix(UNFILTERED) {
                    Some(why) => Verdict::yes("Unfiltered", format!("guests may take any address: {why}")),
                    None => Verdict::yes("Filtered", how),
                }),
        };
        self.tell_network(Layer::Nat, verdict, now_ms);
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

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
