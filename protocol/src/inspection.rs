//! What `sovereign-host inspect` sees of an instance without asking its host agent, as JSON without a secret.

use serde::{Deserialize, Serialize};

use crate::condition::{Condition, Verdict};
use crate::name::Name;
use crate::status::VmmStatus;

/// The schema's name.
pub const SCHEMA: &str = "sovereign.inspection/1";

/// One look at an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inspection {
    /// [`SCHEMA`].
    pub schema: String,
    /// The host agent's traces.
    pub agent: AgentSeen,
    /// Guests with a directory of their own, in name order.
    pub guests: Vec<GuestSeen>,
}

/// What shows of the host agent without speaking to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentSeen {
    /// The process that holds the instance's lock.
    pub holder: Option<Process>,
    /// Its control socket.
    pub control: SocketSeen,
    /// Milliseconds since it last wrote to its log; `None` without one.
    pub log_age_ms: Option<u64>,
    /// The last lines of its log.
    pub log: Vec<String>,
}

/// A process, by number and state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Its state as in proc_pid_stat(5), such as `S`, or `T` for stopped; `?` when it is gone.
    pub state: char,
}

/// A Unix socket, as a connect finds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SocketSeen {
    /// There is none.
    #[default]
    Absent,
    /// It is there and nobody listens: its owner was killed.
    Refused,
    /// Somebody listens.
    Accepted,
}

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSeen {
    /// Its name.
    pub name: Name,
    /// Its shim's socket.
    pub shim: SocketSeen,
    /// The boot, if the shim told.
    pub boot_id: Option<String>,
    /// The VMM, if the shim told.
    pub vmm: Option<VmmStatus>,
    /// The VMM's process.
    pub process: Option<Process>,
    /// Whether the VMM runs, in the words of the host agent's conditions.
    pub running: Verdict,
    /// Whether the guest agent answers a fresh dial.
    pub session: Verdict,
    /// What the guest agent says of itself, if it answered.
    pub conditions: Vec<Condition>,
    /// How the last boot ended; `None` while one runs.
    pub exit: Option<ExitSeen>,
    /// The console of the last boot.
    pub console: Option<ConsoleSeen>,
    /// The data disk.
    pub disk: DiskSeen,
    /// Milliseconds that the look took.
    pub took_ms: u64,
}

/// A shim's record of how a boot ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitSeen {
    /// Why, such as `GuestPanicked`.
    pub reason: String,
    /// What was seen.
    pub evidence: String,
    /// Milliseconds since the end.
    pub age_ms: u64,
}

/// The end of a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSeen {
    /// Milliseconds since something was printed.
    pub age_ms: u64,
    /// The last lines that are not empty, without control characters.
    pub last: Vec<String>,
    /// The line of a kernel panic.
    pub panic: Option<String>,
}

/// A data disk's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSeen {
    /// There is none.
    Absent,
    /// It is there.
    Present {
        /// Its size.
        bytes: u64,
        /// What of that takes room: the file is sparse.
        used_bytes: u64,
    },
    /// It cannot be looked at.
    Unreadable(String),
}
