//! Makes room in the cache: what no image in use and not the newest one needs goes.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use thiserror::Error;

use crate::{
    lock::Lock,
    manifest,
    scratch::Gate,
    seal,
    store::{StoreError, io_error},
};

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Number of files.
    pub files: usize,
    /// Their length in bytes.
    pub bytes: u64,
}

/// Why nothing, or not all, was removed.
#[derive(Debug, Error)]
pub enum PruneError {
    /// A build would lose what it is about to use.
    #[error("{builds} builds are using the cache {}", cache.display())]
    InUse {
        /// The cache.
        cache: PathBuf,
        /// Number of builds.
        builds: usize,
    },
    /// A file cannot be looked at or removed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Removes every image, kernel, package, index and manifest of `cache` but those of the images in `keep` (see
/// [`crate::Artifacts::digest`]), of the newest image, and the packages of the cache's own locks. No build begins
/// meanwhile.
///
/// # Errors
/// When a build is going on or a file cannot be removed; then the rest stays for the next time.
pub fn prune(cache: &Path, keep: &[&str]) -> Result<Pruned, PruneError> {
    let cache = &std::path::absolute(cache).map_err(io_error("find", cache))?;
    let gate = Gate::close(cache)?;
    let builds = gate.sweep()?;
    if builds > 0 {
        return Err(PruneError::InUse {
            cache: cache.clone(),
            builds,
        });
    }
    let needed = needed(cache, keep)?;
    let mut pruned = Pruned::default();
    for directory in ["images", "indexes", "kernels", "manifests", "packages"] {
        sweep(&cache.join(directory), &needed, &mut pruned)?;
    }
    Ok(pruned)
}

/// Files that stay; of a kernel its directory.
fn needed(cache: &Path, keep: &[&str]) -> Result<BTreeSet<PathBuf>, StoreError> {
    let packages = cache.join("packages");
    let mut needed = BTreeSet::new();
    let mut manifests: Vec<(SystemTime, PathBuf)> = Vec::new();
    for path in files(&cache.join("manifests"))? {
        let modified = fs::metadata(&path).and_then(|data| data.modified());
        manifests.push((modified.map_err(io_error("read", &path))?, path));
    }
    manifests.sort();
    let newest = manifests.last().map(|(_, path)| path.clone());
    for (_, path) in manifests {
        let Some(manifest) = manifest::read(&path) else {
            continue;
        };
        if !keep.contains(&manifest.artifacts.digest.as_str()) && newest.as_ref() != Some(&path) {
            continue;
        }
        let files = manifest.artifacts.files();
        needed.extend(
            files
                .iter()
                .flat_map(|file| [(*file).to_owned(), seal::beside(file)]),
        );
        needed.extend(manifest.artifacts.kernel.parent().map(Path::to_owned));
        needed.extend(manifest.packages.iter().map(|sha256| packages.join(sha256)));
        needed.insert(path);
    }
    for path in files(cache)?.into_iter().chain(files(&cache.join("locks"))?) {
        if let Ok(Some(lock)) = Lock::load(&path) {
            needed.extend(
                lock.packages
                    .values()
                    .map(|package| packages.join(&package.sha256)),
            );
        }
    }
    Ok(needed)
}

fn sweep(directory: &Path, needed: &BTreeSet<PathBuf>, pruned: &mut Pruned) -> Result<(), StoreError> {
    for path in entries(directory)? {
        if needed.contains(&path) {
            continue;
        }
        let data = fs::symlink_metadata(&path).map_err(io_error("read", &path))?;
        if data.is_dir() {
            sweep(&path, needed, pruned)?;
            fs::remove_dir(&path).map_err(io_error("remove", &path))?;
            continue;
        }
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        pruned.files += 1;
        pruned.bytes += data.len();
    }
    Ok(())
}

fn files(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    Ok(entries(directory)?
        .into_iter()
        .filter(|path| path.is_file())
        .collect())
}

/// The entries of a directory; none when there is no such directory.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("read", directory))?,
    };
    entries
        .map(|entry| Ok(entry.map_err(io_error("read", directory))?.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixture::{Fixture, files_below},
        scratch::Scratch,
    };

    #[test]
    fn images_in_use_and_the_newest_stay_and_build_without_the_network() {
        let mut fixture = Fixture::new();
        let mut built = Vec::new();
        for version in ["1", "2", "3"] {
            fixture.publish(version);
            fixture.update = true;
            built.push(fixture.build(false).unwrap());
        }
        let [used, idle, newest] = &built[..] else {
            unreachable!()
        };
        let size = |fixture: &Fixture| {
            files_below(&fixture.cache())
                .values()
                .map(|bytes| bytes.len() as u64)
                .sum::<u64>()
        };
        let before = size(&fixture);
        let pruned = prune(&fixture.cache(), &[&used.digest]).unwrap();
        assert!(pruned.files > 45, "{pruned:?}");
        assert_eq!(size(&fixture), before - pruned.bytes);
        for file in used.files().into_iter().chain(newest.files()) {
            assert!(file.exists(), "{}", file.display());
        }
        // Of the one nobody uses, only what others share is left.
        for file in idle.files() {
            let shared = used.files().contains(&file) || newest.files().contains(&file);
            assert_eq!(file.exists(), shared, "{}", file.display());
        }
        fixture.server.files.lock().unwrap().clear();
        fixture.update = false;
        assert!(!fixture.build(true).unwrap().built);
        fs::remove_dir_all(fixture.cache().join("images")).unwrap();
        assert!(fixture.build(true).unwrap().built);
        assert!(fixture.warnings.take().is_empty());
        assert_eq!(
            prune(&fixture.cache(), &[&used.digest]).unwrap(),
            Pruned::default()
        );
    }

    #[test]
    fn nothing_goes_while_somebody_builds_and_nothing_is_missed_in_an_empty_cache() {
        let cache = tempfile::tempdir().unwrap();
        assert_eq!(prune(cache.path(), &[]).unwrap(), Pruned::default());
        let building = Scratch::open(cache.path()).unwrap();
        assert!(matches!(
            prune(cache.path(), &[]),
            Err(PruneError::InUse { builds: 1, .. })
        ));
        drop(building);
        fs::create_dir(cache.path().join("images")).unwrap();
        fs::write(cache.path().join("images/old"), "12345").unwrap();
        assert_eq!(prune(cache.path(), &[]).unwrap(), Pruned { files: 1, bytes: 5 });
    }
}
