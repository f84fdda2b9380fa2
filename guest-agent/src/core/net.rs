//! The network of a guest as values: what was seen, what is wanted, and the changes from one to the other.
//!
//! The plan of an interface is `sovereign_reconcile`'s, the same as for the host's bridge. Foreign addresses and
//! routes are left alone: only what carries our mark is ever removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::domain::Domain;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::link_name::LinkName;
use sovereign_reconcile::interface::{Interface, LOOPBACK};
use sovereign_reconcile::observed::{Link, Observed};
use sovereign_reconcile::plan::{self, Step};

/// The driver of the interface that the host gives a guest.
pub const DRIVER: &str = "virtio_net";
/// The index of `lo` in every network namespace (net/core/net_namespace.c registers it first).
pub const LO: u32 = 1;

/// Why an address cannot be used (IPv6 looks for duplicates first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// The kernel still asks whether somebody else has it.
    Tentative,
    /// Somebody else has it.
    Duplicate,
}

/// Everything that was seen at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Links, addresses, and the default routes of the main table.
    pub network: Observed,
    /// The drivers of links by index; virtual ones have none.
    pub drivers: BTreeMap<u32, String>,
    /// Addresses that cannot be used, by link.
    pub unusable: BTreeMap<(u32, IpAddr), Unusable>,
    /// The text of resolv.conf; `None` when it cannot be read.
    pub resolver: Option<String>,
    /// `lo` may have ::1: the kernel speaks IPv6 and it is not switched off.
    pub ipv6: bool,
}

/// What the host wants of the interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Wanted {
    /// The host has not said it yet: everything is left alone.
    #[default]
    Untold,
    /// None: what carries our mark is removed.
    Nothing,
    /// This.
    Spec(InterfaceSpec),
}

/// What the interface is to be from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Comes back with the outcome.
    pub attempt: u64,
    /// It.
    pub wanted: Wanted,
    /// True when there is an old state to go back to if this one cannot be reached.
    pub strict: bool,
}

/// One change, in the order in which they are made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// Of the kernel's network.
    Network(Step),
    /// The text of resolv.conf.
    Resolver(String),
}

impl Change {
    /// The code of the condition while this change is needed and not done.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Network(Step::SetUp { .. }) => "Down",
            Self::Network(Step::SetMtu { .. }) => "OtherMtu",
            Self::Network(Step::AddAddress { .. }) => "AddressMissing",
            Self::Network(Step::AddRoute { .. }) => "RouteMissing",
            Self::Network(_) => "Outdated",
            Self::Resolver(_) => "ResolverMissing",
        }
    }

    /// What is not as wanted, before the change.
    #[must_use]
    pub fn lack(&self) -> String {
        let via = |gateway: &Option<IpAddr>| gateway.map_or_else(String::new, |ip| format!(" via {ip}"));
        match self {
            Self::Network(Step::SetUp { name }) if name.as_str() == LOOPBACK => "lo is down".to_owned(),
            Self::Network(Step::SetUp { .. }) => "the interface is down".to_owned(),
            Self::Network(Step::SetMtu { mtu, .. }) => format!("the mtu is not {mtu}"),
            Self::Network(Step::RemoveRoute { route }) => {
                format!("the default route{} is not wanted any more", via(&route.gateway))
            }
            Self::Network(Step::RemoveAddress { address, .. }) => {
                format!("{address} is not wanted any more")
            }
            Self::Network(Step::AddAddress { address, .. }) => format!("{address} is missing"),
            Self::Network(Step::AddRoute { route }) => {
                format!("the default route{} is missing", via(&route.gateway))
            }
            Self::Network(other) => format!("{other} is not done"),
            Self::Resolver(_) => "resolv.conf is another".to_owned(),
        }
    }

    /// What puts back what this changed, in order; `before` and `after` are what was seen around it.
    #[must_use]
    pub fn inverse(&self, before: &Seen, after: &Seen) -> Vec<Self> {
        match self {
            Self::Network(step) => {
                let back = step.inverse(&before.network, &after.network);
                back.into_iter().map(Self::Network).collect()
            }
            Self::Resolver(_) => before.resolver.clone().map(Self::Resolver).into_iter().collect(),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(step) => step.fmt(f),
            Self::Resolver(_) => f.write_str("resolv.conf: write"),
        }
    }
}

/// The interface of the guest: by driver, never by name; the lowest index of several.
#[must_use]
pub fn device(seen: &Seen) -> Option<&Link> {
    let ours = |link: &&Link| {
        seen.drivers
            .get(&link.index)
            .is_some_and(|driver| driver == DRIVER)
    };
    seen.network.links.values().find(ours)
}

