//! The build as a whole: lock, packages, kernel, root, agent disk, initramfs; each step skipped when its result is there.

use std::{
    io,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use thiserror::Error;

use crate::{
    Arch,
    deb::DebError,
    download::DownloadError,
    erofs::{ErofsError, Mkfs},
    guest_kernel::GuestKernelError,
    keyring::KeyError,
    lock::LockError,
    manifest::Artifacts,
    mirror::MirrorError,
    needed::NeededError,
    recipe::Recipe,
    repository::RepositoryError,
    store::StoreError,
    tree::TreeError,
    workshop::Workshop,
};

/// What to build, and where.
#[derive(Debug, Clone, Copy)]
pub struct Build<'a> {
    /// Directory for downloads and results; made when absent.
    pub cache: &'a Path,
    /// Address of the Debian archive; found on this machine when absent.
    pub mirror: Option<&'a str>,
    /// Base address of a snapshot service, asked as `<base>/file/<SHA-1>` for what the archive no longer carries.
    pub snapshot: Option<&'a str>,
    /// Architecture of the guest.
    pub arch: Arch,
    /// Name of the recipe, such as `postgresql-17`.
    pub recipe: &'a str,
    /// Refuse to resolve anything: the lock file must be there and its packages obtainable.
    pub locked: bool,
    /// Resolve anew even though a lock file is there.
    pub update: bool,
    /// Static program that becomes `/init`.
    pub init: &'a Path,
    /// Static program that becomes `/sovereign-guest` on the agent disk.
    pub agent: &'a Path,
    /// The caller's own lock file; one in the cache when absent. Written when it is not there and by `update` only:
    /// what it no longer gives is replaced by a local lock in the cache.
    pub lock: Option<&'a Path>,
}

impl Build<'_> {
    /// The lock that the build follows, there or not: the caller's, else the cache's own.
    #[must_use]
    pub fn lock_file(&self) -> PathBuf {
        let own = || {
            let name = format!("{}-{}.lock", self.recipe, self.arch.debian());
            self.cache.join(name)
        };
        self.lock.map_or_else(own, Path::to_owned)
    }
}

/// What a build is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Reads the index of a suite.
    Resolving {
        /// The suite.
        suite: String,
    },
    /// Has downloaded some packages.
    Downloading {
        /// Number of packages done.
        done: usize,
        /// Number of packages to download.
        total: usize,
    },
    /// Unpacks the packages of the root.
    Unpacking {
        /// Number of packages.
        packages: usize,
    },
    /// Writes the root image.
    WritingRoot,
    /// Somebody should look at this.
    Warning(String),
}

/// Why there is no image.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such recipe.
    #[error("no recipe {name:?}; there are: {known}")]
    UnknownRecipe {
        /// The name.
        name: String,
        /// The known names.
        known: String,
    },
    /// No mirror is known.
    #[error(transparent)]
    Mirror(#[from] MirrorError),
    /// A built-in key is not usable.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The repository cannot be used.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// There is no usable lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A locked version is neither in the cache nor in the archive, and the build may not resolve another.
    #[error("lock {} cannot be followed and the build must not pick another version", lock.display())]
    LockedGone {
        /// The lock.
        lock: PathBuf,
        /// The package, its version and where it was asked for.
        source: DownloadError,
    },
    /// A package cannot be obtained.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// The cache failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A package cannot be read.
    #[error("cannot read package {name}")]
    Package {
        /// Its name.
        name: String,
        /// Why.
        source: DebError,
    },
    /// A package cannot be added to the root.
    #[error("cannot add {name} to the root")]
    Tree {
        /// Package or recipe.
        name: String,
        /// Why.
        source: TreeError,
    },
    /// The root is not complete.
    #[error(transparent)]
    Needed(#[from] NeededError),
    /// The kernel cannot be made ready.
    #[error(transparent)]
    Kernel(#[from] GuestKernelError),
    /// An image cannot be written.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// Init or agent cannot be read, or the cache cannot be made.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cache's file system is full, or a quota or limit is reached. Nothing unfinished has a final name.
    #[error("there is no room in {}", cache.display())]
    NoRoom {
        /// The cache.
        cache: PathBuf,
        /// What could not be written.
        source: Box<Error>,
    },
    /// A part of the build ended unexpectedly.
    #[error("the build of the kernel files ended unexpectedly")]
    Panicked,
}

impl Error {
    /// A package in the cache is not what was fetched.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::Store(StoreError::Damaged { .. }))
    }

    /// Tells a full disk from all else, however deep in the chain of causes.
    pub(crate) fn with_room_named(self, cache: &Path) -> Self {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        let is_full = |error: &io::Error| matches!(error.kind(), FileTooLarge | QuotaExceeded | StorageFull);
        let first: Option<&(dyn std::error::Error + 'static)> = Some(&self);
        let mut causes = std::iter::successors(first, |error| error.source());
        // A transparent variant hands out the cause of what it wraps.
        let full = matches!(self, Self::Erofs(ErofsError::NoRoom { .. }))
            || causes.any(|error| error.downcast_ref().is_some_and(is_full));
        if !full {
            return self;
        }
        Self::NoRoom {
            cache: cache.to_owned(),
            source: Box::new(self),
        }
    }
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Builds the files a guest boots from, or finds them in the cache.
///
/// Needs no network when the lock and its packages are there, and reads no big file when nothing has changed.
///
/// # Errors
/// Each step has its own kind; see [`enum@Error`].
pub fn build(request: &Build<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Artifacts, Error> {
    in_workshop(request, |workshop| workshop.build(progress))
}

/// Finds what [`build`] would find in the cache; `None` when it would have to make something. Changes nothing.
///
/// # Errors
/// As [`build`], for what cannot be read.
pub fn find(request: &Build<'_>, progress: &mut dyn FnMut(Progress)) -> Result<Option<Artifacts>, Error> {
    in_workshop(request, |workshop| workshop.find(progress))
}

fn in_workshop<T>(
    request: &Build<'_>,
    work: impl FnOnce(&Workshop<'_>) -> Result<T, Error>,
) -> Result<T, Error> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let unknown = || Error::UnknownRecipe {
        name: request.recipe.to_owned(),
        known: Recipe::names().collect::<Vec<_>>().join(", "),
    };
    let recipe = Recipe::named(request.recipe).ok_or_else(unknown)?;
    // Results are named by absolute paths: who reads them may run elsewhere.
    let cache = std::path::absolute(request.cache).map_err(io_error("find", request.cache))?;
    let request = &Build {
        cache: &cache,
        ..*request
    };
    work(&Workshop::new(request, recipe, Mkfs::find()?, now, None))
}
