//! rtnetlink as bytes: the requests that are sent, the messages that are understood, everything else skipped.
//!
//! Own code and not netlink-packet-route: listing links, addresses and routes with that crate adds 690 KB to a
//! static binary (measured) whose whole budget is 2.5 MB. Lengths come from the kernel and are checked all the same.

use std::net::{IpAddr, Ipv4Addr};

use sovereign_protocol::interface::Prefix;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::observed::{Address, Kind, Link};
use sovereign_reconcile::route::{MAIN, OURS, Route, RouteKind};

use crate::core::net::Unusable;

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/if.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 1 << 3;
const IFF_LOWER_UP: u32 = 1 << 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_PROTO: u16 = 11;
const IFA_F_DADFAILED: u8 = 0x08;
const IFA_F_TENTATIVE: u8 = 0x40;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_TABLE: u16 = 15;
const RT_TABLE_MAIN: u8 = 254;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_HOST: u8 = 254;
const RT_SCOPE_NOWHERE: u8 = 255;
const RTN_UNICAST: u8 = 1;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The low bits of an attribute's type; the others are flags.
const ATTRIBUTE_TYPE: u16 = 0x3fff;
const HEADER: usize = 16;

/// What marks addresses (IFA_PROTO, kernel 5.18) and routes (rtm_protocol) as made by this agent; 'S'.
pub const MARK: u8 = OURS;

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum List {
    Links,
    Addresses,
    Routes,
}

/// A message from the kernel, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The end of a list.
    Done,
    /// The answer to a request: 0 or an errno.
    Answer(i32),
    /// An interface; its driver is not in it.
    Link(Link),
    /// An address, and why it cannot be used if so.
    Address(Address, Option<Unusable>),
    /// A default route of the main table with a next hop.
    Route(Route),
    /// Something else.
    Other,
}

/// A message with what its header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Of the request that it answers.
    pub sequence: u32,
    /// The list changed while it was made: ask again.
    pub interrupted: bool,
    /// The content.
    pub message: Message,
}

/// Asks for a list.
#[must_use]
pub fn list(list: List, sequence: u32) -> Vec<u8> {
    // The family-independent header (struct rtgenmsg) in the size of the largest one.
    let (kind, body) = match list {
        List::Links => (RTM_GETLINK, [0; 16].as_slice()),
        List::Addresses => (RTM_GETADDR, [0; 8].as_slice()),
        List::Routes => (RTM_GETROUTE, [0; 12].as_slice()),
    };
    request(kind, NLM_F_DUMP, sequence, body, &[])
}

/// Brings an interface up.
#[must_use]
pub fn up(index: u32, sequence: u32) -> Vec<u8> {
    let body = link_body(index, IFF_UP, IFF_UP);
    request(RTM_NEWLINK, NLM_F_ACK, sequence, &body, &[])
}

/// Takes an interface down.
#[must_use]
pub fn down(index: u32, sequence: u32) -> Vec<u8> {
    request(
        RTM_NEWLINK,
        NLM_F_ACK,
        sequence,
        &link_body(index, 0, IFF_UP),
        &[],
    )
}

/// Sets an interface's MTU.
#[must_use]
pub fn mtu(index: u32, mtu: u32, sequence: u32) -> Vec<u8> {
    let attributes = attribute(IFLA_MTU, &mtu.to_ne_bytes());
    request(
        RTM_NEWLINK,
        NLM_F_ACK,
        sequence,
        &link_body(index, 0, 0),
        &attributes,
    )
}

/// Adds an address with our mark; right to do when it is there.
#[must_use]
pub fn add_address(index: u32, prefix: Prefix, sequence: u32) -> Vec<u8> {
    let mut attributes = address_attributes(prefix);
    if let Some(broadcast) = broadcast(prefix) {
        attributes.extend(attribute(IFA_BROADCAST, &broadcast.octets()));
    }
    attributes.extend(attribute(IFA_PROTO, &[MARK]));
    let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    let body = address_body(index, prefix);
    request(RTM_NEWADDR, flags, sequence, &body, &attributes)
}

