//! What should be there, computed from what somebody asked for. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

use crate::answers::answers;
use crate::conflict::{self, Conflict};
use crate::family::Family;
use crate::filter::{Filter, Sender, WayOut};
use crate::names::{self, LinkName, Mac, Mark};
use crate::near::near;
use crate::observed::Observed;
use crate::route::WantedRoute;
use crate::rule::Rule;
use crate::sysctl::Sysctl;
use crate::uplink::{self, Exit, Platform, Uplink};

mod routing;
mod spec;
mod switches;

use routing::routing;
use spec::check;
pub use spec::{DEFAULT_MTU, GUESTS, NetworkSpec, Place, WantedError};
pub use switches::{Prior, Switched};
use switches::{restored, sysctls};

/// The bridge of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: LinkName,
    /// Its pinned hardware address.
    pub mac: Mac,
    /// Its addresses.
    pub addresses: BTreeSet<HostAddress>,
}

/// Everything that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What ours carry.
    pub mark: Mark,
    /// Whether `lo` is ours to set up: in a private namespace only.
    pub loopback: bool,
    /// The MTU of all our links.
    pub mtu: u32,
    /// The bridge; `None` removes everything that carries the mark.
    pub bridge: Option<Bridge>,
    /// A TAP for each guest; each is a port of the bridge.
    pub taps: BTreeMap<LinkName, Name>,
    /// Ports reach the bridge only, not each other.
    pub isolated: bool,
    /// Routes in our own table.
    pub routes: BTreeSet<WantedRoute>,
    /// Rules that lead there and out.
    pub rules: BTreeSet<Rule>,
    /// Switches and their values.
    pub sysctls: BTreeMap<Sysctl, i64>,
    /// Switches that are put back.
    pub restored: BTreeMap<Sysctl, i64>,
    /// What is filtered and translated; `None` removes it.
    pub filter: Option<Filter>,
    /// Addresses that are wanted and not set, because others of this host are in the same subnet.
    pub conflicts: BTreeSet<Conflict>,
    /// Families whose subnet is another's: the conflict of each.
    pub taken: BTreeMap<Family, Conflict>,
    /// The way out of each family that guests have addresses of.
    pub exits: BTreeMap<Family, Exit>,
}

impl Wanted {
    /// What a spec means where `observed` is.
    ///
    /// # Errors
    /// [`WantedError`].
    pub fn of(
        instance: &Name,
        spec: &NetworkSpec,
        switched: &Switched,
        observed: &Observed,
    ) -> Result<Self, WantedError> {
        check(spec)?;
        let (bridge, mark) = (names::bridge(instance), Mark::of(instance));
        let mut wanted = Self {
            loopback: spec.place == Place::Private,
            mtu: spec.mtu,
            filter: filter(instance, &mark, &bridge, spec),
            taps: taps(instance, spec)?,
            isolated: spec.isolated,
            bridge: Some(Bridge {
                name: bridge,
                mac: names::bridge_mac(instance),
                addresses: BTreeSet::new(),
            }),
            ..Self::empty(mark)
        };
        wanted.follow(spec, switched, observed);
        Ok(wanted)
    }

    /// Brings what depends on the rest of the host up to date: cheap, as every change there asks for it.
    pub fn follow(&mut self, spec: &NetworkSpec, switched: &Switched, observed: &Observed) {
        let Some(bridge) = &mut self.bridge else {
            self.restored = restored(switched, &self.sysctls, observed);
            return;
        };
        (bridge.addresses, self.taken) = free(&spec.addresses, &bridge.name, observed);
        self.conflicts = self.taken.values().cloned().collect();
        let families: BTreeSet<Family> = bridge.addresses.iter().map(|a| Family::of(a.ip())).collect();
        let exit = |family: Family| (family, uplink::exit(observed, family, &spec.uplink, spec.vpn));
        self.exits = families.into_iter().map(exit).collect();
        let scoped = |family| {
            matches!(spec.uplink, Uplink::Named(_)) || uplink::platform(observed, family) == Platform::Netd
        };
        (self.routes, self.rules) = routing(&self.mark, bridge, &self.exits, scoped);
        let own = self
            .exits
            .iter()
            .filter(|(_, exit)| matches!(exit, Exit::Own(..)));
        for (family, exit) in own {
            let near = near(&self.mark, &bridge.name, *family, exit.link(), observed);
            self.routes.extend(near);
        }
        if let Some(filter) = &mut self.filter {
            let asked = |family: &Family| {
                spec.forwards
                    .iter()
                    .any(|forward| Family::of(forward.to) == *family)
            };
            let exits = self.exits.iter().map(|(family, exit)| (*family, exit));
            let exits = exits.filter(|(family, _)| asked(family)).collect();
            let answers = answers(
                &self.mark,
                &bridge.name,
                &exits,
                scoped,
                observed,
                &filter.answers,
            );
            self.rules.extend(answers.rules);
            filter.answers = answers.marks;
        }
        self.sysctls = sysctls(&self.mark, &bridge.name, spec, &self.exits, observed);
        self.restored = restored(switched, &self.sysctls, observed);
    }

