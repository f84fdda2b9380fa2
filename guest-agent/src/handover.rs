//! What PID 1 and the agent say to each other: a socket pair that is the agent's fd 0.
//!
//! PID 1 writes one line of JSON (the [`Handover`]), later at most [`STOP`]; the agent
//! writes [`ALIVE`] every [`ALIVE_EVERY`] and, once, [`POWER_OFF`].

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sovereign_protocol::handshake::{BootKey, Identity};

/// The agent's loop turns.
pub const ALIVE: u8 = b'.';
/// Services are stopped: power off.
pub const POWER_OFF: u8 = b'P';
/// To the agent: stop services in order, then ask for the power-off.
pub const STOP: u8 = b'S';
/// How often the agent says [`ALIVE`].
pub const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Longest handover line in bytes.
const LINE_BYTES: u64 = 4 << 10;

/// What the agent must know of this boot. On a socket only, never in a file or an environment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Handover {
    /// The boot id that the host assigned.
    pub boot_id: String,
    /// The key of this boot.
    pub key: BootKey,
    /// The vsock port to listen on.
    pub port: u32,
}

impl Handover {
    /// What both ends of the link share.
    #[must_use]
    pub fn identity(&self) -> Identity {
        Identity {
            boot_id: self.boot_id.clone(),
            key: self.key.clone(),
        }
    }

    /// PID 1's side: writes the line.
    ///
    /// # Errors
    /// The system's own.
    pub fn send(&self, socket: &mut UnixStream) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        socket.write_all(&line)
    }

    /// The agent's side: reads the line.
    ///
    /// # Errors
    /// `InvalidData` when it is something else, else the system's own.
    pub fn receive(socket: &UnixStream) -> io::Result<Self> {
        let mut line = Vec::new();
        // One byte at a time, so that a later STOP stays in the socket.
        BufReader::with_capacity(1, socket.take(LINE_BYTES)).read_until(b'\n', &mut line)?;
        Ok(serde_json::from_slice(&line)?)
    }
}

/// The agent's end of the socket, taken from fd 0.
///
/// # Errors
/// The system's own.
pub fn agent_end() -> io::Result<UnixStream> {
    Ok(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handover_arrives_and_leaves_the_next_byte() {
        let (mut init, agent) = UnixStream::pair().unwrap();
        let handover = Handover {
            boot_id: "b1".into(),
            key: BootKey::generate().unwrap(),
            port: 1024,
        };
        handover.send(&mut init).unwrap();
        init.write_all(&[STOP]).unwrap();
        let received = Handover::receive(&agent).unwrap();
        assert_eq!((received.boot_id.as_str(), received.port), ("b1", 1024));
        assert!(received.key == handover.key);
        let mut next = [0];
        (&agent).read_exact(&mut next).unwrap();
        assert_eq!(next, [STOP]);
    }

    #[test]
    fn a_closed_or_foreign_socket_is_an_error() {
        for bytes in [&b""[..], b"GET / HTTP/1.1\n"] {
            let (mut init, agent) = UnixStream::pair().unwrap();
            init.write_all(bytes).unwrap();
            drop(init);
            assert!(Handover::receive(&agent).is_err());
        }
    }
}
