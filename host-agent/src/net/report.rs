//! What the network tells: each fact when it changes, not each time it is looked at. Pure.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::name::Name;
use sovereign_protocol::ways::Ways;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::filter::PortForward;
use sovereign_reconcile::uplink::Exit;

use super::examine::Stop;
use super::observed::Observed;
use super::plan::Part;
use super::wanted::Wanted;

/// Something that became true of an instance's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkEvent {
    /// All that these guests need is there: looked at again after it was made.
    Ready {
        /// The guests whose TAP can be opened.
        guests: BTreeSet<Name>,
        /// Families in which the host has no address, and why; at least one other has one.
        lacking: BTreeMap<Family, String>,
    },
    /// A part beside the links is as wanted.
    Works {
        /// Which.
        part: Part,
        /// By what means, where there are several.
        how: Option<String>,
        /// The ports that lead to guests now.
        forwards: BTreeSet<PortForward>,
        /// Those that were asked for and cannot be made, and why.
        refused: BTreeMap<PortForward, String>,
    },
    /// Something is not there; it is tried again by itself.
    Failed {
        /// What does not work for it.
        part: Part,
        /// The first step that failed.
        step: String,
        /// Why, and what else failed.
        evidence: String,
    },
    /// Whether a process (the VMM) holds the TAP of a guest.
    Carrier {
        /// The guest.
        guest: Name,
        /// It does.
        attached: bool,
    },
    /// By which way guests leave now.
    Exits {
        /// For each family that they have addresses of.
        exits: BTreeMap<Family, Exit>,
        /// Bytes of the largest packet that all of their links take; `None` without a link.
        mtu: Option<u32>,
    },
    /// The numbers of the ways by which guests leave, when one is another.
    Ways {
        /// Them.
        ways: Ways,
    },
    /// Somebody else changed something of ours, and it was put right.
    Repaired {
        /// The steps, as a plan prints them.
        what: Vec<String>,
    },
    /// Somebody else keeps changing something of ours: repairs are made more slowly now.
    Fight {
        /// The last steps.
        what: Vec<String>,
        /// Repairs in the last ten seconds.
        repairs: usize,
    },
    /// Others stop guests' packets by something that is not ours, or nobody does any more.
    Stopped {
        /// By what, the first of each part; empty when nothing does.
        by: Vec<Stop>,
    },
    /// Leftovers of scripts were removed, as somebody asked for by name.
    Removed {
        /// Each thing.
        what: Vec<String>,
    },
}

/// What a packet filter does that is as wanted.
#[derive(Debug, Clone, Default)]
pub(super) struct Enforced {
    /// By what means, and what it lacks.
    pub(super) how: Option<String>,
    /// Forwards that it makes.
    pub(super) forwards: BTreeSet<PortForward>,
    /// Forwards that it cannot make, and why.
    pub(super) refused: BTreeMap<PortForward, String>,
}

/// What was told last.
#[derive(Debug, Default)]
pub(super) struct Reporter {
    states: BTreeMap<Part, NetworkEvent>,
    carriers: BTreeMap<Name, bool>,
    exits: (BTreeMap<Family, Exit>, Option<u32>),
}

impl Reporter {
    /// All is as wanted, but for these families.
    pub(super) fn ready(
        &mut self,
        wanted: &Wanted,
        lacking: BTreeMap<Family, String>,
    ) -> Option<NetworkEvent> {
        let guests = wanted.taps.values().cloned().collect();
        self.state(Part::Links, NetworkEvent::Ready { guests, lacking })
    }

    /// A part beside the links is as wanted.
    pub(super) fn works(&mut self, part: Part, enforced: Enforced) -> Option<NetworkEvent> {
        let Enforced {
            how,
            forwards,
            refused,
        } = enforced;
        let works = NetworkEvent::Works {
            part,
            how,
            forwards,
            refused,
        };
        self.state(part, works)
    }

    /// Something is not.
    pub(super) fn failed(&mut self, part: Part, step: String, evidence: String) -> Option<NetworkEvent> {
        self.state(part, NetworkEvent::Failed { part, step, evidence })
    }

