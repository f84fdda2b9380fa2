//! Looking at disk and kernel; what it means is judged in `core`.

use std::path::Path;
use std::time::Duration;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use tokio::sync::mpsc;
use tokio::time::interval;

use crate::contract::Kernel;
use crate::core::judge::{self, DiskSeen};
use crate::core::world::{Event, LOOK_MS};
use crate::engine::Request;
use crate::facts::BootFacts;
use crate::places;

/// A kernel changes rarely: it is tried each so many looks, once a minute.
const KERNEL_TURNS: u32 = 12;

/// Looks at everything, for ever; ends when nobody listens.
pub async fn run(facts: BootFacts, requests: mpsc::Sender<Request>) {
    let mut turns = interval(Duration::from_millis(LOOK_MS));
    let mut misses = Vec::new();
    for turn in 0u32.. {
        turns.tick().await;
        if turn % KERNEL_TURNS == 0 {
            misses = Kernel::default().misses();
        }
        let disk = judge::disk(
            facts.data.as_ref(),
            disk(Path::new(places::DATA)).as_ref().map_err(String::as_str),
        );
        for event in [Event::Disk(disk), Event::Kernel(misses.clone())] {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_not_there_is_an_error_and_this_one_has_a_size() {
        assert!(disk(Path::new("/nonexistent")).is_err());
        assert!(disk(Path::new("/")).unwrap().bytes > 0);
    }
}
