//! PID 1 after the boot: one loop that starts the agent, hears it, reaps, and powers off.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::reboot::{RebootMode, reboot, set_cad_enabled};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sync};

use super::watchdog::{Turn, Watchdog};
use crate::exits::{Exit, Exits};
use crate::handover::{self, Handover};
use crate::{clock, log, places};

/// After a signal to PID 1 the agent has this long to stop its services.
const SERVICES_MS: u64 = 40_000;
/// Everything left gets this long between SIGTERM and SIGKILL.
const TERM_MS: u64 = 5_000;
/// No wait is longer than this.
const LONGEST_WAIT_MS: u64 = 60_000;

struct Supervisor<'a> {
    handover: &'a Handover,
    watchdog: Watchdog,
    agent: Option<Agent>,
    exits: Exits,
    /// When to power off although the agent has not asked for it.
    deadline_ms: Option<u64>,
}

struct Agent {
    pid: Pid,
    socket: UnixStream,
}

/// Runs until power-off.
pub(super) fn run(handover: &Handover) -> ! {
    let signals = match listen_to_signals() {
        Ok(signals) => signals,
        Err(error) => super::fatal(&format!("no signals for PID 1: {error}")),
    };
    let mut supervisor = Supervisor {
        handover,
        watchdog: Watchdog::new(clock::boot_ms()),
        agent: None,
        exits: Exits::default(),
        deadline_ms: None,
    };
    while !supervisor.turn(&signals) {}
    power_off()
}

fn listen_to_signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR] {
        set.add(signal);
    }
    set.thread_block()?;
    let _ = set_cad_enabled(false); // Ctrl-Alt-Del becomes SIGINT
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

impl Supervisor<'_> {
    /// One turn; true when it is time to power off.
    fn turn(&mut self, signals: &SignalFd) -> bool {
        let now = clock::boot_ms();
        let wait = match self.watchdog.turn(now) {
            Turn::Start if self.deadline_ms.is_some() => LONGEST_WAIT_MS,
            Turn::Start => {
                self.start(now);
                0
            }
            Turn::Kill => {
                log::line("the agent was silent for too long and is killed", &[]);
                self.kill_agent();
                0
            }
            Turn::Sleep(left) => left,
        };
        let left = self
            .deadline_ms
            .map_or(LONGEST_WAIT_MS, |deadline| deadline.saturating_sub(now));
        self.wait(signals, wait.min(left).min(LONGEST_WAIT_MS));
        let asked = self.hear() | self.signalled(signals);
        self.reap();
        asked
            || self
                .deadline_ms
                .is_some_and(|deadline| clock::boot_ms() >= deadline)
    }

    fn start(&mut self, now: u64) {
        match spawn(self.handover) {
            Ok(agent) => {
                self.agent = Some(agent);
                self.watchdog.started(now);
            }
            Err(error) => {
                log::line(
                    "cannot start the agent",
                    &[("path", &places::GUEST), ("error", &error)],
                );
                self.watchdog.ended(now);
            }
        }
    }

    fn kill_agent(&mut self) {
        if let Some(agent) = &self.agent {
            let _ = kill(agent.pid, Signal::SIGKILL);
        }
        self.watchdog.heard(clock::boot_ms()); // its end follows as SIGCHLD
    }

    fn wait(&self, signals: &SignalFd, wait_ms: u64) {
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(agent) = &self.agent {
            fds.push(PollFd::new(agent.socket.as_fd(), PollFlags::POLLIN));
        }
        let timeout = u16::try_from(wait_ms.saturating_add(1)).unwrap_or(u16::MAX);
        let _ = poll(&mut fds, PollTimeout::from(timeout)); // EINTR is a wake-up too
    }

    /// Reads what the agent said; true when it asks for the power-off.
    fn hear(&mut self) -> bool {
        let Some(agent) = &mut self.agent else {
            return false;
        };
        let mut said = [0; 64];
        match agent.socket.read(&mut said) {
            Ok(0) => {
                // It closed its end: it is dying, or as good as dead.
                let _ = kill(agent.pid, Signal::SIGKILL);
                let _ = waitpid(agent.pid, None).map(|status| self.exits.push(exit_of(status)));
                log::line("the agent ended", &[]);
                self.agent = None;
                self.watchdog.ended(clock::boot_ms());
                false
            }
            Ok(length) => {
                self.watchdog.heard(clock::boot_ms());
                said[..length].contains(&handover::POWER_OFF)
            }
            Err(_) => false,
        }
    }

    /// A signal asks the agent to stop its services first; without an agent it is power-off at once.
    fn signalled(&mut self, signals: &SignalFd) -> bool {
        while let Ok(Some(info)) = signals.read_signal() {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            if number == Signal::SIGCHLD as i32 || self.deadline_ms.is_some() {
                continue;
            }
            log::line("asked to power off", &[("signal", &number)]);
            let told = self
                .agent
                .as_mut()
                .is_some_and(|agent| agent.socket.write_all(&[handover::STOP]).is_ok());
            if !told {
                return true;
            }
            self.deadline_ms = Some(clock::boot_ms() + SERVICES_MS);
        }
        false
    }

    /// Collects every ended child and orphan, and keeps their statuses for the agent.
    fn reap(&mut self) {
        let mut reaped = false;
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            reaped = true;
            self.exits.push(exit_of(status));
            if self
                .agent
                .as_ref()
                .is_some_and(|agent| status.pid() == Some(agent.pid))
            {
                log::line("the agent ended", &[("status", &exit_of(status).status)]);
                self.agent = None;
                self.watchdog.ended(clock::boot_ms());
            }
        }
        if reaped && let Err(error) = write_exits(&self.exits) {
            log::line("cannot write the exit records", &[("error", &error)]);
        }
    }
}

