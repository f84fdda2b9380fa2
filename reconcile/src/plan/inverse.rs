//! What puts back what a step changed.

use std::collections::BTreeSet;

use super::Step;
use crate::names::LinkName;
use crate::observed::{Kind, Link, Observed};
use crate::route::{OURS, Route, WantedRoute};
use crate::rule::RuleAction;
use crate::wanted::DEFAULT_MTU;

impl Step {
    /// The steps, in their order, that put back what this one changed; `before` is what was seen before it was made and
    /// `after` what was seen then. A plan is undone by the inverses of its steps, the last one first.
    ///
    /// None where nothing was changed, and for what is not known by value: the packet filter, which its back end writes
    /// as a whole; links of a kind that is not made here; what others had put on a link of ours that was removed.
    #[must_use]
    pub fn inverse(&self, before: &Observed, after: &Observed) -> BTreeSet<Self> {
        let link = |name: &LinkName| before.link(name.as_str());
        let is_up = |name: &LinkName| link(name).is_some_and(|link| link.up);
        let one = match self {
            Self::RemoveLink { index, .. } => return link_again(*index, before),
            Self::AddRoute { route } => return route_before(route, before, after),
            Self::CreateBridge { name, .. } | Self::CreateTap { name, .. } => {
                let made = after.link(name.as_str()).filter(|_| link(name).is_none());
                made.map(|link| Self::RemoveLink {
                    name: link.name.clone(),
                    index: link.index,
                })
            }
            Self::SetMac { name, .. } => link(name).and_then(|link| link.mac).map(|mac| Self::SetMac {
                name: name.clone(),
                mac,
            }),
            Self::SetMtu { name, .. } => link(name).map(|link| Self::SetMtu {
                name: name.clone(),
                mtu: link.mtu,
            }),
            Self::SetController { name, .. } | Self::LeaveController { name } => {
                return link(name).map_or_else(BTreeSet::new, |link| port(name, link, before));
            }
            Self::SetIsolated { name, .. } => {
                let port = link(name).filter(|link| link.controller.is_some());
                port.map(|link| Self::SetIsolated {
                    name: name.clone(),
                    isolated: link.isolated,
                })
            }
            Self::SetUp { name } => (!is_up(name)).then(|| Self::SetDown { name: name.clone() }),
            Self::SetDown { name } => is_up(name).then(|| Self::SetUp { name: name.clone() }),
            Self::RemoveRoute { route } => again(route, before),
            Self::RemoveAddress { link: name, address } => Some(Self::AddAddress {
                link: name.clone(),
                address: *address,
            }),
            Self::AddAddress { link: name, address } => {
                let mut seen = link(name).into_iter().flat_map(|l| before.addresses_of(l.index));
                let was_there = seen.any(|seen| seen.place() == Some(*address));
                (!was_there).then(|| Self::RemoveAddress {
                    link: name.clone(),
                    address: *address,
                })
            }
            Self::AddRule { rule } => {
                let added = !before.rules.contains(rule);
                added.then(|| Self::RemoveRule { rule: rule.clone() })
            }
            Self::RemoveRule { rule } => {
                let whole = !rule.narrower && rule.action != RuleAction::Other;
                whole.then(|| Self::AddRule { rule: rule.clone() })
            }
            Self::SetSysctl { sysctl, from, to } => {
                // One of a link that was made in the same plan goes with it.
                let known = before.sysctls.contains_key(sysctl);
                known.then(|| Self::RestoreSysctl {
                    sysctl: sysctl.clone(),
                    from: *to,
                    to: *from,
                })
            }
            Self::RestoreSysctl { sysctl, from, to } => Some(Self::SetSysctl {
                sysctl: sysctl.clone(),
                from: *to,
                to: *from,
            }),
            Self::SetFilter { .. } | Self::RemoveFilter { .. } => None,
        };
        one.into_iter().collect()
    }
}

