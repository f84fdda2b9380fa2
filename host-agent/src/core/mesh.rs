//! Guests that need each other: whether a requirement can be used, who is told of it, and who stops first.
//!
//! The condition `SERVICE.requires` of a guest is the host's own: it is judged from what the other guest reports, in the
//! step in which that is heard, and the guest is pushed a document that says the same.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::mesh::{Client, Requirement, Role, ServiceRef};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, HostSpec, Service};
use sovereign_protocol::status::{Phase, RequiredStatus};
use sovereign_reconcile::view::NetworkMode;

use super::event::Effect;
use super::world::{Guest, LASTING_MS, World, host_key};

/// What a service's name is followed by in the subject of its requirement's condition.
const REQUIRES: &str = ".requires";

/// What both ends of one requirement are told, whatever is true of it at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    of: ServiceRef,
    address: IpAddr,
    port: u16,
    role: Role,
    from: Vec<IpAddr>,
}

/// What is remembered of a requirement.
#[derive(Debug, Default)]
pub(super) struct Edge {
    /// The place at which it was last usable: only another one has to wait until the other guest has taken it over.
    settled: Option<Place>,
    /// The verdict that the guest was last told.
    verdict: Option<Verdict>,
}

/// What a guest's document says of other guests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ties {
    /// What its services need, by service.
    pub requirements: BTreeMap<Name, Requirement>,
    /// Who logs in to its services, by service.
    pub clients: BTreeMap<Name, Vec<Client>>,
}

/// True for the subject of a requirement's condition within its guest: no service has a dot in its name.
pub(super) fn is_requirement(subject: &str) -> bool {
    subject.ends_with(REQUIRES)
}

/// What ties a guest to others, by what is wanted alone; nothing of it was observed.
pub(super) fn ties(spec: &HostSpec, guest: &Name) -> Ties {
    let Some(config) = spec.guests.get(guest) else {
        return Ties::default();
    };
    let requirements = config.services.iter().filter_map(|service| {
        let place = place(spec, guest, config, service)?;
        let unseen = Verdict::unknown("WaitsFor", "not looked at yet");
        Some((service.name.clone(), requirement(place, &unseen)))
    });
    let mut clients: BTreeMap<Name, Vec<Client>> = BTreeMap::new();
    for (other, config) in &spec.guests {
        for service in &config.services {
            if let Some(place) = place(spec, other, config, service)
                && place.of.guest == *guest
            {
                let (role, from) = (place.role, place.from);
                let list = clients.entry(place.of.service).or_default();
                list.push(Client { role, from });
            }
        }
    }
    Ties {
        requirements: requirements.collect(),
        clients,
    }
}

/// Where a service finds what it needs; `None` when it needs nothing. A validated document has all of it.
fn place(spec: &HostSpec, guest: &Name, config: &GuestConfig, service: &Service) -> Option<Place> {
    let addresses = |config: &GuestConfig| -> Vec<IpAddr> {
        let prefixes = config.interface.iter().flat_map(|interface| &interface.addresses);
        prefixes.map(|prefix| prefix.address()).collect()
    };
    let of = service.requires.clone()?;
    let other = spec.guests.get(&of.guest)?;
    let needed = other.services.iter().find(|needed| needed.name == of.service)?;
    let own = ServiceRef {
        guest: guest.clone(),
        service: service.name.clone(),
    };
    // By a family that both have; each is known by all of its own.
    let (from, theirs) = (addresses(config), addresses(other));
    let reached = |to: &&IpAddr| from.iter().any(|own| own.is_ipv4() == to.is_ipv4());
    Some(Place {
        address: *theirs.iter().find(reached).or(theirs.first())?,
        port: needed.kind.port(),
        role: Role::of(&own).ok()?,
        from,
        of,
    })
}

fn requirement(place: Place, verdict: &Verdict) -> Requirement {
    Requirement {
        of: place.of,
        status: verdict.status,
        evidence: verdict.evidence.clone(),
        address: place.address,
        port: place.port,
        role: place.role,
    }
}

impl World {
    /// What a guest's document says of other guests, as it stands now.
    #[must_use]
    pub fn ties(&self, guest: &Name) -> Ties {
        let mut ties = self.spec().map(|spec| ties(spec, guest)).unwrap_or_default();
        for (service, requirement) in &mut ties.requirements {
            let edge = self.edges.get(&(guest.clone(), service.clone()));
            if let Some(verdict) = edge.and_then(|edge| edge.verdict.as_ref()) {
                requirement.status = verdict.status;
                requirement.evidence.clone_from(&verdict.evidence);
            }
        }
        ties
    }

    /// Judges every requirement, and pushes what became of it to the guest that has it.
    pub(super) fn judge_edges(&mut self, now_ms: u64, effects: &mut Vec<Effect>) {
        let wanted = self.wanted_edges();
        self.forget_edges(&wanted);
        for ((guest, service), place) in wanted {
            let key = (guest.clone(), service.clone());
            let settled = self.edges.get(&key).and_then(|edge| edge.settled.as_ref()) == Some(&place);
            let verdict = self.judge_edge(&place, settled, now_ms);
            let edge = self.edges.entry(key).or_default();
            if verdict.status == Status::True {
                edge.settled = Some(place);
            }
            let told = edge.verdict.replace(verdict.clone()).map(|told| told.status);
            let subject = format!("{service}{REQUIRES}");
            let status = verdict.status;
            self.feed.observe(
                host_key(Layer::Service, &guest, &subject),
                verdict,
                LASTING_MS,
                now_ms,
            );
            if told != Some(status) {
                self.push(&guest, effects);
            }
        }
    }

