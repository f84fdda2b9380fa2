//! The part of a plan about routes of our own table, rules and switches.

use super::{Plan, Step};
use crate::names::LinkName;
use crate::observed::Observed;
use crate::route::{OURS, Route, WantedRoute};
use crate::wanted::Wanted;

impl Plan {
    pub(super) fn routes(&mut self, wanted: &Wanted, observed: &Observed) {
        let index = |route: &WantedRoute| observed.link(route.link.as_str()).map(|link| link.index);
        for route in &wanted.routes {
            let index = index(route);
            if !observed.routes.iter().any(|seen| route.is(seen, index)) {
                self.steps.insert(Step::AddRoute { route: route.clone() });
            }
        }
        let of_ours = observed
            .routes
            .iter()
            .filter(|seen| (seen.protocol, seen.table) == (OURS, wanted.mark.table));
        // A route goes with its link.
        let stays = |route: &&Route| !self.removes(route.link);
        let of_ours: Vec<_> = of_ours.filter(stays).collect();
        for seen in of_ours {
            // One to the same place is replaced by the one that is added.
            if !wanted
                .routes
                .iter()
                .any(|route| route.to == seen.to && seen.metric == route.metric())
            {
                self.steps.insert(Step::RemoveRoute { route: seen.clone() });
            }
        }
    }

    fn removes(&self, link: Option<u32>) -> bool {
        let removes = |step: &Step| matches!(step, Step::RemoveLink { index, .. } if Some(*index) == link);
        self.steps.iter().any(removes)
    }

    fn makes(&self, name: &LinkName, observed: &Observed) -> bool {
        let link = observed.link(name.as_str());
        link.is_none_or(|link| self.removes(Some(link.index)))
    }

    pub(super) fn rules(&mut self, wanted: &Wanted, observed: &Observed) {
        let missing = wanted.rules.difference(&observed.rules).cloned();
        self.steps.extend(missing.map(|rule| Step::AddRule { rule }));
        let of_ours = observed.rules.iter().filter(|rule| rule.is_of(&wanted.mark));
        let unwanted = of_ours.filter(|rule| !wanted.rules.contains(rule)).cloned();
        self.steps.extend(unwanted.map(|rule| Step::RemoveRule { rule }));
    }

    pub(super) fn sysctls(&mut self, wanted: &Wanted, observed: &Observed) {
        for (sysctl, to) in &wanted.sysctls {
            let from = match sysctl.link().filter(|_| sysctl.goes_with_our_link()) {
                Some(link) if self.makes(link, observed) => Some(sysctl.fresh()),
                _ => observed.sysctls.get(sysctl).copied(),
            };
            // None: this kernel has no such switch.
            if let Some(from) = from.filter(|from| from != to) {
                self.steps.insert(Step::SetSysctl {
                    sysctl: sysctl.clone(),
                    from,
                    to: *to,
                });
            }
        }
        for (sysctl, to) in &wanted.restored {
            let from = observed.sysctls.get(sysctl).copied().unwrap_or_default();
            self.steps.insert(Step::RestoreSysctl {
                sysctl: sysctl.clone(),
                from,
                to: *to,
            });
        }
    }
}

#[cfg(test)]
#[path = "routing_tests.rs"]
mod tests;
