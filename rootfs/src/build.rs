//! The build as a whole: lock, packages, kernel, root, agent disk, initramfs; each step skipped when its result is there.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use thiserror::Error;

use crate::{
    Arch,
    deb::{self, DebError},
    digest::sha256_hex,
    download::{DownloadError, absent, download},
    erofs::{ErofsError, Mkfs},
    fetch::Fetcher,
    guest_kernel::{GuestKernel, GuestKernelError, KERNEL_FORMAT},
    keyring::{KeyError, Keyring},
    lock::{Lock, LockError, LockedPackage, resolve},
    manifest::{self, Artifacts},
    mirror::{MirrorError, Mirrors},
    needed::{self, NeededError},
    recipe::{RECIPE_VERSION, Recipe},
    repository::{Repository, RepositoryError},
    store::{Store, StoreError, write_atomically},
    tree::{Tree, TreeError},
};

/// What to build, and where.
#[derive(Debug, Clone, Copy)]
pub struct Build<'a> {
    /// Directory for downloads and results; made when absent.
    pub cache: &'a Path,
    /// Address of the Debian archive; found on this machine when absent.
    pub mirror: Option<&'a str>,
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
    /// Lock file; one in the cache when absent.
    pub lock: Option<&'a Path>,
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
    #[error(
        "a locked package is gone and the build must not pick another version; run it once without --locked"
    )]
    LockedGone(#[source] DownloadError),
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
    /// A part of the build ended unexpectedly.
    #[error("the build of the kernel files ended unexpectedly")]
    Panicked,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
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
    let mkfs = Mkfs::find()?;
    Workshop {
        request,
        recipe,
        mkfs,
        store: package_store(request.cache),
        now,
        keyring: None,
    }
    .build(progress)
}

/// Everything that stays the same during one build.
struct Workshop<'a> {
    request: &'a Build<'a>,
    recipe: Recipe,
    mkfs: Mkfs,
    store: Store,
    /// Seconds since 1970.
    now: u64,
    /// Whose signatures count; Debian's keys when absent.
    keyring: Option<Keyring>,
}

fn package_store(cache: &Path) -> Store {
    Store::new(cache.join("packages"))
}

