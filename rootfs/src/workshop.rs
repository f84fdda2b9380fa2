//! One build from lock to results; each step is skipped when its result is there.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
};

use crate::{
    build::{Build, Error, Progress, io_error},
    deb,
    digest::sha256_hex,
    erofs::{Mkfs, Packing},
    guest_kernel::{GuestKernel, KERNEL_FORMAT},
    keyring::Keyring,
    lock::{Lock, LockError, LockedPackage},
    locking::{AtHand, warn},
    manifest::{self, Artifacts, Manifest},
    needed, parallel,
    recipe::{RECIPE_VERSION, Recipe},
    scratch::Scratch,
    seal::{self, Condition},
    store::{Store, StoreError},
    tree::Tree,
};

/// Everything that stays the same during one build.
pub(crate) struct Workshop<'a> {
    pub(crate) request: &'a Build<'a>,
    pub(crate) recipe: Recipe,
    pub(crate) store: Store,
    /// Seconds since 1970.
    pub(crate) now: u64,
    /// Whose signatures count; Debian's keys when absent.
    pub(crate) keyring: Option<Keyring>,
    mkfs: Mkfs,
}

impl<'a> Workshop<'a> {
    pub(crate) fn new(
        request: &'a Build<'a>,
        recipe: Recipe,
        mkfs: Mkfs,
        now: u64,
        keyring: Option<Keyring>,
    ) -> Self {
        Self {
            request,
            recipe,
            store: Store::new(request.cache.join("packages")),
            now,
            keyring,
            mkfs,
        }
    }

    pub(crate) fn build(&self, progress: &mut dyn FnMut(Progress)) -> Result<Artifacts, Error> {
        self.results_or_new(progress)
            .map_err(|error| error.with_room_named(self.request.cache))
    }

    /// What an earlier build left for the same inputs; makes and fetches nothing.
    pub(crate) fn find(&self, progress: &mut dyn FnMut(Progress)) -> Result<Option<Artifacts>, Error> {
        let known = self.known(progress)?;
        Ok(match self.at_hand(&known, progress)? {
            Some(AtHand::Results(artifacts)) => Some(*artifacts),
            Some(AtHand::Packages(_)) | None => None,
        })
    }

    fn results_or_new(&self, progress: &mut dyn FnMut(Progress)) -> Result<Artifacts, Error> {
        let known = self.known(progress)?;
        let at_hand = self.at_hand(&known, progress)?;
        if let Some(AtHand::Results(artifacts)) = at_hand {
            return Ok(*artifacts);
        }
        let scratch = &Scratch::open(self.request.cache)?;
        let lock = match at_hand {
            Some(AtHand::Packages(lock)) => lock,
            _ => self.obtain(&known, scratch, progress)?,
        };
        let artifacts = self.healed(&lock, scratch, progress, |progress| {
            self.make(&lock, scratch, progress)
        })?;
        let manifest = Manifest {
            artifacts,
            packages: lock
                .packages
                .values()
                .map(|package| package.sha256.clone())
                .collect(),
        };
        manifest::save(scratch, &self.manifest_path(&lock)?, &manifest)?;
        Ok(manifest.artifacts)
    }

    /// What `act` gives, with damaged packages of `lock` fetched again once.
    pub(crate) fn healed<T>(
        &self,
        lock: &Lock,
        scratch: &Scratch,
        progress: &mut dyn FnMut(Progress),
        act: impl Fn(&mut dyn FnMut(Progress)) -> Result<T, Error>,
    ) -> Result<T, Error> {
        match act(progress) {
            Err(error) if error.is_damage() => {}
            result => return result,
        }
        // All of them, not only the one that was met first.
        for (name, package) in &lock.packages {
            if let Err(StoreError::Damaged { path }) = self.store.read(&package.sha256) {
                let path = path.display();
                warn(
                    progress,
                    format!("package {name} at {path} is damaged and is fetched again"),
                );
                self.store.remove(&package.sha256)?;
            }
        }
        self.fetch(lock, scratch, progress)?;
        act(progress)
    }

