//! How a guest's answer gets back by the link that its question came by. Pure.
//!
//! Who asks for a forwarded port may be behind another link than the way out: another network of a phone, the LAN while a VPN
//! is up, the second uplink of a server. By its destination alone the answer would leave by the way out, where nobody waits
//! for it. So the packet filter gives the connection the mark of the link, and what a guest answers carries it while it is
//! routed; a rule for each mark looks into the table that leads out by that link.
//!
//! A connection keeps its mark until the asker's next packet, and an asker may wait long. So a link keeps its number as long
//! as it works, whoever comes or goes beside it; an agent that begins finds the numbers in the rules.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::names::{LinkName, Mark};
use crate::near::is_near;
use crate::observed::{Kind, Link, Observed};
use crate::route::{MAIN, OURS, Route};
use crate::rule::{ANSWERS, ATTACHED, NETD_VPN, Rule, RuleAction};
use crate::uplink::{self, Exit, NETD_TABLES, Platform};

/// The bits of marks of packets and connections that are ours. netd uses 0 to 20 and 29 to 31, and of connections 24 and 25
/// (`Fwmark.h`, `StrictController.cpp`); Tailscale 16 to 23; Kubernetes 14 and 15.
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

/// A way back by a link, the best one first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Back {
    /// To wherever this table knows a way to.
    Out(u32),
    /// To what is attached to it, by this table.
    Attached(u32),
}

impl Back {
    fn table(self) -> u32 {
        match self {
            Self::Out(table) | Self::Attached(table) => table,
        }
    }
}

/// The ways back by a link, of each family.
type Backs = BTreeMap<Family, Back>;

/// For the families of `exits`; `scoped` says of which of them our own rules decide. Where the main table decides and all
/// default routes are by one link, no answer can take another one: then there is nothing to do.
pub(crate) fn answers(
    mark: &Mark,
    bridge: &LinkName,
    exits: &BTreeMap<Family, &Exit>,
    scoped: impl Fn(Family) -> bool,
    observed: &Observed,
    before: &BTreeMap<LinkName, u32>,
) -> Answers {
    let mut links: BTreeMap<u32, Backs> = BTreeMap::new();
    for (family, exit) in exits {
        let mut backs = backs(mark, observed, *family, exit, scoped(*family));
        backs.retain(|index, _| is_a_door(mark, observed, *index));
        if !scoped(*family) && backs.len() < 2 {
            continue;
        }
        for (index, back) in backs {
            links.entry(index).or_default().insert(*family, back);
        }
    }
    let mut links: Vec<(u32, Backs)> = links.into_iter().collect();
    links.sort_by_key(|(index, backs)| rank(observed, exits, *index, backs)); // stable: older ones first
    links.truncate(LINKS as usize);
    let mut answers = Answers::default();
    for (number, (index, backs)) in numbered(bridge, observed, before, links) {
        let marked = number << MASK.trailing_zeros();
        let rule = |family, priority, to, table| Rule {
            iif: Some(bridge.as_str().to_owned()),
            mark: Some((marked, MASK)),
            to,
            ..Rule::ours(family, priority, RuleAction::Lookup(table))
        };
        for (family, back) in backs {
            if uplink::platform(observed, family) == Platform::Linux
                && ![MAIN, mark.table].contains(&back.table())
            {
                // Somebody's table may know the gateway only, which need not send on to its own network.
                let attached = attached(observed, family, index);
                answers
                    .rules
                    .extend(attached.map(|to| rule(family, ATTACHED, Some(to), MAIN)));
            }
            answers.rules.insert(rule(family, ANSWERS, None, back.table()));
        }
        answers
            .marks
            .extend(uplink::working(observed, index).map(|link| (link, marked)));
    }
    answers
}

/// Whether a link works and others may be behind it.
fn is_a_door(mark: &Mark, observed: &Observed, index: u32) -> bool {
    let others = |link: &Link| link.kind != Kind::Loopback && !mark.is_on(&link.name, link.group);
    uplink::working(observed, index).is_some() && observed.links.get(&index).is_some_and(others)
}

/// The subnets of a link.
fn attached(observed: &Observed, family: Family, index: u32) -> impl Iterator<Item = Prefix> {
    let routes = observed.routes.iter();
    let of_it = routes.filter(move |route| route.link == Some(index) && is_near(route, family));
    of_it.map(|route| route.to)
}

/// Who gets a number first: ways out, then tunnels, then who has a default route, then the rest.
fn rank(observed: &Observed, exits: &BTreeMap<Family, &Exit>, index: u32, backs: &Backs) -> u8 {
    let name = observed.links.get(&index).map(|link| link.name.as_str());
    let leads_out = |exit: &&Exit| exit.link().map(LinkName::as_str) == name;
    let is_tunnel =
        |rule: &Rule| tunnel(rule).is_some_and(|table| backs.get(&rule.family) == Some(&Back::Out(table)));
    let is_out = |back: &Back| matches!(back, Back::Out(_));
    match () {
        () if exits.values().any(leads_out) => 0,
        () if observed.rules.iter().any(is_tunnel) => 1,
        () if backs.values().any(is_out) => 2,
        () => 3,
    }
}

