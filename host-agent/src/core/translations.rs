//! Forwards that the kernel translates: which are to be, and what is true of each. Pure.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::condition::{Layer, Verdict};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Forward, GuestConfig};
use sovereign_reconcile::filter::PortForward;

use super::network::Network;
use super::world::{LASTING_MS, World, host_key};
use crate::net::Part;

/// A forward whose port is ours and whose guest is ready has one of these reasons; any other is not for the kernel to say.
const KERNELS: [&str; 4] = ["Translating", "Translated", "NotTranslated", "Unconfirmed"];

/// The subject of what is true of a forward's ports beside the forward itself.
pub(super) fn port_subject(forward: &Name) -> String {
    format!("{forward}.port")
}

/// What the packet filter told last.
#[derive(Debug, Default)]
pub(super) struct Translated {
    /// Forwards that are in the kernel's tables.
    pub(super) there: BTreeSet<PortForward>,
    /// Those that it cannot make, and why.
    pub(super) refused: BTreeMap<PortForward, String>,
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

impl Network {
    fn judge_translation(&self, forward: &PortForward) -> Verdict {
        let is_there = self.translated.there.contains(forward);
        if let Some(why) = self.failed.get(&Part::Filter) {
            let text = format!("the packet filter is not as wanted: {why}");
            return match is_there {
                true => Verdict::unknown("Unconfirmed", text), // it may be in force as it was
                false => Verdict::no("NotTranslated", text),
            };
        }
        if is_there {
            let PortForward {
                transport,
                ports,
                to,
                to_port,
                ..
            } = forward;
            return Verdict::yes(
                "Translated",
                format!("{transport} {ports} leads to {to}:{to_port}"),
            );
        }
        let why = self.translated.refused.get(forward).cloned();
        let links = || {
            let failed = self.failed.get(&Part::Links)?;
            Some(format!("the network is not there: {failed}"))
        };
        match why.or_else(links) {
            Some(why) => Verdict::no("NotTranslated", why),
            None => Verdict::unknown("Translating", "the kernel is told"),
        }
    }
}

impl World {
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

    /// What is to be said of a forward of a guest that is ready: where it is asked for again nothing changes in the kernel's
    /// tables, so nobody would tell of it.
    pub(super) fn translated(&self, guest: &Name, forward: &str) -> Option<Verdict> {
        let state = self.guests.get(guest).filter(|state| state.serving)?;
        let mut forwards = state.config.forwards.iter();
        let forward = forwards.find(|wanted| wanted.name.as_str() == forward)?;
        let translation = translation(&state.config, forward)?;
        Some(self.network.judge_translation(&translation))
    }

    /// Brings the conditions of the kernel's forwards up to date.
    pub(super) fn judge_translations(&mut self, now_ms: u64) {
        for ((guest, name), forward) in self.translations() {
            let key = host_key(Layer::Forward, &guest, name.as_str());
            let before = self.feed.verdict(&key);
            if before.is_some_and(|verdict| KERNELS.contains(&verdict.reason.as_str())) {
                let verdict = self.network.judge_translation(&forward);
                self.feed.observe(key, verdict, LASTING_MS, now_ms);
            }
        }
    }

