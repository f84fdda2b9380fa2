//! Which lock a build follows.
//!
//! The caller's lock is a promise to others who build by it: it is written when it is not there or on request, never
//! because an archive moved on. When it cannot be followed, all packages are resolved anew (a mix of old and new
//! versions was never offered by anybody) into a local lock in the cache, which stands in for it from then on.

use std::path::{Path, PathBuf};

use crate::{
    build::{Error, Progress},
    digest::sha256_hex,
    download::{absent, download},
    fetch::Fetcher,
    keyring::Keyring,
    lock::{Lock, LockError, resolve},
    manifest::Artifacts,
    repository::Repository,
    scratch::Scratch,
    source::Sources,
    store::Store,
    workshop::Workshop,
};

/// The locks that are there before the network is asked.
#[derive(Debug)]
pub(crate) struct Known {
    /// The lock at [`Known::path`], when it fits.
    base: Option<Lock>,
    /// What stands in for it.
    local: Option<Local>,
    path: PathBuf,
    /// Why the lock at [`Known::path`] does not fit.
    misfit: Option<String>,
    /// Where a new lock is written.
    target: PathBuf,
}

/// A lock that stands in for the caller's.
#[derive(Debug)]
struct Local {
    lock: Lock,
    /// How it differs and where both are.
    notice: String,
}

/// What can be had without the network.
#[derive(Debug)]
pub(crate) enum AtHand {
    /// The results of an earlier build.
    Results(Box<Artifacts>),
    /// A lock all of whose packages are in the store.
    Packages(Lock),
}

