//! The way from mirror to lock and packages, against a small signed repository on loopback.

use std::fs;

use super::*;
use crate::{
    DownloadError, KeyError, RepositoryError, StoreError,
    fixture::{DATE, Fixture},
    release::ReleaseError,
    testing::{Signer, xz},
};

#[test]
fn packages_are_locked_once_and_then_need_no_network() {
    let fixture = Fixture::new();
    let lock = fixture.lock(false).unwrap();
    assert_eq!(lock.packages["libpq5"].version, "1");
    fixture.server.files.lock().unwrap().clear();
    assert_eq!(fixture.lock(false).unwrap(), lock);
    assert_eq!(fixture.lock(true).unwrap(), lock);
    assert!(fixture.warnings.borrow().is_empty());
}

#[test]
fn a_locked_build_never_resolves() {
    let fixture = Fixture::new();
    assert!(matches!(
        fixture.lock(true),
        Err(Error::Lock(LockError::Absent { .. }))
    ));
}

/// Version 1 is gone from the pool, version 2 is there, the cache is empty.
fn moved_on(fixture: &Fixture) {
    fixture.publish("2");
    fixture.drop_from_pool("_1.deb");
}

fn version(lock: &Lock) -> &str {
    &lock.packages["libpq5"].version
}

#[test]
fn without_a_lock_of_the_caller_a_gone_version_is_resolved_anew_with_a_warning() {
    let fixture = Fixture::new();
    fixture.lock(false).unwrap();
    fs::remove_dir_all(fixture.cache().join("packages")).unwrap();
    moved_on(&fixture);
    assert!(matches!(fixture.lock(true), Err(Error::LockedGone { .. })));
    assert_eq!(version(&fixture.lock(false).unwrap()), "2");
    assert!(fixture.warnings.borrow()[0].contains(" is gone: "));
}

#[test]
fn a_local_lock_stands_in_for_one_that_is_gone_and_needs_no_network_later() {
    let mut fixture = Fixture::new();
    let committed = fixture.commit_lock();
    moved_on(&fixture);
    let lock = fixture.lock(false).unwrap();
    assert_eq!(version(&lock), "2");
    assert!(!fixture.own_lock().exists());
    let told = fixture.warnings.take().join("\n");
    assert!(
        told.contains("_1.deb (HTTP 404)") && told.contains("stands in for it: "),
        "{told}"
    );
    assert!(
        told.contains(" 2 instead of 1 and ") && told.contains("sovereign.lock cannot be followed"),
        "{told}"
    );

    fixture.server.files.lock().unwrap().clear();
    assert_eq!(fixture.lock(false).unwrap(), lock, "from the cache alone");
    assert!(
        fixture.warnings.take()[0].contains("stands in for it"),
        "told every time"
    );
    assert_eq!(fs::read(fixture.lock.as_ref().unwrap()).unwrap(), committed);
}

#[test]
fn a_locked_build_names_the_gone_package_and_ignores_the_local_lock() {
    let mut fixture = Fixture::new();
    let committed = fixture.commit_lock();
    fixture.publish("2");
    fixture.drop_from_pool("/libpq5_1.deb");
    fixture.lock(false).unwrap();
    let error = fixture.lock(true).unwrap_err();
    let Error::LockedGone { lock, source } = error else {
        panic!("{error}")
    };
    assert_eq!(Some(&lock), fixture.lock.as_ref());
    assert!(
        matches!(&source, DownloadError::Gone { name, version, .. } if name == "libpq5" && version == "1")
    );
    assert_eq!(fs::read(lock).unwrap(), committed);
}

#[test]
fn what_the_pool_dropped_comes_from_the_snapshot_by_hash() {
    let mut fixture = Fixture::new();
    fixture.commit_lock();
    fixture.take_snapshot();
    moved_on(&fixture);
    for locked in [true, false] {
        assert_eq!(version(&fixture.lock(locked).unwrap()), "1");
        fs::remove_dir_all(fixture.cache()).unwrap();
    }
    assert!(fixture.warnings.borrow().is_empty());
}

#[test]
fn a_snapshot_service_is_not_trusted() {
    let mut fixture = Fixture::new();
    fixture.commit_lock();
    fixture.take_snapshot();
    let sha1 = Lock::load(fixture.lock.as_ref().unwrap())
        .unwrap()
        .unwrap()
        .packages["libpq5"]
        .sha1
        .clone()
        .unwrap();
    fixture.change(&format!("/snapshot/file/{sha1}"), b"libpq5", b"libpqX");
    moved_on(&fixture);
    let error = fixture.lock(false).unwrap_err();
    assert!(
        matches!(&error, Error::Download(DownloadError::Store { name, .. }) if name == "libpq5"),
        "{error}"
    );
}

#[test]
fn a_place_that_does_not_answer_is_not_one_that_has_nothing() {
    let mut fixture = Fixture::new();
    fixture.commit_lock();
    moved_on(&fixture);
    // Bound and closed again: nobody listens there.
    let unused = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    fixture.snapshot = Some(format!("http://{unused}"));
    let error = fixture.lock(false).unwrap_err();
    assert!(
        matches!(error, Error::Download(DownloadError::Fetch { .. })),
        "{error}"
    );
}

