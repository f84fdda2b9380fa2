//! A process at the other end of a Unix socket, held by its pidfd: no other can be taken for it.

use std::io;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;

/// A process that is not our child.
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

    #[cfg(test)]
    pub(crate) fn of_pid(pid: u32) -> io::Result<Option<Self>> {
        Self::open(Pid::from_raw(pid.cast_signed()).unwrap())
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
