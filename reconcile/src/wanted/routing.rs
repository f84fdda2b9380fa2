//! Routes and rules of our own, for all families.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::interface::Prefix;

use super::Bridge;
use crate::family::Family;
use crate::names::{LinkName, Mark};
use crate::route::WantedRoute;
use crate::rule::{FROM_GUESTS, NO_WAY, Rule, RuleAction, TO_GUESTS};
use crate::uplink::Exit;

/// Routes and rules of our own. Where the main table decides there are none: whoever changes the host's routing means
/// the guests, too.
pub(super) fn routing(
    mark: &Mark,
    bridge: &Bridge,
    exits: &BTreeMap<Family, Exit>,
    scoped: impl Fn(Family) -> bool,
) -> (BTreeSet<WantedRoute>, BTreeSet<Rule>) {
    let (mut routes, mut rules) = (BTreeSet::new(), BTreeSet::new());
    let ours = |to, link: &LinkName, gateway, source| WantedRoute {
        table: mark.table,
        to,
        link: link.clone(),
        gateway,
        source,
        ours: true,
    };
    for address in &bridge.addresses {
        let (family, subnet) = (Family::of(address.ip()), address.subnet());
        let prefix = Prefix::new(subnet.network(), subnet.prefix());
        let Some(to) = prefix.filter(|_| scoped(family)) else {
            continue; // a subnet's length is one of a prefix
        };
        routes.insert(ours(to, &bridge.name, None, Some(address.ip())));
        rules.insert(Rule {
            to: Some(to),
            ..Rule::ours(family, TO_GUESTS, RuleAction::Lookup(mark.table))
        });
    }
    let from_guests = |family, priority, action| Rule {
        iif: Some(bridge.name.as_str().to_owned()),
        ..Rule::ours(family, priority, action)
    };
    for (family, exit) in exits.iter().filter(|(family, _)| scoped(**family)) {
        let table = match exit {
            Exit::Own(link, gateway) => {
                routes.insert(ours(family.everywhere(), link, *gateway, None));
                Some(mark.table)
            }
            Exit::Table(table, _) => Some(*table),
            Exit::None(_) | Exit::Main(_) => None,
        };
        let lookup = table.map(|table| from_guests(*family, FROM_GUESTS, RuleAction::Lookup(table)));
        rules.extend(lookup);
        rules.insert(from_guests(*family, NO_WAY, RuleAction::Unreachable));
    }
    (routes, rules)
}
