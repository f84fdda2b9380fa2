//! The steps that `nft` makes of each of its matches and statements, by the same words.

use std::net::IpAddr;

use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::Subnet;

use super::Expression::{self, Compare, Ct, Data, DestinationType, Mask, Meta, Payload};
use super::expression::Comparison::{AtLeast, AtMost, Equal, NotEqual};
use super::expression::Register::{One, Two};
use super::expression::{Base, Comparison, CtKey, MetaKey, NatFamily, NatKind, Verdict};
use crate::names::{LinkName, Mac};

/// RTN_LOCAL.
const LOCAL: u32 = 2;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;

/// `iifname "..."`, `oifname != "..."`.
pub(crate) fn link(key: MetaKey, how: Comparison, name: &LinkName) -> Vec<Expression> {
    vec![Meta { key, to: One }, compare(how, &name.padded())]
}

/// `iifname "..."`.
pub(crate) fn comes_by(name: &LinkName) -> Vec<Expression> {
    link(MetaKey::InName, Equal, name)
}

/// `oifname "..."`.
pub(crate) fn leaves_by(name: &LinkName) -> Vec<Expression> {
    link(MetaKey::OutName, Equal, name)
}

/// `meta nfproto ipv4` or `ipv6`.
pub(crate) fn family_of(ip: IpAddr) -> Vec<Expression> {
    let number = if ip.is_ipv4() { IPV4 } else { IPV6 };
    vec![
        Meta {
            key: MetaKey::Family,
            to: One,
        },
        compare(Equal, &[number]),
    ]
}

/// Whose address.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Source,
    Destination,
}

impl End {
    /// Of the address in the header of its family.
    fn offset(self, ip: IpAddr) -> u32 {
        match (self, ip.is_ipv4()) {
            (Self::Source, true) => 12,
            (Self::Destination, true) => 16,
            (Self::Source, false) => 8,
            (Self::Destination, false) => 24,
        }
    }
}

/// `ip saddr 10.0.0.0/24`, `ip6 daddr ::1`, in a packet that is known to be of the family.
pub(crate) fn address_in(end: End, how: Comparison, ip: IpAddr, prefix: u8) -> Vec<Expression> {
    let bytes = octets(ip);
    let whole = usize::from(prefix / 8).min(bytes.len());
    let load = |length| network(end.offset(ip), length);
    if prefix.is_multiple_of(8) && whole > 0 {
        return vec![load(whole), compare(how, &bytes[..whole])];
    }
    let mask: Vec<u8> = (0..bytes.len())
        .map(|at| {
            u8::MAX
                .checked_shl((8 * (at + 1)).saturating_sub(prefix.into()) as u32)
                .unwrap_or(0)
        })
        .collect();
    let masked: Vec<u8> = bytes.iter().zip(&mask).map(|(byte, mask)| byte & mask).collect();
    vec![
        load(bytes.len()),
        Mask { register: One, mask },
        compare(how, &masked),
    ]
}

/// `ip daddr 10.0.0.5` with its family.
pub(crate) fn address(end: End, ip: IpAddr) -> Vec<Expression> {
    let prefix = if ip.is_ipv4() { 32 } else { 128 };
    [family_of(ip), address_in(end, Equal, ip, prefix)].concat()
}

/// `ip saddr 10.0.0.0/24` with its family.
pub(crate) fn subnet(end: End, subnet: &Subnet) -> Vec<Expression> {
    let ip = subnet.network();
    [family_of(ip), address_in(end, Equal, ip, subnet.prefix())].concat()
}

/// `tcp dport 80` or `udp dport 5000-5010`.
pub(crate) fn ports(transport: Transport, ports: Ports) -> Vec<Expression> {
    let mut steps = transport_is(transport.number());
    steps.push(header(Base::Transport, 2, 2));
    match ports.span() {
        0 => steps.push(compare(Equal, &ports.first().to_be_bytes())),
        _ => steps.extend([
            compare(AtLeast, &ports.first().to_be_bytes()),
            compare(AtMost, &ports.last().to_be_bytes()),
        ]),
    }
    steps
}

/// `tcp flags syn / syn,rst`.
pub(crate) fn opens_tcp() -> Vec<Expression> {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    let mask = vec![SYN | RST];
    [
        transport_is(TCP),
        vec![
            header(Base::Transport, 13, 1),
            Mask { register: One, mask },
            compare(Equal, &[SYN]),
        ],
    ]
    .concat()
}

/// `tcp option maxseg size set rt mtu`.
pub(crate) fn clamp_mss() -> Vec<Expression> {
    vec![
        Expression::RouteMss { to: One },
        Expression::ToNetworkOrder { register: One },
        Expression::WriteMss { from: One },
    ]
}

/// `fib daddr type local`, or `!=`.
pub(crate) fn to_this_host(how: Comparison) -> Vec<Expression> {
    vec![DestinationType { to: One }, compare(how, &LOCAL.to_ne_bytes())]
}

/// Bits of `ct state` (`enum ip_conntrack_info`, NF_CT_STATE_BIT).
pub(crate) const INVALID: u32 = 1;
/// See [`INVALID`].
pub(crate) const ESTABLISHED: u32 = 2;
/// See [`INVALID`].
pub(crate) const RELATED: u32 = 4;
/// IPS_DST_NAT.
const DNAT: u32 = 32;

/// `ct state established,related`.
pub(crate) fn state(bits: u32) -> Vec<Expression> {
    ct_bits(CtKey::State, bits)
}