    /// Programs that wait on ports of forwards, by guest and forward: all there are.
    pub(super) fn share_ports(&mut self, found: &BTreeMap<(Name, Name), String>, now_ms: u64) {
        for (guest, state) in &self.guests {
            for forward in &state.config.forwards {
                let key = host_key(Layer::Forward, guest, &port_subject(&forward.name));
                match found.get(&(guest.clone(), forward.name.clone())) {
                    Some(text) => {
                        let verdict = Verdict::no("PortShared", text.as_str());
                        self.feed.observe(key, verdict, LASTING_MS, now_ms);
                    }
                    None => drop(self.feed.remove(&key)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use sovereign_protocol::condition::Status;
    use sovereign_protocol::interface::InterfaceSpec;
    use sovereign_protocol::port::Transport;
    use sovereign_protocol::spec::Translated as OfKernel;
    use sovereign_protocol::spec::{HostSpec, VERSION};

    use super::super::Event;
    use super::super::world::tests::config;
    use super::*;
    use crate::net::NetworkEvent;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn kernels(own: &str, listen: &str) -> Forward {
        Forward {
            name: name(own),
            service: Some(name("postgres")),
            listen: listen.parse().unwrap(),
            port: 5432,
            translated: Some(OfKernel {
                transport: Transport::Udp,
                more: 1,
            }),
        }
    }

    /// A guest that is ready, with two forwards of the kernel whose ports are ours.
    fn world() -> World {
        let mut world = World::new(1);
        let mut guest = config(5432);
        let address: IpAddr = "192.168.100.2".parse().unwrap();
        guest.interface = Some(InterfaceSpec {
            addresses: vec![sovereign_protocol::interface::Prefix::new(address, 24).unwrap()],
            ..InterfaceSpec::default()
        });
        guest.forwards = vec![kernels("one", "0.0.0.0:5000"), kernels("two", "10.0.0.5:6000")];
        let spec = HostSpec {
            version: VERSION,
            network: None,
            guests: BTreeMap::from([(name("sql"), guest)]),
        };
        world.step(Event::Applied(spec), 0);
        world.guests.get_mut(&name("sql")).unwrap().serving = true;
        for forward in ["one", "two"] {
            let verdict = Verdict::unknown("Translating", "the kernel is told");
            let key = host_key(Layer::Forward, &name("sql"), forward);
            world.feed.observe(key, verdict, LASTING_MS, 0);
        }
        world
    }

    fn said(world: &World, subject: &str) -> Option<(Status, String, String)> {
        let verdict = world
            .feed
            .verdict(&host_key(Layer::Forward, &name("sql"), subject))?;
        Some((verdict.status, verdict.reason.clone(), verdict.evidence.clone()))
    }

    fn hear(world: &mut World, event: NetworkEvent) {
        world.network_event(event, 0);
        world.judge_translations(0);
    }

    fn works(there: &[&PortForward], refused: &[(&PortForward, &str)]) -> NetworkEvent {
        let text = |(forward, why): &(&PortForward, &str)| ((*forward).clone(), (*why).to_owned());
        NetworkEvent::Works {
            part: Part::Filter,
            how: Some("nf_tables".to_owned()),
            forwards: there.iter().map(|forward| (*forward).clone()).collect(),
            refused: refused.iter().map(text).collect(),
        }
    }

    fn failed(part: Part) -> NetworkEvent {
        NetworkEvent::Failed {
            part,
            step: "packet filter".to_owned(),
            evidence: "not ours".to_owned(),
        }
    }

    #[test]
    fn a_forward_is_said_to_be_what_the_packet_filter_told_of_it() {
        let mut world = world();
        let wanted: Vec<PortForward> = world.translations().into_values().collect();
        let [one, two] = &wanted[..] else {
            panic!("{wanted:?}")
        };
        hear(&mut world, works(&[one], &[(two, "no table nat of its family")]));
        let led = (
            Status::True,
            "Translated".to_owned(),
            "udp 5000-5001 leads to 192.168.100.2:5432".to_owned(),
        );
        assert_eq!(said(&world, "one").unwrap(), led);
        let (status, reason, evidence) = said(&world, "two").unwrap();
        assert_eq!((status, reason.as_str()), (Status::False, "NotTranslated"));
        assert_eq!(evidence, "no table nat of its family");

        hear(&mut world, failed(Part::Filter));
        let (status, reason, evidence) = said(&world, "one").unwrap();
        assert_eq!((status, reason.as_str()), (Status::Unknown, "Unconfirmed"));
        assert!(evidence.ends_with("packet filter: not ours"), "{evidence}");
        assert_eq!(said(&world, "two").unwrap().1, "NotTranslated");

        hear(&mut world, works(&[one, two], &[]));
        assert_eq!(said(&world, "one").unwrap(), led);
        assert_eq!(said(&world, "two").unwrap().0, Status::True);
        hear(&mut world, works(&[two], &[]));
        assert_eq!(
            said(&world, "one").unwrap().1,
            "Translating",
            "it is to come again"
        );
    }

    #[test]
    fn without_a_network_or_a_filter_nobody_waits_for_a_forward() {
        for part in [Part::Links, Part::Filter] {
            let mut world = world();
            hear(&mut world, failed(part));
            for forward in ["one", "two"] {
                let (status, reason, _) = said(&world, forward).unwrap();
                assert_eq!(
                    (status, reason.as_str()),
                    (Status::False, "NotTranslated"),
                    "{part:?}"
                );
            }
        }
        let mut world = world();
        hear(&mut world, failed(Part::Routing));
        assert_eq!(said(&world, "one").unwrap().1, "Translating");
    }

    #[test]
    fn a_port_that_is_not_ours_is_not_for_the_kernel_to_say() {
        let mut world = world();
        let key = host_key(Layer::Forward, &name("sql"), "one");
        world
            .feed
            .observe(key, Verdict::no("PortUnavailable", "x"), LASTING_MS, 0);
        hear(&mut world, failed(Part::Filter));
        assert_eq!(said(&world, "one").unwrap().1, "PortUnavailable");
        world.guests.get_mut(&name("sql")).unwrap().serving = false;
        let key = host_key(Layer::Forward, &name("sql"), "two");
        world
            .feed
            .observe(key, Verdict::no("NotListening", "x"), LASTING_MS, 0);
        world.judge_translations(0);
        assert_eq!(said(&world, "two").unwrap().1, "NotListening");
    }

    #[test]
    fn a_shared_port_is_told_beside_the_forward_until_it_is_shared_no_more() {
        let mut world = world();
        let shared = |text: &str| {
            let key = (name("sql"), name("two"));
            Event::SharedPorts(BTreeMap::from([(key, text.to_owned())]))
        };
        world.step(shared("pid 7 (nc)"), 0);
        let told = said(&world, "two.port").unwrap();
        assert_eq!(
            (told.0, told.1.as_str(), told.2.as_str()),
            (Status::False, "PortShared", "pid 7 (nc)")
        );
        assert_eq!(said(&world, "one.port"), None);
        world.step(Event::SharedPorts(BTreeMap::new()), 0);
        assert_eq!(said(&world, "two.port"), None);
        world.step(shared("pid 8 (nc)"), 0);
        let mut spec = world.spec().unwrap().clone();
        let guest = spec.guests.get_mut(&name("sql")).unwrap();
        guest.forwards.retain(|forward| forward.name.as_str() == "one");
        world.step(Event::Applied(spec), 0);
        assert_eq!(
            said(&world, "two.port"),
            None,
            "nobody wants the forward any more"
        );
        assert_eq!(said(&world, "two"), None);
    }
}
