//! What a host agent tells of its network, as a document of JSON.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sovereign_protocol::name::Name;

use crate::observed::Observed;
use crate::plan::{Conflict, Part, Plan, Step, plan};
use crate::sysctl::Sysctl;
use crate::wanted::{NetworkSpec, Prior, Wanted, WantedError};

/// The network of an instance as its host agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkView {
    /// Whether there is one.
    pub mode: NetworkMode,
    /// What was last seen in its namespace.
    pub observed: Observed,
    /// Guests whose VMM holds a card.
    pub cards: BTreeSet<Name>,
}

/// The namespace that somebody is in, as a plan for it needs it: seen without a host agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLook {
    /// What is there, with the switches that the plan is about.
    pub observed: Observed,
    /// The switches that a host agent changed, and what they were.
    pub switched: Vec<(Sysctl, Prior)>,
    /// How the packet filter is.
    pub filter: FilterLook,
}

impl NetworkLook {
    /// What a host agent would do that begins here and wants this; without a spec, one that takes all of the instance's
    /// away.
    ///
    /// # Errors
    /// When no network can be made of the spec.
    pub fn plan(&self, instance: &Name, spec: Option<&NetworkSpec>) -> Result<Plan, WantedError> {
        let switched = self.switched.iter().cloned().collect();
        let wanted = match spec {
            Some(spec) => Wanted::of(instance, spec, &switched, &self.observed)?,
            None => Wanted::nothing(instance, &switched, &self.observed),
        };
        let mut todo = plan(&wanted, &self.observed);
        let tag = wanted.mark.prefix;
        match &self.filter {
            FilterLook::AsWanted => {}
            FilterLook::Differs if wanted.filter.is_some() => {
                todo.steps.insert(Step::SetFilter { tag });
            }
            FilterLook::Differs => drop(todo.steps.insert(Step::RemoveFilter { tag })),
            FilterLook::Blocked(evidence) => {
                todo.conflicts.insert(Conflict {
                    part: Part::Filter,
                    on: "packet filter".to_owned(),
                    evidence: evidence.clone(),
                });
            }
        }
        Ok(todo)
    }
}

/// How a packet filter is beside what is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterLook {
    /// As asked for.
    AsWanted,
    /// Otherwise, or nobody could look.
    Differs,
    /// Something that is not ours is in its place.
    Blocked(String),
}

/// Whether there is a network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Nobody wanted one yet, or it is being tried.
    #[default]
    Undecided,
    /// There is none, for this reason.
    Off(String),
    /// A namespace of our own.
    Private,
    /// The namespace that the host agent is in.
    Host,
}

impl NetworkMode {
    /// Whether there is a network.
    #[must_use]
    pub fn is_there(&self) -> bool {
        matches!(self, Self::Private | Self::Host)
    }
}