/// `ct status dnat`.
pub(crate) fn was_forwarded() -> Vec<Expression> {
    ct_bits(CtKey::Status, DNAT)
}

/// `ct mark & mask == value`.
pub(crate) fn connection_is_marked(value: u32, mask: u32) -> Vec<Expression> {
    let mask = mask.to_ne_bytes().to_vec();
    vec![
        Ct {
            key: CtKey::Mark,
            to: One,
        },
        Mask { register: One, mask },
        compare(Equal, &value.to_ne_bytes()),
    ]
}

/// `ct mark set ct mark & ~mask | value`.
pub(crate) fn mark_connection(value: u32, mask: u32) -> Vec<Expression> {
    let load = Ct {
        key: CtKey::Mark,
        to: One,
    };
    vec![
        load,
        bits(value, mask),
        Expression::SetConnectionMark { from: One },
    ]
}

/// `meta mark set meta mark & ~mask | value`.
pub(crate) fn mark_packet(value: u32, mask: u32) -> Vec<Expression> {
    let load = Meta {
        key: MetaKey::Mark,
        to: One,
    };
    vec![load, bits(value, mask), Expression::SetMark { from: One }]
}

fn bits(value: u32, mask: u32) -> Expression {
    Expression::Bits {
        register: One,
        keep: (!mask).to_ne_bytes().to_vec(),
        set: value.to_ne_bytes().to_vec(),
    }
}

fn ct_bits(key: CtKey, bits: u32) -> Vec<Expression> {
    let mask = bits.to_ne_bytes().to_vec();
    vec![
        Ct { key, to: One },
        Mask { register: One, mask },
        compare(NotEqual, &[0; 4]),
    ]
}

/// `ct direction original`.
pub(crate) fn questions() -> Vec<Expression> {
    direction(0)
}

/// `ct direction reply`.
pub(crate) fn answers() -> Vec<Expression> {
    direction(1)
}

fn direction(number: u8) -> Vec<Expression> {
    let key = CtKey::Direction;
    vec![Ct { key, to: One }, compare(Equal, &[number])]
}

/// `dnat ip to 10.0.0.2`, or `10.0.0.2:80`.
pub(crate) fn dnat(to: IpAddr, port: Option<u16>) -> Vec<Expression> {
    let mut steps = vec![Data {
        to: One,
        value: octets(to),
    }];
    if let Some(port) = port {
        let value = port.to_be_bytes().to_vec();
        steps.push(Data { to: Two, value });
    }
    steps.push(Expression::Nat {
        kind: NatKind::Destination,
        family: NatFamily::of(to),
        address: One,
        port: port.map(|_| Two),
    });
    steps
}

/// `accept` and the like.
pub(crate) fn end(verdict: Verdict) -> Vec<Expression> {
    vec![Expression::Verdict(verdict)]
}

/// Ethernet's types.
pub(crate) const TYPE_IPV4: u16 = 0x0800;
/// See [`TYPE_IPV4`].
pub(crate) const TYPE_ARP: u16 = 0x0806;
/// See [`TYPE_IPV4`].
pub(crate) const TYPE_IPV6: u16 = 0x86dd;

/// `ether type arp`. With a VLAN tag the type is 802.1Q's, whatever is in the frame.
pub(crate) fn ether_type(how: Comparison, number: u16) -> Vec<Expression> {
    vec![header(Base::Link, 12, 2), compare(how, &number.to_be_bytes())]
}

/// `ether saddr != ...`.
pub(crate) fn ether_source_is_not(mac: Mac) -> Vec<Expression> {
    vec![header(Base::Link, 6, 6), compare(NotEqual, &mac.0)]
}

/// `arp saddr ether != ...`, in a frame that is known to be ARP.
pub(crate) fn arp_mac_is_not(mac: Mac) -> Vec<Expression> {
    vec![network(8, 6), compare(NotEqual, &mac.0)]
}

/// `arp saddr ip != ...`, in a frame that is known to be ARP.
pub(crate) fn arp_ip_is_not(ip: std::net::Ipv4Addr) -> Vec<Expression> {
    vec![network(14, 4), compare(NotEqual, &ip.octets())]
}

/// `icmpv6 type N`.
pub(crate) fn icmpv6(number: u8) -> Vec<Expression> {
    [
        transport_is(ICMPV6),
        vec![header(Base::Transport, 0, 1), compare(Equal, &[number])],
    ]
    .concat()
}

/// `@th,64,128 != ...`: the target of a neighbour's advertisement, `prefix` bits of it.
pub(crate) fn target_is_not(ip: std::net::Ipv6Addr, prefix: u8) -> Vec<Expression> {
    let mut steps = address_in(End::Source, NotEqual, ip.into(), prefix);
    if let Some(Payload { base, offset, .. }) = steps.first_mut() {
        (*base, *offset) = (Base::Transport, 8);
    }
    steps
}

fn transport_is(number: u8) -> Vec<Expression> {
    let key = MetaKey::Transport;
    vec![Meta { key, to: One }, compare(Equal, &[number])]
}

fn network(offset: u32, length: usize) -> Expression {
    header(Base::Network, offset, length)
}

fn header(base: Base, offset: u32, length: usize) -> Expression {
    Payload {
        base,
        offset,
        length: length as u32,
        to: One,
    }
}

fn compare(how: Comparison, value: &[u8]) -> Expression {
    Compare {
        register: One,
        how,
        value: value.to_vec(),
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}
