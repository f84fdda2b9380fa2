//! The two Debian archives that packages come from.

use serde::{Deserialize, Serialize};

/// An archive: its own host path, signing keys and suites.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Archive {
    /// The distribution with its point-release updates.
    Main,
    /// Security updates.
    Security,
}

impl Archive {
    /// The suites of it that are merged for a release, by code name.
    pub(crate) fn suites(self, release: &str) -> Vec<String> {
        match self {
            Self::Main => vec![release.to_owned(), format!("{release}-updates")],
            Self::Security => vec![format!("{release}-security")],
        }
    }
}
