//! Where a build keeps what is not finished: a directory of its own in the cache, from which finished files are renamed.
//!
//! Nothing half-written ever has a final name. A build holds a lock on its directory, so that the next build can tell
//! what a killed one left from what a living one works on. Locks die with their process; ids and times are not asked.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use tempfile::{NamedTempFile, TempDir};

use crate::store::{StoreError, io_error};

const DIRECTORY: &str = "scratch";
/// Held while directories come and go, so that none is seen between its making and its locking.
const GATE: &str = "gate";
const LOCK: &str = "lock";

/// The directory of one build; removed with its content when the build ends.
#[derive(Debug)]
pub(crate) struct Scratch {
    directory: TempDir,
    _lock: File,
}

/// The cache while no build can begin.
#[derive(Debug)]
pub(crate) struct Gate {
    root: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a directory and removes those of builds that died. Waits only for others that do the same.
    pub(crate) fn open(cache: &Path) -> Result<Self, StoreError> {
        let gate = Gate::close(cache)?;
        gate.sweep()?;
        let directory = TempDir::new_in(&gate.root).map_err(io_error("create a directory in", &gate.root))?;
        Ok(Self {
            _lock: locked(&directory.path().join(LOCK), FlockOperation::LockExclusive)?,
            directory,
        })
    }

    /// A new file without a final name.
    pub(crate) fn file(&self) -> Result<NamedTempFile, StoreError> {
        let directory = self.directory.path();
        NamedTempFile::new_in(directory).map_err(io_error("create a file in", directory))
    }

    /// A new directory without a final name.
    pub(crate) fn directory(&self) -> Result<TempDir, StoreError> {
        let directory = self.directory.path();
        TempDir::new_in(directory).map_err(io_error("create a directory in", directory))
    }

    /// Gives `bytes` the name `path`, whose directory is made when absent; readers see the old or the new content
    /// whole, also after a power cut.
    pub(crate) fn publish(&self, bytes: &[u8], path: &Path) -> Result<(), StoreError> {
        let mut file = self.file()?;
        file.write_all(bytes).map_err(io_error("write", path))?;
        finish(file, path)?;
        Ok(())
    }
}

/// Gives a written file its final name; its description.
pub(crate) fn finish(file: NamedTempFile, path: &Path) -> Result<fs::Metadata, StoreError> {
    let readable = fs::Permissions::from_mode(0o644);
    file.as_file()
        .sync_all()
        .and_then(|()| file.as_file().set_permissions(readable))
        .map_err(io_error("write", path))?;
    make_parent(path)?;
    let file = file
        .persist(path)
        .map_err(|error| io_error("create", path)(error.error))?;
    file.metadata().map_err(io_error("read", path))
}

impl Gate {
    /// Waits until no other build begins or ends its beginning.
    pub(crate) fn close(cache: &Path) -> Result<Self, StoreError> {
        let root = cache.join(DIRECTORY);
        fs::create_dir_all(&root).map_err(io_error("create", &root))?;
        Ok(Self {
            _lock: locked(&root.join(GATE), FlockOperation::LockExclusive)?,
            root,
        })
    }

    /// Removes the directories of dead builds; the number of living ones.
    pub(crate) fn sweep(&self) -> Result<usize, StoreError> {
        let mut alive = 0;
        for entry in fs::read_dir(&self.root).map_err(io_error("read", &self.root))? {
            let path = entry.map_err(io_error("read", &self.root))?.path();
            if !path.is_dir() {
                continue;
            }
            if is_alive(&path) {
                alive += 1;
            } else {
                // A mkfs.erofs that outlived its build may still write there; then the next build removes the rest.
                let _ = fs::remove_dir_all(&path);
            }
        }
        Ok(alive)
    }
}

fn is_alive(directory: &Path) -> bool {
    match File::open(directory.join(LOCK)) {
        Ok(file) => flock(&file, FlockOperation::NonBlockingLockExclusive).is_err(),
        // It died before it was locked: the gate is closed while a directory has no lock.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

fn locked(path: &Path, operation: FlockOperation) -> Result<File, StoreError> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io_error("create", path))?;
    flock(&file, operation).map_err(|error| io_error("lock", path)(error.into()))?;
    Ok(file)
}

/// Makes the directory that `path` is to be in.
pub(crate) fn make_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(io_error("create", parent))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(cache: &Path) -> usize {
        let entries = fs::read_dir(cache.join(DIRECTORY)).unwrap();
        entries
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count()
    }

    #[test]
    fn what_a_dead_build_left_goes_and_what_a_living_one_has_stays() {
        let cache = tempfile::tempdir().unwrap();
        let living = Scratch::open(cache.path()).unwrap();
        let file = living.file().unwrap();
        // As after SIGKILL: the lock is gone, the directory is not.
        let mut dead = Scratch::open(cache.path()).unwrap();
        dead.directory.disable_cleanup(true);
        let remains = dead.directory().unwrap().keep();
        drop(dead);
        fs::create_dir(cache.path().join(DIRECTORY).join("never locked")).unwrap();
        assert_eq!(left(cache.path()), 3);

        let next = Scratch::open(cache.path()).unwrap();
        assert!(!remains.exists() && file.path().exists());
        assert_eq!(left(cache.path()), 2);
        drop((living, next));
        assert_eq!(left(cache.path()), 0);
        assert_eq!(Gate::close(cache.path()).unwrap().sweep().unwrap(), 0);
    }

    #[test]
    fn living_builds_are_counted() {
        let cache = tempfile::tempdir().unwrap();
        let living = [
            Scratch::open(cache.path()).unwrap(),
            Scratch::open(cache.path()).unwrap(),
        ];
        assert_eq!(Gate::close(cache.path()).unwrap().sweep().unwrap(), living.len());
    }

    #[test]
    fn a_published_file_is_whole_and_readable_by_all() {
        let cache = tempfile::tempdir().unwrap();
        let scratch = Scratch::open(cache.path()).unwrap();
        let path = cache.path().join("deep/er/file");
        for text in ["old", "new"] {
            scratch.publish(text.as_bytes(), &path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
    }
}
