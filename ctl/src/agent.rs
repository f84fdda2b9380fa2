//! The host agent's process: found, started, awaited. Everything it does is its own business.

use std::cmp::Ordering;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sovereign_protocol::layout::Layout;
use tokio::net::UnixStream;

use crate::context::{Context, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::{systemd, unit};

/// A fresh host agent answers within this time, or something is wrong with it.
const START: Duration = Duration::from_secs(10);
/// After its child ended, a losing `up` still gives the winner's agent this long to answer.
const LOST_RACE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(10);
/// What is shown of its log when it does not come up.
const LOG_TAIL_BYTES: u64 = 4 << 10;
const LOG_TAIL_LINES: usize = 8;

/// The binaries that belong together; they lie beside `sovereign`.
#[derive(Debug, Clone)]
pub(crate) struct Binaries {
    /// The host agent.
    pub(crate) host: PathBuf,
    /// PID 1 of a guest.
    pub(crate) init: PathBuf,
    /// The guest agent.
    pub(crate) guest: PathBuf,
}

impl Binaries {
    /// Looks beside the running executable.
    ///
    /// # Errors
    /// `Configuration`, naming each one that is missing.
    pub(crate) fn find() -> Result<Self, CommandError> {
        let own = std::env::current_exe()
            .and_then(|path| path.canonicalize())
            .map_err(|error| {
                CommandError::new(
                    Kind::Internal,
                    "NoExecutable",
                    "cannot find the running executable",
                )
                .because(error)
            })?;
        Self::beside(own.parent().unwrap_or(Path::new("/")))
    }

    fn beside(dir: &Path) -> Result<Self, CommandError> {
        let [host, init, guest] =
            ["sovereign-host", "sovereign-init", "sovereign-guest"].map(|name| dir.join(name));
        let missing: Vec<String> = [&host, &init, &guest]
            .into_iter()
            .filter(|path| !path.is_file())
            .map(|path| path.display().to_string())
            .collect();
        if missing.is_empty() {
            return Ok(Self { host, init, guest });
        }
        let message = format!("not there: {}", missing.join(", "));
        Err(CommandError::new(Kind::Configuration, "MissingBinary", message).next("make build"))
    }
}

/// How a running host agent stands to the binaries here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Current,
    /// It is older, or its program was replaced since it started.
    Outdated,
    Newer,
}

fn standing(theirs: &str, ours: &str, replaced: bool) -> Standing {
    let parts =
        |version: &str| -> Vec<u64> { version.split('.').map(|part| part.parse().unwrap_or(0)).collect() };
    match parts(theirs).cmp(&parts(ours)) {
        Ordering::Less => Standing::Outdated,
        Ordering::Greater => Standing::Newer,
        Ordering::Equal if replaced => Standing::Outdated,
        Ordering::Equal => Standing::Current,
    }
}

async fn compared(layout: &Layout, binaries: &Binaries, link: &Link) -> (Standing, Option<Process>) {
    let process = Process::listening(layout).await;
    let replaced = process
        .as_ref()
        .is_some_and(|process| process.was_replaced(&binaries.host));
    let standing = standing(&link.peer_agent, env!("CARGO_PKG_VERSION"), replaced);
    (standing, process)
}

/// True when `up` would replace the agent at the other end of `link`.
pub(crate) async fn is_outdated(layout: &Layout, binaries: &Binaries, link: &Link) -> bool {
    matches!(
        compared(layout, binaries, link).await,
        (Standing::Outdated, Some(_))
    )
}

/// As [`ensure`], and replaces an agent that is older than this program; guests run on and are adopted.
///
/// # Errors
/// As [`ensure`]; `Refused` when the running agent is newer.
pub(crate) async fn ensure_current(
    context: &Context,
    binaries: &Binaries,
) -> Result<(Link, bool), CommandError> {
    let layout = &context.layout;
    let Some(link) = Link::connect_if_running(layout).await? else {
        return ensure(context, binaries).await;
    };
    let ours = env!("CARGO_PKG_VERSION");
    let theirs = escaped(&link.peer_agent);
    match compared(layout, binaries, &link).await {
        (Standing::Current, _) | (Standing::Outdated, None) => Ok((link, false)),
        (Standing::Newer, _) => {
            let message = format!("the running host agent is version {theirs}, this is {ours}");
            Err(CommandError::new(Kind::Refused, "NewerAgent", message).next("update this installation"))
        }
        (Standing::Outdated, Some(process)) => {
            talk(&format!(
                "host agent {theirs} (pid {}) is replaced; guests run on",
                process.pid
            ));
            drop(link);
            process.end(layout).await?;
            ensure(context, binaries).await
        }
    }
}

