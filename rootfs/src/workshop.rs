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
    locking::AtHand,
    manifest::{self, Artifacts},
    needed,
    recipe::{RECIPE_VERSION, Recipe},
    store::{Store, write_atomically},
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
        let known = self.known(progress)?;
        let lock = match self.at_hand(&known, progress)? {
            Some(AtHand::Results(artifacts)) => return Ok(*artifacts),
            Some(AtHand::Packages(lock)) => lock,
            None => self.obtain(&known, progress)?,
        };
        let artifacts = self.make(&lock, progress)?;
        manifest::save(&self.manifest_path(&lock)?, &artifacts)?;
        Ok(artifacts)
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
        self.mkfs.erofs_from_tree(&tree, Packing::Lz4, &target)?;
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
            let tree = kernel.agent_tree(agent)?;
            self.mkfs.erofs_from_tree(&tree, Packing::Plain, &agent_disk)?;
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
#[path = "workshop_tests.rs"]
mod tests;
