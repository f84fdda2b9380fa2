//! What of the host's surroundings a guest is told: name servers, search list and MTU where its configuration says nothing.

use std::collections::BTreeMap;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::interface::{InterfaceSpec, MTU, Prefix};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, Namespace, Uplink};
use sovereign_protocol::status::Phase;
use sovereign_reconcile::finding::Cards;
use sovereign_reconcile::resolver::{Advice, HostResolver, NoResolver, Way, advise, complete};
use sovereign_reconcile::view::NetworkMode;
use sovereign_reconcile::wanted::DEFAULT_MTU;

use super::event::Effect;
use super::world::{Guest, LASTING_MS, World, host_key};

/// The subject of whether guests can ask for names.
const RESOLVER: &str = "resolver";

impl World {
    /// Takes in what this host asks itself, before anything is started.
    pub fn know_resolver(&mut self, resolver: HostResolver) {
        self.network.resolver = resolver;
    }

    /// What guests are told of name servers.
    ///
    /// # Errors
    /// When they have a way out and there is none to tell of.
    pub fn advice(&self) -> Result<Advice, NoResolver> {
        let network = self.spec().and_then(|spec| spec.network.as_ref());
        let leaves = network.is_some_and(|network| network.uplink != Uplink::None);
        // Guests that are adopted are told something before it is known whether there is a network.
        let asked = network.is_some_and(|network| network.namespace == Namespace::Host);
        let way = match &self.network.mode {
            NetworkMode::Host if leaves => Way::Host,
            NetworkMode::Undecided if leaves && asked => Way::Host,
            NetworkMode::Private | NetworkMode::Undecided if leaves => Way::Pasta,
            _ => Way::None,
        };
        advise(&self.network.resolver, way)
    }

    /// What guests were told last of name servers: a file that is gone while somebody writes it takes nothing away.
    #[must_use]
    pub fn advised(&self) -> &Advice {
        &self.network.advised
    }

    /// A guest's interface with all that its configuration leaves to this host.
    #[must_use]
    pub fn interface(&self, config: &GuestConfig) -> Option<InterfaceSpec> {
        let advice = self.advised();
        let interface = config.interface.as_ref()?;
        let addresses = interface.addresses.iter().map(Prefix::address);
        Some(InterfaceSpec {
            ways: self.network.ways.of(addresses),
            ..complete(interface, advice, self.guest_mtu())
        })
    }

    /// What is known of guests' cards: who holds one, and who keeps to the MTU that it is told. One whose agent is not
    /// reached, or refused what it was told, keeps to what it knew.
    #[must_use]
    pub fn cards(&self) -> Cards {
        let hears = |name: &Name| {
            let agent = self.feed.verdict(&host_key(Layer::Session, name, "agent"));
            agent.is_some_and(|verdict| verdict.status == Status::True)
        };
        let keeps = |(name, guest): &(&Name, &Guest)| match guest.phase {
            Phase::Stopped | Phase::Failed | Phase::CrashLoop => true, // it will be told when it boots
            Phase::Starting | Phase::Running | Phase::Stopping => guest.applied == guest.given && hears(name),
        };
        let mtu = |(name, guest): (&Name, &Guest)| Some((name.clone(), self.interface(&guest.config)?.mtu?));
        Cards {
            held: self.holding_cards(),
            mtu: self.guests.iter().filter(keeps).filter_map(mtu).collect(),
        }
    }

    /// What fits through the guests' cards and through the way out. It is always said: a guest goes back to its card's own
    /// only if it is told so.
    fn guest_mtu(&self) -> u32 {
        let uplink = self.network.uplink_mtu.unwrap_or(DEFAULT_MTU);
        uplink.clamp(*MTU.start(), DEFAULT_MTU)
    }

    /// Tells guests what changed around this host.
    pub(super) fn judge_surroundings(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        if let Ok(advice) = self.advice() {
            self.network.advised = advice;
        }
        let now: BTreeMap<Name, InterfaceSpec> = self
            .guests
            .iter()
            .filter_map(|(name, guest)| Some((name.clone(), self.interface(&guest.config)?)))
            .collect();
        let before = std::mem::replace(&mut self.network.told, now.clone());
        let differs = |name: &&Name| {
            before
                .get(*name)
                .is_some_and(|before| now.get(*name) != Some(before))
        };
        for name in now.keys().filter(differs) {
            self.give(name, effects);
        }
        self.judge_resolver(now_ms);
    }

    fn judge_resolver(&mut self, now_ms: u64) {
        let key = Key::new(Layer::Routing, RESOLVER);
        let asks = |guest: &GuestConfig| guest.interface.as_ref().is_some_and(|i| i.dns.is_empty());
        let somebody = self
            .guests
            .values()
            .any(|guest| guest.wanted && asks(&guest.config));
        let verdict = match self.advice() {
            Err(why) if somebody => Some(Verdict::no("NoResolver", why.to_string())),
            Ok(advice) if somebody && !advice.servers.is_empty() => {
                let servers: Vec<String> = advice.servers.iter().map(ToString::to_string).collect();
                let through = match advice.forwarded.is_empty() {
                    true => String::new(),
                    false => {
                        let asked: Vec<String> = advice.forwarded.iter().map(ToString::to_string).collect();
                        format!(", for which pasta asks {}", asked.join(", "))
                    }
                };
                Some(Verdict::yes(
                    "Advised",
                    format!("guests ask {}{through}", servers.join(", ")),
                ))
            }
            _ => None,
        };
        match verdict {
            Some(verdict) => {
                self.feed.observe(key, verdict, LASTING_MS, now_ms);
            }
            None => {
                self.feed.remove(&key);
            }
        }
    }
}

#[cfg(test)]
#[path = "surroundings_tests.rs"]
mod tests;