/// The table of a VPN by netd.
fn tunnel(rule: &Rule) -> Option<u32> {
    match rule.action {
        RuleAction::Lookup(table) if rule.priority == NETD_VPN => Some(table),
        _ => None,
    }
}

/// Gives links numbers: that of `before`, else that which the rules of ours say already, else the lowest one that is free.
fn numbered(
    bridge: &LinkName,
    observed: &Observed,
    before: &BTreeMap<LinkName, u32>,
    links: Vec<(u32, Backs)>,
) -> Numbers {
    let ours = |rule: &&Rule| {
        let of_us = rule.protocol == OURS && rule.iif.as_deref() == Some(bridge.as_str());
        of_us && rule.priority == ANSWERS
    };
    let mut said: BTreeMap<u32, BTreeMap<Family, u32>> = BTreeMap::new();
    for rule in observed.rules.iter().filter(ours) {
        if let (Some((mark, MASK)), RuleAction::Lookup(table)) = (rule.mark, rule.action) {
            said.entry(mark).or_default().insert(rule.family, table);
        }
    }
    let mut numbers = Numbers::new();
    let links = claim(&mut numbers, links, |index, _, _| {
        before.get(&uplink::working(observed, index)?).copied()
    });
    let links = claim(&mut numbers, links, |_, backs, numbers| {
        let tables = backs.iter().map(|(family, back)| (*family, back.table()));
        let tables: BTreeMap<Family, u32> = tables.collect();
        let is_it = |(mark, there): &(&u32, &BTreeMap<Family, u32>)| {
            **there == tables && !numbers.contains_key(&(*mark >> MASK.trailing_zeros()))
        };
        said.iter().find(is_it).map(|(mark, _)| *mark)
    });
    for link in links {
        let free = (1..=LINKS).find(|number| !numbers.contains_key(number));
        numbers.extend(free.map(|number| (number, link)));
    }
    numbers
}

/// Links by number.
type Numbers = BTreeMap<u32, (u32, Backs)>;

/// Gives links the number of the mark that `mark_of` says, where nobody has it; the rest.
fn claim(
    numbers: &mut Numbers,
    links: Vec<(u32, Backs)>,
    mark_of: impl Fn(u32, &Backs, &Numbers) -> Option<u32>,
) -> Vec<(u32, Backs)> {
    let mut rest = Vec::new();
    for (index, backs) in links {
        let number = mark_of(index, &backs, numbers).map(|mark| mark >> MASK.trailing_zeros());
        match number.filter(|number| (1..=LINKS).contains(number) && !numbers.contains_key(number)) {
            Some(number) => drop(numbers.insert(number, (index, backs))),
            None => rest.push((index, backs)),
        }
    }
    rest
}

/// By which table packets leave by each link, or reach at least what is attached to it. One pass over the routes.
fn backs(mark: &Mark, observed: &Observed, family: Family, exit: &Exit, scoped: bool) -> BTreeMap<u32, Back> {
    let platform = uplink::platform(observed, family);
    let first = uplink::defaults(observed, family).into_iter().next();
    let first = first.and_then(|(route, _)| route.link);
    let back = |route: &Route, link: u32| {
        let leads_out = route.is_default(family) && route.protocol != OURS;
        match platform {
            Platform::Netd if leads_out && NETD_TABLES.checked_add(link) == Some(route.table) => {
                Some(Back::Out(route.table))
            }
            Platform::Netd if is_near(route, family) => Some(Back::Attached(MAIN)),
            // Of two in the main table the kernel takes the better one, whoever asked.
            Platform::Linux if leads_out && (route.table != MAIN || first == Some(link)) => {
                Some(Back::Out(route.table))
            }
            // Where the main table decides it needs no rule for that.
            Platform::Linux if scoped && route.table == MAIN && Family::of(route.to.address()) == family => {
                Some(Back::Attached(MAIN))
            }
            Platform::Netd | Platform::Linux => None,
        }
    };
    let mut backs: BTreeMap<u32, Back> = BTreeMap::new();
    for route in &observed.routes {
        let Some((link, back)) = route.link.and_then(|link| Some((link, back(route, link)?))) else {
            continue;
        };
        let best = backs.entry(link).or_insert(back);
        *best = better(*best, back);
    }
    match (platform, exit) {
        (Platform::Linux, Exit::Own(link, _)) => {
            let own = observed.link(link.as_str());
            backs.extend(own.map(|link| (link.index, Back::Out(mark.table))));
        }
        (Platform::Linux, _) => {}
        // A VPN that takes some addresses only has no default route, and its table is like that of others.
        (Platform::Netd, _) => {
            let rules = observed.rules.iter().filter(|rule| rule.family == family);
            let tables = rules.filter_map(tunnel);
            backs
                .extend(tables.filter_map(|table| Some((table.checked_sub(NETD_TABLES)?, Back::Out(table)))));
        }
    }
    backs
}

/// The main table before others: there the machine's own answers go.
fn better(one: Back, other: Back) -> Back {
    let order = |back: &Back| (*back != Back::Out(MAIN), *back);
    std::cmp::min_by_key(one, other, order)
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
