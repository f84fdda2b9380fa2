//! Others in the guests' subnet: addresses of other links, and routes that lead part of it elsewhere.

use std::net::IpAddr;

use sovereign_protocol::condition::Layer;
use sovereign_protocol::subnet::Subnet;

use super::look::Look;
use super::main_table::shown;
use super::{Code, Finding, of_family};
use crate::family::Family;
use crate::route::{OURS, Route};

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let mut found = conflicts(look);
    let addresses = look
        .ours
        .wanted
        .bridge
        .iter()
        .flat_map(|bridge| &bridge.addresses);
    for address in addresses {
        let subnet = address.subnet();
        let routes: Vec<&Route> = look
            .routes
            .iter()
            .filter(|route| leads_away(look, route, subnet))
            .collect();
        found.extend((!routes.is_empty()).then(|| route_conflict(look, subnet, &routes)));
    }
    found
}

/// The same conflicts that keep an address of ours from being set.
fn conflicts(look: &Look) -> Vec<Finding> {
    let conflicts = look.ours.wanted.conflicts.iter();
    let finding = |conflict: &crate::conflict::Conflict| Finding {
        layer: Layer::Tap,
        code: Code::AddressConflict,
        family: None,
        subject: conflict.on.clone(),
        what: format!(
            "Another link of this host is in the guests' {}: an address of ours there would cut it off, so none is set.",
            conflict.on
        ),
        evidence: vec![conflict.evidence.clone()],
        check: "ip address show".to_owned(),
        wrong_if: "no other link has an address in that subnet".to_owned(),
        fix: "choose another [network] address in sovereign.toml, then: sovereign up".to_owned(),
        leftover: None,
        risk: "guests get other addresses".to_owned(),
        stops: true,
    };
    conflicts.map(finding).collect()
}

/// A route of others to all of a subnet or part of it, by another link than the bridge.
fn leads_away(look: &Look, route: &Route, subnet: Subnet) -> bool {
    let within = subnet.contains(route.to.address()) && route.to.length() >= subnet.prefix();
    let bridge = look.ours.bridge().map(|bridge| bridge.as_str());
    let by_bridge = look
        .link(route.link)
        .is_some_and(|link| Some(link.name.as_str()) == bridge);
    within && !by_bridge && route.protocol != OURS
}

fn route_conflict(look: &Look, subnet: Subnet, routes: &[&Route]) -> Finding {
    let network: IpAddr = subnet.network();
    let family = Family::of(network);
    let first = shown(look, routes[0]);
    Finding {
        layer: Layer::Routing,
        code: Code::RouteConflict,
        family: Some(family),
        subject: of_family(family, &subnet.to_string()),
        what: format!(
            "{family}: a route of another program leads addresses of the guests' subnet {subnet} elsewhere."
        ),
        evidence: routes
            .iter()
            .map(|route| format!("ip route: {}", shown(look, route)))
            .collect(),
        check: format!("ip route get {}", routes[0].to.address()),
        wrong_if: "it names the guests' bridge".to_owned(),
        fix: format!("ip route delete {first}"),
        leftover: None,
        risk: "whatever the route leads to is not reached any more; else choose another [network] address"
            .to_owned(),
        stops: false,
    }
}