/// Removes an address.
#[must_use]
pub fn remove_address(index: u32, prefix: Prefix, sequence: u32) -> Vec<u8> {
    let body = address_body(index, prefix);
    request(
        RTM_DELADDR,
        NLM_F_ACK,
        sequence,
        &body,
        &address_attributes(prefix),
    )
}

/// Adds a default route with our mark before foreign ones, which stay.
#[must_use]
pub fn add_route(index: u32, gateway: IpAddr, metric: u32, sequence: u32) -> Vec<u8> {
    let body = route_body(gateway, RT_SCOPE_UNIVERSE);
    let attributes = route_attributes(index, gateway, metric);
    request(
        RTM_NEWROUTE,
        NLM_F_ACK | NLM_F_CREATE,
        sequence,
        &body,
        &attributes,
    )
}

/// Removes a default route that carries our mark.
#[must_use]
pub fn remove_route(index: u32, gateway: IpAddr, metric: u32, sequence: u32) -> Vec<u8> {
    let body = route_body(gateway, RT_SCOPE_NOWHERE);
    let attributes = route_attributes(index, gateway, metric);
    request(RTM_DELROUTE, NLM_F_ACK, sequence, &body, &attributes)
}

/// Splits what one `recv` gave; ends at the first header that does not fit.
#[must_use]
pub fn parse(mut bytes: &[u8]) -> Vec<Received> {
    let mut all = Vec::new();
    while let Some(length) = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok()) {
        let Some(message) = bytes.get(..length).filter(|_| length >= HEADER) else {
            break;
        };
        if let (Some(kind), Some(flags), Some(sequence)) =
            (u16_at(message, 4), u16_at(message, 6), u32_at(message, 8))
        {
            all.push(Received {
                sequence,
                interrupted: flags & NLM_F_DUMP_INTR != 0,
                message: understand(kind, &message[HEADER..]),
            });
        }
        bytes = bytes.get(align(length)..).unwrap_or_default();
    }
    all
}

fn understand(kind: u16, body: &[u8]) -> Message {
    let message = match kind {
        NLMSG_DONE => Some(Message::Done),
        NLMSG_ERROR => u32_at(body, 0).map(|error| Message::Answer(error.cast_signed().saturating_neg())),
        RTM_NEWLINK => link(body).map(Message::Link),
        RTM_NEWADDR => address(body).map(|(address, state)| Message::Address(address, state)),
        RTM_NEWROUTE => route(body).map(Message::Route),
        _ => None,
    };
    message.unwrap_or(Message::Other)
}

/// ifinfomsg: family u8, pad u8, type u16, index i32, flags u32, change u32.
fn link(body: &[u8]) -> Option<Link> {
    let flags = u32_at(body, 8)?;
    let attributes = body.get(16..)?;
    let name = find(attributes, IFLA_IFNAME)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Link {
        index: u32_at(body, 4)?,
        name: String::from_utf8_lossy(name).into_owned(),
        kind: if flags & IFF_LOOPBACK != 0 {
            Kind::Loopback
        } else {
            Kind::Other
        },
        group: 0,
        mac: None,
        up: flags & IFF_UP != 0,
        carrier: flags & IFF_LOWER_UP != 0,
        mtu: find(attributes, IFLA_MTU)
            .and_then(|value| u32_at(value, 0))
            .unwrap_or(0),
        controller: None,
        isolated: false,
    })
}

/// ifaddrmsg: family u8, prefix length u8, flags u8, scope u8, index u32.
fn address(body: &[u8]) -> Option<(Address, Option<Unusable>)> {
    let [family, length, flags, ..] = *body else {
        return None;
    };
    let attributes = body.get(8..)?;
    // IFA_ADDRESS is the peer on a point-to-point link; IPv6 has no IFA_LOCAL otherwise.
    let value = find(attributes, IFA_LOCAL).or_else(|| find(attributes, IFA_ADDRESS))?;
    let state = if flags & IFA_F_DADFAILED != 0 {
        Some(Unusable::Duplicate)
    } else if flags & IFA_F_TENTATIVE != 0 {
        Some(Unusable::Tentative)
    } else {
        None
    };
    let address = Address {
        link: u32_at(body, 4)?,
        ip: ip(family, value)?,
        prefix: length,
        ours: find(attributes, IFA_PROTO) == Some(&[MARK]),
        passed_over: false, // of interest to a host only
    };
    address.place().map(|_| (address, state))
}