fn spawn(handover: &Handover) -> io::Result<Agent> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let child = Command::new(places::GUEST)
        .env_clear()
        .env("PATH", places::PATH)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    handover.send(&mut ours)?;
    ours.set_nonblocking(true)?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    Ok(Agent { pid, socket: ours })
}

fn exit_of(status: WaitStatus) -> Exit {
    let code = match status {
        WaitStatus::Exited(_, code) => code,
        WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
        _ => 255,
    };
    Exit {
        pid: status.pid().map_or(0, |pid| pid.as_raw().unsigned_abs()),
        status: code.unsigned_abs(),
        at_ms: clock::boot_ms(),
    }
}

fn write_exits(exits: &Exits) -> io::Result<()> {
    let new = format!("{}.new", places::EXITS);
    fs::write(&new, exits.encode())?;
    fs::rename(new, places::EXITS)
}

/// SIGTERM, a wait, SIGKILL, sync, the data disk unmounted, power off.
fn power_off() -> ! {
    log::line("powering off", &[]);
    let everything = Pid::from_raw(-1);
    let _ = kill(everything, Signal::SIGTERM);
    if !all_ended(TERM_MS) {
        let _ = kill(everything, Signal::SIGKILL);
        all_ended(1_000);
    }
    sync();
    for target in mounted_on_data() {
        if let Err(error) = umount2(target.as_str(), MntFlags::empty()) {
            log::line("cannot unmount", &[("target", &target), ("error", &error)]);
        }
    }
    sync();
    let _ = reboot(RebootMode::RB_POWER_OFF);
    super::fatal("the kernel did not power off")
}

fn all_ended(limit_ms: u64) -> bool {
    let deadline = clock::boot_ms() + limit_ms;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return true,
            Ok(WaitStatus::StillAlive) | Err(_) if clock::boot_ms() >= deadline => return false,
            Ok(WaitStatus::StillAlive) | Err(_) => std::thread::sleep(std::time::Duration::from_millis(10)),
            Ok(_) => {}
        }
    }
}

/// Mount points of ext4 file systems, the last mounted first.
fn mounted_on_data() -> Vec<String> {
    ext4_targets(&fs::read_to_string("/proc/mounts").unwrap_or_default())
}

fn ext4_targets(mounts: &str) -> Vec<String> {
    let target = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        (fields.get(2) == Some(&"ext4")).then(|| fields[1].to_owned())
    };
    mounts.lines().rev().filter_map(target).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binds_are_unmounted_before_the_disk() {
        let mounts = "/dev/vda / erofs ro 0 0\n/dev/vdc /run/sovereign/data ext4 rw 0 0\n/dev/vdc /var/lib/postgresql ext4 rw 0 0\n";
        assert_eq!(
            ext4_targets(mounts),
            ["/var/lib/postgresql", "/run/sovereign/data"]
        );
    }

    #[test]
    fn a_status_is_a_code_or_128_and_the_signal() {
        let pid = Pid::from_raw(7);
        assert_eq!(exit_of(WaitStatus::Exited(pid, 3)).status, 3);
        assert_eq!(
            exit_of(WaitStatus::Signaled(pid, Signal::SIGKILL, false)).status,
            137
        );
        assert_eq!(exit_of(WaitStatus::Exited(pid, 3)).pid, 7);
    }
}
