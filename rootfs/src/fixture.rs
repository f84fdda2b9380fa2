//! A signed repository on loopback that carries every package of a recipe, and builds against it.

use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use sovereign_kernel::testing::Module;

use crate::{
    Arch, Build, Error, Progress,
    digest::{sha1_hex, sha256_hex},
    erofs::Mkfs,
    lock::Lock,
    locking::AtHand,
    manifest::Artifacts,
    recipe::Recipe,
    scratch::Scratch,
    testing::{Server, Signer, TarEntry, deb, xz},
    workshop::Workshop,
};

pub(crate) const RECIPE: &str = "postgresql-17";
pub(crate) const DATE: &str = "Thu, 12 Nov 2026 00:00:00 UTC";
const SUITES: [(&str, &str); 3] = [
    ("/debian", "trixie"),
    ("/debian", "trixie-updates"),
    ("/debian-security", "trixie-security"),
];
const KERNEL: &str = "linux-image-6-cloud-amd64";
const RELEASE: &str = "6-cloud-amd64";

/// A mirror, a cache, and what a build was told to do.
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) signer: Signer,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) mirror: String,
    pub(crate) warnings: RefCell<Vec<String>>,
    /// The caller's own lock file.
    pub(crate) lock: Option<PathBuf>,
    /// The snapshot service.
    pub(crate) snapshot: Option<String>,
    pub(crate) update: bool,
}

impl Fixture {
    /// Every package is there in version 1.
    pub(crate) fn new() -> Self {
        Self::in_directory(tempfile::tempdir().unwrap())
    }

    pub(crate) fn in_directory(directory: tempfile::TempDir) -> Self {
        let (server, signer) = (Server::start(), Signer::subkey());
        let mirror = format!("{}/debian", server.address);
        let fixture = Self {
            server,
            signer,
            directory,
            mirror,
            warnings: RefCell::default(),
            lock: None,
            snapshot: None,
            update: false,
        };
        for program in ["init", "agent"] {
            fs::write(fixture.program(program), program).unwrap();
        }
        fixture.publish("1");
        fixture
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.directory.path().join("cache")
    }

    /// The lock that the cache keeps where the caller has none.
    pub(crate) fn own_lock(&self) -> PathBuf {
        self.cache().join("postgresql-17-amd64.lock")
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts `version` of every package into the main suite; the other suites are empty.
    pub(crate) fn publish(&self, version: &str) {
        let names = Recipe::named(RECIPE).unwrap().packages();
        let stanzas: Vec<String> = names
            .chain(["linux-image-cloud-amd64", KERNEL])
            .map(|name| self.package(name, version))
            .collect();
        for (base, suite) in SUITES {
            let text = if suite == "trixie" {
                stanzas.join("\n\n")
            } else {
                String::new()
            };
            self.suite(base, suite, suite, DATE, &self.signer, &text);
        }
    }

    /// Puts a package into the pool and gives its stanza.
    pub(crate) fn package(&self, name: &str, version: &str) -> String {
        let body = if name == KERNEL {
            kernel(version)
        } else {
            // Enough that does not shrink to make the root the longest file of all.
            let noise: String = (0..20)
                .map(|at| sha256_hex(format!("{name} {at}").as_bytes()))
                .collect();
            let content = format!("{name} {version} {noise}");
            deb(&[TarEntry::file(&format!("./usr/share/{name}"), content.as_bytes())])
        };
        self.package_of(name, version, body)
    }

    pub(crate) fn package_of(&self, name: &str, version: &str, body: Vec<u8>) -> String {
        let path = format!("pool/{name}_{version}.deb");
        let stanza = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: {KERNEL}\n\
             Filename: {path}\nSize: {}\nSHA256: {}",
            body.len(),
            sha256_hex(&body)
        );
        self.server.put(&format!("/debian/{path}"), body);
        stanza
    }

    pub(crate) fn suite(
        &self,
        base: &str,
        suite: &str,
        codename: &str,
        date: &str,
        signer: &Signer,
        packages: &str,
    ) {
        let index = xz(packages.as_bytes());
        let release = format!(
            "Codename: {codename}\nDate: {date}\nSHA256:\n {} {} main/binary-amd64/Packages.xz\n",
            sha256_hex(&index),
            index.len()
        );
        self.server
            .put(&format!("{base}/dists/{suite}/InRelease"), signer.sign(&release));
        self.server.put(
            &format!("{base}/dists/{suite}/main/binary-amd64/Packages.xz"),
            index,
        );
    }

    /// Changes bytes of a served file.
    pub(crate) fn change(&self, path: &str, from: &[u8], to: &[u8]) {
        let mut files = self.server.files.lock().unwrap();
        let bytes = files.get_mut(path).unwrap();
        let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
        bytes.splice(at..at + from.len(), to.iter().copied());
    }

    pub(crate) fn drop_from_pool(&self, suffix: &str) {
        self.server
            .files
            .lock()
            .unwrap()
            .retain(|path, _| !path.ends_with(suffix));
    }

