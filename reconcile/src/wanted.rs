//! What should be there, computed from what somebody asked for. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

use crate::answers::answers;
use crate::conflict::{self, Conflict};
use crate::family::Family;
use crate::filter::{Filter, PortForward, Sender, WayOut};
use crate::names::{self, LinkName, Mac, Mark};
use crate::near::near;
use crate::observed::{Kind, Link, Observed};
use crate::route::WantedRoute;
use crate::rule::{FROM_GUESTS, NO_WAY, Rule, RuleAction, TO_GUESTS};
use crate::sysctl::Sysctl;
use crate::uplink::{self, Exit, Platform, Uplink, Vpn};

/// Guests of one bridge, at most; the kernel's own limit is 1,023 ports.
pub const GUESTS: usize = 1_000;
/// The smallest MTU with which IPv6 works, and the largest of a TAP.
const MTU: std::ops::RangeInclusive<u32> = 1280..=65_521;
/// The MTU of a fresh Ethernet link.
pub const DEFAULT_MTU: u32 = 1500;

/// What is asked of an instance's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Where its links are.
    pub place: Place,
    /// The host's own addresses on the bridge; none: guests reach each other only.
    pub addresses: BTreeSet<HostAddress>,
    /// Bytes of the largest packet on it.
    pub mtu: u32,
    /// The guests that have a network card, with the addresses that they may send from.
    pub guests: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// By which way guests leave.
    pub uplink: Uplink,
    /// What they do while a VPN is up.
    pub vpn: Vpn,
    /// Guests do not reach each other.
    pub isolated: bool,
    /// Ports of this host that lead to guests.
    pub forwards: BTreeSet<PortForward>,
    /// Name servers on this host's own loopback, which guests of a private namespace ask through what leads them out.
    pub resolvers: BTreeSet<IpAddr>,
}

/// Where the links of a network are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Place {
    /// In a namespace of our own: `lo` is ours to set up, and nobody else is to be met.
    #[default]
    Private,
    /// In the namespace that the host agent itself is in.
    Host,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            place: Place::default(),
            addresses: BTreeSet::new(),
            mtu: DEFAULT_MTU,
            guests: BTreeMap::new(),
            uplink: Uplink::None,
            vpn: Vpn::default(),
            isolated: false,
            forwards: BTreeSet::new(),
            resolvers: BTreeSet::new(),
        }
    }
}

impl NetworkSpec {
    /// Whether this host sends packets of guests on.
    #[must_use]
    pub fn routes(&self) -> bool {
        self.uplink != Uplink::None || !self.forwards.is_empty()
    }

    /// Whether a program has to lead guests out of a namespace of our own.
    #[must_use]
    pub fn is_led_out(&self) -> bool {
        self.place == Place::Private && self.uplink != Uplink::None
    }

    fn families(&self) -> BTreeSet<Family> {
        self.addresses.iter().map(|a| Family::of(a.ip())).collect()
    }
}

/// What a switch was before we set it, and what we set. Kept on disk, so that the next agent can put it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prior {
    /// Before.
    pub before: i64,
    /// Set by us.
    pub set: i64,
}

/// The switches that we changed.
pub type Switched = BTreeMap<Sysctl, Prior>;

