//! What a host agent tells of findings, as a document of JSON.

use serde::{Deserialize, Serialize};

use super::{Finding, Leftover, Probe};

/// The answer to a question for findings: looked at anew for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingsView {
    /// Lowest layer first.
    pub findings: Vec<Finding>,
    /// Where the kernel would send packets.
    pub probes: Vec<Probe>,
    /// What can be removed by name.
    pub leftovers: Vec<Leftover>,
    /// What could not be looked at, and why.
    pub unseen: Vec<String>,
    /// Milliseconds that the look took.
    pub took_ms: u64,
}