    /// Makes a snapshot service of everything that is now in the pool.
    pub(crate) fn take_snapshot(&mut self) {
        let files = Arc::clone(&self.server.files);
        let pool: Vec<Vec<u8>> = files
            .lock()
            .unwrap()
            .iter()
            .filter(|(path, _)| path.starts_with("/debian/pool/"))
            .map(|(_, body)| body.clone())
            .collect();
        for body in pool {
            self.server
                .put(&format!("/snapshot/file/{}", sha1_hex(&body)), body);
        }
        self.snapshot = Some(format!("{}/snapshot/", self.server.address));
    }

    /// A caller's lock file made by a first build; the cache is then empty again.
    pub(crate) fn commit_lock(&mut self) -> Vec<u8> {
        self.lock(false).unwrap();
        let path = self.directory.path().join("sovereign.lock");
        fs::rename(self.own_lock(), &path).unwrap();
        fs::remove_dir_all(self.cache()).unwrap();
        let text = fs::read(&path).unwrap();
        self.lock = Some(path);
        text
    }

    /// The lock that a build follows, its packages in the store.
    pub(crate) fn lock(&self, locked: bool) -> Result<Lock, Error> {
        self.with(locked, &Mkfs::fake(), &mut |_| {}, |workshop, progress| {
            let known = workshop.known(progress)?;
            match workshop.at_hand(&known, progress)? {
                Some(AtHand::Packages(lock)) => Ok(lock),
                Some(AtHand::Results(_)) => panic!("nothing was built"),
                None => workshop.obtain(&known, &Scratch::open(workshop.request.cache)?, progress),
            }
        })
    }

    /// A whole build with the real mkfs.erofs.
    pub(crate) fn build(&self, locked: bool) -> Result<Artifacts, Error> {
        self.build_watched(locked, &mut |_| {})
    }

    /// The same; `watch` sees each step before it begins.
    pub(crate) fn build_watched(
        &self,
        locked: bool,
        watch: &mut dyn FnMut(&Progress),
    ) -> Result<Artifacts, Error> {
        let mkfs = Mkfs::find().expect("the tests need erofs-utils");
        self.with(locked, &mkfs, watch, |workshop, progress| {
            workshop.build(progress)
        })
    }

    fn with<T>(
        &self,
        locked: bool,
        mkfs: &Mkfs,
        watch: &mut dyn FnMut(&Progress),
        act: impl FnOnce(&Workshop<'_>, &mut dyn FnMut(Progress)) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let (cache, init, agent) = (self.cache(), self.program("init"), self.program("agent"));
        let request = Build {
            cache: &cache,
            mirror: Some(&self.mirror),
            snapshot: self.snapshot.as_deref(),
            arch: Arch::Amd64,
            recipe: RECIPE,
            locked,
            update: self.update,
            init: &init,
            agent: &agent,
            lock: self.lock.as_deref(),
        };
        let workshop = Workshop::new(
            &request,
            Recipe::named(RECIPE).unwrap(),
            mkfs.clone(),
            self.signer.now(),
            Some(self.signer.keyring_of_both()),
        );
        let mut progress = |step| {
            watch(&step);
            if let Progress::Warning(text) = step {
                self.warnings.borrow_mut().push(text);
            }
        };
        act(&workshop, &mut progress)
    }
}

/// A kernel package with everything a guest needs built in, and two modules.
pub(crate) fn kernel(version: &str) -> Vec<u8> {
    let config: String = sovereign_kernel::REQUIREMENTS
        .iter()
        .map(|requirement| format!("CONFIG_{}=y\n", requirement.symbol))
        .collect();
    let builtin: String = crate::guest_kernel::EARLY_MODULES
        .iter()
        .chain(crate::guest_kernel::LATE_MODULES)
        .map(|name| format!("kernel/{name}.ko\n"))
        .collect();
    let below = format!("./usr/lib/modules/{RELEASE}");
    let modules = [
        Module {
            modinfo: "alias=test:b\0depends=a\0",
            needs: &["a_symbol"],
            ..Module::default()
        }
        .elf(),
        Module {
            modinfo: "depends=\0",
            exports: &["a_symbol"],
            ..Module::default()
        }
        .elf(),
    ];
    deb(&[
        TarEntry::file(
            &format!("./boot/vmlinuz-{RELEASE}"),
            format!("\x7fELF {version}").as_bytes(),
        ),
        TarEntry::file(&format!("./boot/config-{RELEASE}"), config.as_bytes()),
        TarEntry::file(&format!("{below}/modules.builtin"), builtin.as_bytes()),
        TarEntry::file(&format!("{below}/kernel/b.ko"), &modules[0]),
        TarEntry::file(&format!("{below}/kernel/a.ko.xz"), &xz(&modules[1])),
    ])
}

/// All files below `directory` with their content, for comparisons.
pub(crate) fn files_below(directory: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let mut files = std::collections::BTreeMap::new();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                files.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    files
}
