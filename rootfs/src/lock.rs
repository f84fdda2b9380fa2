//! The lock file: exactly which packages an image is made of.

use std::{collections::BTreeMap, fs, io, path::Path};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    Arch, Archive,
    digest::{is_sha1, is_sha256, sha1_hex},
    index::{Index, dependency_names, is_plain_path},
    recipe::Recipe,
    store::{Store, StoreError, write_atomically},
};

/// The only format of lock files so far.
const FORMAT: u32 = 1;
/// Longest lock file that is read, in bytes.
const LOCK_MAX: u64 = 1 << 20;

/// The packages of an image, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Version of this format.
    pub format: u32,
    /// Code name of the release.
    pub suite: String,
    /// Architecture of the guest.
    pub arch: Arch,
    /// Name of the kernel package among the packages.
    pub kernel: String,
    /// All packages by name.
    pub packages: BTreeMap<String, LockedPackage>,
}

/// One package of a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    /// Debian version.
    pub version: String,
    /// Debian architecture (`all` or the guest's).
    pub arch: String,
    /// Which archive carries it.
    pub archive: Archive,
    /// SHA-256 of the .deb.
    pub sha256: String,
    /// SHA-1 of the .deb: the name by which a snapshot service finds it, never what is trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha1: Option<String>,
    /// Length of the .deb in bytes.
    pub size: u64,
    /// Path below the archive's base address.
    pub path: String,
}

/// Why there is no usable lock.
#[derive(Debug, Error)]
pub enum LockError {
    /// The suites do not offer a package.
    #[error("package {name} is not in the archive")]
    NoSuchPackage {
        /// Its name.
        name: String,
    },
    /// The meta package names no kernel.
    #[error("package {meta} depends on no linux-image package")]
    NoKernel {
        /// The meta package.
        meta: String,
    },
    /// A lock is required and there is none.
    #[error("there is no lock file {} and the build must not make one", path.display())]
    Absent {
        /// Where it should be.
        path: std::path::PathBuf,
    },
    /// The lock is for something else.
    #[error("lock file {} does not fit recipe {recipe}: {reason}", path.display())]
    DoesNotFit {
        /// The file.
        path: std::path::PathBuf,
        /// The recipe.
        recipe: String,
        /// What differs.
        reason: String,
    },
    /// The file cannot be read.
    #[error("cannot read lock file {}", path.display())]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not a lock.
    #[error("lock file {} is malformed", path.display())]
    Parse {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// The file is a lock with impossible content.
    #[error("lock file {} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The lock cannot be written as text.
    #[error("cannot write the lock as TOML")]
    Format(#[from] toml::ser::Error),
    /// The file cannot be written.
    #[error("cannot save the lock")]
    Write(#[from] StoreError),
}

/// Picks the offered version of every package of `recipe` and of the current kernel.
pub(crate) fn resolve(index: &Index, recipe: &Recipe, arch: Arch) -> Result<Lock, LockError> {
    let kernel = kernel_package(index, arch)?;
    let names = recipe.packages().map(str::to_owned).chain([kernel.clone()]);
    let packages = names
        .map(|name| Ok((name.clone(), locked(index, &name)?)))
        .collect::<Result<_, LockError>>()?;
    Ok(Lock {
        format: FORMAT,
        suite: recipe.suite.to_owned(),
        arch,
        kernel,
        packages,
    })
}

fn kernel_package(index: &Index, arch: Arch) -> Result<String, LockError> {
    let meta = arch.kernel_package();
    let offer = index.get(meta).ok_or_else(|| LockError::NoSuchPackage {
        name: meta.to_owned(),
    })?;
    let name = dependency_names(&offer.depends).find(|name| name.starts_with("linux-image-"));
    name.map(str::to_owned).ok_or_else(|| LockError::NoKernel {
        meta: meta.to_owned(),
    })
}

fn locked(index: &Index, name: &str) -> Result<LockedPackage, LockError> {
    let offer = index
        .get(name)
        .ok_or_else(|| LockError::NoSuchPackage {
            name: name.to_owned(),
        })?
        .clone();
    Ok(LockedPackage {
        version: offer.version,
        arch: offer.arch,
        archive: offer.archive,
        sha256: offer.sha256,
        sha1: None,
        size: offer.size,
        path: offer.path,
    })
}

impl Lock {
    /// Loads a lock file; nothing when there is none.
    ///
    /// # Errors
    /// When the file cannot be read or is no lock.
    pub fn load(path: &Path) -> Result<Option<Self>, LockError> {
        let read = |source| LockError::Read {
            path: path.to_owned(),
            source,
        };
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(read(error)),
            Ok(metadata) if metadata.len() > LOCK_MAX => {
                return Err(LockError::Damaged {
                    path: path.to_owned(),
                    reason: format!("it has {} bytes, more than {LOCK_MAX}", metadata.len()),
                });
            }
            Ok(_) => {}
        }
        let text = fs::read_to_string(path).map_err(read)?;
        Self::parse(&text, path).map(Some)
    }

    /// The lock in `text`; `path` is for messages.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, LockError> {
        let path = path.to_owned();
        match toml::from_str::<Self>(text) {
            Ok(lock) => match lock.damage() {
                None => Ok(lock),
                Some(reason) => Err(LockError::Damaged { path, reason }),
            },
            Err(source) => Err(LockError::Parse {
                path,
                source: Box::new(source),
            }),
        }
    }

    /// What no resolver writes: such a file was cut, edited or made up.
    fn damage(&self) -> Option<String> {
        if !self.packages.contains_key(&self.kernel) {
            return Some(format!("its kernel {} is not among its packages", self.kernel));
        }
        let odd = |package: &LockedPackage| {
            let sha1 = package.sha1.as_deref().is_none_or(is_sha1);
            !is_sha256(&package.sha256) || !sha1 || !is_plain_path(&package.path)
        };
        let (name, _) = self.packages.iter().find(|(_, package)| odd(package))?;
        Some(format!("digest or path of package {name} is none"))
    }

    /// Saves the lock file atomically.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), LockError> {
        write_atomically(path, self.text()?.as_bytes())?;
        Ok(())
    }

