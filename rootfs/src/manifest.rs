//! What a build made, kept under a key of everything that went into it, so that an unchanged build reads nothing big.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::store::{StoreError, write_atomically};

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

#[derive(Serialize, Deserialize)]
struct Manifest {
    artifacts: Artifacts,
    /// Length of each artifact in bytes, in the order of [`paths`].
    sizes: Vec<u64>,
}

fn paths(artifacts: &Artifacts) -> [&Path; 4] {
    [
        &artifacts.kernel,
        &artifacts.initramfs,
        &artifacts.root,
        &artifacts.agent_disk,
    ]
}

fn sizes(artifacts: &Artifacts) -> io::Result<Vec<u64>> {
    paths(artifacts)
        .iter()
        .map(|path| Ok(fs::metadata(path)?.len()))
        .collect()
}

/// The artifacts of an earlier build with this key, if all of them are still there.
pub(crate) fn load(path: &Path) -> Option<Artifacts> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (sizes(&manifest.artifacts).ok()? == manifest.sizes).then_some(manifest.artifacts)
}

/// Remembers what a build made.
pub(crate) fn save(path: &Path, artifacts: &Artifacts) -> Result<(), StoreError> {
    let error = |source| StoreError::Io {
        action: "write",
        path: path.to_owned(),
        source,
    };
    let manifest = Manifest {
        sizes: sizes(artifacts).map_err(error)?,
        artifacts: artifacts.clone(),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|source| error(source.into()))?;
    write_atomically(path, &text)
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
        assert_eq!(load(&path), None);
        save(&path, &artifacts).unwrap();
        assert_eq!(load(&path), Some(artifacts));
        fs::write(directory.path().join("r"), "cut").unwrap();
        assert_eq!(load(&path), None);
    }
}
