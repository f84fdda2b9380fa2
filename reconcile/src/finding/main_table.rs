//! Default routes in main where netd has a table for each network.

use sovereign_protocol::condition::Layer;

use super::leftover::LeftoverName;
use super::look::Look;
use super::{Code, Finding, of_family};
use crate::family::Family;
use crate::route::{KERNEL, MAIN, OURS, Route};
use crate::uplink::{Platform, platform};

/// RTPROT_RA: a router's own, which the kernel leaves in main where nobody told it another table.
const ADVERTISED: u8 = 9;

/// Default routes in main that neither the kernel nor a router made: copies.
pub(super) fn copies(look: &Look, family: Family) -> impl Iterator<Item = &Route> {
    let netd = platform(&look.observed, family) == Platform::Netd;
    look.observed.routes.iter().filter(move |route| {
        let foreign = ![KERNEL, ADVERTISED, OURS].contains(&route.protocol);
        netd && route.table == MAIN && route.is_default(family) && foreign
    })
}

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let of = |family: Family| {
        let routes: Vec<String> = copies(look, family).map(|route| shown(look, route)).collect();
        (!routes.is_empty()).then(|| finding(family, routes))
    };
    look.families().filter_map(of).collect()
}

fn finding(family: Family, evidence: Vec<String>) -> Finding {
    Finding {
        layer: Layer::Routing,
        code: Code::DefaultInMain,
        family: Some(family),
        subject: of_family(family, "main"),
        what: format!(
            "{family}: main has a default route, which netd never puts there: whatever looks into main leaves its VPN and the network that it chose."
        ),
        evidence,
        check: "ip route show table main default".to_owned(),
        wrong_if: "it prints nothing".to_owned(),
        fix: format!("sovereign doctor --fix={}", LeftoverName::DefaultInMain),
        leftover: Some(LeftoverName::DefaultInMain),
        risk: "whatever relied on the route, such as an old script, has no way out by it then; netd's tables stay".to_owned(),
        stops: false,
    }
}

/// A route as `ip route` shows it.
pub(super) fn shown(look: &Look, route: &Route) -> String {
    let mut text = if route.to.length() == 0 {
        "default".to_owned()
    } else {
        route.to.to_string()
    };
    text += &route
        .gateway
        .map_or_else(String::new, |gateway| format!(" via {gateway}"));
    let link = look
        .link(route.link)
        .map(|link| format!(" dev {}", link.name.escape_debug()));
    text += &link.unwrap_or_default();
    if route.table != MAIN {
        text += &format!(" table {}", route.table);
    }
    if route.metric > 0 {
        text += &format!(" metric {}", route.metric);
    }
    text
}
