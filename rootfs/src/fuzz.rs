//! Parsers of this crate as plain functions for the fuzz workspace.

use std::path::Path;

use crate::{
    Arch, Archive, deb,
    index::{Index, dependency_names, is_plain_path},
    keyring::Keyring,
    lock::Lock,
    needed,
    release::Release,
    tree::{Node, Tree},
};

/// Every entry lies inside the tree, below directories.
fn assert_sound(tree: &Tree) {
    for (path, _) in tree.iter() {
        assert!(
            !path.split('/').any(|part| matches!(part, "" | "." | "..")),
            "{path:?}"
        );
        for (at, _) in path.match_indices('/') {
            assert!(
                matches!(tree.get(&path[..at]), Some(Node::Directory { .. })),
                "{path:?}"
            );
        }
    }
}

/// A package.
pub fn deb(data: &[u8]) {
    if let Ok(tree) = deb::read(data) {
        assert_sound(&tree);
    }
}

/// An uncompressed tar.
pub fn tar(data: &[u8]) {
    if let Ok(tree) = deb::read_tar(data) {
        assert_sound(&tree);
    }
}

/// A signed Release file, whose text is also read as if a signature had been good.
pub fn inrelease(data: &[u8]) {
    if let Ok(keyring) = Keyring::debian() {
        let verified = keyring.verify(Archive::Main, "InRelease", data, 1_700_000_000);
        assert!(verified.is_err(), "nobody else has Debian's keys");
    }
    let text = String::from_utf8_lossy(data);
    if let Ok(release) = Release::parse("trixie", &text, 0, None) {
        let _ = release.file("trixie", "main/binary-amd64/Packages.xz");
    }
}

/// A Packages index.
pub fn packages(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut index = Index::default();
    index.add(Archive::Main, Arch::Amd64, &text);
    for stanza in text.split("\n\n") {
        let name = stanza.lines().find_map(|line| line.strip_prefix("Package: "));
        if let Some(offer) = name.and_then(|name| index.get(name)) {
            assert!(is_plain_path(&offer.path) && offer.sha256.len() == 64);
            let _ = dependency_names(&offer.depends).count();
        }
    }
}

/// A lock file: what is read is written the same.
pub fn lock(data: &[u8]) {
    let path = Path::new("lock");
    if let Ok(lock) = Lock::parse(&String::from_utf8_lossy(data), path)
        && let Ok(text) = lock.text()
    {
        let again = Lock::parse(&text, path).map_err(|error| error.to_string());
        assert!(again.is_ok_and(|again| again == lock));
    }
}

/// The libraries that a program needs.
pub fn elf_needed(data: &[u8]) {
    let _ = needed::needed(data);
}

/// Whether a parser takes these bytes, by the name of its target.
#[must_use]
pub fn is_read(target: &str, data: &[u8]) -> bool {
    match target {
        "deb" => deb::read(data).is_ok(),
        "tar" => deb::read_tar(data).is_ok(),
        "lock" => Lock::parse(&String::from_utf8_lossy(data), Path::new("lock")).is_ok(),
        _ => needed::needed(data).is_ok_and(|names| !names.is_empty()),
    }
}