impl Workshop<'_> {
    /// The locks that are there.
    ///
    /// # Errors
    /// When the caller's lock is damaged, or absent or unfit in a build that may not resolve.
    pub(crate) fn known(&self, progress: &mut dyn FnMut(Progress)) -> Result<Known, Error> {
        let path = self.request.lock_file();
        let nothing = || Known {
            base: None,
            local: None,
            path: path.clone(),
            misfit: None,
            target: path.clone(),
        };
        if self.request.update && !self.request.locked {
            return Ok(nothing());
        }
        let Some(lock) = self.load(&path, progress)? else {
            return Ok(nothing());
        };
        let misfit = lock.misfit(&self.recipe, self.request.arch);
        if self.request.locked {
            return match misfit {
                None => Ok(Known {
                    base: Some(lock),
                    ..nothing()
                }),
                Some(reason) => Err(self.unfit(path, reason).into()),
            };
        }
        if self.request.lock.is_none() {
            // The cache's own lock binds nobody.
            let base = match misfit {
                None => Some(lock),
                Some(reason) => {
                    warn(
                        progress,
                        format!("lock file {} is replaced: {reason}", path.display()),
                    );
                    None
                }
            };
            return Ok(Known { base, ..nothing() });
        }
        let target = self.local_path(&lock)?;
        Ok(Known {
            local: self.local(&lock, &path, &target, progress),
            base: misfit.is_none().then_some(lock),
            path,
            misfit,
            target,
        })
    }

    /// What the known locks give without the network, best first.
    pub(crate) fn at_hand(
        &self,
        known: &Known,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Option<AtHand>, Error> {
        for (lock, notice) in known.locks() {
            let results = self.results(lock)?;
            if results.is_none() && !absent(lock, &self.store).is_empty() {
                continue;
            }
            if let Some(notice) = notice {
                warn(progress, notice.to_owned());
            }
            let packages = || AtHand::Packages(lock.clone());
            return Ok(Some(
                results.map_or_else(packages, |results| AtHand::Results(Box::new(results))),
            ));
        }
        Ok(None)
    }

    /// A lock all of whose packages were brought into the store; written when it is a new one.
    pub(crate) fn obtain(
        &self,
        known: &Known,
        scratch: &Scratch,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Lock, Error> {
        for (lock, notice) in known.locks() {
            match self.fetch(lock, scratch, progress) {
                Ok(()) => {
                    if let Some(notice) = notice {
                        warn(progress, notice.to_owned());
                    }
                    return Ok(lock.clone());
                }
                Err(Error::Download(error)) if error.is_gone() && self.request.locked => {
                    return Err(Error::LockedGone {
                        lock: known.path.clone(),
                        source: error,
                    });
                }
                Err(Error::Download(error)) if error.is_gone() => warn(progress, error.to_string()),
                Err(error) => return Err(error),
            }
        }
        let lock = self.resolve(scratch, progress)?;
        self.fetch(&lock, scratch, progress)?;
        let lock = self.healed(&lock, scratch, progress, |_| Ok(lock.with_sha1(&self.store)?))?;
        lock.save(&known.target)?;
        if known.target != known.path {
            let notice = match &known.base {
                Some(base) => notice(base, &lock, &known.path, &known.target),
                None => format!(
                    "lock {} does not fit, {} stands in for it: {}",
                    known.path.display(),
                    known.target.display(),
                    known.misfit.as_deref().unwrap_or_default()
                ),
            };
            warn(progress, notice);
        }
        Ok(lock)
    }

    /// One file per lock it stands in for; another snapshot service is another chance for the lock itself.
    fn local_path(&self, base: &Lock) -> Result<PathBuf, LockError> {
        let key = sha256_hex(format!("{}\n{}", self.request.snapshot.unwrap_or(""), base.text()?).as_bytes());
        let (recipe, arch) = (self.recipe.name, self.request.arch.debian());
        let name = format!("{recipe}-{arch}-{}.lock", &key[..32]);
        Ok(self.request.cache.join("locks").join(name))
    }

    /// The lock at `path`; one of the cache that is damaged is as good as none.
    fn load(&self, path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Option<Lock>, LockError> {
        match Lock::load(path) {
            Ok(None) if self.request.locked => Err(LockError::Absent {
                path: path.to_owned(),
            }),
            Err(error @ (LockError::Parse { .. } | LockError::Damaged { .. }))
                if self.request.lock.is_none() && !self.request.locked =>
            {
                warn(progress, format!("{error}: it is replaced"));
                Ok(None)
            }
            result => result,
        }
    }

    fn local(
        &self,
        base: &Lock,
        path: &Path,
        target: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Option<Local> {
        match Lock::load(target) {
            Ok(lock) => {
                let lock = lock.filter(|lock| lock.misfit(&self.recipe, self.request.arch).is_none())?;
                let notice = notice(base, &lock, path, target);
                Some(Local { lock, notice })
            }
            Err(error) => {
                warn(progress, format!("{error}: it is made anew when it is needed"));
                None
            }
        }
    }

    fn unfit(&self, path: PathBuf, reason: String) -> LockError {
        LockError::DoesNotFit {
            path,
            recipe: self.recipe.name.to_owned(),
            reason,
        }
    }

    fn resolve(&self, scratch: &Scratch, progress: &mut dyn FnMut(Progress)) -> Result<Lock, Error> {
        let sources = Sources::discover(self.request.mirror, self.request.snapshot)?;
        let keyring = self.keyring.clone().map_or_else(Keyring::debian, Ok)?;
        let repository = Repository {
            mirrors: sources.mirrors(),
            keyring: &keyring,
            fetcher: &Fetcher::new(),
            store: &Store::new(self.request.cache.join("indexes")),
            scratch,
            seen: self.request.cache.join("seen"),
            now: self.now,
        };
        let mut tell = |suite: &str| {
            progress(Progress::Resolving {
                suite: suite.to_owned(),
            })
        };
        let index = repository.index(self.recipe.suite, self.request.arch, &mut tell)?;
        Ok(resolve(&index, &self.recipe, self.request.arch)?)
    }

    pub(crate) fn fetch(
        &self,
        lock: &Lock,
        scratch: &Scratch,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), Error> {
        let packages = absent(lock, &self.store);
        if packages.is_empty() {
            return Ok(());
        }
        let sources = Sources::discover(self.request.mirror, self.request.snapshot)?;
        let total = packages.len();
        let mut tell = |done| progress(Progress::Downloading { done, total });
        tell(0);
        download(
            &packages,
            &sources,
            &Fetcher::new(),
            &self.store,
            scratch,
            &mut tell,
        )?;
        Ok(())
    }
}

impl Known {
    /// Each lock, and what to say when it is followed.
    fn locks(&self) -> impl Iterator<Item = (&Lock, Option<&str>)> {
        let base = self.base.iter().map(|lock| (lock, None));
        let local = self
            .local
            .iter()
            .map(|local| (&local.lock, Some(local.notice.as_str())));
        base.chain(local)
    }
}

fn notice(base: &Lock, local: &Lock, path: &Path, target: &Path) -> String {
    format!(
        "lock {} cannot be followed, {} stands in for it: {}",
        path.display(),
        target.display(),
        base.difference(local)
            .unwrap_or_else(|| "the same versions".to_owned())
    )
}

pub(crate) fn warn(progress: &mut dyn FnMut(Progress), text: String) {
    progress(Progress::Warning(text));
}

#[cfg(test)]
#[path = "locking_tests.rs"]
mod tests;
