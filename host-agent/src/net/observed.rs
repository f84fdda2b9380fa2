//! Folds netlink messages into what is there.
//!
//! A dump and a notification carry the same messages, so one function takes both, and the
//! state stays right without another dump as long as no notification was lost.

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
pub use sovereign_reconcile::observed::{Address, Kind, Link, Observed, Route};

use super::names::Mac;

/// The end of an IPv4 address's label that makes it ours; every kernel keeps labels.
pub(super) const LABEL_END: &str = ":sv";
/// IFA_PROTO of our IPv6 addresses (kernel 5.18; older ones drop it, and the address is not taken for ours).
pub(super) const ADDRESS_PROTOCOL: u8 = b'S';

/// What a namespace is, message by message.
pub trait Fold {
    /// Folds one message in; kinds that do not matter are left alone.
    fn take(&mut self, message: &RouteNetlinkMessage);
}

impl Fold for Observed {
    fn take(&mut self, message: &RouteNetlinkMessage) {
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
                }
            }
            RouteNetlinkMessage::NewRoute(message) => self.routes.extend(route(message)),
            RouteNetlinkMessage::DelRoute(message) => {
                if let Some(route) = route(message) {
                    self.routes.remove(&route);
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
        observed.routes.retain(|route| route.link != link.index);
    }
    observed.links.insert(link.index, link);
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
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(value.clone()),
            LinkAttribute::Mtu(value) => mtu = Some(*value),
            LinkAttribute::Group(value) => link.group = *value,
            LinkAttribute::Carrier(value) => link.carrier = *value != 0,
            LinkAttribute::Controller(value) => link.controller = (*value != 0).then_some(*value),
            LinkAttribute::Address(value) => link.mac = value.as_slice().try_into().ok().map(Mac),
            LinkAttribute::LinkInfo(infos) => info = infos.iter().find_map(kind_of),
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

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut ip, mut local, mut ours) = (None, None, false);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(value) => ip = Some(*value),
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Label(label) => ours |= label.ends_with(LABEL_END),
            AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)) => ours = true,
            _ => {}
        }
    }
    Some(Address {
        link: message.header.index,
        ip: local.or(ip)?, // of a point-to-point address, `Address` is the other end
        prefix: message.header.prefix_len,
        ours,
    })
}

fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let (mut network, mut link) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => network = Some(IpAddr::V4(*ip)),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => network = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
            _ => {}
        }
    }
    Some(Route {
        link: link?,
        network: network?,
        prefix: header.destination_prefix_length,
    })
}

#[cfg(test)]
#[path = "observed_tests.rs"]
mod tests;
