//! What the running kernel lacks of the contract in `sovereign-kernel`: tried where trying is cheap, else looked up.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use sovereign_kernel::{Proof, REQUIREMENTS, Requirement};

use crate::core::judge::Miss;
use crate::places;

/// The kernel as seen through its files.
#[derive(Debug, Clone)]
pub struct Kernel {
    root: PathBuf,
}

impl Default for Kernel {
    fn default() -> Self {
        Self::below("/")
    }
}

impl Kernel {
    /// With its files below another directory. Tests have their own.
    #[must_use]
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// What is not met, in the order of the contract.
    #[must_use]
    pub fn misses(&self) -> Vec<Miss> {
        let filesystems = fs::read_to_string(self.path("/proc/filesystems")).unwrap_or_default();
        let modules = Modules::read(&self.root);
        let miss = |requirement: &Requirement| {
            let tried = match requirement.symbol {
                "SYSVIPC" => shared_memory_segment().map_err(|error| format!("shmget: {error}")),
                "SHMEM" => self.shared_memory_file(),
                "CGROUPS" => self.cgroup2(),
                // Opening it loads the module.
                "TUN" => self.open("/dev/net/tun"),
                _ => self.shows(&requirement.proof, &filesystems, &modules),
            };
            tried.err().map(|seen| Miss::of(requirement, seen))
        };
        REQUIREMENTS.iter().filter_map(miss).collect()
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    fn shows(&self, proof: &Proof, filesystems: &str, modules: &Modules) -> Result<(), String> {
        let (shown, what) = match proof {
            Proof::Path(path) => (self.path(path).exists(), format!("no {path}")),
            Proof::Filesystem(name) => {
                let names = |line: &str| line.split_whitespace().last() == Some(name);
                (filesystems.lines().any(names), format!("no file system {name}"))
            }
            Proof::Module(name) => {
                // A module that can be loaded on demand is as good as a loaded one.
                let loaded = self.path("/sys/module").join(name).exists();
                (loaded || modules.have(name), format!("no module {name}"))
            }
        };
        if shown { Ok(()) } else { Err(what) }
    }

    fn open(&self, path: &str) -> Result<(), String> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = fs::File::options();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        options
            .open(self.path(path))
            .map(drop)
            .map_err(|error| format!("{path}: {error}"))
    }

    /// As shm_open(3) does it.
    fn shared_memory_file(&self) -> Result<(), String> {
        let path = self
            .path("/dev/shm")
            .join(format!("sovereign-contract-{}", std::process::id()));
        let made = fs::write(&path, "x");
        let _ = fs::remove_file(&path);
        made.map_err(|error| format!("/dev/shm: {error}; PostgreSQL goes on with mmap"))
    }

    fn cgroup2(&self) -> Result<(), String> {
        let path = Path::new(places::CGROUP)
            .parent()
            .unwrap_or(Path::new("/sys/fs/cgroup"));
        let there = statfs(&self.path(&path.to_string_lossy()));
        match there.map(|stat| stat.filesystem_type()) {
            Ok(kind) if kind == CGROUP2_SUPER_MAGIC => Ok(()),
            Ok(_) => Err(format!("{} is not cgroup2", path.display())),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }
}

/// Makes a segment of System V shared memory and removes it.
fn shared_memory_segment() -> io::Result<()> {
    // No crate in use wraps these two calls; they take and return numbers only (the buffer of IPC_RMID is unused).
    #[allow(unsafe_code)]
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4096, libc::IPC_CREAT | 0o600) };
    if id < 0 {
        return Err(io::Error::last_os_error());
    }
    #[allow(unsafe_code)] // as above
    let removed = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    if removed < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Lists of the modules that are built in or can be loaded.
struct Modules(Vec<String>);

impl Modules {
    fn read(root: &Path) -> Self {
        let release = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
        let directory = root.join("lib/modules").join(release.unwrap_or_default());
        let files = ["modules.builtin", "modules.dep"];
        Self(
            files
                .map(|name| fs::read_to_string(directory.join(name)).unwrap_or_default())
                .into(),
        )
    }

    fn have(&self, name: &str) -> bool {
        self.0.iter().any(|text| names_module(text, name))
    }
}

/// True when a line of modules.builtin or modules.dep is about this module.
fn names_module(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let path = line.split(':').next().unwrap_or(line);
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko")
            .next()
            .is_some_and(|stem| stem.replace('-', "_") == name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_named_by_file_whatever_their_dashes() {
        let dep = "kernel/net/netfilter/nf_tables.ko.xz: kernel/a.ko\nkernel/x/vmw-vsock.ko:\n";
        assert!(names_module(dep, "nf_tables"));
        assert!(names_module(dep, "vmw_vsock"));
        assert!(!names_module(dep, "a"));
        assert!(!names_module(dep, "nf_table"));
    }
}
