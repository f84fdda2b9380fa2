//! What a host reaches without a gateway. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::names::{LinkName, Mark};
use crate::observed::Observed;
use crate::route::{KERNEL, MAIN, Route, RouteKind, WantedRoute};
use crate::uplink;

/// What this host reaches without a gateway. A table with a default route of ours has to know it as well, or answers to
/// who came in by another link than that of the default route would leave by the wrong one.
pub(crate) fn near(
    mark: &Mark,
    bridge: &LinkName,
    family: Family,
    exit: Option<&LinkName>,
    observed: &Observed,
) -> impl Iterator<Item = WantedRoute> {
    let mut near: BTreeMap<Prefix, WantedRoute> = BTreeMap::new();
    for route in observed.routes.iter().filter(|route| is_near(route, family)) {
        let link = route.link.and_then(|index| uplink::working(observed, index));
        let Some(link) = link.filter(|link| link != bridge) else {
            continue;
        };
        // Of two links in one subnet that of the default route is as good as the machine's own choice.
        if exit != Some(&link) && near.contains_key(&route.to) {
            continue;
        }
        let route = WantedRoute {
            table: mark.table,
            to: route.to,
            link,
            gateway: None,
            source: None,
            ours: true,
        };
        near.insert(route.to, route);
    }
    near.into_values()
}

/// Whether a route is that of a link's own subnet, which the kernel made for an address of it.
pub(crate) fn is_near(route: &Route, family: Family) -> bool {
    let local = route.to.address().is_loopback() || link_local(route.to.address());
    (route.table, route.protocol, route.gateway) == (MAIN, KERNEL, None)
        && (Family::of(route.to.address()), route.kind) == (family, RouteKind::Unicast)
        && !local
}

fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    }
}
