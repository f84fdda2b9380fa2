//! Which questions are asked.

use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;

use super::look::Networked;
use super::probe::{Question, Way};
use crate::family::Family;
use crate::observed::{Kind, Observed};

/// Links by which answers could come, at most.
const LINKS: usize = 16;
/// Well-known addresses of the internet, and then such as nobody has (RFC 5737, RFC 3849). A question about one sends it
/// nothing.
const ELSEWHERE4: [&str; 4] = ["1.1.1.1", "9.9.9.9", "198.51.100.1", "203.0.113.1"];
const ELSEWHERE6: [&str; 3] = ["2606:4700:4700::1111", "2620:fe::fe", "2001:db8::1"];

/// An address that stands for everything beyond this host: the first of a fixed list that no link of this host is in one
/// subnet with.
///
/// # Panics
/// Never: the lists are not empty, and hold addresses.
#[must_use]
pub fn elsewhere(observed: &Observed, family: Family) -> IpAddr {
    let list: &[&str] = match family {
        Family::V4 => &ELSEWHERE4,
        Family::V6 => &ELSEWHERE6,
    };
    let near = |ip: IpAddr| {
        let mut subnets = observed.addresses.iter();
        subnets.any(|a| Prefix::new(a.ip, a.prefix).is_some_and(|subnet| subnet.contains(ip)))
    };
    let list = || list.iter().filter_map(|text| text.parse().ok());
    let free = list().find(|ip| !near(*ip));
    free.or_else(|| list().next()).expect("the lists hold addresses")
}

/// A guest's address of a family; where no guest has one, the first after the host's that one could have.
#[must_use]
pub fn guest_of(ours: &Networked, family: Family) -> Option<IpAddr> {
    let addresses = ours.wanted.bridge.iter().flat_map(|bridge| &bridge.addresses);
    let host = addresses
        .into_iter()
        .find(|address| Family::of(address.ip()) == family)?;
    let mut guests = ours.guests.values().flatten();
    let real = guests.find(|ip| Family::of(**ip) == family && host.subnet().contains(**ip));
    real.copied().or_else(|| sibling_of(ours, host.ip()))
}

/// Another address of the same subnet that is not the host's.
pub(super) fn sibling_of(ours: &Networked, ip: IpAddr) -> Option<IpAddr> {
    let addresses = ours.wanted.bridge.iter().flat_map(|bridge| &bridge.addresses);
    let host = addresses
        .into_iter()
        .find(|address| address.subnet().contains(ip))?;
    let free = |candidate: &IpAddr| {
        *candidate != ip && *candidate != host.ip() && host.subnet().contains(*candidate)
    };
    let after = |n: u8| match host.subnet().network() {
        IpAddr::V4(network) => IpAddr::V4((u32::from(network).wrapping_add(n.into())).into()),
        IpAddr::V6(network) => IpAddr::V6((u128::from(network).wrapping_add(n.into())).into()),
    };
    (1..=4).map(after).find(free)
}

/// For each family that guests have addresses of: out, in by each link that may bring answers, and from this host. The
/// link of the way out comes first.
#[must_use]
pub fn questions(ours: &Networked, observed: &Observed) -> Vec<Question> {
    let mut questions = Vec::new();
    let Some(bridge) = ours.bridge() else {
        return questions;
    };
    for family in Family::BOTH {
        let Some(guest) = guest_of(ours, family) else {
            continue;
        };
        let question = |way, from, to, iif: Option<&str>| Question {
            family,
            way,
            from,
            to,
            iif: iif.map(str::to_owned),
        };
        let exit = ours.wanted.exits.get(&family).and_then(|exit| exit.link());
        if let Some(exit) = exit {
            let away = elsewhere(observed, family);
            questions.push(question(Way::Out, Some(guest), away, Some(bridge.as_str())));
            let by = |link: &str| question(Way::In, Some(away), guest, Some(link));
            questions.push(by(exit.as_str()));
            let others = bringing(ours, observed, family).filter(|link| *link != exit.as_str());
            questions.extend(others.take(LINKS).map(by));
        }
        questions.push(question(Way::Host, None, guest, None));
    }
    questions
}

/// Links that work and have an address of the family.
fn bringing<'a>(
    ours: &'a Networked,
    observed: &'a Observed,
    family: Family,
) -> impl Iterator<Item = &'a str> {
    let of_family = move |index: u32| {
        let mut addresses = observed.addresses.iter();
        addresses.any(|a| a.link == index && Family::of(a.ip) == family && !is_link_local(a.ip))
    };
    let links = observed.links.values().filter(move |link| {
        let mine = ours.wanted.mark.is_on(&link.name, link.group);
        link.up
            && link.carrier
            && link.controller.is_none()
            && !mine
            && link.kind != Kind::Loopback
            && of_family(link.index)
    });
    links.map(|link| link.name.as_str())
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}
