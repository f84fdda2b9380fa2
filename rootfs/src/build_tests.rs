//! The way from mirror to lock and packages, against a small signed repository on loopback.

use std::cell::RefCell;

use super::*;
use crate::{
    release::ReleaseError,
    testing::{Server, Signer, xz},
};

const RECIPE: &str = "postgresql-17";
const SUITES: [(&str, &str); 3] = [
    ("/debian", "trixie"),
    ("/debian", "trixie-updates"),
    ("/debian-security", "trixie-security"),
];
const DATE: &str = "Thu, 12 Nov 2026 00:00:00 UTC";

/// A mirror that carries every package of the recipe in one version.
struct Fixture {
    server: Server,
    signer: Signer,
    cache: tempfile::TempDir,
    mirror: String,
    warnings: RefCell<Vec<String>>,
}

impl Fixture {
    fn new() -> Self {
        let (server, signer) = (Server::start(), Signer::subkey());
        let mirror = format!("{}/debian", server.address);
        let warnings = RefCell::default();
        let fixture = Self {
            server,
            signer,
            cache: tempfile::tempdir().unwrap(),
            mirror,
            warnings,
        };
        fixture.publish("1");
        fixture
    }

    /// Puts `version` of every package into the main suite; the other suites are empty.
    fn publish(&self, version: &str) {
        let names = Recipe::named(RECIPE).unwrap().packages();
        let kernel = ["linux-image-cloud-amd64", "linux-image-6-cloud-amd64"];
        let stanzas: Vec<String> = names
            .chain(kernel)
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

    fn package(&self, name: &str, version: &str) -> String {
        let (path, body) = (format!("pool/{name}_{version}.deb"), format!("{name} {version}"));
        self.server.put(&format!("/debian/{path}"), body.clone());
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nDepends: linux-image-6-cloud-amd64\n\
             Filename: {path}\nSize: {}\nSHA256: {}",
            body.len(),
            sha256_hex(body.as_bytes())
        )
    }

