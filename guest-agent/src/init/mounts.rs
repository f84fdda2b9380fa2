//! Mounting: the table of writable places and thin calls.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::mount::{MsFlags, mount as mount2};

/// For file systems without devices and set-user-id programs.
pub(super) const PLAIN: MsFlags = MsFlags::MS_NOSUID;
/// For the two image disks.
pub(super) const READ_ONLY: MsFlags = MsFlags::MS_RDONLY.union(MsFlags::MS_NODEV);
/// For data.
pub(super) const DATA: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOATIME);
const TMP: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// A file system without a disk.
#[derive(Debug)]
pub(super) struct Mount {
    pub(super) target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    data: &'static str,
}

/// Everything writable but the data disk, in order; sizes in parts of memory.
pub(super) const WRITABLE: &[Mount] = &[
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        flags: PLAIN,
        data: "mode=0620,gid=5,ptmxmode=0666",
    },
    Mount {
        target: "/dev/shm",
        kind: "tmpfs",
        flags: TMP,
        data: "mode=1777,size=50%",
    },
    Mount {
        target: "/sys/fs/cgroup",
        kind: "cgroup2",
        flags: TMP,
        data: "",
    },
    Mount {
        target: "/run",
        kind: "tmpfs",
        flags: TMP,
        data: "mode=0755,size=10%",
    },
    Mount {
        target: "/tmp",
        kind: "tmpfs",
        flags: TMP,
        data: "mode=1777,size=20%",
    },
    Mount {
        target: "/var/tmp",
        kind: "tmpfs",
        flags: TMP,
        data: "mode=1777,size=10%",
    },
    Mount {
        target: "/var/log",
        kind: "tmpfs",
        flags: TMP,
        data: "mode=0755,size=5%",
    },
];

impl Mount {
    pub(super) fn apply(&self) -> nix::Result<()> {
        if self.target.starts_with("/dev/") {
            let _ = fs::create_dir(self.target);
            let _ = fs::set_permissions(self.target, fs::Permissions::from_mode(0o755));
        }
        mount(self.kind, self.target, self.kind, self.flags, self.data)
    }
}

pub(super) fn mount(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> nix::Result<()> {
    let data = (!data.is_empty()).then_some(data);
    mount2(Some(source), target, Some(kind), flags, data)
}

pub(super) fn bind(source: &str, target: &str) -> nix::Result<()> {
    mount2(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
}

pub(super) fn move_to(source: &str, target: &str) -> nix::Result<()> {
    mount2(Some(source), target, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
}
