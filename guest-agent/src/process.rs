//! A service's processes: one cgroup, one main process; adopted, never started twice.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use std::{fs, io};

use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::cgroup::Cgroup;
use crate::{clock, exits, log, places, spawn};

/// What is left in a cgroup after its main process gets this long to end by itself.
const LEFTOVERS: Duration = Duration::from_secs(2);
/// A killed cgroup must be empty within this time.
const KILLED: Duration = Duration::from_secs(5);
/// PID 1 writes its record of an ended process within this time.
const RECORD: Duration = Duration::from_secs(2);
/// Between looks at something that does not tell of its changes.
const LOOK: Duration = Duration::from_millis(20);

/// A running service.
#[derive(Debug)]
pub struct Running {
    main: Main,
    cgroup: Cgroup,
}

#[derive(Debug)]
enum Main {
    /// We started it.
    Child(Child),
    /// An agent before us did; PID 1 reaps it.
    Adopted {
        pid: u32,
        /// Readable when it has ended; it cannot become another process. A pipe in name only.
        ended: Receiver,
        since_ms: u64,
    },
}

/// Takes over what already runs in the cgroup; processes without their main process are ended.
///
/// # Errors
/// The system's own, or that the leftovers do not end.
pub async fn adopt(cgroup: &Cgroup, main: Option<u32>) -> io::Result<Option<Running>> {
    if cgroup.members()?.is_empty() {
        return Ok(None);
    }
    if let Some(pid) = main
        && let Some(ended) = watch(pid)?
        // After the descriptor is there: what is a member now is what it stands for.
        && cgroup.members()?.contains(&pid)
    {
        log::line("adopted", &[("cgroup", &cgroup.path().display()), ("pid", &pid)]);
        let since_ms = clock::boot_ms();
        return Ok(Some(Running {
            main: Main::Adopted { pid, ended, since_ms },
            cgroup: cgroup.clone(),
        }));
    }
    empty(cgroup, Duration::ZERO).await?;
    Ok(None)
}

/// A descriptor that tells the end of a process; `None` when it has ended.
fn watch(pid: u32) -> io::Result<Option<Receiver>> {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return Ok(None);
    };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => Receiver::from_file_unchecked(File::from(fd)).map(Some),
        // Gone, or not the leader of a process (EINVAL, since 6.9 ENOENT).
        Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Starts the program in its cgroup as a user; it speaks on the console unless it is given another place.
///
/// # Errors
/// The system's own.
pub fn start(
    cgroup: &Cgroup,
    user: &str,
    command: &(PathBuf, Vec<OsString>),
    output: Option<File>,
) -> io::Result<Running> {
    let mut start = Command::new(places::GUEST);
    start
        .args(spawn::arguments(cgroup.path(), user, &command.0, &command.1))
        .stdin(Stdio::null());
    if let Some(output) = output {
        start.stdout(output.try_clone()?).stderr(output);
    }
    let child = start.spawn()?;
    Ok(Running {
        main: Main::Child(child),
        cgroup: cgroup.clone(),
    })
}

impl Running {
    /// The main process, while it was not waited for.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        match &self.main {
            Main::Child(child) => child.id(),
            Main::Adopted { pid, .. } => Some(*pid),
        }
    }

    /// Waits for the end of the main process and then of everything in the cgroup; how it ended, in words.
    pub async fn ended(self) -> String {
        let how = match self.main {
            Main::Child(mut child) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("its end was not seen: {error}"),
            },
            Main::Adopted { pid, ended, since_ms } => match ended.readable().await {
                Ok(()) => recorded(Path::new(places::EXITS), pid, since_ms).await,
                Err(error) => format!("its end was not seen: {error}"),
            },
        };
        match empty(&self.cgroup, LEFTOVERS).await {
            Ok(()) => how,
            Err(error) => format!("{how}; {error}"),
        }
    }
}

/// How a process ended after `since_ms`, by PID 1's record, which may come a moment later.
async fn recorded(file: &Path, pid: u32, since_ms: u64) -> String {
    let begun = Instant::now();
    loop {
        let bytes = fs::read(file).unwrap_or_default();
        match exits::find(&bytes, pid).filter(|exit| exit.at_ms >= since_ms) {
            Some(exit) => return exit.describe(),
            None if begun.elapsed() >= RECORD => return "exit status unknown".to_owned(),
            None => sleep(LOOK).await,
        }
    }
}