/// rtmsg: family, destination length, source length, tos, table, protocol, scope, type (u8 each), flags u32.
fn route(body: &[u8]) -> Option<Route> {
    let [family, destination, source, tos, table, protocol, _, kind, ..] = *body else {
        return None;
    };
    let attributes = body.get(12..)?;
    let table = find(attributes, RTA_TABLE)
        .and_then(|value| u32_at(value, 0))
        .unwrap_or(table.into());
    let is_default = destination == 0 && source == 0 && tos == 0 && kind == RTN_UNICAST;
    if !is_default || table != MAIN {
        return None;
    }
    let gateway = ip(family, find(attributes, RTA_GATEWAY)?)?;
    let number = |kind| find(attributes, kind).and_then(|value| u32_at(value, 0));
    Some(Route {
        table,
        to: Family::of(gateway).everywhere(),
        metric: number(RTA_PRIORITY).unwrap_or(0),
        link: Some(number(RTA_OIF)?),
        gateway: Some(gateway),
        kind: RouteKind::Unicast,
        protocol,
    })
}

/// `which` of the flags are to be changed.
fn link_body(index: u32, flags: u32, which: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
    body.extend(which.to_ne_bytes());
    body
}

fn address_body(index: u32, prefix: Prefix) -> Vec<u8> {
    let scope = if prefix.address().is_loopback() {
        RT_SCOPE_HOST
    } else {
        RT_SCOPE_UNIVERSE
    };
    let mut body = vec![family(prefix.address()), prefix.length(), 0, scope];
    body.extend(index.to_ne_bytes());
    body
}

fn address_attributes(prefix: Prefix) -> Vec<u8> {
    let bytes = octets(prefix.address());
    [attribute(IFA_LOCAL, &bytes), attribute(IFA_ADDRESS, &bytes)].concat()
}

/// As ip(8) does it with `brd +`; none in networks of two addresses or one, and none on the loopback.
fn broadcast(prefix: Prefix) -> Option<Ipv4Addr> {
    let IpAddr::V4(address) = prefix.address() else {
        return None;
    };
    let host = u32::MAX.checked_shr(prefix.length().into()).unwrap_or(0);
    (prefix.length() < 31 && !address.is_loopback()).then(|| Ipv4Addr::from(u32::from(address) | host))
}

fn route_body(gateway: IpAddr, scope: u8) -> Vec<u8> {
    let head = [family(gateway), 0, 0, 0, RT_TABLE_MAIN, MARK, scope, RTN_UNICAST];
    [head.as_slice(), &[0; 4]].concat()
}

fn route_attributes(index: u32, gateway: IpAddr, metric: u32) -> Vec<u8> {
    let mut attributes = attribute(RTA_OIF, &index.to_ne_bytes());
    attributes.extend(attribute(RTA_GATEWAY, &octets(gateway)));
    if metric > 0 {
        attributes.extend(attribute(RTA_PRIORITY, &metric.to_ne_bytes()));
    }
    attributes
}

fn request(kind: u16, flags: u16, sequence: u32, body: &[u8], attributes: &[u8]) -> Vec<u8> {
    // nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32 (0: the kernel fills it in)
    let length = HEADER + body.len() + attributes.len();
    let mut bytes = u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend_from_slice(body);
    bytes.extend_from_slice(attributes);
    bytes
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(align(length), 0);
    bytes
}

fn find(mut attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)? & ATTRIBUTE_TYPE;
        let value = attributes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        attributes = attributes.get(align(length)..)?;
    }
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        AF_INET6 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