    fn state(&mut self, part: Part, now: NetworkEvent) -> Option<NetworkEvent> {
        if self.states.get(&part) == Some(&now) {
            return None;
        }
        self.states.insert(part, now.clone());
        Some(now)
    }

    /// By which way guests leave.
    pub(super) fn exits(&mut self, wanted: &Wanted, observed: &Observed) -> Option<NetworkEvent> {
        let links = wanted.exits.values().filter_map(Exit::link);
        let mtu = links
            .filter_map(|link| Some(observed.link(link.as_str())?.mtu))
            .min();
        if self.exits.0 == wanted.exits && self.exits.1 == mtu {
            return None;
        }
        self.exits = (wanted.exits.clone(), mtu);
        let exits = wanted.exits.clone();
        Some(NetworkEvent::Exits { exits, mtu })
    }

    /// Whose TAP is held; a TAP that is not there has no carrier.
    pub(super) fn carriers(&mut self, wanted: &Wanted, observed: &Observed) -> Vec<NetworkEvent> {
        let is_held = |tap: &str| observed.link(tap).is_some_and(|link| link.carrier);
        let now: BTreeMap<Name, bool> = wanted
            .taps
            .iter()
            .map(|(tap, guest)| (guest.clone(), is_held(tap.as_str())))
            .collect();
        let before = std::mem::replace(&mut self.carriers, now);
        let news = self
            .carriers
            .iter()
            .filter(|(guest, held)| before.get(guest) != Some(held));
        let news = news.map(|(guest, held)| NetworkEvent::Carrier {
            guest: guest.clone(),
            attached: *held,
        });
        news.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::Mark;
    use super::super::observed::Kind;
    use super::super::simulated::Simulated;
    use sovereign_reconcile::wanted::Switched;

    use super::super::wanted::NetworkSpec;
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn wanted(spec: &NetworkSpec) -> Wanted {
        Wanted::of(&name("default"), spec, &Switched::new(), &Observed::fresh()).unwrap()
    }

    #[test]
    fn a_state_is_told_when_it_changes() {
        let wanted = wanted(&NetworkSpec::default());
        let mut reporter = Reporter::default();
        let none = BTreeMap::new;
        assert!(reporter.ready(&wanted, none()).is_some());
        assert!(reporter.ready(&wanted, none()).is_none());
        let lacking = BTreeMap::from([(Family::V6, "switched off".to_owned())]);
        assert!(reporter.ready(&wanted, lacking.clone()).is_some());
        assert!(reporter.ready(&wanted, lacking).is_none());
        assert!(
            reporter
                .failed(Part::Links, "a".to_owned(), "b".to_owned())
                .is_some()
        );
        assert!(
            reporter
                .failed(Part::Links, "a".to_owned(), "b".to_owned())
                .is_none()
        );
        assert!(
            reporter
                .failed(Part::Links, "a".to_owned(), "c".to_owned())
                .is_some()
        );
        assert!(reporter.works(Part::Filter, Enforced::default()).is_some());
        assert!(reporter.ready(&wanted, none()).is_some());
        assert!(reporter.works(Part::Filter, Enforced::default()).is_none());
    }

    #[test]
    fn carriers_are_told_when_they_change() {
        let spec = NetworkSpec {
            guests: [(name("sql"), BTreeSet::new())].into(),
            ..NetworkSpec::default()
        };
        let wanted = wanted(&spec);
        let mut kernel = Simulated::new();
        let mut reporter = Reporter::default();
        let carrier = |attached| {
            vec![NetworkEvent::Carrier {
                guest: name("sql"),
                attached,
            }]
        };
        assert_eq!(reporter.carriers(&wanted, &kernel.state), carrier(false));
        let tap = kernel.add("sv5pkj-sql", Kind::Tap, Mark::of(&name("default")).group);
        assert_eq!(reporter.carriers(&wanted, &kernel.state), []);
        kernel.link(tap, |link| link.carrier = true).unwrap();
        assert_eq!(reporter.carriers(&wanted, &kernel.state), carrier(true));
        assert_eq!(reporter.carriers(&wanted, &kernel.state), []);
        kernel.remove(tap).unwrap();
        assert_eq!(reporter.carriers(&wanted, &kernel.state), carrier(false));
    }
}
