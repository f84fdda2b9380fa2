//! The part of a plan about one interface.

use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;

use super::{Plan, Step};
use crate::family::Family;
use crate::interface::Interface;
use crate::observed::{Address, Link, Observed};
use crate::route::{MAIN, OURS, Route, RouteKind, WantedRoute};
use crate::wanted::DEFAULT_MTU;

/// Plans the way of one interface; nothing where it is not.
#[must_use]
pub fn interface(wanted: &Interface, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    if let Some(link) = observed.link(wanted.name.as_str()) {
        plan.interface(wanted, Some(link), observed);
    }
    plan
}

impl Plan {
    /// `found` is `None` for one that an earlier step makes.
    pub(super) fn interface(&mut self, wanted: &Interface, found: Option<&Link>, observed: &Observed) {
        self.mtu_and_up(wanted, found);
        self.addresses(wanted, found, observed);
        self.gateways(wanted, found, observed);
    }

    pub(super) fn mtu_and_up(&mut self, wanted: &Interface, found: Option<&Link>) {
        let is = found.map_or(DEFAULT_MTU, |link| link.mtu);
        if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != is) {
            self.steps.insert(Step::SetMtu {
                name: wanted.name.clone(),
                mtu,
            });
        }
        if wanted.up && found.is_none_or(|link| !link.up) {
            self.steps.insert(Step::SetUp {
                name: wanted.name.clone(),
            });
        }
    }

    fn addresses(&mut self, wanted: &Interface, found: Option<&Link>, observed: &Observed) {
        let on_it = || {
            found
                .into_iter()
                .flat_map(|link| observed.addresses_of(link.index))
        };
        let unwanted = |address: &&Address| {
            address.ours
                && address
                    .place()
                    .is_some_and(|place| !wanted.addresses.contains(&place))
        };
        for address in on_it().filter(unwanted).filter_map(Address::place) {
            self.steps.insert(Step::RemoveAddress {
                link: wanted.name.clone(),
                address,
            });
        }
        for address in &wanted.addresses {
            let is_there = on_it().any(|seen| seen.place() == Some(*address));
            if !is_there {
                self.steps.insert(Step::AddAddress {
                    link: wanted.name.clone(),
                    address: *address,
                });
            }
            if let Some(found) = found.filter(|found| wanted.connected && is_there && found.up) {
                self.connected(wanted, observed, found, *address);
            }
        }
    }

    /// The kernel made the route to an address's subnet; somebody may have taken it away.
    fn connected(&mut self, wanted: &Interface, observed: &Observed, found: &Link, address: Prefix) {
        let route = WantedRoute {
            table: MAIN,
            to: address.network(),
            link: wanted.name.clone(),
            gateway: None,
            source: Some(address.address()),
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

    /// A default route by the same gateway will do, whoever made it.
    fn gateways(&mut self, wanted: &Interface, found: Option<&Link>, observed: &Observed) {
        let defaults = || {
            let of_it = |route: &&Route| {
                let default = route.to.length() == 0 && route.kind == RouteKind::Unicast;
                default && route.table == MAIN && found.is_some_and(|link| route.link == Some(link.index))
            };
            observed.routes.iter().filter(of_it)
        };
        let is_wanted = |gateway: Option<IpAddr>| gateway.is_some_and(|ip| wanted.gateways.contains(&ip));
        for route in defaults().filter(|route| route.protocol == OURS && !is_wanted(route.gateway)) {
            self.steps.insert(Step::RemoveRoute { route: route.clone() });
        }
        for gateway in &wanted.gateways {
            if defaults().any(|route| route.gateway == Some(*gateway)) {
                continue;
            }
            let route = WantedRoute {
                table: MAIN,
                to: Family::of(*gateway).everywhere(),
                link: wanted.name.clone(),
                gateway: Some(*gateway),
                source: None,
                ours: true,
            };
            self.steps.insert(Step::AddRoute { route });
        }
    }
}

#[cfg(test)]
#[path = "interface_tests.rs"]
mod tests;