/// A link of ours as it was, with what of ours was on it.
fn link_again(index: u32, before: &Observed) -> BTreeSet<Step> {
    let mut steps = BTreeSet::new();
    let was = before.links.get(&index);
    let Some((link, name)) = was.and_then(|link| Some((link, LinkName::parse(&link.name)?))) else {
        return steps;
    };
    let (group, mac) = (link.group, link.mac);
    match (&link.kind, mac) {
        (Kind::Bridge, Some(mac)) => steps.insert(Step::CreateBridge {
            name: name.clone(),
            mac,
            group,
        }),
        (Kind::Tap, _) => steps.insert(Step::CreateTap {
            name: name.clone(),
            group,
        }),
        _ => return steps,
    };
    if let (Kind::Tap, Some(mac)) = (&link.kind, mac) {
        steps.insert(Step::SetMac {
            name: name.clone(),
            mac,
        });
    }
    if link.mtu != DEFAULT_MTU {
        steps.insert(Step::SetMtu {
            name: name.clone(),
            mtu: link.mtu,
        });
    }
    if link.controller.is_some() {
        steps.extend(port(&name, link, before));
    }
    let ports = before
        .links
        .values()
        .filter(|port| port.controller == Some(index));
    for other in ports {
        steps.extend(
            LinkName::parse(&other.name).map_or_else(BTreeSet::new, |name| port(&name, other, before)),
        );
    }
    if link.up {
        steps.insert(Step::SetUp { name: name.clone() });
    }
    let ours = before.addresses_of(index).filter(|address| address.ours);
    steps.extend(
        ours.filter_map(|address| address.place())
            .map(|address| Step::AddAddress {
                link: name.clone(),
                address,
            }),
    );
    let switches = before
        .sysctls
        .iter()
        .filter(|(sysctl, _)| sysctl.link() == Some(&name));
    steps.extend(switches.map(|(sysctl, to)| Step::SetSysctl {
        sysctl: sysctl.clone(),
        from: 0,
        to: *to,
    }));
    let routes = before.routes.iter().filter(|route| route.link == Some(index));
    steps.extend(
        routes
            .filter(|route| route.protocol == OURS)
            .filter_map(|route| again(route, before)),
    );
    steps
}

/// A port as it was: of which bridge, and whether kept from the others; or of none.
fn port(name: &LinkName, link: &Link, before: &Observed) -> BTreeSet<Step> {
    let bridge = link.controller.and_then(|index| before.links.get(&index));
    let Some(bridge) = bridge.and_then(|bridge| LinkName::parse(&bridge.name)) else {
        return BTreeSet::from([Step::LeaveController { name: name.clone() }]);
    };
    let isolated = link.isolated.then(|| Step::SetIsolated {
        name: name.clone(),
        isolated: true,
    });
    let port = Step::SetController {
        name: name.clone(),
        bridge,
    };
    isolated.into_iter().chain([port]).collect()
}

/// Takes an added route away, and puts those back whose place it took.
fn route_before(wanted: &WantedRoute, before: &Observed, after: &Observed) -> BTreeSet<Step> {
    let link = after.link(wanted.link.as_str()).map(|link| link.index);
    let added = after.routes.difference(&before.routes);
    let added: Vec<&Route> = added.filter(|route| wanted.is(route, link)).collect();
    let place = |route: &&Route| (route.table, route.to, route.metric);
    let theirs = (wanted.table, wanted.to, wanted.metric());
    let replaced = before.routes.difference(&after.routes);
    let replaced: Vec<&Route> = replaced.filter(|route| place(route) == theirs).collect();
    let back: BTreeSet<Step> = replaced
        .into_iter()
        .filter_map(|route| again(route, before))
        .collect();
    if !back.is_empty() {
        return back; // takes the place again
    }
    let gone = |route: &Route| Step::RemoveRoute { route: route.clone() };
    added.into_iter().map(gone).collect()
}

/// Adds a route of ours again; one with a metric that we do not give, or of another kind, is not ours to make.
fn again(route: &Route, before: &Observed) -> Option<Step> {
    let link = route.link.and_then(|index| before.links.get(&index))?;
    let subnet = |address: &&crate::observed::Address| {
        let place = address.place();
        address.ours && place.is_some_and(|place| place.network() == route.to)
    };
    let source = before.addresses_of(link.index).find(subnet);
    let wanted = WantedRoute {
        table: route.table,
        to: route.to,
        link: LinkName::parse(&link.name)?,
        gateway: route.gateway,
        source: source
            .filter(|_| route.gateway.is_none())
            .map(|address| address.ip),
        ours: true,
    };
    let same = wanted.is(route, route.link) && wanted.metric() == route.metric;
    same.then_some(Step::AddRoute { route: wanted })
}

#[cfg(test)]
#[path = "inverse_tests.rs"]
pub(super) mod tests;
