//! The packages that the merged suites offer, by name.

use std::{cmp::Ordering, collections::BTreeMap};

use crate::{Arch, Archive, digest::is_sha256, version};

/// One version of one package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) version: String,
    pub(crate) arch: String,
    pub(crate) archive: Archive,
    /// Path below the archive's base address.
    pub(crate) path: String,
    pub(crate) sha256: String,
    /// In bytes.
    pub(crate) size: u64,
    /// The text of `Depends`.
    pub(crate) depends: String,
}

/// The newest offer of each package.
#[derive(Debug, Default)]
pub(crate) struct Index {
    offers: BTreeMap<String, Offer>,
}

impl Index {
    /// Adds the stanzas of a Packages file; of one package the newest version stays.
    pub(crate) fn add(&mut self, archive: Archive, arch: Arch, packages: &str) {
        for stanza in packages.split("\n\n") {
            let Some((name, offer)) = parse(archive, stanza) else {
                continue;
            };
            if offer.arch != arch.debian() && offer.arch != "all" {
                continue;
            }
            let newer = self
                .offers
                .get(name)
                .is_none_or(|old| version::compare(&offer.version, &old.version) == Ordering::Greater);
            if newer {
                self.offers.insert(name.to_owned(), offer);
            }
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Offer> {
        self.offers.get(name)
    }
}

fn parse(archive: Archive, stanza: &str) -> Option<(&str, Offer)> {
    let fields: BTreeMap<&str, &str> = stanza
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| !name.starts_with(' '))
        .collect();
    let text = |name| fields.get(name).map(|value| (*value).to_owned());
    let sha256 = text("SHA256").filter(|digest| is_sha256(digest))?;
    let path = text("Filename").filter(|path| is_plain_path(path))?;
    let size = fields.get("Size")?.parse().ok()?;
    let depends = text("Depends").unwrap_or_default();
    let offer = Offer {
        version: text("Version")?,
        arch: text("Architecture")?,
        archive,
        path,
        sha256,
        size,
        depends,
    };
    Some((fields.get("Package")?, offer))
}

/// Whether a pool path stays below the archive's address.
pub(crate) fn is_plain_path(path: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"/._+~-%:".contains(&byte);
    path.bytes().all(allowed)
        && path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != "..")
}

/// Names in a `Depends` text: the first alternative of each clause.
pub(crate) fn dependency_names(depends: &str) -> impl Iterator<Item = &str> {
    depends.split(',').filter_map(|clause| {
        let first = clause.split('|').next()?.trim();
        first
            .split([' ', '(', ':', '['])
            .next()
            .filter(|name| !name.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stanza(name: &str, version: &str, path: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nFilename: {path}\nSize: 5\nSHA256: {}\nDescription: x\n y: z",
            "0".repeat(64)
        )
    }

    #[test]
    fn the_newest_version_of_all_suites_wins() {
        let mut index = Index::default();
        index.add(
            Archive::Main,
            Arch::Amd64,
            &format!(
                "{}\n\n{}\n",
                stanza("a", "1.9", "pool/a1"),
                stanza("b", "2", "pool/b")
            ),
        );
        index.add(Archive::Security, Arch::Amd64, &stanza("a", "1.10", "pool/a2"));
        index.add(Archive::Main, Arch::Amd64, &stanza("a", "1.10~rc1", "pool/a3"));
        let offer = index.get("a").unwrap();
        assert_eq!(
            (offer.version.as_str(), offer.archive, offer.path.as_str()),
            ("1.10", Archive::Security, "pool/a2")
        );
        assert!(index.get("b").is_some() && index.get("c").is_none());
    }

    #[test]
    fn other_architectures_and_odd_paths_are_left_out() {
        let mut index = Index::default();
        index.add(Archive::Main, Arch::Arm64, &stanza("a", "1", "pool/a"));
        for path in ["../a", "/a", "pool//a", "http://x@y/a", "pool/a b", "pool/./a"] {
            index.add(Archive::Main, Arch::Amd64, &stanza("a", "1", path));
        }
        assert!(index.get("a").is_none());
    }

    #[test]
    fn dependency_names_are_first_alternatives() {
        let names: Vec<_> = dependency_names("linux-image-6 (= 1), a:any | b, c [amd64],d").collect();
        assert_eq!(names, ["linux-image-6", "a", "c", "d"]);
    }
}
