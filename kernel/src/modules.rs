//! The module files of a kernel package and what they say about themselves.
//!
//! Works from the modules alone, because a Debian kernel package carries no `modules.dep`.

use std::{collections::BTreeMap, num::NonZero, sync::Arc, thread};

use thiserror::Error;

use crate::{
    catalogue::Catalogue,
    decompress::{DecompressError, decompress},
    module_info::ModuleInfo,
};

/// Most modules of one package; Debian's largest kernel has about 5,000.
const MODULES_MAX: usize = 20_000;

/// Longest unpacked module in bytes; the longest of Debian have about 30 MiB.
const MODULE_MAX: u64 = 128 << 20;

/// The modules of one kernel package as they are packaged.
#[derive(Debug, Default)]
pub struct ModuleSet {
    files: BTreeMap<String, ModuleFile>,
    texts: BTreeMap<&'static str, Arc<[u8]>>,
}

#[derive(Debug)]
struct ModuleFile {
    path: String,
    bytes: Arc<[u8]>,
}

/// The lists that a package brings beside its modules.
const TEXTS: [&str; 3] = [BUILTIN, BUILTIN_INFO, ORDER];
pub(crate) const BUILTIN: &str = "modules.builtin";
pub(crate) const BUILTIN_INFO: &str = "modules.builtin.modinfo";
pub(crate) const ORDER: &str = "modules.order";

/// Why modules could not be made ready.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// Neither a file of the package nor built in.
    #[error("module {name}, needed by {wanted_by}, is neither in the kernel package nor built in")]
    NotFound {
        /// The missing module.
        name: String,
        /// The module or list that names it.
        wanted_by: String,
    },
    /// Modules depend on each other in a circle, or too deeply.
    #[error("module {name} depends on itself, or on a chain of too many modules")]
    Circle {
        /// One module of the circle.
        name: String,
    },
    /// The file does not decompress.
    #[error("cannot unpack module {path}")]
    Unpack {
        /// Its path.
        path: String,
        /// Why.
        source: DecompressError,
    },
    /// The file is not a module.
    #[error("cannot read .modinfo of {path}: {reason}")]
    ModInfo {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    },
    /// More than any kernel has.
    #[error("kernel package has {count} modules, more than {MODULES_MAX}, or an index would pass 256 MiB")]
    TooMany {
        /// Number of module files.
        count: usize,
    },
}

/// The one spelling of a module name: file names use `-` and `_` at will.
#[must_use]
pub fn canonical_name(name: &str) -> String {
    name.replace('-', "_")
}

impl ModuleSet {
    /// Makes a set from `(path inside /lib/modules/<version>, bytes)`; files that are neither modules nor lists of them
    /// are left out. Of two modules of one name the first path counts.
    pub fn new(files: impl IntoIterator<Item = (String, Arc<[u8]>)>) -> Self {
        let mut set = Self::default();
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort();
        for (path, bytes) in files {
            if let Some(text) = TEXTS.into_iter().find(|name| *name == path) {
                set.texts.insert(text, bytes);
            } else if let Some(name) = module_name(&path) {
                set.files.entry(name).or_insert(ModuleFile { path, bytes });
            }
        }
        set
    }

    /// Every file of the package that belongs below `/lib/modules/<version>`, as it is packaged.
    pub fn packaged(&self) -> impl Iterator<Item = (&str, &Arc<[u8]>)> {
        let modules = self.files.values().map(|file| (file.path.as_str(), &file.bytes));
        modules.chain(self.texts.iter().map(|(name, bytes)| (*name, bytes)))
    }

    /// Unpacks every module and reads what it says, on all processors.
    ///
    /// # Errors
    /// When a file is no module, or there are too many.
    pub fn catalogue(&self) -> Result<Catalogue, ModuleError> {
        if self.files.len() > MODULES_MAX {
            return Err(ModuleError::TooMany {
                count: self.files.len(),
            });
        }
        let files: Vec<(&String, &ModuleFile)> = self.files.iter().collect();
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let share = files.len().div_ceil(threads).max(1);
        let read = |files: &[(&String, &ModuleFile)]| -> Result<Vec<_>, ModuleError> {
            let info = |(name, file): &(&String, &ModuleFile)| {
                Ok(((*name).clone(), file.path.clone(), file.info()?))
            };
            files.iter().map(info).collect()
        };
        let parts: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = files
                .chunks(share)
                .map(|files| scope.spawn(move || read(files)))
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        });
        let mut modules = Vec::with_capacity(self.files.len());
        for part in parts {
            modules.extend(part?);
        }
        Ok(Catalogue::new(modules, |name| self.text(name)))
    }

    /// The ELF file of a module.
    ///
    /// # Errors
    /// When there is no such module or it does not unpack.
    pub fn unpacked(&self, name: &str) -> Result<Vec<u8>, ModuleError> {
        let file = self.files.get(name).ok_or_else(|| ModuleError::NotFound {
            name: name.to_owned(),
            wanted_by: "the caller".to_owned(),
        })?;
        file.unpacked()
    }

    fn text(&self, name: &str) -> String {
        self.texts
            .get(name)
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .unwrap_or_default()
    }
}

impl ModuleFile {
    fn unpacked(&self) -> Result<Vec<u8>, ModuleError> {
        decompress(&self.bytes, MODULE_MAX).map_err(|source| ModuleError::Unpack {
            path: self.path.clone(),
            source,
        })
    }

    fn info(&self) -> Result<ModuleInfo, ModuleError> {
        ModuleInfo::read(&self.unpacked()?).map_err(|reason| ModuleError::ModInfo {
            path: self.path.clone(),
            reason,
        })
    }
}

/// The path without a compression suffix, as `modules.order` and `modules.builtin` have it.
pub(crate) fn strip_compression(path: &str) -> &str {
    [".xz", ".zst", ".gz"]
        .iter()
        .find_map(|suffix| path.strip_suffix(suffix))
        .unwrap_or(path)
}

pub(crate) fn module_name(path: &str) -> Option<String> {
    let file = strip_compression(path).rsplit('/').next()?;
    file.strip_suffix(".ko").map(canonical_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Module;

    fn set(files: &[(&str, &[u8])]) -> ModuleSet {
        ModuleSet::new(
            files
                .iter()
                .map(|(path, bytes)| ((*path).to_owned(), Arc::from(*bytes))),
        )
    }

    #[test]
    fn modules_and_their_lists_are_kept_as_they_are_and_nothing_else() {
        let elf = Module::default().elf();
        let set = set(&[
            ("kernel/a-b.ko", &elf),
            ("modules.order", b"kernel/a-b.ko\n"),
            ("build", b"x"),
            ("kernel/z/a_b.ko", b"another of the same name"),
        ]);
        let kept: Vec<_> = set.packaged().map(|(path, _)| path).collect();
        assert_eq!(kept, ["kernel/a-b.ko", "modules.order"]);
        assert_eq!(set.unpacked("a_b").unwrap(), elf);
        assert!(matches!(set.unpacked("c"), Err(ModuleError::NotFound { .. })));
    }

    #[test]
    fn files_that_are_no_modules_are_named() {
        let text = set(&[("k/a.ko", b"\x7fELF")]);
        assert!(matches!(text.catalogue(), Err(ModuleError::ModInfo { path, .. }) if path == "k/a.ko"));
        let garbage = set(&[("k/a.ko.xz", b"\xfd7zXZ\0bad")]);
        assert!(matches!(garbage.catalogue(), Err(ModuleError::Unpack { path, .. }) if path == "k/a.ko.xz"));
    }
}
