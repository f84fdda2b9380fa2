//! What shows of the host agent without speaking to it.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sovereign_protocol::inspection::{AgentSeen, Process, SocketSeen};
use sovereign_protocol::layout::Layout;
use tokio::net::UnixStream;

use super::{age_ms, last_lines, process, tail};

/// Bytes and lines of its log.
const LOG_BYTES: u64 = 8 << 10;
const LOG_LINES: usize = 5;

/// Looks at lock, control socket and log. The lock is not tried: that could refuse a start that happens meanwhile.
pub(super) async fn look(layout: &Layout) -> AgentSeen {
    AgentSeen {
        holder: lock_holder(&layout.lock()),
        control: socket(&layout.control()).await,
        log_age_ms: age_ms(&layout.log()),
        log: last_lines(&tail(&layout.log(), LOG_BYTES), LOG_LINES),
    }
}

/// What a connect finds.
async fn socket(path: &Path) -> SocketSeen {
    match UnixStream::connect(path).await {
        Ok(_) => SocketSeen::Accepted,
        // A full backlog is somebody who does not accept any more.
        Err(error) if error.kind() == ErrorKind::WouldBlock => SocketSeen::Accepted,
        Err(error) if error.kind() == ErrorKind::NotFound => SocketSeen::Absent,
        Err(_) => SocketSeen::Refused,
    }
}

/// The process that holds a flock(2) on a file: /proc/locks names it, and its open files prove it.
pub(crate) fn lock_holder(path: &Path) -> Option<Process> {
    let file = fs::metadata(path).ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let mut holders = locks.lines().filter_map(|line| flock_of(line, file.ino()));
    let found = holders.find(|pid| has_open(*pid, &file))?;
    Some(process(found))
}

/// The process of a line of /proc/locks that is a flock on this inode.
fn flock_of(line: &str, inode: u64) -> Option<u32> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    // "-> " marks one that waits; it does not hold.
    let [_, "FLOCK", _, "WRITE", pid, place, ..] = fields[..] else {
        return None;
    };
    let (_, found) = place.rsplit_once(':')?;
    (found.parse() == Ok(inode)).then(|| pid.parse().ok())?
}

fn has_open(pid: u32, file: &fs::Metadata) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    entries.into_iter().flatten().flatten().any(|entry| {
        let open = fs::metadata(entry.path());
        open.is_ok_and(|open| (open.dev(), open.ino()) == (file.dev(), file.ino()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_held_write_flock_on_the_inode_counts() {
        let held = "1: FLOCK  ADVISORY  WRITE 29121 fe:00:10807427 0 EOF";
        assert_eq!(flock_of(held, 10_807_427), Some(29_121));
        assert_eq!(flock_of(held, 1), None);
        for other in [
            "1: -> FLOCK  ADVISORY  WRITE 5 fe:00:7 0 EOF",
            "1: POSIX  ADVISORY  WRITE 5 fe:00:7 0 EOF",
            "1: FLOCK  ADVISORY  READ 5 fe:00:7 0 EOF",
            "",
        ] {
            assert_eq!(flock_of(other, 7), None, "{other}");
        }
    }

    #[test]
    fn the_holder_of_a_lock_is_found_and_a_free_one_has_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let file = fs::File::create(&path).unwrap();
        assert_eq!(lock_holder(&path), None);
        file.lock().unwrap();
        assert_eq!(
            lock_holder(&path).map(|holder| holder.pid),
            Some(std::process::id())
        );
    }
}
