//! Looking at disk and kernel; what it means is judged in `core`.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use sovereign_kernel::{Proof, REQUIREMENTS};
use tokio::sync::mpsc;
use tokio::time::interval;

use crate::core::judge::{self, DiskSeen, Miss};
use crate::core::world::{Event, LOOK_MS};
use crate::engine::Request;
use crate::facts::BootFacts;
use crate::places;

/// Looks at everything, for ever; ends when nobody listens.
pub async fn run(facts: BootFacts, requests: mpsc::Sender<Request>) {
    let mut turns = interval(Duration::from_millis(LOOK_MS));
    loop {
        turns.tick().await;
        let disk = judge::disk(
            facts.data.as_ref(),
            disk(Path::new(places::DATA)).as_ref().map_err(String::as_str),
        );
        for event in [Event::Disk(disk), Event::Kernel(kernel())] {
            if requests.send(Request::Event(event)).await.is_err() {
                return;
            }
        }
    }
}

/// Looks at the file system of a directory.
fn disk(path: &Path) -> Result<DiskSeen, String> {
    let failed = |error| format!("{}: {error}", path.display());
    let kind = statfs(path).map_err(failed)?;
    let space = statvfs(path).map_err(failed)?;
    let block = space.fragment_size();
    Ok(DiskSeen {
        ext4: kind.filesystem_type() == EXT4_SUPER_MAGIC,
        read_only: space.flags().contains(FsFlags::ST_RDONLY),
        free_bytes: space.blocks_available().saturating_mul(block),
        bytes: space.blocks().saturating_mul(block),
        free_inodes: space.files_available(),
    })
}

/// What the running kernel lacks: the contract's proofs, and the two devices tried.
fn kernel() -> Vec<Miss> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let builtin = modules_file("modules.builtin");
    let loadable = modules_file("modules.dep");
    let shows = |proof: &Proof| match proof {
        Proof::Path(path) => Path::new(path).exists(),
        Proof::Filesystem(name) => filesystems
            .lines()
            .any(|line| line.split_whitespace().last() == Some(name)),
        Proof::Module(name) => {
            // A module that can be loaded on demand is as good as a loaded one.
            Path::new("/sys/module").join(name).exists()
                || names_module(&builtin, name)
                || names_module(&loadable, name)
        }
    };
    let missing = REQUIREMENTS
        .iter()
        .filter(|requirement| !shows(&requirement.proof));
    let mut misses: Vec<Miss> = missing
        .map(|r| Miss::of(r, format!("no {:?}", r.proof)))
        .collect();
    misses.retain(|miss| miss.symbol != "TUN"); // shown below by opening it, which loads the module
    misses.extend(device("TUN", "/dev/net/tun", &["tailscale"]));
    misses.extend(shared_memory());
    misses
}

fn device(symbol: &str, path: &str, breaks: &[&str]) -> Option<Miss> {
    let error = fs::File::options()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(path)
        .err()?;
    Some(Miss {
        symbol: symbol.to_owned(),
        seen: format!("{path}: {error}"),
        breaks: breaks.iter().map(|name| (*name).to_owned()).collect(),
    })
}

fn shared_memory() -> Option<Miss> {
    use crate::postgres::conf::SharedMemory;
    (SharedMemory::probe(Path::new("/dev/shm")) == SharedMemory::Mmap).then(|| Miss {
        symbol: "SHMEM".to_owned(),
        seen: "no file can be made in /dev/shm: PostgreSQL falls back to mmap".to_owned(),
        breaks: Vec::new(),
    })
}

fn modules_file(name: &str) -> String {
    let release = nix::sys::utsname::uname().map(|uname| uname.release().to_string_lossy().into_owned());
    release
        .ok()
        .and_then(|release| fs::read_to_string(Path::new("/lib/modules").join(release).join(name)).ok())
        .unwrap_or_default()
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

    #[test]
    fn a_directory_that_is_not_there_is_an_error_and_this_one_has_a_size() {
        assert!(disk(Path::new("/nonexistent")).is_err());
        assert!(disk(Path::new("/")).unwrap().bytes > 0);
    }

    #[test]
    fn a_missing_device_is_named_with_its_error() {
        let miss = device("TUN", "/nonexistent/tun", &["tailscale"]).unwrap();
        assert!(
            miss.seen.starts_with("/nonexistent/tun: No such file"),
            "{}",
            miss.seen
        );
    }
}
