//! The record of a pasta that runs: written by itself before it is one, so that no kill of anybody can lose it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::process::{self, Process};

/// What is kept of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its process id.
    pub(super) pid: u32,
    /// When that process began, in clock ticks since boot (proc_pid_stat(5)).
    pub(super) started: u64,
    /// What it is attached to, as the agent that started it says it.
    pub(super) attachment: String,
}

impl Record {
    /// That of this very process.
    ///
    /// # Errors
    /// When the process cannot be looked at.
    pub(super) fn of_ourselves(attachment: String) -> io::Result<Self> {
        let pid = std::process::id();
        let started = process::started(pid).ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            pid,
            started,
            attachment,
        })
    }

    /// Reads one; what cannot be read is as good as none.
    pub(super) fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }

    /// The process, if it still runs. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's own.
    pub(super) fn process(&self) -> io::Result<Option<Process>> {
        Process::of_record(self.pid, self.started)
    }

    /// Whether the process runs; for who has no runtime to hold it with.
    fn runs(&self) -> bool {
        process::started(self.pid) == Some(self.started) && process::state(self.pid) != 'Z'
    }

    /// Writes it where none is; one of a process that is gone is replaced.
    ///
    /// # Errors
    /// `AlreadyExists` while another one runs; the system's own.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(other) = Self::read(path)
            && other.runs()
        {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("process {} is attached already", other.pid),
            ));
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", self.pid));
        let written = self.write_new(beside.as_ref()).and_then(|()| {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            fs::hard_link(&beside, path) // fails where somebody else was quicker
        });
        let _ = fs::remove_file(&beside); // it is gone, or was never there
        written
    }

    fn write_new(&self, path: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        file.write_all(&serde_json::to_vec(self)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_names_a_process_that_runs_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pasta.json");
        assert_eq!(Record::read(&path), None);
        fs::write(&path, "\u{0}{").unwrap();
        assert_eq!(Record::read(&path), None);
        let ours = Record::of_ourselves("a".to_owned()).unwrap();
        ours.write(&path).unwrap();
        assert_eq!(Record::read(&path), Some(ours.clone()));
        let taken = ours.write(&path).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists, "{taken}");
        assert_eq!(ours.process().unwrap().unwrap().pid, ours.pid);
        // The same number, and another process.
        let gone = Record {
            started: ours.started + 1,
            ..ours.clone()
        };
        fs::write(&path, serde_json::to_vec(&gone).unwrap()).unwrap();
        assert!(gone.process().unwrap().is_none());
        ours.write(&path).unwrap();
        assert_eq!(Record::read(&path), Some(ours));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