    /// Nothing of an instance; what it switched is put back.
    #[must_use]
    pub fn nothing(instance: &Name, switched: &Switched, observed: &Observed) -> Self {
        Self {
            restored: restored(switched, &BTreeMap::new(), observed),
            ..Self::empty(Mark::of(instance))
        }
    }

    /// Whether all works without the filter, too: in a namespace of our own that leads nowhere it only keeps guests from
    /// taking each other's addresses.
    #[must_use]
    pub fn may_be_unfiltered(&self) -> bool {
        let leads = |filter: &Filter| filter.way_out != WayOut::None || !filter.forwards.is_empty();
        self.loopback && !self.filter.as_ref().is_some_and(leads)
    }

    fn empty(mark: Mark) -> Self {
        Self {
            mark,
            loopback: false,
            mtu: DEFAULT_MTU,
            bridge: None,
            taps: BTreeMap::new(),
            isolated: false,
            routes: BTreeSet::new(),
            rules: BTreeSet::new(),
            restored: BTreeMap::new(),
            sysctls: BTreeMap::new(),
            filter: None,
            conflicts: BTreeSet::new(),
            taken: BTreeMap::new(),
            exits: BTreeMap::new(),
        }
    }
}

/// The addresses in whose subnets nobody else is: one of ours there would cut the host off from them.
fn free(
    addresses: &BTreeSet<HostAddress>,
    bridge: &LinkName,
    observed: &Observed,
) -> (BTreeSet<HostAddress>, BTreeMap<Family, Conflict>) {
    let mut free = addresses.clone();
    let mut taken = BTreeMap::new();
    free.retain(|address| {
        let conflict = conflict::in_use(observed, bridge, address.subnet());
        let is_free = conflict.is_none();
        taken.extend(conflict.map(|conflict| (Family::of(address.ip()), conflict)));
        is_free
    });
    (free, taken)
}

fn taps(instance: &Name, spec: &NetworkSpec) -> Result<BTreeMap<LinkName, Name>, WantedError> {
    let mut taps = BTreeMap::new();
    for guest in spec.guests.keys() {
        let name = names::tap(instance, guest);
        if let Some(other) = taps.insert(name.clone(), guest.clone()) {
            return Err(WantedError::SameLink(other, guest.clone(), name));
        }
    }
    Ok(taps)
}

/// Private links that lead nowhere need no filter but for what guests may call themselves.
fn filter(instance: &Name, mark: &Mark, bridge: &LinkName, spec: &NetworkSpec) -> Option<Filter> {
    let mut senders = spec
        .guests
        .iter()
        .filter(|(_, addresses)| !addresses.is_empty())
        .peekable();
    if spec.place == Place::Private && !spec.routes() && senders.peek().is_none() {
        return None;
    }
    let sender = |(guest, addresses): (&Name, &BTreeSet<IpAddr>)| {
        let sender = Sender {
            mac: names::guest_mac(instance, guest),
            addresses: addresses.clone(),
        };
        (names::tap(instance, guest), sender)
    };
    Some(Filter {
        tag: mark.prefix.clone(),
        bridge: bridge.clone(),
        subnets: spec.addresses.iter().map(HostAddress::subnet).collect(),
        way_out: match spec.uplink {
            Uplink::None => WayOut::None,
            Uplink::Auto | Uplink::Named(_) => WayOut::Masquerade,
        },
        forwards: spec.forwards.clone(),
        answers: BTreeMap::new(), // by `follow`
        senders: senders.map(sender).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn spec(guests: usize) -> NetworkSpec {
        NetworkSpec {
            addresses: [HostAddress::parse("192.168.100.1/24").unwrap()].into(),
            guests: (0..guests)
                .map(|n| (name(&format!("g{n}")), BTreeSet::new()))
                .collect(),
            ..NetworkSpec::default()
        }
    }

    fn of(spec: &NetworkSpec) -> Result<Wanted, WantedError> {
        Wanted::of(&name("default"), spec, &Switched::new(), &Observed::fresh())
    }

    #[test]
    fn a_spec_becomes_a_bridge_and_taps() {
        let wanted = of(&spec(GUESTS)).unwrap();
        assert_eq!(wanted.taps.len(), GUESTS);
        let bridge = wanted.bridge.unwrap();
        assert_eq!((bridge.name.as_str(), bridge.addresses.len()), ("sv5pkj", 1));
        let nothing = Wanted::nothing(&name("default"), &Switched::new(), &Observed::fresh());
        assert!(nothing.bridge.is_none());
    }

    #[test]
    fn limits_are_named() {
        let refused = |spec: &NetworkSpec| of(spec).unwrap_err();
        assert_eq!(refused(&spec(GUESTS + 1)), WantedError::TooMany(GUESTS + 1));
        for mtu in [0, 1279, 65_522] {
            assert_eq!(refused(&NetworkSpec { mtu, ..spec(1) }), WantedError::Mtu(mtu));
        }
        let mut twice = spec(1);
        twice
            .addresses
            .insert(HostAddress::parse("192.168.100.9/24").unwrap());
        assert!(matches!(refused(&twice), WantedError::SameSubnet(..)));
    }
}
