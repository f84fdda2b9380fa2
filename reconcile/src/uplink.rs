//! How packets of guests leave this host, from what is there. Pure.
//!
//! Plain Linux has its default route in the main table, and whoever changes that decides for the guests as well.
//! Android's netd has a table for each network and a ladder of rules that all say `iif lo`: nothing of it applies to
//! packets of a bridge, so they get rules of their own below it, which look into the table of the network that netd
//! chose (FACTS section 2).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
pub use sovereign_protocol::spec::{Uplink, Vpn};

use crate::family::Family;
use crate::names::LinkName;
use crate::observed::{Link, Observed};
use crate::route::{MAIN, Route};
use crate::rule::{KERNEL_MAIN, NETD_DEFAULT, NETD_LAST, NETD_VPN, Rule, RuleAction};

/// netd's table of a network is this plus the number of its link.
pub(crate) const NETD_TABLES: u32 = 1_000;

/// Who rules the host's routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Platform {
    /// The main table.
    Linux,
    /// Android's netd.
    Netd,
}

/// The way out of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// There is none, for this reason.
    None(NoExit),
    /// The main table knows; by this link now.
    Main(LinkName),
    /// A table of the system's knows, which is that of this link.
    Table(u32, LinkName),
    /// A default route in a table of ours.
    Own(LinkName, Option<IpAddr>),
}

/// Why guests have no way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum NoExit {
    /// Nobody wants one.
    #[error("none is configured (network.uplink)")]
    Unwanted,
    /// The host has no default route.
    #[error("this host has no default route")]
    NoDefault,
    /// None of the named links has one.
    #[error("no link that network.uplink names has a default route")]
    NoNamed,
    /// A VPN is up, and `vpn = "block"`.
    #[error("a VPN is up and network.vpn is \"block\"")]
    Blocked,
}

impl Exit {
    /// The link by which packets leave.
    #[must_use]
    pub fn link(&self) -> Option<&LinkName> {
        match self {
            Self::None(_) => None,
            Self::Main(link) | Self::Table(_, link) | Self::Own(link, _) => Some(link),
        }
    }
}

/// Whose rules are there. Of one family: a kernel has another ladder for each, and one of them may be as it was at boot.
#[must_use]
pub fn platform(observed: &Observed, family: Family) -> Platform {
    let of_it = || observed.rules.iter().filter(|rule| rule.family == family);
    let has = |wanted: &dyn Fn(&Rule) -> bool| of_it().any(wanted);
    let netd = has(&|rule| (rule.priority, rule.action) == (NETD_LAST, RuleAction::Unreachable));
    let kernel = has(&|rule| rule.priority == KERNEL_MAIN);
    if netd && !kernel {
        Platform::Netd
    } else {
        Platform::Linux
    }
}

/// The way out of one family.
#[must_use]
pub fn exit(observed: &Observed, family: Family, uplink: &Uplink, vpn: Vpn) -> Exit {
    let names = match uplink {
        Uplink::None => return Exit::None(NoExit::Unwanted),
        Uplink::Auto => None,
        Uplink::Named(names) => Some(names),
    };
    match platform(observed, family) {
        Platform::Linux => by_main(observed, family, names),
        Platform::Netd => by_netd(observed, family, names, vpn),
    }
}

fn by_main(observed: &Observed, family: Family, names: Option<&Vec<LinkName>>) -> Exit {
    let all = defaults(observed, family);
    let Some(names) = names else {
        let first = all.into_iter().next();
        return first.map_or(Exit::None(NoExit::NoDefault), |(_, link)| Exit::Main(link));
    };
    let named = names
        .iter()
        .find_map(|name| all.iter().find(|(_, link)| link == name));
    named.map_or(Exit::None(NoExit::NoNamed), |(route, link)| {
        Exit::Own(link.clone(), route.gateway)
    })
}

/// The default routes of the main table by links that work, the one that decides first.
pub(crate) fn defaults(observed: &Observed, family: Family) -> Vec<(&Route, LinkName)> {
    let of_main = |route: &&Route| route.table == MAIN && route.is_default(family);
    let found = observed.routes.iter().filter(of_main);
    let mut found: Vec<_> = found
        .filter_map(|route| Some((route, working(observed, route.link?)?)))
        .collect();
    found.sort_by_key(|(route, _)| route.metric);
    found
}

fn by_netd(observed: &Observed, family: Family, names: Option<&Vec<LinkName>>, vpn: Vpn) -> Exit {
    let looks_up = |rule: &&Rule| rule.family == family && matches!(rule.action, RuleAction::Lookup(_));
    let rules = || observed.rules.iter().filter(looks_up);
    let tunnel = rules()
        .filter(|rule| rule.priority == NETD_VPN && rule.uids.is_some())
        .find_map(|rule| through(observed, family, rule));
    match (vpn, tunnel) {
        (Vpn::Block, Some(_)) => return Exit::None(NoExit::Blocked),
        (Vpn::Follow, Some(exit)) => return exit,
        _ => {}
    }
    let Some(names) = names else {
        let by_default = rules().filter(|rule| rule.priority == NETD_DEFAULT);
        let mut exits = by_default.filter_map(|rule| through(observed, family, rule));
        return exits.next().unwrap_or(Exit::None(NoExit::NoDefault));
    };
    let named = names.iter().find_map(|name| {
        let link = observed.link(name.as_str())?;
        table(observed, family, NETD_TABLES.checked_add(link.index)?)
    });
    named.unwrap_or(Exit::None(NoExit::NoNamed))
}

fn through(observed: &Observed, family: Family, rule: &Rule) -> Option<Exit> {
    match rule.action {
        RuleAction::Lookup(number) => table(observed, family, number),
        RuleAction::Unreachable | RuleAction::Other => None,
    }
}

/// A table with a default route by a link that works.
fn table(observed: &Observed, family: Family, number: u32) -> Option<Exit> {
    let of_it = |route: &&Route| route.table == number && route.is_default(family);
    let mut routes = observed.routes.iter().filter(of_it);
    routes.find_map(|route| Some(Exit::Table(number, working(observed, route.link?)?)))
}

/// The name of a link that is up and has carrier.
pub(crate) fn working(observed: &Observed, index: u32) -> Option<LinkName> {
    let works = |link: &&Link| link.up && link.carrier;
    let link = observed.links.get(&index).filter(works)?;
    LinkName::parse(&link.name)
}

#[cfg(test)]
#[path = "uplink_tests.rs"]
mod tests;