#[test]
fn another_snapshot_service_is_another_chance_for_the_lock() {
    let mut fixture = Fixture::new();
    fixture.commit_lock();
    fixture.take_snapshot();
    let snapshot = fixture.snapshot.take();
    moved_on(&fixture);
    assert_eq!(version(&fixture.lock(false).unwrap()), "2");
    fixture.snapshot = snapshot;
    assert_eq!(version(&fixture.lock(false).unwrap()), "1");
}

#[test]
fn a_lock_without_sha1_says_why_the_snapshot_was_not_asked() {
    let mut fixture = Fixture::new();
    fixture.commit_lock();
    fixture.take_snapshot();
    let path = fixture.lock.clone().unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let old: String = text
        .lines()
        .filter(|line| !line.starts_with("sha1"))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_ne!(old, text);
    fs::write(&path, old).unwrap();
    moved_on(&fixture);
    let Error::LockedGone { source, .. } = fixture.lock(true).unwrap_err() else {
        panic!("another error")
    };
    assert!(source.to_string().contains("finds files by SHA-1"), "{source}");
}

#[test]
fn only_an_update_rewrites_the_lock_of_the_caller() {
    let mut fixture = Fixture::new();
    let committed = fixture.commit_lock();
    let path = fixture.lock.clone().unwrap();
    // Such as a lock from before the recipe had this package.
    let unfit = String::from_utf8(committed).unwrap().replace("libpq5", "libpq4");
    fs::write(&path, &unfit).unwrap();
    assert!(matches!(
        fixture.lock(true),
        Err(Error::Lock(LockError::DoesNotFit { .. }))
    ));
    assert_eq!(version(&fixture.lock(false).unwrap()), "1");
    assert!(
        fixture
            .warnings
            .take()
            .join("")
            .contains("package libpq5 is missing")
    );
    assert_eq!(fs::read_to_string(&path).unwrap(), unfit);

    fixture.update = true;
    let lock = fixture.lock(false).unwrap();
    assert_eq!(Lock::load(&path).unwrap(), Some(lock));
}

#[test]
fn damaged_locks_of_the_caller_are_refused_and_those_of_the_cache_made_anew() {
    let mut fixture = Fixture::new();
    let committed = fixture.commit_lock();
    let path = fixture.lock.clone().unwrap();
    let text = String::from_utf8(committed).unwrap();
    let cut = &text[..text.len() / 2];
    let no_digest = text.replacen("sha256 = \"", "sha256 = \"../", 1);
    let no_kernel = text.replace("kernel = \"linux", "kernel = \"minix");
    for damaged in ["\0\0\0", cut, &no_digest, &no_kernel] {
        fs::write(&path, damaged).unwrap();
        for locked in [true, false] {
            let error = fixture.lock(locked).unwrap_err().to_string();
            assert!(error.contains("sovereign.lock is "), "{error}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }
    fs::write(&path, &text).unwrap();
    moved_on(&fixture);
    let lock = fixture.lock(false).unwrap();
    let local = fs::read_dir(fixture.cache().join("locks"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    fs::write(&local, cut).unwrap();
    fixture.warnings.take();
    assert_eq!(fixture.lock(false).unwrap(), lock);
    assert!(fixture.warnings.take()[0].contains(&local.display().to_string()));

    fixture.lock = None;
    fs::write(fixture.own_lock(), cut).unwrap();
    assert!(fixture.lock(true).is_err());
    assert_eq!(version(&fixture.lock(false).unwrap()), "2");
    assert!(fixture.warnings.take()[0].contains("it is replaced"));
}

#[test]
fn a_newer_archive_does_not_move_a_lock() {
    let fixture = Fixture::new();
    let lock = fixture.lock(false).unwrap();
    fixture.publish("2");
    assert_eq!(fixture.lock(false).unwrap(), lock);
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
    let lock = fixture.lock(false).unwrap();
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
        b"Codename: trixie",
        b"Codename: trixie\nOrigin: Evil",
    );
    let error = fixture.lock(false).unwrap_err();
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
    let error = fixture.lock(false).unwrap_err();
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
    let error = fixture.lock(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Release(ReleaseError::WrongSuite { .. }))
        ),
        "{error}"
    );
    fixture.publish("1");
    fixture.lock(false).unwrap();
    fs::remove_file(fixture.own_lock()).unwrap();
    fixture.suite(
        "/debian",
        "trixie",
        "trixie",
        "Wed, 11 Nov 2026 00:00:00 UTC",
        &fixture.signer,
        "",
    );
    let error = fixture.lock(false).unwrap_err();
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
    let error = fixture.lock(false).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Repository(RepositoryError::Store(StoreError::Mismatch { .. }))
        ),
        "{error}"
    );
    fixture.server.put(index, good);
    fixture.change("/debian/pool/libpq5_1.deb", b"libpq5", b"libpqX");
    let error = fixture.lock(false).unwrap_err();
    assert!(
        matches!(&error, Error::Download(DownloadError::Store { name, .. }) if name == "libpq5"),
        "{error}"
    );
    assert!(!fixture.own_lock().exists(), "no lock without its packages");
}
