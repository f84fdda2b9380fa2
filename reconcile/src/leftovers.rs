//! What instances left behind, known by its marks alone: no store, no configuration. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::names::Mark;
use crate::observed::{Link, Observed};
use crate::plan::{Plan, Step};
use crate::route::OURS;
use crate::rule::{Rule, RuleAction};

/// Whose leftovers are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// One instance's.
    One(Mark),
    /// Those of every instance but these, by the prefix of their marks: they are in use.
    AllBut(BTreeSet<String>),
}

impl Whose {
    /// Whether what carries this prefix is meant.
    #[must_use]
    pub fn includes(&self, prefix: &str) -> bool {
        match self {
            Self::One(mark) => mark.prefix == prefix,
            Self::AllBut(used) => !used.contains(prefix),
        }
    }

    fn has_link(&self, link: &Link) -> bool {
        match self {
            Self::One(mark) => mark.is_on(&link.name, link.group),
            Self::AllBut(_) => Mark::on(link).is_some_and(|mark| self.includes(&mark.prefix)),
        }
    }

    /// `prefixes` of the tables whose links are still there.
    fn has_table(&self, table: u32, prefixes: &BTreeMap<u32, String>) -> bool {
        match self {
            Self::One(mark) => mark.table == table,
            Self::AllBut(_) => {
                let owner = prefixes.get(&table);
                Mark::has_table(table) && owner.is_none_or(|prefix| self.includes(prefix))
            }
        }
    }

    fn has_rule(&self, rule: &Rule, prefixes: &BTreeMap<u32, String>) -> bool {
        let by_table = matches!(rule.action, RuleAction::Lookup(table) if self.has_table(table, prefixes));
        let by_link = rule
            .iif
            .as_deref()
            .is_some_and(|iif| Mark::is_prefix(iif) && self.includes(iif));
        rule.protocol == OURS && (by_table || by_link)
    }
}

/// The instances whose links some process holds: a VMM runs there. By the prefix of their marks.
#[must_use]
pub fn used(observed: &Observed) -> BTreeSet<String> {
    let held = observed
        .links
        .values()
        .filter(|link| link.carrier && link.kind == crate::observed::Kind::Tap);
    held.filter_map(Mark::on).map(|mark| mark.prefix).collect()
}

/// What removes the links, routes and rules of leftovers.
#[must_use]
pub fn plan(whose: &Whose, observed: &Observed) -> Plan {
    let mut plan = Plan::default();
    let marks = observed.links.values().filter_map(Mark::on);
    let prefixes: BTreeMap<u32, String> = marks.map(|mark| (mark.table, mark.prefix)).collect();
    let mut going = BTreeSet::new();
    for link in observed.links.values().filter(|link| whose.has_link(link)) {
        going.insert(Some(link.index));
        plan.steps.insert(Step::RemoveLink {
            name: link.name.clone(),
            index: link.index,
        });
    }
    let ours = |table, protocol| protocol == OURS && whose.has_table(table, &prefixes);
    for route in observed
        .routes
        .iter()
        .filter(|route| ours(route.table, route.protocol))
    {
        if !going.contains(&route.link) {
            plan.steps.insert(Step::RemoveRoute { route: route.clone() }); // others go with their link
        }
    }
    for rule in observed
        .rules
        .iter()
        .filter(|rule| whose.has_rule(rule, &prefixes))
    {
        plan.steps.insert(Step::RemoveRule { rule: rule.clone() });
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::Family;
    use crate::observed::Kind;
    use crate::route::{MAIN, Route};
    use crate::simulated::{Simulated, default_route, router};
    use sovereign_protocol::name::Name;

    fn mark(instance: &str) -> Mark {
        Mark::of(&Name::parse(instance).unwrap())
    }

    /// A bridge, a TAP, a route and a rule of an instance.
    fn leave(kernel: &mut Simulated, mark: &Mark, held: bool) {
        kernel.add(&mark.prefix, Kind::Bridge, mark.group);
        let tap = kernel.add(&format!("{}-sql", mark.prefix), Kind::Tap, mark.group);
        kernel.link(tap, |link| link.carrier = held).unwrap();
        let route = default_route(mark.table, 2, "10.0.0.1");
        kernel.state.routes.insert(Route {
            protocol: OURS,
            ..route
        });
        kernel
            .state
            .rules
            .insert(Rule::ours(Family::V4, 9_000, RuleAction::Lookup(mark.table)));
        let iif = Some(mark.prefix.clone());
        let by_link = Rule::ours(Family::V4, 9_020, RuleAction::Unreachable);
        kernel.state.rules.insert(Rule { iif, ..by_link });
    }

    #[test]
    fn one_instances_leftovers_are_found_beside_anothers_and_foreign_ones() {
        let (one, two) = (mark("one"), mark("two"));
        let mut kernel = router();
        kernel.add("sv0000", Kind::Bridge, one.group); // no prefix of ours: 0 is not in its letters
        kernel.add("svaaaa", Kind::Bridge, 0);
        kernel
            .state
            .rules
            .insert(Rule::ours(Family::V4, 9_000, RuleAction::Lookup(MAIN)));
        let before = kernel.clone();
        leave(&mut kernel, &one, false);
        leave(&mut kernel, &two, true);
        let of_one = plan(&Whose::One(one.clone()), &kernel.state);
        assert_eq!(of_one.steps.len(), 5, "{of_one}");
        assert_eq!(used(&kernel.state), BTreeSet::from([two.prefix.clone()]));
        let all = plan(&Whose::AllBut(used(&kernel.state)), &kernel.state);
        assert_eq!(all, of_one);
        let every = plan(&Whose::AllBut(BTreeSet::new()), &kernel.state);
        assert_eq!(every.steps.len(), 10, "{every}");
        every.steps.iter().for_each(|step| kernel.apply(step).unwrap());
        assert_eq!(kernel.state, before.state);
    }

    #[test]
    fn routes_and_rules_are_found_without_their_links() {
        let one = mark("one");
        let mut kernel = router();
        leave(&mut kernel, &one, false);
        for link in [4, 5] {
            kernel.remove(link).unwrap();
        }
        let left = plan(&Whose::AllBut(BTreeSet::new()), &kernel.state);
        assert_eq!(left.steps.len(), 3, "{left}");
        assert!(plan(&Whose::One(mark("two")), &kernel.state).is_done());
    }
}
