//! Flows that left by a former way out, under an address of this host that is of it no more.
//!
//! A translation lasts as long as packets do. A program that always sends from the same port (WireGuard, a name server)
//! goes on under the old address after its host got another one for the way out, and no provider lets that through. The
//! kernel forgets a flow by itself when its link or its address goes, or when it leaves by another link
//! (`nf_nat_oif_changed`), but not when the address stays: a prefix that the provider took back is deprecated only, and
//! a router may be in another subnet on the same link. TCP is ended by the guest itself, who is told of the way; what
//! came back for it, were it taken away here, this host would refuse. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;
use sovereign_protocol::port::Transport;
use sovereign_protocol::subnet::Subnet;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::filter::Filter;
use sovereign_reconcile::observed::Observed;
use sovereign_reconcile::way::Way;

use super::conntrack::Entry;

/// By what such flows are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Former {
    /// The guests' subnets.
    subnets: BTreeSet<Subnet>,
    /// Addresses that were of the way and are no more, with the subnet that is reached from each without any.
    addresses: BTreeMap<IpAddr, Option<Prefix>>,
}

impl Former {
    /// What the guests of a filter left by before, where they leave by another way now.
    #[must_use]
    pub fn of(
        filter: &Filter,
        (before, now): (&BTreeMap<Family, Way>, &BTreeMap<Family, Way>),
        observed: &Observed,
    ) -> Self {
        let near = |ip: IpAddr| {
            let address = observed.addresses.iter().find(|address| address.ip == ip)?;
            Prefix::new(ip, address.prefix)
        };
        let gone = now.iter().flat_map(|(family, way)| {
            let former = before.get(family).map(|former| former.sources.clone());
            former
                .unwrap_or_default()
                .into_iter()
                .filter(|ip| !way.sources.contains(ip))
        });
        Self {
            subnets: filter.subnets.iter().copied().collect(),
            addresses: gone.map(|ip| (ip, near(ip))).collect(),
        }
    }

    /// Whether a flow is a guest's to elsewhere that leaves under such an address. One that others opened by a forward
    /// goes back by the link that it came by, whatever the way.
    #[must_use]
    pub fn has(&self, entry: &Entry) -> bool {
        let guests = |address| self.subnets.iter().any(|subnet| subnet.contains(address));
        let elsewhere = |near: &Option<Prefix>| near.is_none_or(|near| !near.contains(entry.destination));
        entry.transport != Transport::Tcp.number()
            && entry.is_masqueraded()
            && guests(entry.source)
            && !guests(entry.destination)
            && self.addresses.get(&entry.answers_to).is_some_and(elsewhere)
    }

    /// Takes another change in.
    pub(super) fn add(&mut self, more: Self) {
        self.subnets.extend(more.subnets);
        self.addresses.extend(more.addresses);
    }

    /// True when no address is gone.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use sovereign_reconcile::filter::WayOut;
    use sovereign_reconcile::names::LinkName;
    use sovereign_reconcile::observed::Address;

    use super::super::conntrack::tests::{entries, filter};
    use super::*;

    fn way(link: &str, sources: &[&str]) -> Way {
        Way {
            link: LinkName::parse(link).unwrap(),
            gateway: None,
            sources: sources.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    /// What is stale of the kernel's entries and of some made of them, after the way of IPv4 was another one.
    fn stale(before: &[&str], now: &[&str], near: u8) -> Vec<String> {
        let observed = Observed {
            addresses: [Address {
                link: 2,
                ip: "192.0.2.1".parse().unwrap(),
                prefix: near,
                ours: false,
                passed_over: false,
            }]
            .into(),
            ..Observed::default()
        };
        let mut guests = filter(&[], WayOut::Masquerade);
        guests.subnets = [Subnet::parse("10.9.0.0/24").unwrap()].into();
        let ways = |sources| BTreeMap::from([(Family::V4, way("eth0", sources))]);
        let former = Former::of(&guests, (&ways(before), &ways(now)), &observed);
        let found = entries().into_iter().filter(|entry| former.has(entry));
        found
            .map(|entry| format!("{} {}", entry.source, entry.destination))
            .collect()
    }

    #[test]
    fn guests_flows_to_elsewhere_under_a_former_address_are_stale_and_nothing_else() {
        let flow = ["10.9.0.2 192.0.2.2"];
        assert_eq!(
            stale(&["192.0.2.1"], &["198.51.100.1"], 32),
            flow,
            "not what a forward let in"
        );
        assert_eq!(
            stale(&["192.0.2.1"], &["198.51.100.1"], 24),
            [""; 0],
            "it is beside the old link"
        );
        assert_eq!(stale(&["192.0.2.1"], &["192.0.2.1", "192.0.2.9"], 32), [""; 0]);
        assert_eq!(stale(&["192.0.2.7"], &["198.51.100.1"], 32), [""; 0]);
    }
}
