//! What is there: links, addresses and routes of one namespace, folded from netlink messages.
//!
//! A dump and a notification carry the same messages, so one function takes both, and the
//! state stays right without another dump as long as no notification was lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::names::Mac;

/// The end of an IPv4 address's label that makes it ours; every kernel keeps labels.
pub(super) const LABEL_END: &str = ":sv";
/// IFA_PROTO of our IPv6 addresses (kernel 5.18; older ones drop it, and the address is not taken for ours).
pub(super) const ADDRESS_PROTOCOL: u8 = b'S';

/// What a link is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// `lo`.
    Loopback,
    /// A bridge.
    Bridge,
    /// A TAP.
    Tap,
    /// Anything else.
    Other,
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number: never used again soon, unlike a name.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its device group.
    pub group: u32,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it was set up.
    pub up: bool,
    /// Whether it has carrier; of a TAP: whether a process holds it.
    pub carrier: bool,
    /// The bridge it is a port of.
    pub controller: Option<u32>,
}

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// The link.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// The length of its subnet in bits.
    pub prefix: u8,
    /// Whether it carries our mark.
    pub ours: bool,
}

/// A route of the main table that leads straight to a link's own subnet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The link.
    pub link: u32,
    /// The subnet.
    pub network: IpAddr,
    /// Its length in bits.
    pub prefix: u8,
}

/// The state of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// All links by index.
    pub links: BTreeMap<u32, Link>,
    /// All addresses.
    pub addresses: BTreeSet<Address>,
    /// Connected routes.
    pub routes: BTreeSet<Route>,
}

impl Observed {
    /// The link of this name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// Folds one message in; kinds that do not matter are left alone.
    pub fn take(&mut self, message: &RouteNetlinkMessage) {
        match message {
            RouteNetlinkMessage::NewLink(message) => self.new_link(message),
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

    fn new_link(&mut self, message: &LinkMessage) {
        let Some(link) = link(message) else {
            return;
        };
        if !link.up {
            // The kernel drops IPv4 routes of a link that goes down without RTM_DELROUTE (FACTS section 2).
            self.routes.retain(|route| route.link != link.index);
        }
        self.links.insert(link.index, link);
    }

    pub(super) fn remove_link(&mut self, index: u32) {
        self.links.remove(&index);
        self.addresses.retain(|address| address.link != index);
        self.routes.retain(|route| route.link != index);
    }

    fn remove_address(&mut self, gone: &Address) {
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (gone.link, gone.ip, gone.prefix);
        self.addresses.retain(|address| !same(address));
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
