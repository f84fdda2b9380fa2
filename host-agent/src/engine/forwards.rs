//! Ports of the host that lead to guests: reserved at once, open while the guest is ready.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::Transport;
use sovereign_protocol::spec::HostSpec;
use sovereign_reconcile::filter::PortForward;

use super::Engine;
use super::shared_ports::Claimed;
use crate::core::Event;
use crate::forward::{Claim, Forward};
use crate::port_owner;

/// Why a port cannot be had, with the program that has it.
fn unavailable(transport: Transport, listen: std::net::SocketAddr, error: &std::io::Error) -> Verdict {
    let who = match error.kind() {
        std::io::ErrorKind::AddrInUse => format!("; {}", port_owner::describe(transport, listen)),
        _ => String::new(),
    };
    Verdict::no("PortUnavailable", format!("{listen}: {error}{who}"))
}

impl Engine {
    /// Reserves what is new, releases what is gone; conflicts become conditions.
    pub(super) fn reserve_forwards(&mut self, spec: &HostSpec) -> Vec<Event> {
        let mut verdicts = self.claim_translated(spec);
        let wanted: BTreeMap<(Name, Name), std::net::SocketAddr> = spec
            .guests
            .iter()
            .flat_map(|(guest, config)| {
                config
                    .forwards
                    .iter()
                    .filter(|f| f.translated.is_none())
                    .map(|f| ((guest.clone(), f.name.clone()), f.listen))
            })
            .collect();
        self.forwards
            .retain(|key, (listen, _)| wanted.get(key) == Some(listen));
        for (key, listen) in wanted {
            if self.forwards.contains_key(&key) {
                continue;
            }
            let verdict = match Forward::reserve(listen) {
                Ok(forward) => {
                    self.forwards.insert(key.clone(), (listen, forward));
                    Verdict::unknown("Reserved", format!("{listen} opens when the guest is ready"))
                }
                Err(error) => unavailable(Transport::Tcp, listen, &error),
            };
            verdicts.push(Event::Forward(key.0, key.1.to_string(), verdict));
        }
        verdicts
    }

    /// Ports that the kernel is to translate must be nobody's: a program that listens there would hear nothing more.
    fn claim_translated(&mut self, spec: &HostSpec) -> Vec<Event> {
        let mut wanted = BTreeMap::new();
        for (guest, config) in &spec.guests {
            let translated = config
                .forwards
                .iter()
                .filter(|forward| forward.translated.is_some());
            wanted.extend(translated.map(|forward| ((guest.clone(), forward.name.clone()), forward)));
        }
        self.translated
            .retain(|key, claim| wanted.get(key).is_some_and(|forward| claim.is_of(forward)));
        let mut verdicts = Vec::new();
        for (key, forward) in wanted {
            if self.translated.contains_key(&key) {
                continue;
            }
            let verdict = match Claim::of(forward) {
                Ok(claim) => {
                    self.translated.insert(key.clone(), claim);
                    Verdict::unknown(
                        "Reserved",
                        format!("{} opens when the guest is ready", forward.listens()),
                    )
                }
                Err((listen, error)) => unavailable(forward.transport(), listen, &error),
            };
            verdicts.push(Event::Forward(key.0, key.1.to_string(), verdict));
        }
        let claims = self.translated.iter();
        let now: Claimed = claims.map(|(key, claim)| (key.clone(), claim.takes())).collect();
        self.claimed
            .send_if_modified(|claimed| std::mem::replace(claimed, now.clone()) != now);
        verdicts
    }

    pub(super) async fn switch_forwards(&mut self, guest: &Name, serve: bool) {
        let Some(target) = self.guests.get(guest).map(|handle| handle.target.clone()) else {
            return;
        };
        let ports = self.world.forward_ports(guest);
        let mut verdicts = Vec::new();
        for (owner, name) in self.translated.keys().filter(|(owner, _)| owner == guest) {
            let verdict = match serve {
                true => Verdict::unknown("Translating", "the kernel is told"),
                false => Verdict::no("NotListening", "it refuses: the guest is not ready"),
            };
            verdicts.push(Event::Forward(owner.clone(), name.to_string(), verdict));
        }
        for ((owner, name), (listen, forward)) in &mut self.forwards {
            let Some(port) = ports.get(name).filter(|_| owner == guest) else {
                continue;
            };
            let switched = if serve {
                forward.open(*port, target.clone()).await
            } else {
                forward.close().await
            };
            let verdict = match switched {
                Ok(()) if serve => Verdict::yes("Listening", format!("{listen} leads to port {port}")),
                Ok(()) => Verdict::no(
                    "NotListening",
                    format!("{listen} refuses: the guest is not ready"),
                ),
                Err(error) => unavailable(Transport::Tcp, *listen, &error),
            };
            verdicts.push(Event::Forward(guest.clone(), name.to_string(), verdict));
        }
        for event in verdicts {
            self.report(event).await;
        }
    }

    /// What the kernel is to translate now.
    pub(super) fn translations(&self) -> BTreeSet<PortForward> {
        let wanted = self.world.translations().into_iter();
        let claimed = wanted.filter(|(key, _)| self.translated.contains_key(key));
        claimed.map(|(_, forward)| forward).collect()
    }
}
