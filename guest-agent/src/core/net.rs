//! The network as values: what was seen, what is wanted, and the actions from one to the other.
//!
//! Foreign addresses and routes are left alone: only what carries our mark is ever removed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::domain::Domain;
use sovereign_protocol::interface::{InterfaceSpec, Prefix};

/// The driver of the interface that the host gives a guest.
pub const DRIVER: &str = "virtio_net";
/// The index of `lo` in every network namespace (net/core/net_namespace.c registers it first).
pub const LO: u32 = 1;

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// It is administratively up.
    pub up: bool,
    /// Somebody is at the other end.
    pub carrier: bool,
    /// Its largest packet, in bytes.
    pub mtu: u32,
    /// The driver of its device; virtual interfaces have none.
    pub driver: Option<String>,
}

/// Whether an address can be used (IPv6 looks for duplicates first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the field's own terms
pub enum AddressState {
    Usable,
    Tentative,
    Duplicate,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface.
    pub index: u32,
    /// Address and network.
    pub prefix: Prefix,
    /// It carries our mark (IFA_PROTO).
    pub ours: bool,
    /// Whether it can be used.
    pub state: AddressState,
}

/// A default route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The interface.
    pub index: u32,
    /// The next hop.
    pub gateway: IpAddr,
    /// It carries our mark (the route's protocol).
    pub ours: bool,
}

/// Everything that was seen at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// By index.
    pub links: Vec<Link>,
    /// In the kernel's order.
    pub addresses: Vec<Address>,
    /// In the kernel's order.
    pub routes: Vec<Route>,
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
#[allow(missing_docs)] // index of the interface first, then the thing
pub enum Action {
    Up(u32),
    Mtu(u32, u32),
    RemoveRoute(u32, IpAddr),
    RemoveAddress(u32, Prefix),
    AddAddress(u32, Prefix),
    AddRoute(u32, IpAddr),
    Resolver(String),
}

impl Action {
    /// The code of the condition while this action is needed and not done.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Up(_) => "Down",
            Self::Mtu(..) => "OtherMtu",
            Self::RemoveRoute(..) | Self::RemoveAddress(..) => "Outdated",
            Self::AddAddress(..) => "AddressMissing",
            Self::AddRoute(..) => "RouteMissing",
            Self::Resolver(_) => "ResolverMissing",
        }
    }

    /// What is not as wanted, before the action.
    #[must_use]
    pub fn lack(&self) -> String {
        match self {
            Self::Up(LO) => "lo is down".to_owned(),
            Self::Up(_) => "the interface is down".to_owned(),
            Self::Mtu(_, mtu) => format!("the mtu is not {mtu}"),
            Self::RemoveRoute(_, gateway) => {
                format!("the default route via {gateway} is not wanted any more")
            }
            Self::RemoveAddress(_, prefix) => format!("{prefix} is not wanted any more"),
            Self::AddAddress(_, prefix) => format!("{prefix} is missing"),
            Self::AddRoute(_, gateway) => format!("the default route via {gateway} is missing"),
            Self::Resolver(_) => "resolv.conf is another".to_owned(),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up(index) => write!(f, "bring interface {index} up"),
            Self::Mtu(_, mtu) => write!(f, "set mtu {mtu}"),
            Self::RemoveRoute(_, gateway) => write!(f, "remove the default route via {gateway}"),
            Self::RemoveAddress(_, prefix) => write!(f, "remove {prefix}"),
            Self::AddAddress(_, prefix) => write!(f, "add {prefix}"),
            Self::AddRoute(_, gateway) => write!(f, "add the default route via {gateway}"),
            Self::Resolver(_) => f.write_str("write resolv.conf"),
        }
    }
}

/// The interface of the guest: by driver, never by name; the lowest index of several.
#[must_use]
pub fn device(seen: &Seen) -> Option<&Link> {
    let ours = |link: &&Link| link.driver.as_deref() == Some(DRIVER);
    seen.links.iter().filter(ours).min_by_key(|link| link.index)
}

/// What makes the interface as wanted, sorted; empty when it is.
#[must_use]
pub fn plan(wanted: &Wanted, seen: &Seen) -> Vec<Action> {
    let nothing = InterfaceSpec::default();
    let spec = match wanted {
        Wanted::Untold => return Vec::new(),
        Wanted::Nothing => &nothing,
        Wanted::Spec(spec) => spec,
    };
    let Some(link) = device(seen) else {
        return Vec::new();
    };
    let mut actions = outdated(spec, link, seen);
    if let Wanted::Spec(spec) = wanted {
        actions.extend(missing(spec, link, seen));
    }
    actions.sort();
    actions
}

