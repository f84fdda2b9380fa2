//! All that a diagnosis stands on.

use std::collections::BTreeSet;
use std::path::PathBuf;

use sovereign_protocol::inspection::{GuestSeen, Inspection};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::record::Record;
use sovereign_protocol::status::{GuestStatus, StatusReport};
use sovereign_reconcile::finding::FindingsView;

/// What was gathered, all within the last seconds.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// The instance and its files.
    pub(crate) layout: Layout,
    /// How `sovereign` is called for this instance, with its flags.
    pub(crate) sovereign: String,
    /// RFC 3339 UTC of the end of the gathering.
    pub(crate) at: String,
    /// What is wanted.
    pub(crate) configuration: Configuration,
    /// What the host agent says.
    pub(crate) agent: Agent,
    /// What shows without it, or why nothing does.
    pub(crate) inspection: Result<Inspection, Failure>,
    /// What the host agent found that others did to the network.
    pub(crate) network: Result<FindingsView, Failure>,
    /// The last ends of virtual machines in the host's journal, oldest first, with their age in milliseconds.
    pub(crate) ends: Vec<(Record, u64)>,
}

/// The configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Configuration {
    /// It is valid.
    Valid {
        /// Its file.
        path: PathBuf,
        /// Its guests.
        guests: BTreeSet<Name>,
    },
    /// It is missing or cannot be used.
    Unusable {
        /// Its file, if there is one.
        path: Option<PathBuf>,
        /// Why.
        failure: Failure,
        /// The next command, by the error itself.
        next: String,
    },
}

/// The host agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Agent {
    /// It told what is true.
    Answered(StatusReport),
    /// Nobody listens at its socket.
    NotRunning,
    /// It could not be asked.
    Failed(Failure),
}

/// Something that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A code for programs.
    pub(crate) reason: String,
    /// What happened.
    pub(crate) evidence: String,
}

impl Facts {
    /// The report of a host agent that answered.
    pub(crate) fn status(&self) -> Option<&StatusReport> {
        match &self.agent {
            Agent::Answered(report) => Some(report),
            Agent::NotRunning | Agent::Failed(_) => None,
        }
    }

    /// A guest as the host agent reports it.
    pub(crate) fn reported(&self, guest: &Name) -> Option<&GuestStatus> {
        self.status()?.guests.iter().find(|status| status.name == *guest)
    }

    /// A guest as it was seen past the host agent.
    pub(crate) fn seen(&self, guest: &Name) -> Option<&GuestSeen> {
        let inspection = self.inspection.as_ref().ok()?;
        inspection.guests.iter().find(|seen| seen.name == *guest)
    }

    /// True when the configuration wants a guest, or cannot be asked.
    pub(crate) fn may_be_wanted(&self, guest: &Name) -> bool {
        match &self.configuration {
            Configuration::Valid { guests, .. } => guests.contains(guest),
            Configuration::Unusable { .. } => true,
        }
    }
}
