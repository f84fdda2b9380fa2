//! Folds netlink messages into what is there.
//!
//! A dump and a notification carry the same messages, so one function takes both, and the
//! state stays right without another dump as long as no notification was lost.

use std::net::IpAddr;

use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope,
};
use netlink_packet_route::link::{
    InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction as Verb, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use sovereign_protocol::interface::Prefix;
use sovereign_reconcile::family::Family;
pub use sovereign_reconcile::observed::{Address, Kind, Link, Observed};
use sovereign_reconcile::route::{OURS, Route, RouteKind};
use sovereign_reconcile::rule::{Rule, RuleAction};

use super::names::Mac;

/// The end of an IPv4 address's label that makes it ours; every kernel keeps labels.
pub(super) const LABEL_END: &str = ":sv";
/// IFA_PROTO of our IPv6 addresses (kernel 5.18; older ones drop it, and the address is not taken for ours).
pub(super) const ADDRESS_PROTOCOL: u8 = b'S';

/// Flags of addresses that are not for connections to come. Secondary ones of IPv4 and temporary ones of IPv6 share a bit
/// (linux/if_addr.h).
const PASSED_OVER: AddressFlags = AddressFlags::Secondary
    .union(AddressFlags::Deprecated)
    .union(AddressFlags::Tentative)
    .union(AddressFlags::Dadfailed);

/// What a namespace is, message by message.
pub trait Fold {
    /// Folds one message in; kinds that do not matter are left alone. A route that `replaces` takes the place of
    /// another to the same destination, of which nothing is told.
    fn fold(&mut self, message: &RouteNetlinkMessage, replaces: bool);

    /// The same for a message that replaces nothing.
    fn take(&mut self, message: &RouteNetlinkMessage) {
        self.fold(message, false);
    }
}

impl Fold for Observed {
    fn fold(&mut self, message: &RouteNetlinkMessage, replaces: bool) {
        match message {
            RouteNetlinkMessage::NewLink(message) => new_link(self, message),
            RouteNetlinkMessage::DelLink(message) if is_whole_link(message) => {
                self.remove_link(message.header.index);
            }
            RouteNetlinkMessage::NewAddress(message) => {
                if let Some(address) = address(message) {
                    self.remove_address(&address);
                    self.addresses.insert(address);
                }
            }
            RouteNetlinkMessage::DelAddress(message) => {
                if let Some(address) = address(message) {
                    self.remove_address(&address);
                    drop_routes_from(self, &address);
                }
            }
            RouteNetlinkMessage::NewRoute(message) => {
                if let Some(new) = route(message) {
                    let place = |route: &Route| (route.table, route.to, route.metric);
                    self.routes.retain(|old| !replaces || place(old) != place(&new));
                    self.routes.insert(new);
                }
            }
            RouteNetlinkMessage::DelRoute(message) => {
                if let Some(route) = route(message) {
                    self.routes.remove(&route);
                }
            }
            RouteNetlinkMessage::NewRule(message) => self.rules.extend(rule(message)),
            RouteNetlinkMessage::DelRule(message) => {
                if let Some(rule) = rule(message) {
                    self.rules.remove(&rule);
                }
            }
            _ => {}
        }
    }
}

fn new_link(observed: &mut Observed, message: &LinkMessage) {
    let Some(link) = link(message) else {
        return;
    };
    if !link.up {
        // The kernel drops IPv4 routes of a link that goes down without RTM_DELROUTE (FACTS section 2).
        observed.routes.retain(|route| route.link != Some(link.index));
    }
    observed.links.insert(link.index, link);
}

/// The kernel drops IPv4 routes whose source is an address that goes, without RTM_DELROUTE (fib_sync_down_addr). The only
/// ones of ours that have a source lead to its subnet; one that is still there is replaced by the same.
fn drop_routes_from(observed: &mut Observed, gone: &Address) {
    let from = |route: &Route| {
        route.protocol == OURS && route.link == Some(gone.link) && route.gateway.is_none() && {
            Prefix::new(gone.ip, gone.prefix).is_some_and(|subnet| subnet.contains(route.to.address()))
        }
    };
    if gone.ip.is_ipv4() {
        observed.routes.retain(|route| !from(route));
    }
}

/// Bridges send messages of their own family about ports: a port that left is not a link that went.
fn is_whole_link(message: &LinkMessage) -> bool {
    message.header.interface_family == AddressFamily::Unspec
}

/// `None` for a message that does not tell the whole link, such as a wireless event.
fn link(message: &LinkMessage) -> Option<Link> {
    if !is_whole_link(message) {
        return None;
    }
    let flags = message.header.flags;
    let (mut name, mut mtu, mut info) = (None, None, None);
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: Kind::Other,
        group: 0,
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        carrier: flags.contains(LinkFlags::LowerUp),
        controller: None,
        isolated: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = Some(*value),
            LinkAttribute::Group(value) => link.group = *value,
            LinkAttribute::Carrier(value) => link.carrier = *value != 0,
            LinkAttribute::Controller(value) => link.controller = (*value != 0).then_some(*value),
            LinkAttribute::Address(value) => link.mac = value.as_slice().try_into().ok().map(Mac),
            LinkAttribute::LinkInfo(infos) => {
                info = infos.iter().find_map(kind_of);
                link.isolated = infos.iter().any(is_isolated);
            }
            _ => {}
        }
    }
    link.name = name?;
    link.mtu = mtu?;
    link.kind = match info {
        Some(InfoKind::Bridge) => Kind::Bridge,
        Some(InfoKind::Tun) if message.header.link_layer_type == LinkLayerType::Ether => Kind::Tap,
        None if flags.contains(LinkFlags::Loopback) => Kind::Loopback,
        _ => Kind::Other,
    };
    Some(link)
}

