//! The client of a signed Debian repository: from InRelease to an index of packages.

use std::path::{Path, PathBuf};

use sovereign_kernel::{DecompressError, decompress};
use thiserror::Error;

use crate::{
    Arch, Archive,
    fetch::{FetchError, Fetcher},
    index::Index,
    keyring::{KeyError, Keyring},
    mirror::Mirrors,
    release::{Release, ReleaseError, Vouched},
    scratch::Scratch,
    store::{Store, StoreError},
};

/// Longest InRelease file in bytes.
const IN_RELEASE_MAX: u64 = 4 << 20;
/// Longest compressed package index in bytes.
const INDEX_MAX: u64 = 64 << 20;
/// Longest package index in bytes.
const INDEX_TEXT_MAX: u64 = 512 << 20;

/// Why the repository cannot be used.
#[derive(Debug, Error)]
pub enum RepositoryError {
    /// A download failed.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A signature does not hold.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A Release file is not usable.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// A file is not what the Release file vouches for, or cannot be kept.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An index does not unpack.
    #[error("cannot unpack the package index of {suite}")]
    Unpack {
        /// The suite.
        suite: String,
        /// Why.
        source: DecompressError,
    },
    /// An index is not text.
    #[error("the package index of {suite} is not UTF-8")]
    NotText {
        /// The suite.
        suite: String,
    },
    /// An index is larger than allowed.
    #[error("the package index of {suite} has {size} bytes, more than {INDEX_MAX}")]
    TooLong {
        /// The suite.
        suite: String,
        /// Its length in bytes.
        size: u64,
    },
}

/// A repository as seen from this machine.
pub(crate) struct Repository<'a> {
    pub(crate) mirrors: &'a Mirrors,
    pub(crate) keyring: &'a Keyring,
    pub(crate) fetcher: &'a Fetcher,
    pub(crate) store: &'a Store,
    pub(crate) scratch: &'a Scratch,
    /// Where the newest date seen of each suite is kept.
    pub(crate) seen: PathBuf,
    /// Seconds since 1970.
    pub(crate) now: u64,
}

impl Repository<'_> {
    /// The merged offers of all suites of `release`; `tell` hears the name of each suite.
    pub(crate) fn index(
        &self,
        release: &str,
        arch: Arch,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Index, RepositoryError> {
        let mut index = Index::default();
        for archive in [Archive::Main, Archive::Security] {
            for suite in archive.suites(release) {
                tell(&suite);
                index.add(archive, arch, &self.packages(archive, &suite, arch)?);
            }
        }
        Ok(index)
    }

    fn packages(&self, archive: Archive, suite: &str, arch: Arch) -> Result<String, RepositoryError> {
        let base = format!("{}/dists/{suite}", self.mirrors.of(archive));
        let release = self.release(archive, suite, &base)?;
        let directory = format!("main/binary-{}", arch.debian());
        let vouched = release.file(suite, &format!("{directory}/Packages.xz"))?;
        if vouched.size > INDEX_MAX {
            return Err(RepositoryError::TooLong {
                suite: suite.to_owned(),
                size: vouched.size,
            });
        }
        if !self.store.has(&vouched.sha256, vouched.size) {
            self.fetch_index(&format!("{base}/{directory}"), vouched)?;
        }
        let compressed = match self.store.read(&vouched.sha256) {
            Err(StoreError::Damaged { .. }) => {
                self.fetch_index(&format!("{base}/{directory}"), vouched)?;
                self.store.read(&vouched.sha256)?
            }
            read => read?,
        };
        let text = decompress(&compressed, INDEX_TEXT_MAX).map_err(|source| RepositoryError::Unpack {
            suite: suite.to_owned(),
            source,
        })?;
        String::from_utf8(text).map_err(|_| RepositoryError::NotText {
            suite: suite.to_owned(),
        })
    }

    fn release(&self, archive: Archive, suite: &str, base: &str) -> Result<Release, RepositoryError> {
        let address = format!("{base}/InRelease");
        let signed = self.fetcher.get(&address, IN_RELEASE_MAX)?;
        let text = self.keyring.verify(archive, &address, &signed, self.now)?;
        let seen = self.seen.join(suite);
        let release = Release::parse(suite, &text, self.now, read_date(&seen))?;
        self.scratch.publish(release.date.to_string().as_bytes(), &seen)?;
        Ok(release)
    }

    /// By hash first: during a mirror update the plain name may already be the next index.
    fn fetch_index(&self, directory: &str, vouched: &Vouched) -> Result<(), RepositoryError> {
        let by_hash = format!("{directory}/by-hash/SHA256/{}", vouched.sha256);
        let plain = format!("{directory}/Packages.xz");
        let (address, body) = match self.fetcher.open(&by_hash) {
            Ok(body) => (by_hash, body),
            Err(FetchError::Gone { .. }) => (plain.clone(), self.fetcher.open(&plain)?),
            Err(error) => return Err(error.into()),
        };
        self.store
            .insert(self.scratch, &address, &vouched.sha256, vouched.size, body)?;
        Ok(())
    }
}

fn read_date(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}
