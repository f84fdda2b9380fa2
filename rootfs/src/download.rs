//! Locked packages brought into the store, several at a time, each from the first place that has it.

use std::{
    sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use thiserror::Error;

use crate::{
    fetch::{FetchError, Fetcher},
    lock::{Lock, LockedPackage},
    scratch::Scratch,
    source::Sources,
    store::{Store, StoreError},
};

/// Downloads that run at the same time.
const THREADS: usize = 4;
/// Largest package in bytes.
const PACKAGE_MAX: u64 = 256 << 20;

/// Why a package is not there.
#[derive(Debug, Error)]
pub enum DownloadError {
    /// A place failed.
    #[error("cannot download package {name} {version}")]
    Fetch {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// Why.
        source: Box<FetchError>,
    },
    /// No place carries this version any more.
    #[error("package {name} {version} is gone: {}", places.join("; "))]
    Gone {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// What each place said.
        places: Vec<String>,
    },
    /// The file is not the locked one or cannot be kept.
    #[error("cannot keep package {name} {version}")]
    Store {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// Why.
        source: Box<StoreError>,
    },
    /// Larger than allowed.
    #[error("package {name} {version} has {size} bytes, more than {PACKAGE_MAX}")]
    TooLarge {
        /// Its name.
        name: String,
        /// Its version.
        version: String,
        /// Its length in bytes.
        size: u64,
    },
}

impl DownloadError {
    /// Every place was asked and none carries this version any more; a place that did not answer is not that.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }
}

/// The locked packages that the store lacks.
pub(crate) fn absent<'a>(lock: &'a Lock, store: &Store) -> Vec<(&'a str, &'a LockedPackage)> {
    let packages = lock
        .packages
        .iter()
        .filter(|(_, package)| !store.has(&package.sha256, package.size));
    packages.map(|(name, package)| (name.as_str(), package)).collect()
}

/// Downloads `packages`; `tell` hears the number of packages done after each. Ends at the first error.
pub(crate) fn download(
    packages: &[(&str, &LockedPackage)],
    sources: &Sources,
    fetcher: &Fetcher,
    store: &Store,
    scratch: &Scratch,
    tell: &mut dyn FnMut(usize),
) -> Result<(), DownloadError> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::sync_channel(THREADS);
    thread::scope(|scope| {
        for _ in 0..THREADS.min(packages.len()) {
            let (sender, next, stop) = (sender.clone(), &next, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Some((name, package)) = packages.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    if sender
                        .send(one(name, package, sources, fetcher, store, scratch))
                        .is_err()
                    {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut result = Ok(());
        for (done, outcome) in receiver.iter().enumerate() {
            match outcome {
                Ok(()) => tell(done + 1),
                Err(error) => {
                    stop.store(true, Ordering::Relaxed);
                    result = result.and(Err(error));
                }
            }
        }
        result
    })
}

fn one(
    name: &str,
    package: &LockedPackage,
    sources: &Sources,
    fetcher: &Fetcher,
    store: &Store,
    scratch: &Scratch,
) -> Result<(), DownloadError> {
    let (name, version) = (name.to_owned(), package.version.clone());
    if package.size > PACKAGE_MAX {
        return Err(DownloadError::TooLarge {
            name,
            version,
            size: package.size,
        });
    }
    let mut places = Vec::new();
    for address in sources.of(package) {
        match fetcher.open(&address) {
            Ok(body) => {
                return store
                    .insert(scratch, &address, &package.sha256, package.size, body)
                    .map_err(|source| DownloadError::Store {
                        name,
                        version,
                        source: Box::new(source),
                    });
            }
            Err(error @ FetchError::Gone { .. }) => places.push(error.to_string()),
            Err(source) => {
                return Err(DownloadError::Fetch {
                    name,
                    version,
                    source: Box::new(source),
                });
            }
        }
    }
    places.extend(sources.silent(package).map(str::to_owned));
    Err(DownloadError::Gone {
        name,
        version,
        places,
    })
}
