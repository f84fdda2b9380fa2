//! Where one instance keeps its files. Pure: the directories are the caller's.

use std::path::PathBuf;

use crate::handshake::{BootKey, Identity};
use crate::name::Name;

/// A shim's socket in its guest's run directory.
pub const SHIM_SOCKET: &str = "shim.sock";

/// The store's file in the state directory.
pub const STORE: &str = "state.redb";

/// The two directories of an instance and what lies in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The instance.
    pub instance: Name,
    /// Sockets; gone after a reboot.
    pub run: PathBuf,
    /// Specs, data disks, secrets, logs; lasts.
    pub state: PathBuf,
}

impl Layout {
    /// The host agent's control socket.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// The socket of the helper that holds the private network.
    #[must_use]
    pub fn netns(&self) -> PathBuf {
        self.run.join("netns.sock")
    }

    /// The lock that only one host agent holds.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// Secret values, mode 0600: JSON object, `guest/name` to value.
    #[must_use]
    pub fn secrets(&self) -> PathBuf {
        self.state.join("secrets.json")
    }

    /// The host agent's own log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.state.join("host.log")
    }

    /// The host agent's store: the accepted HostSpec and the journal of events.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.state.join(STORE)
    }

    /// What the kernel's switches were before the host agent set them.
    #[must_use]
    pub fn switched(&self) -> PathBuf {
        self.state.join("switched.json")
    }

    /// A guest's lasting directory.
    #[must_use]
    pub fn guest_state(&self, guest: &Name) -> PathBuf {
        self.state.join("guests").join(guest.as_str())
    }

    /// A guest's data disk.
    #[must_use]
    pub fn data_disk(&self, guest: &Name) -> PathBuf {
        self.guest_state(guest).join("data.img")
    }

    /// What a guest's console printed (bounded ring).
    #[must_use]
    pub fn console(&self, guest: &Name) -> PathBuf {
        self.guest_state(guest).join("console.log")
    }

    /// The record of how a guest's VMM last ended.
    #[must_use]
    pub fn exit_record(&self, guest: &Name) -> PathBuf {
        self.guest_state(guest).join("exit.json")
    }

    /// A guest's sockets.
    #[must_use]
    pub fn guest_run(&self, guest: &Name) -> PathBuf {
        self.run.join(guest.as_str())
    }

    /// What both ends of the control socket must share: SO_PEERCRED tells who is there.
    #[must_use]
    pub fn control_identity(&self) -> Identity {
        Identity {
            boot_id: format!("control:{}", self.instance),
            key: BootKey::none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next version must find what this one wrote.
    #[test]
    fn everything_stays_where_it_is() {
        let sql = Name::parse("sql").unwrap();
        let layout = Layout {
            instance: Name::parse("t").unwrap(),
            run: "/r".into(),
            state: "/s".into(),
        };
        let paths = [
            layout.control(),
            layout.netns(),
            layout.guest_run(&sql),
            layout.lock(),
            layout.secrets(),
            layout.log(),
            layout.store(),
            layout.switched(),
            layout.data_disk(&sql),
            layout.console(&sql),
            layout.exit_record(&sql),
        ];
        let expected = [
            "/r/control.sock",
            "/r/netns.sock",
            "/r/sql",
            "/s/lock",
            "/s/secrets.json",
            "/s/host.log",
            "/s/state.redb",
            "/s/switched.json",
            "/s/guests/sql/data.img",
            "/s/guests/sql/console.log",
            "/s/guests/sql/exit.json",
        ];
        assert_eq!(paths.map(|path| path.display().to_string()), expected);
    }
}