    /// The results of an earlier build by this lock.
    pub(crate) fn results(&self, lock: &Lock) -> Result<Option<Artifacts>, Error> {
        Ok(manifest::load(&self.manifest_path(lock)?))
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

    fn make(
        &self,
        lock: &Lock,
        scratch: &Scratch,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Artifacts, Error> {
        let images = self.request.cache.join("images");
        fs::create_dir_all(&images).map_err(io_error("create", &images))?;
        let mut notices = Notices::default();
        let (root, kernel_files) = thread::scope(|scope| {
            let kernel_files = scope.spawn(|| self.kernel_files(lock, scratch, &images, &mut notices));
            let root = self.root(lock, scratch, &images, progress);
            (root, kernel_files.join().map_err(|_| Error::Panicked))
        });
        notices.tell(progress);
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

    fn root(
        &self,
        lock: &Lock,
        scratch: &Scratch,
        images: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PathBuf, Error> {
        let packages = || lock.packages.iter().filter(|(name, _)| **name != lock.kernel);
        let digests: Vec<&str> = packages().map(|(_, package)| package.sha256.as_str()).collect();
        let target = images.join(name(
            "root",
            "erofs",
            &[&self.tools(), lock.arch.debian(), &digests.join(" ")],
        ));
        let mut notices = Notices::default();
        if notices.whole(&target) {
            return Ok(target);
        }
        notices.tell(progress);
        progress(Progress::Unpacking {
            packages: digests.len(),
        });
        let mut tree = self.unpack_all(packages().collect())?;
        let recipe = |source| Error::Tree {
            name: format!("recipe {}", self.recipe.name),
            source,
        };
        self.recipe.finish(&mut tree, lock.arch).map_err(recipe)?;
        needed::check(&tree, lock.arch)?;
        progress(Progress::WritingRoot);
        self.image(&tree, Packing::Lz4, scratch, &target)?;
        Ok(target)
    }

    fn image(&self, tree: &Tree, packing: Packing, scratch: &Scratch, target: &Path) -> Result<(), Error> {
        let work = scratch.directory()?;
        let image = self.mkfs.image(tree, packing, work.path())?;
        Ok(seal::publish(scratch, image, target)?)
    }

    /// The packages as one tree, merged by name: later ones replace files of earlier ones.
    fn unpack_all(&self, mut packages: Vec<(&String, &LockedPackage)>) -> Result<Tree, Error> {
        // Large ones first, so that no thread is left alone with one at the end.
        packages.sort_by_key(|(_, package)| std::cmp::Reverse(package.size));
        let trees = parallel::map(&packages, |(name, package)| self.unpack(name, package))?;
        let mut trees: Vec<(&String, Tree)> = packages.iter().map(|(name, _)| *name).zip(trees).collect();
        trees.sort_by_key(|(name, _)| *name);
        let mut root = Tree::default();
        for (name, tree) in trees {
            root.merge(tree).map_err(|source| Error::Tree {
                name: name.clone(),
                source,
            })?;
        }
        Ok(root)
    }

    fn unpack(&self, name: &str, package: &LockedPackage) -> Result<Tree, Error> {
        let bytes = self.store.read(&package.sha256)?;
        deb::read(&bytes).map_err(|source| Error::Package {
            name: name.to_owned(),
            source,
        })
    }

    fn kernel_files(
        &self,
        lock: &Lock,
        scratch: &Scratch,
        images: &Path,
        notices: &mut Notices,
    ) -> Result<KernelFiles, Error> {
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
            Ok(kernel) => kernel,
            Err(damaged) => {
                notices.damaged.extend(damaged);
                let bytes = self.store.read(&package.sha256)?;
                GuestKernel::prepare(&lock.kernel, &bytes, scratch, &directory)?
            }
        };
        let read = |path: &Path| fs::read(path).map_err(io_error("read", path));
        let (init, agent) = (read(self.request.init)?, read(self.request.agent)?);
        let (init_digest, agent_digest) = (sha256_hex(&init), sha256_hex(&agent));
        let initramfs = images.join(name(
            "initramfs",
            "cpio",
            &[&self.tools(), &package.sha256, &init_digest],
        ));
        if !notices.whole(&initramfs) {
            seal::publish(scratch, kernel.initramfs(init)?.as_slice(), &initramfs)?;
        }
        let agent_disk = images.join(name(
            "agent",
            "erofs",
            &[&self.tools(), &package.sha256, &agent_digest],
        ));
        if !notices.whole(&agent_disk) {
            self.image(&kernel.agent_tree(agent)?, Packing::Plain, scratch, &agent_disk)?;
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

/// Files of the cache that were found damaged and are made anew.
#[derive(Debug, Default)]
struct Notices {
    damaged: Vec<PathBuf>,
}

impl Notices {
    /// Whether a finished file is there and is what it was.
    fn whole(&mut self, path: &Path) -> bool {
        let condition = seal::check(path);
        if condition == Condition::Damaged {
            self.damaged.push(path.to_owned());
        }
        condition == Condition::Whole
    }

    fn tell(self, progress: &mut dyn FnMut(Progress)) {
        for path in self.damaged {
            warn(
                progress,
                format!("{} is damaged and is made anew", path.display()),
            );
        }
    }
}

/// File name of a result by everything that goes into it.
fn name(kind: &str, suffix: &str, inputs: &[&str]) -> String {
    format!(
        "{kind}-{}.{suffix}",
        &sha256_hex(inputs.join("\n").as_bytes())[..32]
    )
}

#[cfg(test)]
#[path = "workshop_tests.rs"]
mod tests;