fn kind_of(info: &LinkInfo) -> Option<&InfoKind> {
    match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    }
}

fn is_isolated(info: &LinkInfo) -> bool {
    let LinkInfo::PortData(InfoPortData::BridgePort(port)) = info else {
        return false;
    };
    port.iter()
        .any(|attribute| matches!(attribute, InfoBridgePort::Isolated(true)))
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut ip, mut local, mut ours) = (None, None, false);
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(value) => ip = Some(*value),
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Label(label) => ours |= label.ends_with(LABEL_END),
            AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)) => ours = true,
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(Address {
        link: message.header.index,
        ip: local.or(ip)?, // of a point-to-point address, `Address` is the other end
        prefix: message.header.prefix_len,
        ours,
        passed_over: message.header.scope != AddressScope::Universe || flags.intersects(PASSED_OVER),
    })
}

/// `None` for one that does not matter, and for the cache's.
fn route(message: &RouteMessage) -> Option<Route> {
    any_route(message).filter(Route::matters)
}

/// A route, whether it matters or not; `None` for the cache's, which answers to questions are.
pub(super) fn any_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let family = family(header.address_family)?;
    let mut route = Route {
        table: u32::from(header.table),
        to: family.everywhere(),
        metric: 0,
        link: None,
        gateway: None,
        kind: match header.kind {
            RouteType::Unicast => RouteKind::Unicast,
            _ => RouteKind::Other,
        },
        protocol: header.protocol.into(),
    };
    let mut to = family.everywhere().address();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => route.table = *table,
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => to = IpAddr::V4(*ip),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => to = IpAddr::V6(*ip),
            RouteAttribute::Oif(index) => route.link = Some(*index),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => route.gateway = Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => route.gateway = Some(IpAddr::V6(*ip)),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => route.gateway = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    route.to = Prefix::new(to, header.destination_prefix_length)?;
    Some(route)
}

/// `None` for one that does not matter.
fn rule(message: &RuleMessage) -> Option<Rule> {
    any_rule(message).filter(Rule::matters)
}

/// A rule, whether it matters or not.
pub(super) fn any_rule(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut rule = Rule::ours(family(header.family)?, 0, RuleAction::Other);
    rule.protocol = 0;
    rule.narrower = header.tos != 0 || header.flags.contains(RuleFlags::Invert);
    let (mut mark, mut mask) = (None, u32::MAX);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Destination(ip) => rule.to = Prefix::new(*ip, header.dst_len),
            RuleAttribute::Source(ip) => rule.from = Prefix::new(*ip, header.src_len),
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = *value,
            RuleAttribute::UidRange(range) => rule.uids = Some((range.start, range.end)),
            RuleAttribute::Protocol(protocol) => rule.protocol = (*protocol).into(),
            // No condition: what a lookup may not find. Ours and netd's have none.
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            _ => rule.narrower = true,
        }
    }
    // A mask without a mark means all packets that have none of its bits.
    rule.mark = match (mark, mask) {
        (None, u32::MAX) => None,
        (mark, mask) => Some((mark.unwrap_or(0), mask)),
    };
    rule.action = match header.action {
        Verb::ToTable => RuleAction::Lookup(table),
        Verb::Unreachable => RuleAction::Unreachable,
        _ => RuleAction::Other,
    };
    Some(rule)
}

fn family(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

#[cfg(test)]
#[path = "observed_tests.rs"]
mod tests;
