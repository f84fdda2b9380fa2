//! The way from what is there to what should be there: sorted steps that can be printed. Pure.
//!
//! Nothing is remembered: a plan is made of two values. It removes and changes only what
//! carries our mark; a link with one of our names but without the mark is a conflict, and
//! everything that stands on it is left alone.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use sovereign_protocol::subnet::{HostAddress, Subnet};

use crate::names::{LinkName, Mac};
use crate::observed::{Kind, Link, Observed};
use crate::wanted::{Bridge, DEFAULT_MTU, Wanted};

/// One change. Their order is the order in which they are made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Step {
    /// Remove a link that carries our mark.
    RemoveLink {
        /// Its name, for people.
        name: String,
        /// Its number, for the kernel.
        index: u32,
    },
    /// Make the bridge, marked in the same message.
    CreateBridge {
        /// Its name.
        name: LinkName,
        /// Its hardware address.
        #[serde(serialize_with = "as_text")]
        mac: Mac,
        /// The mark.
        group: u32,
    },
    /// Make a TAP: not lasting, then marked, then lasting.
    CreateTap {
        /// Its name.
        name: LinkName,
        /// The mark.
        group: u32,
    },
    /// Pin the bridge's hardware address again.
    SetMac {
        /// The link.
        name: LinkName,
        /// The address.
        #[serde(serialize_with = "as_text")]
        mac: Mac,
    },
    /// Set the MTU.
    SetMtu {
        /// The link.
        name: LinkName,
        /// Bytes.
        mtu: u32,
    },
    /// Make a TAP a port of the bridge.
    SetController {
        /// The TAP.
        name: LinkName,
        /// The bridge.
        bridge: LinkName,
    },
    /// Set a link up.
    SetUp {
        /// The link.
        name: LinkName,
    },
    /// Remove an address that carries our mark.
    RemoveAddress {
        /// The link.
        link: LinkName,
        /// The address.
        address: HostAddress,
    },
    /// Add an address.
    AddAddress {
        /// The link.
        link: LinkName,
        /// The address.
        address: HostAddress,
    },
    /// Add the route to an address's subnet again, which the kernel once made by itself.
    AddRoute {
        /// The link.
        link: LinkName,
        /// The address whose subnet it is.
        address: HostAddress,
    },
}

pub(crate) fn as_text<S: serde::Serializer>(value: &impl fmt::Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// Something foreign in the place of something of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// Its name.
    pub name: LinkName,
    /// What is wrong with it.
    pub evidence: String,
}

/// What is to be done, and what stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The changes, in their order.
    pub steps: BTreeSet<Step>,
    /// What is left alone because it is not ours.
    pub conflicts: BTreeSet<Conflict>,
}

impl Plan {
    /// Whether all is as wanted.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.steps.is_empty() && self.conflicts.is_empty()
    }
}

/// Plans the way from `observed` to `wanted`.
#[must_use]
pub fn plan(wanted: &Wanted, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    plan.remove_unwanted(wanted, observed);
    if wanted.loopback {
        plan.raise_loopback(observed);
    }
    let Some(bridge) = &wanted.bridge else {
        return plan;
    };
    let found = plan.find(wanted, observed, &bridge.name, Kind::Bridge);
    if !matches!(found, Found::Foreign) {
        plan.bridge(wanted, observed, bridge, found.link());
    }
    let port_of = match found {
        Found::Foreign => None,
        Found::Absent => Some((&bridge.name, None)),
        Found::Ours(link) => Some((&bridge.name, Some(link.index))),
    };
    for name in wanted.taps.keys() {
        let found = plan.find(wanted, observed, name, Kind::Tap);
        if !matches!(found, Found::Foreign) {
            plan.tap(wanted, name, found.link(), port_of);
        }
    }
    plan
}

#[derive(Debug, Clone, Copy)]
enum Found<'a> {
    Absent,
    Ours(&'a Link),
    Foreign,
}

impl<'a> Found<'a> {
    fn link(self) -> Option<&'a Link> {
        match self {
            Self::Ours(link) => Some(link),
            Self::Absent | Self::Foreign => None,
        }
    }
}

impl Plan {
    fn remove_unwanted(&mut self, wanted: &Wanted, observed: &Observed) {
        let bridge = wanted.bridge.as_ref().map(|bridge| &bridge.name);
        let names: BTreeSet<&str> = wanted.taps.keys().chain(bridge).map(LinkName::as_str).collect();
        for link in observed.links.values() {
            if wanted.mark.is_on(&link.name, link.group) && !names.contains(link.name.as_str()) {
                self.remove(link);
            }
        }
    }

    fn remove(&mut self, link: &Link) {
        self.steps.insert(Step::RemoveLink {
            name: link.name.clone(),
            index: link.index,
        });
    }

    fn raise_loopback(&mut self, observed: &Observed) {
        let down = |link: &&Link| link.kind == Kind::Loopback && !link.up;
        let lo = observed.links.values().find(down);
        let name = lo.and_then(|lo| LinkName::parse(&lo.name));
        self.steps.extend(name.map(|name| Step::SetUp { name }));
    }

