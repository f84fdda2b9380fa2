//! What others did to this host's network that harms guests: from a look at everything to findings. Pure.
//!
//! [`judge`] knows nothing but a [`Look`]: what was dumped, what the kernel answered to questions about packets
//! ([`probe`]), and foreign filters in words that can be followed (`chain`). One noun a file; each family is judged on
//! its own. Nothing foreign is ever changed because of a finding, unless somebody asks for a [`leftover`] by its name.

use serde::{Deserialize, Serialize};
use sovereign_protocol::condition::Layer;

use crate::family::Family;

mod address;
mod bridged;
mod carrier;
mod chain;
mod code;
mod drops;
mod ladder;
pub mod leftover;
mod look;
mod main_table;
mod mtu;
mod packet;
pub mod probe;
pub mod question;
mod reverse_path;
mod saved;
mod tables;
mod view;
mod way;

#[cfg(test)]
mod tests;

pub use code::Code;
pub use leftover::{Leftover, LeftoverName};
pub use look::{Cards, Look, Networked, Saved, Switches};
pub use probe::Probe;
pub use view::FindingsView;

/// Something that harms guests' traffic, or would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Where it is broken.
    pub layer: Layer,
    /// Its code.
    pub code: Code,
    /// The family that it is about; `None` for all.
    pub family: Option<Family>,
    /// What it is about, such as a link or a chain.
    pub subject: String,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What was seen, most telling first; never empty.
    pub evidence: Vec<String>,
    /// A command that changes nothing and could contradict it.
    pub check: String,
    /// What the command shows if the finding is wrong.
    pub wrong_if: String,
    /// The next command to run.
    pub fix: String,
    /// The leftover that goes when it is asked for by this name.
    pub leftover: Option<LeftoverName>,
    /// What the fix may cost.
    pub risk: String,
    /// Guests' packets are surely stopped by it.
    pub stops: bool,
}

/// Lines of evidence that a finding keeps.
const EVIDENCE: usize = 16;

/// All findings, lowest layer first.
#[must_use]
pub fn judge(look: &Look) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(carrier::findings(look));
    findings.extend(address::findings(look));
    findings.extend(main_table::findings(look));
    findings.extend(reverse_path::findings(look));
    findings.extend(mtu::findings(look));
    findings.extend(ladder::findings(look));
    findings.extend(way::findings(look, &findings));
    findings.extend(drops::findings(look));
    findings.extend(bridged::findings(look));
    findings.extend(saved::findings(look));
    for finding in &mut findings {
        finding.evidence.truncate(EVIDENCE);
    }
    findings.sort_by(|a, b| {
        (a.layer, a.code, a.family, &a.subject).cmp(&(b.layer, b.code, b.family, &b.subject))
    });
    findings
}

/// `IPv4: `, for a sentence's begin or a subject.
fn of_family(family: Family, text: &str) -> String {
    format!("{family} {text}")
}
