//! The part of a plan about addresses, routes, rules and switches.

use sovereign_protocol::interface::Prefix;
use sovereign_protocol::subnet::{HostAddress, Subnet};

use super::{Plan, Step};
use crate::observed::{Address, Kind, Link, Observed};
use crate::route::{MAIN, OURS, Route, WantedRoute};
use crate::wanted::{Bridge, Wanted};

impl Plan {
    pub(super) fn addresses(&mut self, wanted: &Wanted, observed: &Observed) {
        let Some(bridge) = &wanted.bridge else {
            return;
        };
        let found = our_bridge(wanted, bridge, observed);
        let in_its_place = observed.link(bridge.name.as_str());
        if in_its_place.is_some_and(|link| !wanted.mark.is_on(&link.name, link.group)) {
            return; // a foreign one
        }
        let on_it = |a: &&Address| found.is_some_and(|link| link.index == a.link);
        for old in observed.addresses.iter().filter(on_it).filter(|a| a.ours) {
            let old = HostAddress::new(old.ip, old.prefix);
            if let Some(address) = old.ok().filter(|old| !bridge.addresses.contains(old)) {
                self.steps.insert(Step::RemoveAddress {
                    link: bridge.name.clone(),
                    address,
                });
            }
        }
        for address in &bridge.addresses {
            let same = |a: &Address| (a.ip, a.prefix) == (address.ip(), address.prefix());
            let is_there = observed.addresses.iter().filter(on_it).any(same);
            if !is_there {
                self.steps.insert(Step::AddAddress {
                    link: bridge.name.clone(),
                    address: *address,
                });
            }
            if let Some(found) = found.filter(|found| is_there && found.up) {
                self.connected(observed, bridge, found, *address);
            }
        }
    }

    /// The kernel made the route to an address's subnet; somebody may have taken it away.
    fn connected(&mut self, observed: &Observed, bridge: &Bridge, found: &Link, address: HostAddress) {
        let Some(to) = prefix_of(address.subnet()) else {
            return;
        };
        let route = WantedRoute {
            table: MAIN,
            to,
            link: bridge.name.clone(),
            gateway: None,
            source: Some(address.ip()),
            ours: false,
        };
        if !observed
            .routes
            .iter()
            .any(|seen| route.is(seen, Some(found.index)))
        {
            self.steps.insert(Step::AddRoute { route });
        }
    }

    pub(super) fn routes(&mut self, wanted: &Wanted, observed: &Observed) {
        let index = |route: &WantedRoute| observed.link(route.link.as_str()).map(|link| link.index);
        for route in &wanted.routes {
            let index = index(route);
            if !observed.routes.iter().any(|seen| route.is(seen, index)) {
                self.steps.insert(Step::AddRoute { route: route.clone() });
            }
        }
        let of_ours = observed
            .routes
            .iter()
            .filter(|seen| (seen.protocol, seen.table) == (OURS, wanted.mark.table));
        // A route goes with its link.
        let stays = |route: &&Route| !self.removes(route.link);
        let of_ours: Vec<_> = of_ours.filter(stays).collect();
        for seen in of_ours {
            // One to the same place is replaced by the one that is added.
            if !wanted
                .routes
                .iter()
                .any(|route| route.to == seen.to && seen.metric == route.metric())
            {
                self.steps.insert(Step::RemoveRoute { route: seen.clone() });
            }
        }
    }

    fn removes(&self, link: Option<u32>) -> bool {
        let removes = |step: &Step| matches!(step, Step::RemoveLink { index, .. } if Some(*index) == link);
        self.steps.iter().any(removes)
    }

    pub(super) fn rules(&mut self, wanted: &Wanted, observed: &Observed) {
        let missing = wanted.rules.difference(&observed.rules).cloned();
        self.steps.extend(missing.map(|rule| Step::AddRule { rule }));
        let of_ours = observed.rules.iter().filter(|rule| rule.is_of(&wanted.mark));
        let unwanted = of_ours.filter(|rule| !wanted.rules.contains(rule)).cloned();
        self.steps.extend(unwanted.map(|rule| Step::RemoveRule { rule }));
    }

    pub(super) fn sysctls(&mut self, wanted: &Wanted, observed: &Observed) {
        for (sysctl, to) in &wanted.sysctls {
            match observed.sysctls.get(sysctl) {
                Some(is) if is == to => {}
                None if !sysctl.goes_with_our_link() => {} // this kernel has no such switch
                is => {
                    self.steps.insert(Step::SetSysctl {
                        sysctl: sysctl.clone(),
                        from: is.copied().unwrap_or_default(),
                        to: *to,
                    });
                }
            }
        }
        for (sysctl, to) in &wanted.restored {
            let from = observed.sysctls.get(sysctl).copied().unwrap_or_default();
            self.steps.insert(Step::RestoreSysctl {
                sysctl: sysctl.clone(),
                from,
                to: *to,
            });
        }
    }
}

fn our_bridge<'a>(wanted: &Wanted, bridge: &Bridge, observed: &'a Observed) -> Option<&'a Link> {
    let link = observed.link(bridge.name.as_str())?;
    let ours = wanted.mark.is_on(&link.name, link.group) && link.kind == Kind::Bridge;
    ours.then_some(link)
}

fn prefix_of(subnet: Subnet) -> Option<Prefix> {
    Prefix::new(subnet.network(), subnet.prefix())
}

#[cfg(test)]
#[path = "routing_tests.rs"]
mod tests;
