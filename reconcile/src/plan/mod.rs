//! The way from what is there to what should be there: sorted steps that can be printed. Pure.
//!
//! Nothing is remembered: a plan is made of two values. It removes and changes only what
//! carries our mark; a link with one of our names but without the mark is a conflict, and
//! everything that stands on it is left alone.

use std::collections::BTreeSet;
use std::fmt;

use crate::observed::Observed;
use crate::wanted::Wanted;

mod interface;
mod inverse;
mod links;
mod routing;
mod step;

pub use crate::conflict::{Conflict, Part};
pub use interface::interface;
pub use step::Step;
pub(crate) use step::as_text;

/// What is to be done, and what stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// The changes, in their order.
    pub steps: BTreeSet<Step>,
    /// What is left alone because it is not ours.
    pub conflicts: BTreeSet<Conflict>,
}

impl Plan {
    /// What of it is about one part.
    #[must_use]
    pub fn of(&self, part: Part) -> Self {
        let steps = self.steps.iter().filter(|step| step.part() == part).cloned();
        let conflicts = self.conflicts.iter().filter(|conflict| conflict.part == part);
        Self {
            steps: steps.collect(),
            conflicts: conflicts.cloned().collect(),
        }
    }

    /// Whether all is as wanted.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.steps.is_empty() && self.conflicts.is_empty()
    }
}

/// Plans the way from `observed` to `wanted`; the packet filter apart, which only its own back end can compare.
#[must_use]
pub fn plan(wanted: &Wanted, observed: &Observed) -> Plan {
    let mut plan = Plan {
        conflicts: wanted.conflicts.clone(),
        ..Plan::default()
    };
    plan.links(wanted, observed);
    plan.routes(wanted, observed);
    plan.rules(wanted, observed);
    plan.sysctls(wanted, observed);
    plan
}

impl fmt::Display for Plan {
    /// One line a step, then one a conflict.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            writeln!(f, "{step}")?;
        }
        for conflict in &self.conflicts {
            writeln!(f, "{conflict}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