    /// The lock as text; equal locks have equal texts.
    pub(crate) fn text(&self) -> Result<String, LockError> {
        Ok(format!(
            "# Written by `sovereign build`. Renew it with `sovereign build --update`.\n{}",
            toml::to_string(self)?
        ))
    }

    /// The lock with the SHA-1 of each package, of files in `store` that were checked against their SHA-256.
    pub(crate) fn with_sha1(&self, store: &Store) -> Result<Self, StoreError> {
        let mut lock = self.clone();
        for package in lock.packages.values_mut() {
            package.sha1 = Some(sha1_hex(&store.read(&package.sha256)?));
        }
        Ok(lock)
    }

    /// How `other` differs: one package by name and versions, of the rest the number.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<String> {
        let change = |name: &str, package: &LockedPackage| match other.packages.get(name) {
            Some(new) if new.version == package.version => None,
            Some(new) => Some(format!("{name} {} instead of {}", new.version, package.version)),
            None => Some(format!("no {name}")),
        };
        let gone = self
            .packages
            .iter()
            .filter_map(|(name, package)| change(name, package));
        let added = other
            .packages
            .keys()
            .filter(|name| !self.packages.contains_key(*name));
        let mut changes = gone.chain(added.map(|name| format!("{name} added")));
        let first = changes.next()?;
        match changes.count() {
            0 => Some(first),
            more => Some(format!("{first} and {more} more")),
        }
    }

    /// What keeps this lock from being one for `recipe`, if anything.
    pub(crate) fn misfit(&self, recipe: &Recipe, arch: Arch) -> Option<String> {
        if self.format != FORMAT {
            return Some(format!("format is {}, expected {FORMAT}", self.format));
        }
        if self.suite != recipe.suite || self.arch != arch {
            return Some(format!("it is for {} {}", self.suite, self.arch.debian()));
        }
        let mut wanted = recipe.packages().map(str::to_owned).chain([self.kernel.clone()]);
        wanted
            .find(|name| !self.packages.contains_key(name))
            .map(|name| format!("package {name} is missing"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(without: &str) -> Index {
        let recipe = Recipe::named("postgresql-17").unwrap();
        let mut index = Index::default();
        let digest = "0".repeat(64);
        for name in recipe
            .packages()
            .chain(["linux-image-6.1-cloud-amd64", "linux-image-cloud-amd64"])
        {
            if name != without {
                let stanza = format!(
                    "Package: {name}\nVersion: 1\nArchitecture: amd64\nFilename: pool/{name}.deb\nSize: 3\nSHA256: {digest}\n\
                     Depends: linux-image-6.1-cloud-amd64 (= 1)"
                );
                index.add(Archive::Main, Arch::Amd64, &stanza);
            }
        }
        index
    }

    #[test]
    fn a_lock_is_resolved_saved_and_loaded() {
        let recipe = Recipe::named("postgresql-17").unwrap();
        let lock = resolve(&index(""), &recipe, Arch::Amd64).unwrap();
        assert_eq!(lock.kernel, "linux-image-6.1-cloud-amd64");
        assert!(!lock.packages.contains_key("linux-image-cloud-amd64"));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/sovereign.lock");
        assert_eq!(Lock::load(&path).unwrap(), None);
        lock.save(&path).unwrap();
        assert_eq!(Lock::load(&path).unwrap(), Some(lock.clone()));
        assert_eq!(lock.misfit(&recipe, Arch::Amd64), None);
        assert!(lock.misfit(&recipe, Arch::Arm64).is_some());
        fs::write(&path, "format = 1\nunknown = 2\n").unwrap();
        assert!(matches!(Lock::load(&path), Err(LockError::Parse { .. })));
    }

    #[test]
    fn missing_packages_are_named() {
        let recipe = Recipe::named("postgresql-17").unwrap();
        for name in ["libpq5", "linux-image-cloud-amd64", "linux-image-6.1-cloud-amd64"] {
            let error = resolve(&index(name), &recipe, Arch::Amd64).unwrap_err();
            assert!(
                matches!(&error, LockError::NoSuchPackage { name: found } if found == name),
                "{error}"
            );
        }
        let mut lock = resolve(&index(""), &recipe, Arch::Amd64).unwrap();
        lock.packages.remove("libpq5");
        assert!(lock.misfit(&recipe, Arch::Amd64).unwrap().contains("libpq5"));
    }
}
