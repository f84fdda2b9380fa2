//! Processes: held by their pidfd, so that no other can be taken for them, or looked at.

use std::io;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::process::Child;

/// A process, at the other end of a Unix socket or below us.
#[derive(Debug)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// A pidfd in the only type of tokio that takes any pollable descriptor safely.
    pidfd: pipe::Receiver,
}

impl Process {
    /// Who listens at the other end; `None` when it has ended this moment.
    ///
    /// # Errors
    /// `NotFound` when its process is not visible from here; the system's own.
    pub fn of_peer(stream: &UnixStream) -> io::Result<Option<Self>> {
        let pid = stream.peer_cred()?.pid().and_then(Pid::from_raw);
        let pid = pid
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "its process is not visible from here"))?;
        Self::open(pid)
    }

    /// A child of ours that was not waited for: nobody else can have its id.
    ///
    /// # Errors
    /// The system's own.
    pub fn of_child(child: &Child) -> io::Result<Option<Self>> {
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        pid.map_or(Ok(None), Self::open)
    }

    /// The process of this id that began at this time (see [`started`]); `None` when it has ended.
    ///
    /// # Errors
    /// The system's own.
    pub fn of_record(pid: u32, began: u64) -> io::Result<Option<Self>> {
        let Some(raw) = Pid::from_raw(pid.cast_signed()) else {
            return Ok(None);
        };
        // In this order: the descriptor is of whoever has the id now, and that one is looked at.
        let process = Self::open(raw)?;
        Ok(process.filter(|process| started(pid) == Some(began) && !process.has_ended()))
    }

    /// Whether it has ended, reaped or not.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    fn open(pid: Pid) -> io::Result<Option<Self>> {
        match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Err(rustix::io::Errno::SRCH) => Ok(None),
            other => Ok(Some(Self {
                pid: pid.as_raw_nonzero().get().unsigned_abs(),
                pidfd: pipe::Receiver::from_owned_fd_unchecked(other?)?,
            })),
        }
    }

    /// Waits until it has ended. Cancel safe.
    pub async fn ended(&self) {
        let _ = self.pidfd.readable().await; // an error would mean that the runtime is going down
    }

    /// Ends it at once.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL); // it may have ended this moment
    }
}

/// When a process began, in clock ticks since boot (proc_pid_stat(5), field 22); `None` when there is none.
#[must_use]
pub fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the state after it is field 3.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// The letter of a process's state (proc_pid_stat(5)); `?` when it cannot be seen.
#[must_use]
pub fn state(pid: u32) -> char {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything; the state comes after the last one.
    let letter = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    letter.unwrap_or('?')
}