/// Messages and attributes begin at multiples of four bytes.
fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn only(bytes: &[u8]) -> Message {
        let all = parse(bytes);
        assert_eq!(all.len(), 1);
        all[0].message.clone()
    }

    #[test]
    fn what_is_asked_for_is_what_is_understood() {
        for text in ["192.168.100.2/24", "10.0.0.1/32", "fd00::2/64"] {
            let prefix: Prefix = text.parse().unwrap();
            let Message::Address(seen, None) = only(&add_address(7, prefix, 1)) else {
                panic!("no address")
            };
            assert_eq!((seen.link, seen.place(), seen.ours), (7, Some(prefix), true));
        }
        for text in ["192.168.100.1", "fe80::1"] {
            let gateway: IpAddr = text.parse().unwrap();
            let metric = u32::from(gateway.is_ipv6()) * 512;
            let Message::Route(seen) = only(&add_route(7, gateway, metric, 1)) else {
                panic!("no route")
            };
            assert_eq!(
                (seen.link, seen.gateway, seen.metric),
                (Some(7), Some(gateway), metric)
            );
            assert!(seen.protocol == OURS && seen.is_default(Family::of(gateway)));
        }
    }

    #[test]
    fn only_default_routes_of_the_main_table_are_routes() {
        let bytes = add_route(7, "10.0.0.1".parse().unwrap(), 0, 1);
        for (at, value) in [(HEADER + 1, 8), (HEADER + 4, 52), (HEADER + 7, 7)] {
            let mut other = bytes.clone();
            other[at] = value;
            assert_eq!(only(&other), Message::Other, "{at}");
        }
    }

    #[test]
    fn networks_have_a_broadcast_and_pairs_have_none() {
        let of = |text: &str| broadcast(text.parse().unwrap()).map(|address| address.to_string());
        assert_eq!(of("192.168.100.2/23").as_deref(), Some("192.168.101.255"));
        for none in ["10.0.0.0/31", "10.0.0.1/32", "127.0.0.1/8", "fd00::1/64"] {
            assert_eq!(of(none), None, "{none}");
        }
    }

    #[test]
    fn an_acknowledgement_is_told_from_an_error_and_several_messages_are_split() {
        let mut ack = request(NLMSG_ERROR, 0, 9, &0i32.to_ne_bytes(), &[]);
        ack.extend(request(NLMSG_ERROR, 0, 10, &(-17i32).to_ne_bytes(), &[]));
        ack.extend(request(NLMSG_DONE, NLM_F_DUMP_INTR, 11, &[], &[]));
        let all = parse(&ack);
        assert_eq!(
            all.iter()
                .map(|r| (r.sequence, r.interrupted, r.message.clone()))
                .collect::<Vec<_>>(),
            [
                (9, false, Message::Answer(0)),
                (10, false, Message::Answer(17)),
                (11, true, Message::Done)
            ]
        );
    }

    #[test]
    fn a_tentative_and_a_duplicate_address_are_told_apart() {
        let bytes = add_address(2, "fd00::2/64".parse().unwrap(), 1);
        for (flags, state) in [
            (IFA_F_TENTATIVE, Some(Unusable::Tentative)),
            (IFA_F_TENTATIVE | IFA_F_DADFAILED, Some(Unusable::Duplicate)),
            (0x80, None),
        ] {
            let mut flagged = bytes.clone();
            flagged[HEADER + 2] = flags;
            let Message::Address(_, seen) = only(&flagged) else {
                panic!("no address")
            };
            assert_eq!(seen, state);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_are_read_twice(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&bytes).len() <= bytes.len() / HEADER);
        }

        #[test]
        fn a_damaged_message_does_not_panic(at in 0usize..60, value: u8, cut in 0usize..60) {
            let mut bytes = add_address(3, "10.0.0.2/24".parse().unwrap(), 1);
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
            bytes.truncate(bytes.len().min(cut));
            let _ = parse(&bytes);
        }
    }
}