/// Why no network can be made of a spec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WantedError {
    /// More guests than [`GUESTS`].
    #[error("{0} guests are too many for one bridge: the limit is {GUESTS}")]
    TooMany(usize),
    /// An MTU that links do not take.
    #[error("an MTU of {0} bytes does not work: use 1280 to 65521")]
    Mtu(u32),
    /// Two guests whose long names digest to the same: rename one.
    #[error("guests {0} and {1} would share the link {2}: rename one of them")]
    SameLink(Name, Name, LinkName),
    /// Two forwards of one port.
    #[error("two forwards want {} port {}: it leads to {} and to {}", .0.0.transport, .0.1.ports, .0.0.to, .0.1.to)]
    SamePort(Box<(PortForward, PortForward)>),
    /// Two addresses of one subnet.
    #[error("{0} and {1} are in one subnet")]
    SameSubnet(HostAddress, HostAddress),
}

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
            let exits = self.exits.iter().filter(|(family, _)| asked(family));
            let answers = answers(&self.mark, &bridge.name, exits, scoped, observed);
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

    /// The switches to look at: those that a spec may want, and those that were changed.
    #[must_use]
    pub fn watched(
        instance: &Name,
        spec: &NetworkSpec,
        switched: &Switched,
        observed: &Observed,
    ) -> BTreeSet<Sysctl> {
        let mut watched: BTreeSet<Sysctl> = switched.keys().cloned().collect();
        if deafens(spec) {
            watched.insert(Sysctl::GuestAdvertisements(names::bridge(instance)));
        }
        if !spec.routes() {
            return watched;
        }
        if spec.place == Place::Host {
            watched.insert(Sysctl::ReversePath(names::bridge(instance)));
        }
        if spec.place == Place::Host && spec.families().contains(&Family::V6) {
            let mark = Mark::of(instance);
            let listeners = listeners(&mark, observed);
            watched.extend(listeners.map(Sysctl::AcceptAdvertisements));
        }
        for family in spec.families() {
            watched.insert(match family {
                Family::V4 => Sysctl::ForwardV4,
                Family::V6 => Sysctl::ForwardV6,
            });
            let exit = uplink::exit(observed, family, &spec.uplink, spec.vpn);
            let link = exit
                .link()
                .filter(|_| family == Family::V6 && spec.place == Place::Host);
            watched.extend(link.cloned().map(Sysctl::AcceptAdvertisements));
        }
        watched
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

fn check(spec: &NetworkSpec) -> Result<(), WantedError> {
    if spec.guests.len() > GUESTS {
        return Err(WantedError::TooMany(spec.guests.len()));
    }
    if !MTU.contains(&spec.mtu) {
        return Err(WantedError::Mtu(spec.mtu));
    }
    let mut subnets = BTreeMap::new();
    for address in &spec.addresses {
        if let Some(other) = subnets.insert(address.subnet(), *address) {
            return Err(WantedError::SameSubnet(other, *address));
        }
    }
    for forward in &spec.forwards {
        let others = spec.forwards.range((Bound::Excluded(forward), Bound::Unbounded));
        let takes = forward.takes();
        if let Some(other) = others.into_iter().find(|other| takes.collides(other.takes())) {
            return Err(WantedError::SamePort(Box::new((forward.clone(), other.clone()))));
        }
    }
    Ok(())
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

/// Routes and rules of our own. Where the main table decides there are none: whoever changes the host's routing means
/// the guests, too.
fn routing(
    mark: &Mark,
    bridge: &Bridge,
    exits: &BTreeMap<Family, Exit>,
    scoped: impl Fn(Family) -> bool,
) -> (BTreeSet<WantedRoute>, BTreeSet<Rule>) {
    let (mut routes, mut rules) = (BTreeSet::new(), BTreeSet::new());
    let ours = |to, link: &LinkName, gateway, source| WantedRoute {
        table: mark.table,
        to,
        link: link.clone(),
        gateway,
        source,
        ours: true,
    };
    for address in &bridge.addresses {
        let (family, subnet) = (Family::of(address.ip()), address.subnet());
        let prefix = Prefix::new(subnet.network(), subnet.prefix());
        let Some(to) = prefix.filter(|_| scoped(family)) else {
            continue; // a subnet's length is one of a prefix
        };
        routes.insert(ours(to, &bridge.name, None, Some(address.ip())));
        rules.insert(Rule {
            to: Some(to),
            ..Rule::ours(family, TO_GUESTS, RuleAction::Lookup(mark.table))
        });
    }
    let from_guests = |family, priority, action| Rule {
        iif: Some(bridge.name.as_str().to_owned()),
        ..Rule::ours(family, priority, action)
    };
    for (family, exit) in exits.iter().filter(|(family, _)| scoped(**family)) {
        let table = match exit {
            Exit::Own(link, gateway) => {
                routes.insert(ours(family.everywhere(), link, *gateway, None));
                Some(mark.table)
            }
            Exit::Table(table, _) => Some(*table),
            Exit::None(_) | Exit::Main(_) => None,
        };
        let lookup = table.map(|table| from_guests(*family, FROM_GUESTS, RuleAction::Lookup(table)));
        rules.extend(lookup);
        rules.insert(from_guests(*family, NO_WAY, RuleAction::Unreachable));
    }
    (routes, rules)
}

/// Whether guests could tell this host routers and addresses of its own. In a namespace of ours the filter drops what they say
/// of routers.
fn deafens(spec: &NetworkSpec) -> bool {
    spec.place == Place::Host
}

/// Links of others from which this host may hear of routers: none that others are behind, such as a bridge of virtual
/// machines, unless a default route shows that there is a router (the way out is asked for beside these).
fn listeners(mark: &Mark, observed: &Observed) -> impl Iterator<Item = LinkName> {
    let listens = |link: &&Link| {
        let alone = link.controller.is_none() && ![Kind::Bridge, Kind::Loopback].contains(&link.kind);
        alone && !mark.is_on(&link.name, link.group)
    };
    let links = observed.links.values().filter(listens);
    links.filter_map(|link| LinkName::parse(&link.name))
}

fn sysctls(
    mark: &Mark,
    bridge: &LinkName,
    spec: &NetworkSpec,
    exits: &BTreeMap<Family, Exit>,
    observed: &Observed,
) -> BTreeMap<Sysctl, i64> {
    let mut sysctls = BTreeMap::new();
    if deafens(spec) {
        sysctls.insert(Sysctl::GuestAdvertisements(bridge.clone()), 0);
    }
    if !spec.routes() {
        return sysctls;
    }
    if spec.place == Place::Host {
        sysctls.insert(Sysctl::ReversePath(bridge.clone()), 2); // private, all packets have one way
    }
    for (family, exit) in exits {
        match family {
            Family::V4 => sysctls.insert(Sysctl::ForwardV4, 1),
            Family::V6 => sysctls.insert(Sysctl::ForwardV6, 1),
        };
        if *family == Family::V4 || spec.place == Place::Private {
            continue;
        }
        // Also before the first one is heard, and before this host is a router: then it would be deaf.
        for link in listeners(mark, observed).chain(exit.link().cloned()) {
            let accepts = Sysctl::AcceptAdvertisements(link);
            // 0 means that nobody wants them there.
            if observed.sysctls.get(&accepts).is_some_and(|value| *value > 0) {
                sysctls.insert(accepts, 2);
            }
        }
    }
    sysctls
}

/// What is no longer wanted and is still as we set it.
fn restored(
    switched: &Switched,
    wanted: &BTreeMap<Sysctl, i64>,
    observed: &Observed,
) -> BTreeMap<Sysctl, i64> {
    let unwanted = switched.iter().filter(|(sysctl, _)| !wanted.contains_key(sysctl));
    let still_ours = unwanted.filter(|(sysctl, prior)| observed.sysctls.get(sysctl) == Some(&prior.set));
    still_ours
        .map(|(sysctl, prior)| (sysctl.clone(), prior.before))
        .collect()
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
