//! What a build made, kept under a key of everything that went into it, so that an unchanged build reads nothing big.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    scratch::Scratch,
    seal::{self, Condition},
    store::{StoreError, io_error},
};

/// Finished files and what they are made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifacts {
    /// Uncompressed kernel.
    pub kernel: PathBuf,
    /// Initramfs with `/init`, `/modules/NNN-name.ko` and `/modules.order`.
    pub initramfs: PathBuf,
    /// Read-only root (erofs).
    pub root: PathBuf,
    /// Agent disk (erofs) with `/sovereign-guest` and `/modules/<version>`.
    pub agent_disk: PathBuf,
    /// Release of the kernel, as `uname -r` says it.
    pub kernel_version: String,
    /// Digest of everything that went into the files.
    pub digest: String,
    /// Packages as `name version`, sorted.
    pub packages: Vec<String>,
    /// Version of the program that made the images.
    pub tool: String,
    /// False when everything came from the cache.
    #[serde(skip)]
    pub built: bool,
}

/// What is remembered of a build.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) artifacts: Artifacts,
    /// SHA-256 of each package.
    pub(crate) packages: Vec<String>,
}

impl Artifacts {
    /// The four files.
    pub(crate) fn files(&self) -> [&Path; 4] {
        [&self.kernel, &self.initramfs, &self.root, &self.agent_disk]
    }
}

/// The artifacts of an earlier build with this key, if all of them are still what they were.
pub(crate) fn load(path: &Path) -> Option<Artifacts> {
    let artifacts = read(path)?.artifacts;
    let whole = |path: &&Path| seal::check(path) == Condition::Whole;
    artifacts.files().iter().all(whole).then_some(artifacts)
}

/// A manifest, whatever has become of its files.
pub(crate) fn read(path: &Path) -> Option<Manifest> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Remembers what a build made.
pub(crate) fn save(scratch: &Scratch, path: &Path, manifest: &Manifest) -> Result<(), StoreError> {
    let text =
        serde_json::to_vec_pretty(manifest).map_err(|error| io_error("describe", path)(error.into()))?;
    scratch.publish(&text, path)
}

/// What tells that a file is unchanged without reading it.
pub(crate) fn stamp(path: &Path) -> io::Result<String> {
    let data = fs::metadata(path)?;
    Ok(format!(
        "{}:{}:{}:{}.{:09}",
        data.dev(),
        data.ino(),
        data.size(),
        data.mtime(),
        data.mtime_nsec()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_counts_only_while_its_files_are_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let artifacts = Artifacts {
            kernel: file("k"),
            initramfs: file("i"),
            root: file("r"),
            agent_disk: file("a"),
            kernel_version: "6".to_owned(),
            digest: "d".to_owned(),
            packages: vec![],
            tool: "t".to_owned(),
            built: false,
        };
        let path = directory.path().join("m/key.json");
        let manifest = Manifest {
            artifacts: artifacts.clone(),
            packages: vec![],
        };
        let scratch = Scratch::open(directory.path()).unwrap();
        for path in artifacts.files() {
            seal::publish(&scratch, fs::read(path).unwrap().as_slice(), path).unwrap();
        }
        assert_eq!(load(&path), None);
        save(&scratch, &path, &manifest).unwrap();
        assert_eq!(load(&path), Some(artifacts));
        fs::write(directory.path().join("r"), "cut").unwrap();
        assert_eq!(load(&path), None);
        assert!(read(&path).is_some());
    }
}