/// How the main process ended while no agent was there to see it.
#[must_use]
pub fn missed(file: &Path, main: u32, agent_since_ms: u64) -> Option<String> {
    let exit = exits::find(&fs::read(file).ok()?, main)?;
    (exit.at_ms < agent_since_ms).then(|| exit.describe())
}

/// Asks the main process to end by its own signal; without one everything in the cgroup is asked by SIGTERM.
pub fn stop(cgroup: &Cgroup, main: Option<u32>, by: Signal) {
    let members = cgroup.members().unwrap_or_default();
    match main.filter(|pid| members.contains(pid)) {
        Some(pid) => signal(pid, by),
        None => members.iter().for_each(|pid| signal(*pid, Signal::SIGTERM)),
    }
}

/// Ends everything in the cgroup now.
pub fn kill(cgroup: &Cgroup) {
    if let Err(error) = cgroup.kill() {
        let path = cgroup.path().display();
        log::line("cannot kill", &[("cgroup", &path), ("error", &error)]);
    }
}

async fn empty(cgroup: &Cgroup, grace: Duration) -> io::Result<()> {
    let begun = Instant::now();
    let mut killed = false;
    while !cgroup.members()?.is_empty() {
        if !killed && begun.elapsed() >= grace {
            kill(cgroup);
            killed = true;
        }
        if begun.elapsed() >= grace + KILLED {
            let path = cgroup.path().display();
            return Err(io::Error::other(format!("{path} does not become empty")));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = send_signal(Pid::from_raw(pid), signal); // ESRCH: it has ended meanwhile
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exits::{Exit, Exits};

    fn cgroup(members: &str) -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("cgroup.procs"), members).unwrap();
        let cgroup = Cgroup::at(directory.path());
        (directory, cgroup)
    }

    #[tokio::test]
    async fn an_empty_or_missing_cgroup_has_nothing_to_adopt() {
        let (directory, empty) = cgroup("");
        assert!(adopt(&empty, Some(1)).await.unwrap().is_none());
        let missing = Cgroup::at(directory.path().join("none"));
        assert!(adopt(&missing, Some(1)).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_main_process_in_its_cgroup_is_adopted_and_its_end_is_seen_at_once() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = child.id().unwrap();
        let (directory, cgroup) = cgroup(&format!("1\n{pid}\n"));
        let running = adopt(&cgroup, Some(pid)).await.unwrap().unwrap();
        let Main::Adopted { ended, since_ms, .. } = running.main else {
            panic!("not adopted")
        };
        assert!(
            tokio::time::timeout(Duration::from_millis(50), ended.readable())
                .await
                .is_err(),
            "it runs"
        );
        child.start_kill().unwrap();
        ended.readable().await.unwrap();

        let file = directory.path().join("exits");
        let mut exits = Exits::default();
        let exit = |at_ms, status| Exit { pid, status, at_ms };
        exits.push(exit(since_ms - 1, 3)); // the process that had this number before
        fs::write(&file, exits.encode()).unwrap();
        let late = async {
            sleep(2 * LOOK).await;
            exits.push(exit(since_ms, 137));
            fs::write(&file, exits.encode()).unwrap();
        };
        let (how, ()) = tokio::join!(recorded(&file, pid, since_ms), late);
        assert_eq!(how, "signal 9");
        assert_eq!(missed(&file, pid, since_ms + 1).as_deref(), Some("signal 9"));
        assert_eq!(missed(&file, pid, since_ms), None, "this one was watched");
        assert_eq!(missed(&file, pid + 1, u64::MAX), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_that_does_not_come_is_not_waited_for_for_ever() {
        let (directory, _) = cgroup("");
        let how = recorded(&directory.path().join("none"), 1, 0).await;
        assert_eq!(how, "exit status unknown");
    }

    #[tokio::test(start_paused = true)]
    async fn leftovers_without_a_main_process_are_killed_and_not_started_beside() {
        // No process has a number this high (PID_MAX_LIMIT is 4,194,304).
        for main in [None, Some(78), Some(u32::MAX), Some(4_194_304)] {
            let (directory, cgroup) = cgroup("77\n4194304\n");
            // Nothing really ends in this cgroup, so it is an error, and the kill was asked for.
            assert!(adopt(&cgroup, main).await.is_err(), "{main:?}");
            let asked = fs::read_to_string(directory.path().join("cgroup.kill")).unwrap();
            assert_eq!(asked, "1");
        }
    }
}