/// Connects to the host agent, and starts it first if none answers: an installed one by systemd. True when it was
/// started.
///
/// # Errors
/// As [`Link::connect`]; `Unreachable` with the end of its log when it does not come up.
pub(crate) async fn ensure(context: &Context, binaries: &Binaries) -> Result<(Link, bool), CommandError> {
    let layout = &context.layout;
    if let Some(link) = Link::connect_if_running(layout).await? {
        return Ok((link, false));
    }
    let log_start = fs::metadata(layout.log()).map_or(0, |log| log.len());
    let mut child = match unit::is_installed(&context.environment, layout) {
        true => {
            systemd::tell(&context.environment, &["start", &unit::name(layout)])?;
            None
        }
        false => Some(spawn(layout, &binaries.host)?),
    };
    let mut limit = Instant::now() + START;
    let mut ended = None;
    loop {
        if let Some(link) = Link::connect_if_running(layout).await? {
            let Some(child) = &child else {
                return Ok((link, true));
            };
            let listening = Process::listening(layout).await;
            let ours = listening.is_some_and(|process| process.pid.unsigned_abs() == child.id());
            return Ok((link, ours)); // another `up` may have been quicker
        }
        if ended.is_none()
            && let Some(child) = &mut child
            && let Ok(Some(status)) = child.try_wait()
        {
            ended = Some(status);
            limit = Instant::now() + LOST_RACE;
        }
        if Instant::now() >= limit {
            let how = ended.map_or("did not answer".to_owned(), |status| format!("ended ({status})"));
            let message = format!("the host agent {how}; {}", log_tail(&layout.log(), log_start));
            return Err(CommandError::new(Kind::Unreachable, "AgentDidNotStart", message)
                .next(format!("less {}", layout.log().display())));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn spawn(layout: &Layout, host: &Path) -> Result<Child, CommandError> {
    let failed = |what: &str, path: &Path, error: std::io::Error| {
        let message = format!("cannot {what} {}", path.display());
        CommandError::new(Kind::Internal, "AgentDidNotStart", message).because(error)
    };
    for dir in [&layout.state, &layout.run] {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|error| failed("make the directory", dir, error))?;
    }
    let path = layout.log();
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path);
    let log = log.map_err(|error| failed("open", &path, error))?;
    let second = log.try_clone().map_err(|error| failed("open", &path, error))?;
    Command::new(host)
        .args(["run", "--detach", "--instance", layout.instance.as_str()])
        .arg("--run-dir")
        .arg(&layout.run)
        .arg("--state-dir")
        .arg(&layout.state)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(second)
        .spawn()
        .map_err(|error| failed("start", host, error))
}

/// The last lines that were written after `start`.
fn log_tail(path: &Path, start: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let from = length.saturating_sub(LOG_TAIL_BYTES).max(start.min(length));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    if lines.is_empty() {
        return format!("its log {} says nothing", path.display());
    }
    let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    format!(
        "its log {} ends with:\n    {}",
        path.display(),
        escaped(&tail.join("\n")).replace('\n', "\n    ")
    )
}

/// Of proc_pid_stat(5) and proc_uptime(5): the time since a process began.
fn age(stat: &str, uptime: &str, ticks_per_second: u64) -> Option<Duration> {
    // The name in parentheses may hold anything; the start is the 22nd field, the 20th after it.
    let (_, after_name) = stat.rsplit_once(") ")?;
    let started: u64 = after_name.split(' ').nth(19)?.parse().ok()?;
    let uptime: f64 = uptime.split(' ').next()?.parse().ok()?;
    let age = uptime - started as f64 / ticks_per_second as f64;
    Duration::try_from_secs_f64(age.max(0.0)).ok()
}

/// A running host agent, held by its pidfd, so that no other process can be taken for it.
#[derive(Debug)]
pub(crate) struct Process {
    pidfd: OwnedFd,
    /// Its process id.
    pub(crate) pid: i32,
}

impl Process {
    /// The process at the other end of the control socket; `None` when nobody listens.
    pub(crate) async fn listening(layout: &Layout) -> Option<Self> {
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let stream = UnixStream::connect(layout.control()).await.ok()?;
        let pid = Pid::from_raw(stream.peer_cred().ok()?.pid()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self {
            pidfd,
            pid: pid.as_raw_nonzero().get(),
        })
    }

    /// True when the file it was started from is no longer the one at `program`.
    fn was_replaced(&self, program: &Path) -> bool {
        let runs = fs::read_link(format!("/proc/{}/exe", self.pid)).unwrap_or_default();
        let mut gone = program.canonicalize().unwrap_or_default().into_os_string();
        gone.push(" (deleted)"); // proc_pid_exe(5)
        runs.as_os_str() == gone
    }

    /// Ends it and sees it gone; its guests run on.
    ///
    /// # Errors
    /// `Refused` when it cannot be told to, `TimedOut` when it does not.
    pub(crate) async fn end(&self, layout: &Layout) -> Result<(), CommandError> {
        self.terminate()?;
        if tokio::time::timeout(START, self.ended()).await.is_err() {
            let message = format!("the host agent (pid {}) does not end", self.pid);
            return Err(CommandError::new(Kind::TimedOut, "NotEnded", message)
                .next(format!("less {}", layout.log().display())));
        }
        Ok(())
    }

    fn terminate(&self) -> Result<(), CommandError> {
        use rustix::process::{Signal, pidfd_send_signal};
        pidfd_send_signal(&self.pidfd, Signal::TERM).map_err(|error| {
            let message = format!("cannot end the host agent (pid {})", self.pid);
            CommandError::new(Kind::Refused, "NotEnded", message).because(error)
        })
    }

    /// How long it has been running; `None` when it is gone.
    pub(crate) fn age(&self) -> Option<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let uptime = fs::read_to_string("/proc/uptime").ok()?;
        age(&stat, &uptime, rustix::param::clock_ticks_per_second())
    }

    /// Waits for its end, by looking: tokio's AsyncFd cannot be had without `unsafe`. Cancel safe.
    pub(crate) async fn ended(&self) {
        while !self.has_ended() {
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A pidfd reads as soon as its process has ended.
    fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_binaries_are_all_named_with_the_command_that_builds_them() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("sovereign-init"), "").unwrap();
        let error = Binaries::beside(dir.path()).unwrap_err();
        let text = error.human();
        assert!(
            text.contains("sovereign-host")
                && text.contains("sovereign-guest")
                && !text.contains("sovereign-init")
        );
        assert!(text.ends_with("next: make build\n"));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_agent_that_ends_at_once_is_reported_with_the_end_of_its_log() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let context = Context::in_dir(dir.path());
        let layout = &context.layout;
        let host = dir.path().join("sovereign-host");
        fs::write(
            &host,
            "#!/bin/sh\necho \"args: $*\"\nprintf 'cannot \\033[31mstart\\n' >&2\nexit 9\n",
        )
        .unwrap();
        fs::set_permissions(&host, fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(&layout.state).unwrap();
        fs::write(layout.log(), "old line\n").unwrap();
        let binaries = Binaries {
            init: host.clone(),
            guest: host.clone(),
            host,
        };
        let error = ensure(&context, &binaries).await.err().unwrap();
        let text = error.human();
        assert_eq!(error.kind, Kind::Unreachable);
        assert!(
            text.contains("exit status: 9") && text.contains("cannot \\x1b[31mstart"),
            "{text}"
        );
        assert!(
            text.contains("args: run --detach --instance t --run-dir") && !text.contains("old line"),
            "{text}"
        );
    }

    #[test]
    fn the_age_of_a_process_whatever_its_name() {
        let fields: Vec<String> = (3..30)
            .map(|field| {
                if field == 22 {
                    "150".to_owned()
                } else {
                    "7".to_owned()
                }
            })
            .collect();
        let stat = format!("12 (a ) b) {}", fields.join(" "));
        assert_eq!(age(&stat, "10.50 3.00\n", 100), Some(Duration::from_secs(9)));
        assert_eq!(
            age(&stat, "1.0 0", 100),
            Some(Duration::ZERO),
            "clocks are read one after the other"
        );
        assert_eq!(age("12 (short) S", "10.50 3.00\n", 100), None);
    }

    #[test]
    fn an_older_or_replaced_agent_is_outdated_and_a_newer_one_is_not_touched() {
        for (theirs, ours, replaced, expected) in [
            ("0.1.0", "0.1.0", false, Standing::Current),
            ("0.1.0", "0.1.0", true, Standing::Outdated),
            ("0.0.9", "0.1.0", false, Standing::Outdated),
            ("0.9.0", "0.10.0", false, Standing::Outdated),
            ("1.0.0", "0.10.0", true, Standing::Newer),
            ("nonsense", "0.1.0", false, Standing::Outdated),
        ] {
            assert_eq!(standing(theirs, ours, replaced), expected, "{theirs} {ours}");
        }
    }
}
