//! Where a locked package may come from, in the order in which the places are asked.
//!
//! Every place is as untrusted as the next: what counts is the SHA-256 of the lock. A snapshot service keeps every
//! file that the archive ever carried and names files by SHA-1 alone, so a lock carries that too, as an address.

use crate::{
    lock::LockedPackage,
    mirror::{MirrorError, Mirrors, http_base},
};

/// The places.
#[derive(Debug, Clone)]
pub(crate) struct Sources {
    mirrors: Mirrors,
    snapshot: Option<String>,
}

impl Sources {
    /// # Errors
    /// When no mirror is known or an address is not plain http.
    pub(crate) fn discover(mirror: Option<&str>, snapshot: Option<&str>) -> Result<Self, MirrorError> {
        let snapshot = snapshot.map(|address| {
            http_base(address).ok_or_else(|| MirrorError::BadSnapshot {
                address: address.to_owned(),
            })
        });
        Ok(Self {
            mirrors: Mirrors::discover(mirror)?,
            snapshot: snapshot.transpose()?,
        })
    }

    pub(crate) fn mirrors(&self) -> &Mirrors {
        &self.mirrors
    }

    /// The addresses of a package.
    pub(crate) fn of(&self, package: &LockedPackage) -> Vec<String> {
        let pool = format!("{}/{}", self.mirrors.of(package.archive), package.path);
        let snapshot = self.snapshot.as_ref().zip(package.sha1.as_ref());
        [
            Some(pool),
            snapshot.map(|(base, sha1)| format!("{base}/file/{sha1}")),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Why a place was not asked for `package`, if one was left out.
    pub(crate) fn silent(&self, package: &LockedPackage) -> Option<&'static str> {
        (self.snapshot.is_some() && package.sha1.is_none())
            .then_some("the snapshot service was not asked: it finds files by SHA-1 and the lock has none")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Archive;

    fn package(sha1: Option<&str>) -> LockedPackage {
        LockedPackage {
            version: "1".to_owned(),
            arch: "all".to_owned(),
            archive: Archive::Security,
            sha256: "0".repeat(64),
            sha1: sha1.map(str::to_owned),
            size: 1,
            path: "pool/a.deb".to_owned(),
        }
    }

    #[test]
    fn the_pool_comes_first_and_the_snapshot_by_sha1() {
        let sources = |snapshot| Sources::discover(Some("http://m.example/debian"), snapshot).unwrap();
        let pool = "http://m.example/debian-security/pool/a.deb";
        assert_eq!(sources(None).of(&package(Some("ab"))), [pool]);
        let with = sources(Some("http://s.example/"));
        assert_eq!(with.of(&package(Some("ab"))), [pool, "http://s.example/file/ab"]);
        assert_eq!(with.of(&package(None)), [pool]);
        assert!(with.silent(&package(None)).is_some() && with.silent(&package(Some("ab"))).is_none());
        assert!(sources(None).silent(&package(None)).is_none());
    }

    #[test]
    fn a_snapshot_address_must_be_plain_http() {
        for address in ["https://s.example", "s.example", "http://"] {
            assert!(matches!(
                Sources::discover(Some("http://m.example/debian"), Some(address)),
                Err(MirrorError::BadSnapshot { .. })
            ));
        }
    }
}
