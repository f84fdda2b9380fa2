//! What helper and agent say to each other: one byte in, one line out, with descriptors beside it.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Asks for a fresh set of descriptors.
pub(super) const ASK_SET: u8 = b's';
/// Asks the helper to end.
pub(super) const ASK_END: u8 = b'e';
/// Unattached tun descriptors in one set; more come with the next set.
pub(super) const TUNS: usize = 16;
/// Netfilter sockets in one set, where the kernel has them: requests, news, and connections that it remembers.
pub(super) const NETFILTERS: usize = 3;
/// Descriptors in one set, at most (the kernel allows 253 in one message).
pub(super) const DESCRIPTORS: usize = 64;
/// Bytes of the line that comes with a set.
pub(super) const LINE_BYTES: usize = 4 << 10;

/// A step on the way to a private namespace. A failure names the first one that did not work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Run the helper program.
    Start,
    /// `unshare(CLONE_NEWUSER)`, for an ordinary user only.
    UnshareUser,
    /// Write the user and group maps, for an ordinary user only.
    MapIds,
    /// `unshare(CLONE_NEWNET)`.
    UnshareNet,
    /// Enter the namespace of a helper that is gone.
    Join,
    /// Open a netlink socket inside.
    Netlink,
    /// Set `lo` up: the first change, which also shows whether the capabilities are real.
    Loopback,
    /// Add a bridge (probe only).
    AddLink,
    /// Open `/dev/net/tun`.
    OpenTun,
    /// Make a TAP with TUNSETIFF (probe only).
    AttachTun,
    /// Open `/proc/sys/net` and the namespace's own files.
    Proc,
    /// Listen on the helper's socket.
    Listen,
    /// Answer the agent within the limit.
    Answer,
    /// Take everything of ours out of the host's own namespace.
    Leave,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start the netns helper",
            Self::UnshareUser => "unshare a user namespace",
            Self::MapIds => "map user and group ids",
            Self::UnshareNet => "unshare a network namespace",
            Self::Join => "enter the network namespace again",
            Self::Netlink => "open a netlink socket",
            Self::Loopback => "set lo up",
            Self::AddLink => "add a link",
            Self::OpenTun => "open /dev/net/tun",
            Self::AttachTun => "make a TAP (TUNSETIFF)",
            Self::Proc => "open /proc/sys/net",
            Self::Listen => "listen on the helper's socket",
            Self::Leave => "remove our network",
            Self::Answer => "get an answer from the netns helper",
        })
    }
}

/// The step that failed, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("cannot {stage}: {evidence}")]
pub struct StageFailure {
    /// The step.
    pub stage: Stage,
    /// The system's error number, when it was the system that refused.
    pub errno: Option<i32>,
    /// The error as text.
    pub evidence: String,
}

impl StageFailure {
    /// A step that failed for a reason of our own.
    #[must_use]
    pub fn new(stage: Stage, evidence: impl Into<String>) -> Self {
        Self {
            stage,
            errno: None,
            evidence: evidence.into(),
        }
    }

    /// A step that the system refused.
    pub(crate) fn io(stage: Stage, error: &io::Error) -> Self {
        Self {
            stage,
            errno: error.raw_os_error(),
            evidence: error.to_string(),
        }
    }
}

/// Names the step in an error of the system.
pub(super) trait At<T> {
    fn at(self, stage: Stage) -> Result<T, StageFailure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, stage: Stage) -> Result<T, StageFailure> {
        self.map_err(|error| StageFailure::io(stage, &error.into()))
    }
}

/// What a descriptor of a set is. Names that a program does not know are ignored by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kind {
    /// A route netlink socket, not bound: requests and their answers.
    Requests,
    /// A route netlink socket, not bound: subscriptions.
    Events,
    /// A netfilter netlink socket, not bound; helpers from before it pass none.
    Netfilter,
    /// `/dev/net/tun`, not attached to any device.
    Tun,
    /// `/proc/sys/net` (O_PATH). What is opened below it acts in the namespace of whoever opens it, so nobody uses it.
    Sysctl,
    /// The switch that lets IPv4 packets pass between links, open for both; not where it cannot be written.
    ForwardV4,
    /// The same for IPv6.
    ForwardV6,
    /// The network namespace itself.
    Net,
    /// The user namespace that owns it, for an ordinary user only.
    User,
    /// Something that a later version passes.
    #[serde(other)]
    Unknown,
}

/// The line that comes out of the helper: with a set, or as its first word on standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Report {
    /// What the descriptors beside this line are, in their order; none for "it works".
    Ready(Vec<Kind>),
    /// Nothing comes: this step failed.
    Failed(StageFailure),
}

impl From<Result<Vec<Kind>, StageFailure>> for Report {
    fn from(outcome: Result<Vec<Kind>, StageFailure>) -> Self {
        match outcome {
            Ok(kinds) => Self::Ready(kinds),
            Err(failure) => Self::Failed(failure),
        }
    }
}

impl Report {
    /// The line, with its end.
    pub(super) fn line(&self) -> Vec<u8> {
        let mut line = serde_json::to_vec(self).unwrap_or_default(); // plain data always serialises
        line.push(b'\n');
        line
    }

    /// Reads a line.
    ///
    /// # Errors
    /// [`StageFailure`] of [`Stage::Answer`] when it is none of ours, or the one it carries.
    pub(super) fn parse(line: &[u8]) -> Result<Vec<Kind>, StageFailure> {
        match serde_json::from_slice(line) {
            Ok(Self::Ready(kinds)) => Ok(kinds),
            Ok(Self::Failed(failure)) => Err(failure),
            Err(error) => {
                let said: String = String::from_utf8_lossy(line).chars().take(200).collect();
                Err(StageFailure::new(Stage::Answer, format!("{error} in {said:?}")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_back_and_unknown_kinds_do_not_hurt() {
        let kinds = vec![Kind::Requests, Kind::Tun];
        assert_eq!(Report::parse(&Report::Ready(kinds.clone()).line()), Ok(kinds));
        let later = br#"{"ready":["requests","of-later"]}"#;
        assert_eq!(Report::parse(later), Ok(vec![Kind::Requests, Kind::Unknown]));
        let failure = StageFailure::io(Stage::OpenTun, &io::Error::from_raw_os_error(13));
        let line = Report::Failed(failure.clone()).line();
        assert_eq!(Report::parse(&line), Err(failure.clone()));
        assert_eq!(
            failure.to_string(),
            "cannot open /dev/net/tun: Permission denied (os error 13)"
        );
    }

    #[test]
    fn a_line_of_somebody_else_is_named() {
        for bad in [&b""[..], b"\n", b"hello\n", b"{\"ready\":7}\n", b"\xff\xfe"] {
            let failure = Report::parse(bad).unwrap_err();
            assert_eq!(failure.stage, Stage::Answer, "{failure}");
        }
    }
}