    fn wanted_edges(&self) -> BTreeMap<(Name, Name), Place> {
        let Some(spec) = self.spec() else {
            return BTreeMap::new();
        };
        let mut wanted = BTreeMap::new();
        for (name, config) in &spec.guests {
            let lives = self.guests.get(name).is_some_and(|guest| guest.wanted);
            for service in config.services.iter().filter(|_| lives) {
                if let Some(place) = place(spec, name, config, service) {
                    wanted.insert((name.clone(), service.name.clone()), place);
                }
            }
        }
        wanted
    }

    fn forget_edges(&mut self, wanted: &BTreeMap<(Name, Name), Place>) {
        let feed = &mut self.feed;
        self.edges.retain(|key, _| {
            let stays = wanted.contains_key(key);
            if !stays {
                feed.remove(&host_key(Layer::Service, &key.0, &format!("{}{REQUIRES}", key.1)));
            }
            stays
        });
    }

    fn judge_edge(&self, place: &Place, settled: bool, now_ms: u64) -> Verdict {
        let Place {
            of,
            address,
            port,
            role,
            ..
        } = place;
        let waits = |status, why: String| Verdict::new(status, "WaitsFor", format!("{of} {why}"));
        if let NetworkMode::Off(why) = &self.network.mode {
            return Verdict::no("NoNetworkBetween", format!("{of} cannot be reached: {why}"));
        }
        let Some(other) = self.guests.get(&of.guest) else {
            return waits(Status::Unknown, "is not wanted".to_owned());
        };
        let seen = |subject: &str| {
            let key = Key::new(Layer::Service, format!("{}/{subject}", of.guest));
            self.feed
                .condition(&key, now_ms)
                .map(|condition| condition.verdict)
        };
        match seen(of.service.as_str()) {
            None => {
                let why = format!("was not seen yet: guest {} is {:?}", of.guest, other.phase);
                return waits(Status::Unknown, why);
            }
            Some(verdict) if verdict.status != Status::True => {
                let why = format!(
                    "is {:?}: {}, {}",
                    verdict.status, verdict.reason, verdict.evidence
                );
                return waits(verdict.status, why);
            }
            Some(_) => {}
        }
        if !settled && other.applied != other.given {
            let why = format!(
                "answers; its guest has not taken over revision {} yet",
                other.given.revision
            );
            return waits(Status::Unknown, why);
        }
        match seen(&format!("{}.{role}", of.service)) {
            Some(verdict) if verdict.status == Status::True => Verdict::yes(
                "Met",
                format!("{of} answers; it is at {address} port {port}, role {role}"),
            ),
            Some(verdict) => {
                let why = format!(
                    "answers; role {role} is {:?}: {}",
                    verdict.status, verdict.evidence
                );
                waits(verdict.status, why)
            }
            None => waits(Status::Unknown, format!("answers; role {role} was not made yet")),
        }
    }

    /// Gives a guest its document again with what was judged anew: it is another edition, so that the guest is ready by what
    /// it knows, not by what it knew.
    fn push(&mut self, name: &Name, effects: &mut Vec<Effect>) {
        if let Some(guest) = self.guests.get_mut(name) {
            guest.given.judged += 1;
        }
        self.give(name, effects);
    }

    /// Gives a guest its document again, if it runs or is about to; it stays as ready as it is.
    pub(super) fn give(&self, name: &Name, effects: &mut Vec<Effect>) {
        let begun = |effect: &Effect| match effect {
            Effect::Start(other, ..) | Effect::Push(other, ..) => other == name,
            _ => false,
        };
        let lives = |guest: &&Guest| matches!(guest.phase, Phase::Starting | Phase::Running);
        if let Some(guest) = self.guests.get(name).filter(lives)
            && !effects.iter().any(begun)
        {
            effects.push(Effect::Push(name.clone(), guest.config.clone()));
        }
    }

    /// Stops who is not wanted any more, each after all that need it have ended.
    pub(super) fn stop_due(&mut self, effects: &mut Vec<Effect>) {
        let lives = |phase| matches!(phase, Phase::Starting | Phase::Running | Phase::Stopping);
        let living = self.guests.values().filter(|guest| lives(guest.phase));
        let needed: BTreeSet<Name> = living
            .flat_map(|guest| &guest.config.services)
            .filter_map(|service| Some(service.requires.as_ref()?.guest.clone()))
            .collect();
        for (name, guest) in self.guests.iter_mut().filter(|(_, guest)| !guest.wanted) {
            if !needed.contains(name) || !lives(guest.phase) {
                guest.stop(name, effects);
            }
        }
    }

    /// A guest's requirements for its status.
    pub(super) fn required(&self, name: &Name, guest: &Guest) -> Vec<RequiredStatus> {
        let required = guest.config.services.iter().filter_map(|service| {
            let of = service.requires.as_ref()?.to_string();
            let edge = self.edges.get(&(name.clone(), service.name.clone()));
            let verdict = edge.and_then(|edge| edge.verdict.as_ref());
            Some(RequiredStatus {
                service: service.name.clone(),
                of,
                status: verdict.map_or(Status::Unknown, |verdict| verdict.status),
            })
        });
        required.collect()
    }
}

#[cfg(test)]
#[path = "mesh_tests.rs"]
mod tests;
