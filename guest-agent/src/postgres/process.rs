//! A service's processes: one cgroup, one main process; adopted, never started twice.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::{exits, log, places, spawn};

/// Between looks at an adopted process, whose end is not told to us.
const LOOK: Duration = Duration::from_millis(250);
/// What is left in a cgroup after its main process gets this long to end by itself.
const LEFTOVERS: Duration = Duration::from_secs(2);
/// A killed cgroup must be empty within this time.
const KILLED: Duration = Duration::from_secs(5);

/// A running service.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    pid: u32,
    cgroup: PathBuf,
}

/// Takes over what already runs in the cgroup; processes without their main process are ended.
///
/// # Errors
/// The system's own, or that the leftovers do not end.
pub async fn adopt(cgroup: &Path, main: Option<u32>) -> io::Result<Option<Running>> {
    let members = members(cgroup)?;
    if members.is_empty() {
        return Ok(None);
    }
    if let Some(pid) = main.filter(|pid| members.contains(pid)) {
        log::line("adopted", &[("cgroup", &cgroup.display()), ("pid", &pid)]);
        return Ok(Some(Running {
            child: None,
            pid,
            cgroup: cgroup.to_owned(),
        }));
    }
    empty(cgroup, Duration::ZERO).await?;
    Ok(None)
}

/// Starts the program in its cgroup.
///
/// # Errors
/// The system's own.
pub fn start(cgroup: &Path, command: &(PathBuf, Vec<OsString>)) -> io::Result<Running> {
    fs::create_dir_all(cgroup)?;
    let child = Command::new(places::GUEST)
        .args(spawn::arguments(
            cgroup,
            super::cluster::USER,
            &command.0,
            &command.1,
        ))
        .stdin(Stdio::null())
        .spawn()?;
    let pid = child.id().unwrap_or(0);
    Ok(Running {
        child: Some(child),
        pid,
        cgroup: cgroup.to_owned(),
    })
}

impl Running {
    /// Waits for the end of the main process and then of everything in the cgroup; how it ended, in words.
    pub async fn ended(mut self) -> String {
        let how = match &mut self.child {
            Some(child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("its end was not seen: {error}"),
            },
            None => self.adopted_end().await,
        };
        match empty(&self.cgroup, LEFTOVERS).await {
            Ok(()) => how,
            Err(error) => format!("{how}; {error}"),
        }
    }

    async fn adopted_end(&self) -> String {
        while members(&self.cgroup).is_ok_and(|members| members.contains(&self.pid)) {
            sleep(LOOK).await;
        }
        sleep(LOOK).await; // PID 1 writes its record
        let file = fs::read(places::EXITS).unwrap_or_default();
        match exits::find(&file, self.pid) {
            Some(exit) => format!("exit status {}", exit.status),
            None => "exit status unknown".to_owned(),
        }
    }
}

/// Asks the main process for a fast stop; without one everything in the cgroup is asked to end.
pub fn stop(cgroup: &Path, main: &Option<u32>) {
    let members = members(cgroup).unwrap_or_default();
    match main.filter(|pid| members.contains(pid)) {
        Some(pid) => signal(pid, Signal::SIGINT),
        None => members.iter().for_each(|pid| signal(*pid, Signal::SIGTERM)),
    }
}

/// Ends everything in the cgroup now.
pub fn kill(cgroup: &Path) {
    if let Err(error) = fs::write(cgroup.join("cgroup.kill"), "1") {
        log::line("cannot kill", &[("cgroup", &cgroup.display()), ("error", &error)]);
    }
}

async fn empty(cgroup: &Path, grace: Duration) -> io::Result<()> {
    let begun = Instant::now();
    let mut killed = false;
    while !members(cgroup)?.is_empty() {
        if !killed && begun.elapsed() >= grace {
            kill(cgroup);
            killed = true;
        }
        if begun.elapsed() >= grace + KILLED {
            return Err(io::Error::other(format!(
                "{} does not become empty",
                cgroup.display()
            )));
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn members(cgroup: &Path) -> io::Result<Vec<u32>> {
    match fs::read_to_string(cgroup.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = send_signal(Pid::from_raw(pid), signal); // ESRCH: it has ended meanwhile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_empty_or_missing_cgroup_has_nothing_to_adopt() {
        let directory = tempfile::tempdir().unwrap();
        assert!(
            adopt(&directory.path().join("none"), Some(1))
                .await
                .unwrap()
                .is_none()
        );
        fs::write(directory.path().join("cgroup.procs"), "").unwrap();
        assert!(adopt(directory.path(), Some(1)).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_main_process_in_its_cgroup_is_adopted_and_its_end_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let procs = directory.path().join("cgroup.procs");
        fs::write(&procs, "77\n78\n").unwrap();
        let running = adopt(directory.path(), Some(78)).await.unwrap().unwrap();
        assert_eq!(running.pid, 78);
        fs::write(&procs, "").unwrap();
        assert_eq!(running.ended().await, "exit status unknown");
    }

    #[tokio::test(start_paused = true)]
    async fn leftovers_without_a_main_process_are_killed_and_not_started_beside() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.procs"), "77\n").unwrap();
        // Nothing really ends in this cgroup, so it is an error, and the kill was asked for.
        assert!(adopt(directory.path(), Some(78)).await.is_err());
        assert_eq!(
            fs::read_to_string(directory.path().join("cgroup.kill")).unwrap(),
            "1"
        );
    }
}