    fn suite(&self, base: &str, suite: &str, codename: &str, date: &str, signer: &Signer, packages: &str) {
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

    fn change(&self, path: &str, from: &str, to: &str) {
        let mut files = self.server.files.lock().unwrap();
        let bytes = files.get_mut(path).unwrap();
        *bytes = String::from_utf8_lossy(bytes).replace(from, to).into_bytes();
    }

    fn drop_from_pool(&self, suffix: &str) {
        self.server
            .files
            .lock()
            .unwrap()
            .retain(|path, _| !path.ends_with(suffix));
    }

    fn obtain(&self, locked: bool) -> Result<Lock, Error> {
        let request = Build {
            cache: self.cache.path(),
            mirror: Some(&self.mirror),
            arch: Arch::Amd64,
            recipe: RECIPE,
            locked,
            update: false,
            init: Path::new("/none"),
            agent: Path::new("/none"),
            lock: None,
        };
        let workshop = Workshop {
            request: &request,
            recipe: Recipe::named(RECIPE).unwrap(),
            mkfs: Mkfs::fake(),
            store: package_store(request.cache),
            now: self.signer.now(),
            keyring: Some(self.signer.keyring_of_both()),
        };
        let mut progress = |step| {
            if let Progress::Warning(text) = step {
                self.warnings.borrow_mut().push(text);
            }
        };
        let path = workshop.lock_path();
        let old = workshop.load_lock(&path, &mut progress)?;
        workshop.obtain(old, &path, &mut progress)
    }
}

#[test]
fn packages_are_locked_once_and_then_need_no_network() {
    let fixture = Fixture::new();
    let lock = fixture.obtain(false).unwrap();
    assert_eq!(lock.packages["libpq5"].version, "1");
    fixture.server.files.lock().unwrap().clear();
    assert_eq!(fixture.obtain(false).unwrap(), lock);
    assert_eq!(fixture.obtain(true).unwrap(), lock);
    assert!(fixture.warnings.borrow().is_empty());
}

#[test]
fn a_locked_build_never_resolves() {
    let fixture = Fixture::new();
    assert!(matches!(
        fixture.obtain(true),
        Err(Error::Lock(LockError::Absent { .. }))
    ));
}

#[test]
fn a_version_gone_from_pool_and_cache_is_resolved_anew_with_a_warning() {
    let fixture = Fixture::new();
    fixture.obtain(false).unwrap();
    fs::remove_dir_all(fixture.cache.path().join("packages")).unwrap();
    fixture.publish("2");
    fixture.drop_from_pool("_1.deb");
    assert!(matches!(fixture.obtain(true), Err(Error::LockedGone(_))));
    assert_eq!(fixture.obtain(false).unwrap().packages["libpq5"].version, "2");
    assert!(fixture.warnings.borrow()[0].contains("gone from the archive"));
}

#[test]
fn a_newer_archive_does_not_move_a_lock() {
    let fixture = Fixture::new();
    let lock = fixture.obtain(false).unwrap();
    fixture.publish("2");
    assert_eq!(fixture.obtain(false).unwrap(), lock);
}

#[test]
fn security_updates_win() {
    let fixture = Fixture::new();
    let stanza = fixture.package("libpq5", "1+deb13u1");
    let files = std::sync::Arc::clone(&fixture.server.files);
    let body = files.lock().unwrap()["/debian/pool/libpq5_1+deb13u1.deb"].clone();
    fixture
        .server
        .put("/debian-security/pool/libpq5_1+deb13u1.deb", body);
    fixture.suite(
        "/debian-security",
        "trixie-security",
        "trixie-security",
        DATE,
        &fixture.signer,
        &stanza,
    );
    let lock = fixture.obtain(false).unwrap();
    assert_eq!(
        (
            lock.packages["libpq5"].version.as_str(),
            lock.packages["libpq5"].archive
        ),
        ("1+deb13u1", crate::Archive::Security)
    );
}

#[test]
fn a_changed_release_file_is_refused() {
    let fixture = Fixture::new();
    fixture.change(
        "/debian/dists/trixie/InRelease",
        "Codename: trixie",
        "Codename: trixie\nOrigin: Evil",
    );
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Key(KeyError::Untrusted { .. }))
        ),
        "{error}"
    );
}

#[test]
fn a_release_file_by_another_key_is_refused() {
    let fixture = Fixture::new();
    fixture.suite("/debian", "trixie", "trixie", DATE, &Signer::primary(), "");
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Key(KeyError::Untrusted { .. }))
        ),
        "{error}"
    );
}

#[test]
fn another_or_an_older_suite_is_refused() {
    let fixture = Fixture::new();
    fixture.suite("/debian", "trixie", "bookworm", DATE, &fixture.signer, "");
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Release(ReleaseError::WrongSuite { .. }))
        ),
        "{error}"
    );
    fixture.publish("1");
    fixture.obtain(false).unwrap();
    fs::remove_file(fixture.cache.path().join("postgresql-17-amd64.lock")).unwrap();
    fixture.suite(
        "/debian",
        "trixie",
        "trixie",
        "Wed, 11 Nov 2026 00:00:00 UTC",
        &fixture.signer,
        "",
    );
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Release(ReleaseError::Older { .. }))
        ),
        "{error}"
    );
}

#[test]
fn a_changed_index_or_package_is_refused() {
    let fixture = Fixture::new();
    let index = "/debian/dists/trixie/main/binary-amd64/Packages.xz";
    let good = fixture.server.files.lock().unwrap()[index].clone();
    fixture.server.put(index, xz(b"Package: evil"));
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Store(StoreError::Mismatch { .. }))
        ),
        "{error}"
    );
    fixture.server.put(index, good);
    fixture.change("/debian/pool/libpq5_1.deb", "libpq5", "libpqX");
    let error = fixture.obtain(false).unwrap_err();
    assert!(
        matches!(&error, Error::Download(DownloadError::Store { name, .. }) if name == "libpq5"),
        "{error}"
    );
    assert!(
        !fixture.cache.path().join("postgresql-17-amd64.lock").exists(),
        "no lock without its packages"
    );
}
