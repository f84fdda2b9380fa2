//! The bridge's table: what comes out of a guest's link says whose it is, or is dropped.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::expression::Comparison::{Equal, NotEqual};
use super::expression::Verdict;
use super::matches::{self, End, TYPE_ARP, TYPE_IPV4, TYPE_IPV6};
use super::{Chain, Expression, Family, Point, Table};
use crate::filter::{Filter, Sender};
use crate::names::LinkName;

/// Addresses of one family that a sender can have: a rule holds 128 steps.
pub const SENDER_ADDRESSES: usize = 24;
/// Before the bridge looks at a frame (NF_BR_PRI_NAT_DST_BRIDGED, the first of the bridge's own).
const FIRST: i32 = -300;
/// What all guests' chains end with.
const ANY: &str = "any-guest";
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const LINK_LOCAL: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10);

/// The table; `None` when every guest may send anything.
pub(super) fn table(filter: &Filter) -> Option<Table> {
    if filter.senders.is_empty() {
        return None;
    }
    let mut table = Table::new(Family::Bridge, &filter.tag);
    let mut first = Chain::at("filter", Point::Prerouting, FIRST);
    for (link, sender) in &filter.senders {
        let name = chain_of(link);
        let jump = matches::end(Verdict::Jump(name.clone()));
        first.push(format!("from {link}"), [matches::comes_by(link), jump]);
        table.chains.insert(name, guest(sender));
    }
    table.chains.insert("prerouting".to_owned(), first);
    table.chains.insert(ANY.to_owned(), any_guest());
    Some(table)
}

/// A link's name may be that of a chain of ours.
fn chain_of(link: &LinkName) -> String {
    format!("from-{link}")
}

fn guest(sender: &Sender) -> Chain {
    let drop = || matches::end(Verdict::Drop);
    let ether_type = |number| matches::ether_type(Equal, number);
    let four = || {
        sender.addresses.iter().filter_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        })
    };
    let six = || {
        sender.addresses.iter().filter_map(|ip| match ip {
            IpAddr::V4(_) => None,
            IpAddr::V6(ip) => Some(*ip),
        })
    };
    let mut chain = Chain::default();
    chain.push("another MAC", [matches::ether_source_is_not(sender.mac), drop()]);
    chain.push(
        "another MAC in ARP",
        [ether_type(TYPE_ARP), matches::arp_mac_is_not(sender.mac), drop()],
    );
    // Duplicate detection asks as nobody.
    let claims = four()
        .chain([Ipv4Addr::UNSPECIFIED])
        .flat_map(matches::arp_ip_is_not);
    chain.push(
        "another address in ARP",
        [ether_type(TYPE_ARP), claims.collect(), drop()],
    );
    let sources = four().flat_map(|ip| source_is_not(ip.into(), 32));
    chain.push(
        "another IPv4 source",
        [ether_type(TYPE_IPV4), sources.collect(), drop()],
    );
    let own = || six().map(|ip| (ip, 128)).chain([LINK_LOCAL]);
    let sources = own()
        .chain([(Ipv6Addr::UNSPECIFIED, 128)])
        .flat_map(|(ip, prefix)| source_is_not(ip.into(), prefix));
    chain.push(
        "another IPv6 source",
        [ether_type(TYPE_IPV6), sources.collect(), drop()],
    );
    let targets = own().flat_map(|(ip, prefix)| matches::target_is_not(ip, prefix));
    chain.push(
        "another's IPv6 address in an advertisement",
        [
            ether_type(TYPE_IPV6),
            matches::icmpv6(NEIGHBOUR_ADVERTISEMENT),
            targets.collect(),
            drop(),
        ],
    );
    chain.push("as any guest", [matches::end(Verdict::Jump(ANY.to_owned()))]);
    chain
}

/// What no guest may be: a router, or something without an address that could be looked at (a VLAN's tag hides it).
fn any_guest() -> Chain {
    let drop = || matches::end(Verdict::Drop);
    let mut chain = Chain::default();
    for (number, comment) in [
        (ROUTER_ADVERTISEMENT, "a guest is no IPv6 router"),
        (REDIRECT, "a guest redirects nobody"),
    ] {
        let is_ip6 = matches::ether_type(Equal, TYPE_IPV6);
        chain.push(comment, [is_ip6, matches::icmpv6(number), drop()]);
    }
    let known = [TYPE_IPV4, TYPE_ARP, TYPE_IPV6];
    let others: Vec<Expression> = known
        .into_iter()
        .flat_map(|number| matches::ether_type(NotEqual, number))
        .collect();
    chain.push("neither IP nor ARP", [others, drop()]);
    chain
}

fn source_is_not(ip: IpAddr, prefix: u8) -> Vec<Expression> {
    matches::address_in(End::Source, NotEqual, ip, prefix)
}
