//! Why the loop looks.

use std::fmt;

/// Why a turn began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// The agent has just started.
    Started,
    /// Something else is wanted.
    Spec,
    /// The kernel told of a change.
    Notified,
    /// Another way out, or a family that is new to the machine around a private network, may have lasted by now.
    WayLasts,
    /// The machine around a private network has other ways out.
    Outside,
    /// The helper's process has ended.
    HelperEnded,
    /// What leads out has ended, or may be started again.
    Uplink,
    /// The sockets broke.
    Broken,
    /// It was time: for another attempt, a repair that had to wait, or the slow look at everything.
    Due,
}

impl fmt::Display for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Started => "started",
            Self::Spec => "something else is wanted",
            Self::Notified => "the kernel told of a change",
            Self::WayLasts => "a way out may have lasted",
            Self::Outside => "the machine's own ways out are others",
            Self::HelperEnded => "the netns helper ended",
            Self::Uplink => "pasta ended, or is due",
            Self::Broken => "the sockets broke",
            Self::Due => "it was time",
        })
    }
}

impl Wake {
    /// What was seen is right but for what the kernel tells: nothing needs to be looked at anew.
    pub(super) fn is_news(self) -> bool {
        matches!(self, Self::Notified | Self::WayLasts | Self::Outside)
    }
}
