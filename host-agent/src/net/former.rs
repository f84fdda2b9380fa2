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
    /// Addresses that were of the way and are no more.
    addresses: BTreeMap<IpAddr, Left>,
}

/// What is known of such an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Left {
    /// The subnet that is reached from it without any gateway, while the address is there.
    near: Option<Prefix>,
    /// The subnets of addresses that are of the way now.
    stay: BTreeSet<Prefix>,
}

impl Left {
    /// Whether an address is another one of the same subnet, as this host's temporary addresses are, to which a kernel
    /// translates with `use_tempaddr = 2` (`ipv6_dev_get_saddr`) and which are no lasting ones of a way. Of IPv4 there
    /// are none such.
    fn goes_with(&self, ip: IpAddr) -> bool {
        let of = |subnet: &Prefix| ip.is_ipv6() && subnet.contains(ip);
        self.near.as_ref().is_some_and(of) && !self.stay.iter().any(of)
    }
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
        let mut addresses = BTreeMap::new();
        for (family, way) in now {
            let former = before.get(family).map(|former| &former.sources);
            for ip in former.into_iter().flatten().copied() {
                if !way.sources.contains(&ip) {
                    let stay = way.sources.iter().filter_map(|ip| near(*ip)).collect();
                    addresses.insert(ip, Left { near: near(ip), stay });
                }
            }
        }
        Self {
            subnets: filter.subnets.iter().copied().collect(),
            addresses,
        }
    }

    /// Whether a flow is a guest's to elsewhere that leaves under such an address. One that others opened by a forward
    /// goes back by the link that it came by, whatever the way.
    ///
    /// One to a network that is reached by a route of its own over the old link goes as well, because such routes are not
    /// observed: its next packet is translated anew.
    #[must_use]
    pub fn has(&self, entry: &Entry) -> bool {
        let guests = |address| self.subnets.iter().any(|subnet| subnet.contains(address));
        let is_left = |left: &Left| left.near.is_none_or(|near| !near.contains(entry.destination));
        let under = entry.answers_to;
        let left = match self.addresses.get(&under) {
            Some(left) => Some(left),
            None => self.addresses.values().find(|left| left.goes_with(under)),
        };
        entry.transport != Transport::Tcp.number()
            && entry.is_masqueraded()
            && guests(entry.source)
            && !guests(entry.destination)
            && left.is_some_and(is_left)
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

    /// Whether a guest's flow over IPv6 that is translated to `under` is stale after `before` became `now`, all in this
    /// observed network of addresses with their prefixes.
    fn is_stale_v6(under: &str, to: &str, before: &[&str], now: &[&str]) -> bool {
        let prefixes = ["2001:db8:1::10/64", "2001:db8:1::d/128", "2001:db8:2::10/64"];
        let addresses = prefixes.map(|text| {
            let prefix: Prefix = text.to_owned().try_into().unwrap();
            Address {
                link: 2,
                ip: prefix.address(),
                prefix: prefix.length(),
                ours: false,
                passed_over: false,
            }
        });
        let observed = Observed {
            addresses: addresses.into(),
            ..Observed::default()
        };
        let mut guests = filter(&[], WayOut::Masquerade);
        guests.subnets = [Subnet::parse("fd00:9::/64").unwrap()].into();
        let ways = |sources| BTreeMap::from([(Family::V6, way("eth0", sources))]);
        let former = Former::of(&guests, (&ways(before), &ways(now)), &observed);
        let mut flows = entries().into_iter();
        let mut flow = flows.find(|entry| entry.is_masqueraded()).unwrap();
        flow.source = "fd00:9::2".parse().unwrap();
        flow.destination = to.parse().unwrap();
        flow.answers_to = under.parse().unwrap();
        former.has(&flow)
    }

    /// With `use_tempaddr = 2` a kernel translates to the temporary address, which is no lasting one of the way.
    #[test]
    fn flows_under_a_temporary_address_are_stale_with_its_prefix() {
        let (slaac, dhcp, other) = ("2001:db8:1::10", "2001:db8:1::d", "2001:db8:2::10");
        let (temporary, away) = ("2001:db8:1::e9c8:ad0e", "2001:db8:ffff::1");
        let moved = |under, to| is_stale_v6(under, to, &[slaac], &[other]);
        assert!(moved(slaac, away) && moved(temporary, away));
        assert!(!moved(temporary, "2001:db8:1::99"), "it is beside the old link");
        assert!(!moved("2001:db8:2::e9c8:ad0e", away), "the new one's");
        assert!(!moved("2001:db8:3::1", away), "of neither");
        let stays = |under| is_stale_v6(under, away, &[slaac, dhcp], &[dhcp, other]);
        assert!(stays(temporary) && stays(slaac) && !stays(dhcp));
        let only_dhcp = |under| is_stale_v6(under, away, &[slaac, dhcp], &[slaac, other]);
        assert!(only_dhcp(dhcp) && !only_dhcp(temporary) && !only_dhcp(slaac));
    }
}
