//! Whole builds against the small repository, with the real mkfs.erofs.

use std::collections::BTreeMap;

use super::*;
use crate::{
    NeededError,
    fixture::{DATE, Fixture, files_below},
    testing::{TarEntry, deb},
};

/// The bytes of each artifact.
fn bytes(artifacts: &Artifacts) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |path: &Path| fs::read(path).unwrap();
    BTreeMap::from([
        ("kernel", read(&artifacts.kernel)),
        ("initramfs", read(&artifacts.initramfs)),
        ("root", read(&artifacts.root)),
        ("agent disk", read(&artifacts.agent_disk)),
    ])
}

fn assert_same(left: &Artifacts, right: &Artifacts) {
    for ((name, left), (_, right)) in bytes(left).iter().zip(&bytes(right)) {
        assert!(!left.is_empty() && left == right, "{name} differs");
    }
}

#[test]
fn two_builds_far_from_each_other_give_the_same_bytes() {
    let (one, two) = (Fixture::new(), Fixture::new());
    let built = [one.build(false).unwrap(), two.build(false).unwrap()];
    assert_ne!(built[0].root, built[1].root);
    assert_same(&built[0], &built[1]);
    assert_eq!(built[0].digest, built[1].digest);
}

#[test]
fn a_cache_with_packages_needs_no_network_and_gives_the_same_bytes() {
    let fixture = Fixture::new();
    let first = fixture.build(false).unwrap();
    let before = bytes(&first);
    fixture.server.files.lock().unwrap().clear();
    let again = fixture.build(true).unwrap();
    assert!(first.built && !again.built);
    for directory in ["images", "kernels", "manifests", "indexes"] {
        fs::remove_dir_all(fixture.cache().join(directory)).unwrap();
    }
    let offline = fixture.build(true).unwrap();
    assert!(offline.built);
    assert!(bytes(&offline) == before, "other bytes");
}

#[test]
fn a_root_whose_programs_lack_a_library_is_no_image() {
    let fixture = Fixture::new();
    let stanza = fixture.package_of(
        "libpq5",
        "2",
        deb(&[TarEntry::file("./usr/bin/program", &fs::read("/bin/sh").unwrap())]),
    );
    fixture.suite(
        "/debian",
        "trixie-updates",
        "trixie-updates",
        DATE,
        &fixture.signer,
        &stanza,
    );
    let error = fixture.build(false).unwrap_err();
    let Error::Needed(NeededError::Missing { file, soname }) = &error else {
        panic!("{error}")
    };
    assert!(
        file == "usr/bin/program" && soname.starts_with("libc.so"),
        "{error}"
    );
    let images = files_below(&fixture.cache().join("images"));
    assert!(
        !images
            .keys()
            .any(|path| path.display().to_string().contains("root-")),
        "no root under its name"
    );
}
