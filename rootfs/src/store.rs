//! A content-addressed store of downloaded files: `<root>/<sha256>`.
//!
//! A file appears under its name only whole and with that digest; what is read is checked again.

use std::{
    fs, io,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::{
    digest::{hex, is_sha256, sha256_hex},
    scratch::{Scratch, make_parent},
};

/// A content-addressed store.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    root: PathBuf,
}

/// Why the store could not keep or give a file.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The data are not those that were asked for.
    #[error("{name} has SHA-256 {found} and {length} bytes, expected {expected} and {expected_length}")]
    Mismatch {
        /// What was fetched.
        name: String,
        /// Expected digest.
        expected: String,
        /// Expected length in bytes.
        expected_length: u64,
        /// Digest found.
        found: String,
        /// Length found, counted up to one byte more than expected.
        length: u64,
    },
    /// The source of the data ended with an error.
    #[error("cannot read {name}")]
    Source {
        /// What was fetched.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A digest that is none.
    #[error("{text:?} is not a SHA-256")]
    NotADigest {
        /// The text.
        text: String,
    },
    /// A stored file is not what was stored.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl Store {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Whether a file of this digest and length is there (its content is checked by [`Store::read`]).
    pub(crate) fn has(&self, sha256: &str, length: u64) -> bool {
        is_sha256(sha256)
            && fs::metadata(self.root.join(sha256)).is_ok_and(|metadata| metadata.len() == length)
    }

    /// Reads a file and checks its digest.
    pub(crate) fn read(&self, sha256: &str) -> Result<Vec<u8>, StoreError> {
        let path = self.path(sha256)?;
        let bytes = fs::read(&path).map_err(io_error("read", &path))?;
        if sha256_hex(&bytes) == sha256 {
            return Ok(bytes);
        }
        Err(StoreError::Damaged { path })
    }

    /// Removes a file; one that is not there is no error.
    pub(crate) fn remove(&self, sha256: &str) -> Result<(), StoreError> {
        let path = self.path(sha256)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Copies `source` into the store while checking digest and length; `name` is for messages.
    pub(crate) fn insert(
        &self,
        scratch: &Scratch,
        name: &str,
        sha256: &str,
        length: u64,
        source: impl Read,
    ) -> Result<(), StoreError> {
        let path = self.path(sha256)?;
        let mut file = scratch.file()?;
        let (found, found_length) = copy_hashed(name, source.take(length.saturating_add(1)), &mut file)?;
        if found != sha256 || found_length != length {
            let (name, expected) = (name.to_owned(), sha256.to_owned());
            return Err(StoreError::Mismatch {
                name,
                expected,
                expected_length: length,
                found,
                length: found_length,
            });
        }
        make_parent(&path)?;
        file.persist(&path)
            .map_err(|error| io_error("create", &path)(error.error))?;
        Ok(())
    }

    fn path(&self, sha256: &str) -> Result<PathBuf, StoreError> {
        if is_sha256(sha256) {
            Ok(self.root.join(sha256))
        } else {
            Err(StoreError::NotADigest {
                text: sha256.to_owned(),
            })
        }
    }
}

/// Copies `source` to `target`; its digest and length in bytes.
pub(crate) fn copy_hashed(
    name: &str,
    mut source: impl Read,
    target: &mut tempfile::NamedTempFile,
) -> Result<(String, u64), StoreError> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut total = 0;
    loop {
        let length = match source.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(StoreError::Source {
                    name: name.to_owned(),
                    source,
                });
            }
        };
        if length == 0 {
            return Ok((hex(&hasher.finalize()), total));
        }
        hasher.update(&buffer[..length]);
        total += length as u64;
        let path = target.path().to_owned();
        target
            .write_all(&buffer[..length])
            .map_err(io_error("write", &path))?;
    }
}

/// Writes a file outside the cache so that readers see the old or the new content whole: temporary file beside it,
/// fsync, rename.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    let mut file = tempfile::NamedTempFile::new_in(parent).map_err(io_error("create a file in", parent))?;
    file.write_all(bytes)
        .and_then(|()| file.as_file().sync_all())
        .map_err(io_error("write", path))?;
    set_mode(file.path(), 0o644)?;
    file.persist(path)
        .map_err(|error| io_error("replace", path)(error.error))?;
    Ok(())
}

fn set_mode(path: &Path, mode: u32) -> Result<(), StoreError> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error("set the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matching_data_get_in() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path().join("store"));
        let scratch = Scratch::open(directory.path()).unwrap();
        let digest = sha256_hex(b"good");
        for bad in [b"evil".as_slice(), b"good and more", b"goo"] {
            assert!(matches!(
                store.insert(&scratch, "x", &digest, 4, bad),
                Err(StoreError::Mismatch { .. })
            ));
            assert!(!store.has(&digest, 4));
        }
        store
            .insert(&scratch, "x", &digest, 4, b"good".as_slice())
            .unwrap();
        assert!(store.has(&digest, 4) && !store.has(&digest, 5));
        assert_eq!(store.read(&digest).unwrap(), b"good");
        assert_eq!(
            fs::read_dir(directory.path().join("store")).unwrap().count(),
            1,
            "no temporary file is left"
        );
    }

    #[test]
    fn damaged_files_and_odd_names_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::new(directory.path().to_owned());
        let digest = sha256_hex(b"good");
        fs::write(directory.path().join(&digest), b"evil").unwrap();
        assert!(matches!(store.read(&digest), Err(StoreError::Damaged { .. })));
        store.remove(&digest).unwrap();
        store.remove(&digest).unwrap();
        assert!(!store.has(&digest, 4));
        assert!(matches!(
            store.read("../../etc/passwd"),
            Err(StoreError::NotADigest { .. })
        ));
    }
}