impl Workshop<'_> {
    fn build(&self, progress: &mut dyn FnMut(Progress)) -> Result<Artifacts, Error> {
        let lock_path = self.lock_path();
        let old = if self.request.update && !self.request.locked {
            None
        } else {
            self.load_lock(&lock_path, progress)?
        };
        if let Some(lock) = &old
            && let Some(artifacts) = manifest::load(&self.manifest_path(lock)?)
        {
            return Ok(artifacts);
        }
        let lock = self.obtain(old, &lock_path, progress)?;
        let artifacts = self.make(&lock, progress)?;
        manifest::save(&self.manifest_path(&lock)?, &artifacts)?;
        Ok(artifacts)
    }

    fn lock_path(&self) -> PathBuf {
        let own = || {
            self.request.cache.join(format!(
                "{}-{}.lock",
                self.recipe.name,
                self.request.arch.debian()
            ))
        };
        self.request.lock.map_or_else(own, Path::to_owned)
    }

    fn load_lock(&self, path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Option<Lock>, Error> {
        let Some(lock) = Lock::load(path)? else {
            let absent = LockError::Absent {
                path: path.to_owned(),
            };
            return if self.request.locked {
                Err(absent.into())
            } else {
                Ok(None)
            };
        };
        let Some(reason) = lock.misfit(&self.recipe, self.request.arch) else {
            return Ok(Some(lock));
        };
        if self.request.locked {
            let recipe = self.recipe.name.to_owned();
            return Err(LockError::DoesNotFit {
                path: path.to_owned(),
                recipe,
                reason,
            }
            .into());
        }
        progress(Progress::Warning(format!(
            "lock file {} is replaced: {reason}",
            path.display()
        )));
        Ok(None)
    }

    /// A lock all of whose packages are in the store; saved when it is a new one.
    fn obtain(
        &self,
        old: Option<Lock>,
        path: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Lock, Error> {
        if let Some(lock) = old {
            match self.fetch(&lock, progress) {
                Ok(()) => return Ok(lock),
                Err(Error::Download(error)) if error.is_gone() && self.request.locked => {
                    return Err(Error::LockedGone(error));
                }
                Err(Error::Download(error)) if error.is_gone() => {
                    let text = format!("{error}: it is gone from the archive, resolving the lock anew");
                    progress(Progress::Warning(text));
                }
                Err(error) => return Err(error),
            }
        }
        let mirrors = Mirrors::discover(self.request.mirror)?;
        let keyring = self.keyring.clone().map_or_else(Keyring::debian, Ok)?;
        let repository = Repository {
            mirrors: &mirrors,
            keyring: &keyring,
            fetcher: &Fetcher::new(),
            store: &Store::new(self.request.cache.join("indexes")),
            seen: self.request.cache.join("seen"),
            now: self.now,
        };
        let mut tell = |suite: &str| {
            progress(Progress::Resolving {
                suite: suite.to_owned(),
            })
        };
        let index = repository.index(self.recipe.suite, self.request.arch, &mut tell)?;
        let lock = resolve(&index, &self.recipe, self.request.arch)?;
        self.fetch(&lock, progress)?;
        lock.save(path)?;
        Ok(lock)
    }

    fn fetch(&self, lock: &Lock, progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
        let packages = absent(lock, &self.store);
        if packages.is_empty() {
            return Ok(());
        }
        let mirrors = Mirrors::discover(self.request.mirror)?;
        let total = packages.len();
        let mut tell = |done| progress(Progress::Downloading { done, total });
        tell(0);
        download(&packages, &mirrors, &Fetcher::new(), &self.store, &mut tell)?;
        Ok(())
    }

    /// The key of everything that goes into a build, without reading the programs.
    fn manifest_path(&self, lock: &Lock) -> Result<PathBuf, Error> {
        let stamp = |path: &Path| manifest::stamp(path).map_err(io_error("read", path));
        let key = format!(
            "{}\n{}\n{}\n{}",
            self.tools(),
            lock.text()?,
            stamp(self.request.init)?,
            stamp(self.request.agent)?
        );
        Ok(self
            .request
            .cache
            .join("manifests")
            .join(format!("{}.json", sha256_hex(key.as_bytes()))))
    }

    fn tools(&self) -> String {
        format!(
            "{} {RECIPE_VERSION} {KERNEL_FORMAT} {}",
            self.recipe.name,
            self.mkfs.version()
        )
    }

    fn make(&self, lock: &Lock, progress: &mut dyn FnMut(Progress)) -> Result<Artifacts, Error> {
        let images = self.request.cache.join("images");
        fs::create_dir_all(&images).map_err(io_error("create", &images))?;
        let (root, kernel_files) = thread::scope(|scope| {
            let kernel_files = scope.spawn(|| self.kernel_files(lock, &images));
            let root = self.root(lock, &images, progress);
            (root, kernel_files.join().map_err(|_| Error::Panicked))
        });
        let files = kernel_files??;
        let digest = sha256_hex(format!("{}\n{}\n{}", self.tools(), lock.text()?, files.programs).as_bytes());
        Ok(Artifacts {
            kernel: files.kernel.vmlinux(),
            initramfs: files.initramfs,
            root: root?,
            agent_disk: files.agent_disk,
            kernel_version: files.kernel.version().to_owned(),
            digest,
            packages: lock
                .packages
                .iter()
                .map(|(name, package)| format!("{name} {}", package.version))
                .collect(),
            tool: self.mkfs.version().to_owned(),
            built: true,
        })
    }

    fn root(&self, lock: &Lock, images: &Path, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf, Error> {
        let packages = || lock.packages.iter().filter(|(name, _)| **name != lock.kernel);
        let digests: Vec<&str> = packages().map(|(_, package)| package.sha256.as_str()).collect();
        let target = images.join(name(
            "root",
            "erofs",
            &[&self.tools(), lock.arch.debian(), &digests.join(" ")],
        ));
        if target.exists() {
            return Ok(target);
        }
        progress(Progress::Unpacking {
            packages: digests.len(),
        });
        let mut tree = Tree::default();
        for (name, package) in packages() {
            tree.merge(self.unpack(name, package)?)
                .map_err(|source| Error::Tree {
                    name: name.clone(),
                    source,
                })?;
        }
        let recipe = |source| Error::Tree {
            name: format!("recipe {}", self.recipe.name),
            source,
        };
        self.recipe.finish(&mut tree, lock.arch).map_err(recipe)?;
        needed::check(&tree, lock.arch)?;
        progress(Progress::WritingRoot);
        self.mkfs.erofs_from_tree(&tree, &target)?;
        Ok(target)
    }

    fn unpack(&self, name: &str, package: &LockedPackage) -> Result<Tree, Error> {
        let bytes = self.store.read(&package.sha256)?;
        deb::read(&bytes).map_err(|source| Error::Package {
            name: name.to_owned(),
            source,
        })
    }

    fn kernel_files(&self, lock: &Lock, images: &Path) -> Result<KernelFiles, Error> {
        let missing = || LockError::NoSuchPackage {
            name: lock.kernel.clone(),
        };
        let package = lock.packages.get(&lock.kernel).ok_or_else(missing)?;
        let directory = self
            .request
            .cache
            .join("kernels")
            .join(format!("{}-{KERNEL_FORMAT}", package.sha256));
        let kernel = match GuestKernel::open(&directory) {
            Some(kernel) => kernel,
            None => GuestKernel::prepare(&lock.kernel, &self.store.read(&package.sha256)?, &directory)?,
        };
        let read = |path: &Path| fs::read(path).map_err(io_error("read", path));
        let (init, agent) = (read(self.request.init)?, read(self.request.agent)?);
        let (init_digest, agent_digest) = (sha256_hex(&init), sha256_hex(&agent));
        let initramfs = images.join(name(
            "initramfs",
            "cpio",
            &[&self.tools(), &package.sha256, &init_digest],
        ));
        if !initramfs.exists() {
            write_atomically(&initramfs, &kernel.initramfs(init)?)?;
        }
        let agent_disk = images.join(name(
            "agent",
            "erofs",
            &[&self.tools(), &package.sha256, &agent_digest],
        ));
        if !agent_disk.exists() {
            self.mkfs
                .erofs_from_tree(&kernel.agent_tree(agent)?, &agent_disk)?;
        }
        Ok(KernelFiles {
            kernel,
            initramfs,
            agent_disk,
            programs: format!("{init_digest} {agent_digest}"),
        })
    }
}

struct KernelFiles {
    kernel: GuestKernel,
    initramfs: PathBuf,
    agent_disk: PathBuf,
    /// Digests of init and agent.
    programs: String,
}

/// File name of a result by everything that goes into it.
fn name(kind: &str, suffix: &str, inputs: &[&str]) -> String {
    format!(
        "{kind}-{}.{suffix}",
        &sha256_hex(inputs.join("\n").as_bytes())[..32]
    )
}

#[cfg(test)]
#[path = "build_tests.rs"]
mod tests;
