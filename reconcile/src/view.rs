//! What a host agent tells of its network, as a document of JSON.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sovereign_protocol::name::Name;

use crate::observed::Observed;

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
