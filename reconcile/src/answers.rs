//! How a guest's answer gets back by the link that its question came by. Pure.
//!
//! Who asks for a forwarded port may be behind another link than the way out: another network of a phone, the LAN while a VPN
//! is up, the second uplink of a server. By its destination alone the answer would leave by the way out, where nobody waits
//! for it. So the packet filter gives the connection the mark of the link, and what a guest sends of that connection carries
//! it while it is routed; a rule for each mark looks into the table that leads out by that link. The mark is set anew by each
//! packet of the question, so marks need not be remembered: a link may have another one after a restart.

use std::collections::{BTreeMap, BTreeSet};

use crate::family::Family;
use crate::names::{LinkName, Mark};
use crate::near::is_near;
use crate::observed::{Kind, Link, Observed};
use crate::route::{MAIN, OURS, Route};
use crate::rule::{ANSWERS, Rule, RuleAction};
use crate::uplink::{self, Exit, NETD_TABLES, Platform};

/// The bits of marks of packets and connections that are ours. Nobody has them: netd uses 0 to 20 and 29 to 31, and of
/// connections 24 and 25 (`Fwmark.h`, `StrictController.cpp`); Tailscale 16 to 23; Kubernetes 14 and 15.
pub const MASK: u32 = 0x1c00_0000;
/// As many links as those bits can tell apart; no bit means no link.
pub const LINKS: u32 = MASK >> MASK.trailing_zeros();

/// Which links are told apart, and how answers find there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Answers {
    /// The mark of each link.
    pub(crate) marks: BTreeMap<LinkName, u32>,
    /// The rules that lead back.
    pub(crate) rules: BTreeSet<Rule>,
}

/// The way back by a link: whether that is a default route, and its table.
type Back = (bool, u32);

/// For the families of `exits`; `scoped` says of which of them our own rules decide. Where the main table decides and all
/// default routes are by one link, no answer can take another one: then there is nothing to do.
pub(crate) fn answers<'a>(
    mark: &Mark,
    bridge: &LinkName,
    exits: impl Iterator<Item = (&'a Family, &'a Exit)>,
    scoped: impl Fn(Family) -> bool,
    observed: &Observed,
) -> Answers {
    let mut links: BTreeMap<u32, (LinkName, BTreeMap<Family, Back>)> = BTreeMap::new();
    for (family, exit) in exits {
        let others = observed.links.values();
        let others = others.filter(|link| link.kind != Kind::Loopback && !mark.is_on(&link.name, link.group));
        let found = others.filter_map(|link| {
            let name = uplink::working(observed, link.index)?;
            let back = back(mark, observed, *family, exit, link, &name)?;
            Some((link.index, name, back))
        });
        let found: Vec<_> = found.collect();
        if !scoped(*family) && found.len() < 2 {
            continue;
        }
        for (index, name, back) in found {
            let (_, families) = links.entry(index).or_insert_with(|| (name, BTreeMap::new()));
            families.insert(*family, back);
        }
    }
    let mut links: Vec<_> = links.into_values().collect();
    links.sort_by_key(|(_, families)| !families.values().any(|(default, _)| *default)); // stable: by number among equals
    let mut answers = Answers::default();
    for ((link, families), number) in links.into_iter().zip(1..=LINKS) {
        let marked = number << MASK.trailing_zeros();
        for (family, (_, table)) in families {
            answers.rules.insert(Rule {
                iif: Some(bridge.as_str().to_owned()),
                mark: Some((marked, MASK)),
                ..Rule::ours(family, ANSWERS, RuleAction::Lookup(table))
            });
        }
        answers.marks.insert(link, marked);
    }
    answers
}

/// The table by which packets leave by a link, or reach at least what is attached to it.
fn back(
    mark: &Mark,
    observed: &Observed,
    family: Family,
    exit: &Exit,
    link: &Link,
    name: &LinkName,
) -> Option<Back> {
    let by_it = || {
        let by_it = |route: &&Route| route.link == Some(link.index);
        observed.routes.iter().filter(by_it)
    };
    let foreign = by_it().filter(|route| route.is_default(family) && route.protocol != OURS);
    let mut tables = foreign.map(|route| route.table);
    if uplink::platform(observed, family) == Platform::Netd {
        let own = NETD_TABLES.checked_add(link.index);
        let attached = || {
            by_it()
                .any(|route| is_near(route, family))
                .then_some((false, MAIN))
        };
        return tables
            .find(|table| Some(*table) == own)
            .map(|table| (true, table))
            .or_else(attached);
    }
    if matches!(exit, Exit::Own(own, _) if own == name) {
        return Some((true, mark.table));
    }
    let first = uplink::defaults(observed, family).into_iter().next();
    if first.is_some_and(|(_, first)| first == *name) {
        return Some((true, MAIN));
    }
    tables.find(|table| *table != MAIN).map(|table| (true, table))
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