fn outdated(spec: &InterfaceSpec, link: &Link, seen: &Seen) -> Vec<Action> {
    let addresses = seen.addresses.iter().filter(|address| {
        address.index == link.index && address.ours && !spec.addresses.contains(&address.prefix)
    });
    let routes = seen
        .routes
        .iter()
        .filter(|route| route.index == link.index && route.ours && spec.gateway != Some(route.gateway));
    addresses
        .map(|address| Action::RemoveAddress(link.index, address.prefix))
        .chain(routes.map(|route| Action::RemoveRoute(link.index, route.gateway)))
        .collect()
}

fn missing(spec: &InterfaceSpec, link: &Link, seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    if !link.up {
        actions.push(Action::Up(link.index));
    }
    if let Some(mtu) = spec.mtu.filter(|mtu| *mtu != link.mtu) {
        actions.push(Action::Mtu(link.index, mtu));
    }
    for prefix in &spec.addresses {
        if !has_address(seen, link.index, *prefix) {
            actions.push(Action::AddAddress(link.index, *prefix));
        }
    }
    if let Some(gateway) = spec.gateway {
        let there = |route: &Route| route.index == link.index && route.gateway == gateway;
        if !seen.routes.iter().any(there) {
            actions.push(Action::AddRoute(link.index, gateway));
        }
    }
    let text = resolver(spec);
    if seen.resolver.as_ref() != Some(&text) {
        actions.push(Action::Resolver(text));
    }
    actions
}

fn has_address(seen: &Seen, index: u32, prefix: Prefix) -> bool {
    seen.addresses
        .iter()
        .any(|address| address.index == index && address.prefix == prefix)
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
pub fn plan_loopback(seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    if !seen.links.iter().any(|link| link.index == LO && link.up) {
        actions.push(Action::Up(LO));
    }
    let v4 = Prefix::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8);
    let v6 = Prefix::new(IpAddr::V6(Ipv6Addr::LOCALHOST), 128).filter(|_| seen.ipv6);
    for prefix in v4.into_iter().chain(v6) {
        if !has_address(seen, LO, prefix) {
            actions.push(Action::AddAddress(LO, prefix));
        }
    }
    actions
}

/// Judges the interface; `errors` are those of the actions that were just tried.
#[must_use]
pub fn judge(wanted: &Wanted, seen: &Seen, errors: &[String]) -> Option<Verdict> {
    let Wanted::Spec(spec) = wanted else { return None };
    let Some(link) = device(seen) else {
        let names: Vec<&str> = seen.links.iter().map(|link| link.name.as_str()).collect();
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
    let states = || seen.addresses.iter().filter(|a| a.index == link.index);
    let wanted_in = |state| states().find(|a| a.state == state && spec.addresses.contains(&a.prefix));
    if let Some(address) = wanted_in(AddressState::Duplicate) {
        let text = format!("{}: somebody else on the link has {}", link.name, address.prefix);
        return Some(Verdict::no("AddressConflict", text));
    }
    if let Some(address) = wanted_in(AddressState::Tentative) {
        let text = format!("{}: {} is checked for duplicates", link.name, address.prefix);
        return Some(Verdict::unknown("AddressTentative", text));
    }
    Some(Verdict::yes("Configured", describe(spec, link)))
}

/// The worst lack names the condition.
fn severity(action: &Action) -> u8 {
    match action {
        Action::Up(_) => 0,
        Action::AddAddress(..) => 1,
        Action::AddRoute(..) => 2,
        Action::Resolver(_) => 3,
        Action::Mtu(..) => 4,
        Action::RemoveRoute(..) | Action::RemoveAddress(..) => 5,
    }
}

/// The reason and the lacks of a plan that is not empty, in one line.
#[must_use]
pub fn lacking(plan: &[Action]) -> Option<(&'static str, String)> {
    let first = plan.iter().min_by_key(|action| severity(action))?;
    let lacks: Vec<String> = plan.iter().map(Action::lack).collect();
    Some((first.reason(), lacks.join(", ")))
}

fn describe(spec: &InterfaceSpec, link: &Link) -> String {
    let join = |list: Vec<String>| list.join(", ");
    let addresses = join(spec.addresses.iter().map(ToString::to_string).collect());
    let route = match spec.gateway {
        Some(gateway) => format!("default route via {gateway}"),
        None => "no default route".to_owned(),
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