/// What makes the interface as wanted, sorted; empty when it is.
#[must_use]
pub fn plan(wanted: &Wanted, seen: &Seen) -> Vec<Change> {
    let name = device(seen).and_then(|link| LinkName::parse(&link.name));
    let Some(card) = name.map(Interface::bare) else {
        return Vec::new();
    };
    match wanted {
        Wanted::Untold => Vec::new(),
        Wanted::Nothing => steps(&card, seen).collect(),
        Wanted::Spec(spec) => {
            let card = Interface {
                up: true,
                mtu: spec.mtu,
                addresses: spec.addresses.iter().copied().collect(),
                gateways: spec.gateways.iter().copied().collect(),
                ..card
            };
            let text = resolver(spec);
            let resolver = (seen.resolver.as_ref() != Some(&text)).then_some(Change::Resolver(text));
            steps(&card, seen).chain(resolver).collect()
        }
    }
}

fn steps(wanted: &Interface, seen: &Seen) -> impl Iterator<Item = Change> {
    let steps: BTreeSet<Step> = plan::interface(wanted, &seen.network).steps;
    steps.into_iter().map(Change::Network)
}

/// The text of resolv.conf.
#[must_use]
pub fn resolver(spec: &InterfaceSpec) -> String {
    let servers = spec.dns.iter().map(|server| format!("nameserver {server}\n"));
    let domains: Vec<&str> = spec.search.iter().map(Domain::as_str).collect();
    let search = (!domains.is_empty()).then(|| format!("search {}\n", domains.join(" ")));
    servers.chain(search).collect()
}

/// What makes the loopback as it must be, sorted; empty when it is.
#[must_use]
pub fn plan_loopback(seen: &Seen) -> Vec<Change> {
    steps(&Interface::loopback(seen.ipv6), seen).collect()
}

/// Judges the interface; `errors` are those of the changes that were just tried.
#[must_use]
pub fn judge(wanted: &Wanted, seen: &Seen, errors: &[String]) -> Option<Verdict> {
    let Wanted::Spec(spec) = wanted else { return None };
    let Some(link) = device(seen) else {
        let names: Vec<&str> = seen
            .network
            .links
            .values()
            .map(|link| link.name.as_str())
            .collect();
        let text = format!(
            "no interface has the driver {DRIVER}; there are: {}",
            names.join(", ")
        );
        return Some(Verdict::no("NoDevice", text));
    };
    if let Some((reason, lacks)) = lacking(&plan(wanted, seen)) {
        let text = format!("{}: {lacks}; {}", link.name, errors.join("; "));
        return Some(Verdict::no(reason, text.trim_end_matches("; ")));
    }
    if !link.carrier {
        let text = format!(
            "{} is up and nobody is at its other end (the host's tap)",
            link.name
        );
        return Some(Verdict::no("NoCarrier", text));
    }
    let wanted_in = |state| {
        let is = |ip| seen.unusable.get(&(link.index, ip)) == Some(&state);
        spec.addresses.iter().find(|address| is(address.address()))
    };
    if let Some(address) = wanted_in(Unusable::Duplicate) {
        let text = format!("{}: somebody else on the link has {address}", link.name);
        return Some(Verdict::no("AddressConflict", text));
    }
    if let Some(address) = wanted_in(Unusable::Tentative) {
        let text = format!("{}: {address} is checked for duplicates", link.name);
        return Some(Verdict::unknown("AddressTentative", text));
    }
    Some(Verdict::yes("Configured", describe(spec, link)))
}

/// The worst lack names the condition.
fn severity(change: &Change) -> u8 {
    match change {
        Change::Network(Step::SetUp { .. }) => 0,
        Change::Network(Step::AddAddress { .. }) => 1,
        Change::Network(Step::AddRoute { .. }) => 2,
        Change::Resolver(_) => 3,
        Change::Network(Step::SetMtu { .. }) => 4,
        Change::Network(_) => 5,
    }
}

/// The reason and the lacks of a plan that is not empty, in one line.
#[must_use]
pub fn lacking(plan: &[Change]) -> Option<(&'static str, String)> {
    let first = plan.iter().min_by_key(|change| severity(change))?;
    let lacks: Vec<String> = plan.iter().map(Change::lack).collect();
    Some((first.reason(), lacks.join(", ")))
}

fn describe(spec: &InterfaceSpec, link: &Link) -> String {
    let join = |list: Vec<String>| list.join(", ");
    let addresses = join(spec.addresses.iter().map(ToString::to_string).collect());
    let route = match &spec.gateways[..] {
        [] => "no default route".to_owned(),
        gateways => {
            let via = gateways.iter().map(ToString::to_string).collect::<Vec<_>>();
            format!("default route via {}", via.join(" and "))
        }
    };
    let dns = match &spec.dns[..] {
        [] => "no DNS".to_owned(),
        dns => format!("DNS {}", join(dns.iter().map(ToString::to_string).collect())),
    };
    format!(
        "{} ({DRIVER}): {addresses}, {route}, {dns}, mtu {}",
        link.name, link.mtu
    )
}

#[cfg(test)]
#[path = "net_tests.rs"]
mod tests;
