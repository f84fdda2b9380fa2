//! What PID 1 found and did, for the agent: one file on /run.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The outcome of one boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFacts {
    /// Everything that was tried, in order.
    pub steps: Vec<Step>,
    /// How the data disk came out; `None` when init did not get to it.
    pub data: Option<DataFact>,
    /// By how much init moved the clock forward, in nanoseconds.
    pub clock_step_ns: i64,
}

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Such as `mount /run`.
    pub name: String,
    /// `None` when it worked.
    pub error: Option<String>,
    /// Milliseconds since boot at its end.
    pub at_ms: u64,
}

/// The data disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFact {
    /// True when it is mounted.
    pub mounted: bool,
    /// A code for programs, such as `Formatted` or `Foreign`.
    pub reason: String,
    /// What was seen.
    pub evidence: String,
}

impl BootFacts {
    /// Reads the file that [`BootFacts::write`] wrote.
    ///
    /// # Errors
    /// The system's own, or `InvalidData`.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// Writes the file whole or not at all.
    ///
    /// # Errors
    /// The system's own.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(new, path)
    }

    /// The steps that failed, as one line.
    #[must_use]
    pub fn failures(&self) -> Option<String> {
        let failed: Vec<String> = self
            .steps
            .iter()
            .filter_map(|step| step.error.as_ref().map(|error| format!("{}: {error}", step.name)))
            .collect();
        (!failed.is_empty()).then(|| failed.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_survive_the_file_and_name_what_failed() {
        let step = |name: &str, error: Option<&str>| Step {
            name: name.into(),
            error: error.map(Into::into),
            at_ms: 1,
        };
        let facts = BootFacts {
            steps: vec![step("mount /run", None), step("module tun", Some("ENOENT"))],
            ..BootFacts::default()
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("facts.json");
        facts.write(&path).unwrap();
        assert_eq!(BootFacts::read(&path).unwrap(), facts);
        assert_eq!(facts.failures().as_deref(), Some("module tun: ENOENT"));
    }
}