    /// What has this name; a link of ours that is no `kind` is removed and made again.
    fn find<'a>(
        &mut self,
        wanted: &Wanted,
        observed: &'a Observed,
        name: &LinkName,
        kind: Kind,
    ) -> Found<'a> {
        let Some(link) = observed.link(name.as_str()) else {
            return Found::Absent;
        };
        if !wanted.mark.is_on(&link.name, link.group) {
            let (group, ours) = (link.group, wanted.mark.group);
            self.conflicts.insert(Conflict {
                name: name.clone(),
                evidence: format!("a link of this name is there but not ours: group {group}, ours is {ours}"),
            });
            return Found::Foreign;
        }
        if link.kind == kind {
            return Found::Ours(link);
        }
        self.remove(link);
        Found::Absent
    }

    fn bridge(&mut self, wanted: &Wanted, observed: &Observed, bridge: &Bridge, found: Option<&Link>) {
        let name = &bridge.name;
        match found {
            None => {
                self.steps.insert(Step::CreateBridge {
                    name: name.clone(),
                    mac: bridge.mac,
                    group: wanted.mark.group,
                });
            }
            Some(link) if link.mac != Some(bridge.mac) => {
                self.steps.insert(Step::SetMac {
                    name: name.clone(),
                    mac: bridge.mac,
                });
            }
            Some(_) => {}
        }
        self.mtu_and_up(wanted, name, found);
        self.addresses(observed, bridge, found);
    }

    fn mtu_and_up(&mut self, wanted: &Wanted, name: &LinkName, found: Option<&Link>) {
        if found.map_or(DEFAULT_MTU, |link| link.mtu) != wanted.mtu {
            self.steps.insert(Step::SetMtu {
                name: name.clone(),
                mtu: wanted.mtu,
            });
        }
        if found.is_none_or(|link| !link.up) {
            self.steps.insert(Step::SetUp { name: name.clone() });
        }
    }

    fn addresses(&mut self, observed: &Observed, bridge: &Bridge, found: Option<&Link>) {
        let there: Vec<_> = observed
            .addresses
            .iter()
            .filter(|a| found.is_some_and(|l| l.index == a.link))
            .collect();
        let link = &bridge.name;
        for old in there.iter().filter(|a| a.ours) {
            let old = HostAddress::new(old.ip, old.prefix);
            if let Some(address) = old.ok().filter(|old| !bridge.addresses.contains(old)) {
                self.steps.insert(Step::RemoveAddress {
                    link: link.clone(),
                    address,
                });
            }
        }
        for address in &bridge.addresses {
            let (link, address) = (link.clone(), *address);
            let is_there = there
                .iter()
                .any(|a| (a.ip, a.prefix) == (address.ip(), address.prefix()));
            if !is_there {
                self.steps.insert(Step::AddAddress { link, address });
            } else if found.is_some_and(|found| found.up && !has_route(observed, found, address.subnet())) {
                self.steps.insert(Step::AddRoute { link, address });
            }
        }
    }

    fn tap(
        &mut self,
        wanted: &Wanted,
        name: &LinkName,
        found: Option<&Link>,
        port_of: Option<(&LinkName, Option<u32>)>,
    ) {
        if found.is_none() {
            self.steps.insert(Step::CreateTap {
                name: name.clone(),
                group: wanted.mark.group,
            });
        }
        if let Some((bridge, index)) = port_of
            && (index.is_none() || found.and_then(|link| link.controller) != index)
        {
            self.steps.insert(Step::SetController {
                name: name.clone(),
                bridge: bridge.clone(),
            });
        }
        self.mtu_and_up(wanted, name, found);
    }
}

fn has_route(observed: &Observed, link: &Link, subnet: Subnet) -> bool {
    let leads = |route: &crate::observed::Route| {
        (route.link, route.network, route.prefix) == (link.index, subnet.network(), subnet.prefix())
    };
    observed.routes.iter().any(leads)
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveLink { name, .. } => write!(f, "link {}: remove", name.escape_debug()),
            Self::CreateBridge { name, mac, group } => {
                write!(f, "link {name}: create bridge, address {mac}, group {group}")
            }
            Self::CreateTap { name, group } => write!(f, "link {name}: create tap, group {group}"),
            Self::SetMac { name, mac } => write!(f, "link {name}: set address {mac}"),
            Self::SetMtu { name, mtu } => write!(f, "link {name}: set mtu {mtu}"),
            Self::SetController { name, bridge } => write!(f, "link {name}: make port of {bridge}"),
            Self::SetUp { name } => write!(f, "link {name}: set up"),
            Self::RemoveAddress { link, address } => write!(f, "address {address}: remove from {link}"),
            Self::AddAddress { link, address } => write!(f, "address {address}: add to {link}"),
            Self::AddRoute { link, address } => write!(f, "route {}: add, dev {link}", address.subnet()),
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}: conflict, {}", self.name, self.evidence)
    }
}

impl fmt::Display for Plan {
    /// One line a step, then one a conflict.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        for conflict in &self.conflicts {
            writeln!(f, "{conflict}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
