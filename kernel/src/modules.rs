//! Kernel modules of a package: what they depend on and the order in which they load.
//!
//! Works from the `.modinfo` of each module, because a Debian kernel package carries no `modules.dep`.

use std::collections::{BTreeMap, BTreeSet};

use object::{Object, ObjectSection};
use thiserror::Error;

use crate::decompress::{DecompressError, decompress};

/// The modules of one kernel package, not yet decompressed.
#[derive(Debug, Default)]
pub struct ModuleSet {
    files: BTreeMap<String, ModuleFile>,
    builtin: BTreeSet<String>,
}

#[derive(Debug)]
struct ModuleFile {
    path: String,
    bytes: Vec<u8>,
}

/// A decompressed module with what it says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyModule {
    /// Name with underscores, as in `/proc/modules`.
    pub name: String,
    /// Path inside `/lib/modules/<version>`, without a compression suffix.
    pub path: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
    /// Names of modules that must be loaded before it; built-in ones are left out.
    pub depends: Vec<String>,
    /// Aliases under which the kernel asks for it.
    pub aliases: Vec<String>,
}

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
    /// Modules depend on each other in a circle.
    #[error("module {name} depends on itself")]
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
}

/// The one spelling of a module name: file names use `-` and `_` at will.
#[must_use]
pub fn canonical_name(name: &str) -> String {
    name.replace('-', "_")
}

impl ModuleSet {
    /// Makes a set from `(path inside /lib/modules/<version>, bytes)` and the text of `modules.builtin`.
    pub fn new(files: impl IntoIterator<Item = (String, Vec<u8>)>, builtin: &str) -> Self {
        let files = files
            .into_iter()
            .filter_map(|(path, bytes)| Some((module_name(&path)?, ModuleFile { path, bytes })));
        Self {
            files: files.collect(),
            builtin: builtin.lines().filter_map(module_name).collect(),
        }
    }

    /// Number of module files.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether the package has no module at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Names built into the kernel.
    pub fn builtin(&self) -> impl Iterator<Item = &str> {
        self.builtin.iter().map(String::as_str)
    }

    /// The `wanted` modules and all they need, each after what it needs; built-in ones are skipped.
    ///
    /// # Errors
    /// When a wanted module or a hard dependency is neither a file nor built in, or a file is no module.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<ReadyModule>, ModuleError> {
        let mut walk = Walk {
            set: self,
            ready: Vec::new(),
            done: BTreeSet::new(),
            open: BTreeSet::new(),
        };
        for name in wanted {
            walk.visit(&canonical_name(name), "the list of wanted modules")?;
        }
        Ok(walk.ready)
    }

    fn has(&self, name: &str) -> bool {
        self.builtin.contains(name) || self.files.contains_key(name)
    }
}

struct Walk<'a> {
    set: &'a ModuleSet,
    ready: Vec<ReadyModule>,
    done: BTreeSet<String>,
    open: BTreeSet<String>,
}

impl Walk<'_> {
    // Recursion is bounded: a module on the current path is refused, so the depth is at most the number of files.
    fn visit(&mut self, name: &str, wanted_by: &str) -> Result<(), ModuleError> {
        if self.done.contains(name) || self.set.builtin.contains(name) {
            return Ok(());
        }
        let file = self.set.files.get(name).ok_or_else(|| ModuleError::NotFound {
            name: name.to_owned(),
            wanted_by: wanted_by.to_owned(),
        })?;
        if !self.open.insert(name.to_owned()) {
            return Err(ModuleError::Circle {
                name: name.to_owned(),
            });
        }
        let bytes = decompress(&file.bytes).map_err(|source| ModuleError::Unpack {
            path: file.path.clone(),
            source,
        })?;
        let info = ModInfo::read(&bytes).map_err(|reason| ModuleError::ModInfo {
            path: file.path.clone(),
            reason,
        })?;
        for dependency in &info.depends {
            self.visit(dependency, name)?;
        }
        for dependency in &info.softdeps {
            if let Some(found) = self.soft(dependency)
                && !self.open.contains(&found)
            {
                self.visit(&found, name)?;
            }
        }
        self.open.remove(name);
        self.done.insert(name.to_owned());
        let depends = info
            .depends
            .into_iter()
            .filter(|name| !self.set.builtin.contains(name))
            .collect();
        let path = strip_compression(&file.path).to_owned();
        self.ready.push(ReadyModule {
            name: name.to_owned(),
            path,
            bytes,
            depends,
            aliases: info.aliases,
        });
        Ok(())
    }

    /// A soft dependency may name a crypto algorithm (`crc32c`), whose portable module is `<name>_generic`.
    fn soft(&self, name: &str) -> Option<String> {
        [name.to_owned(), format!("{name}_generic")]
            .into_iter()
            .find(|candidate| self.set.has(candidate))
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ModInfo {
    depends: Vec<String>,
    softdeps: Vec<String>,
    aliases: Vec<String>,
}

impl ModInfo {
    fn read(elf: &[u8]) -> Result<Self, String> {
        let file = object::read::elf::ElfFile64::<object::Endianness>::parse(elf)
            .map_err(|error| error.to_string())?;
        let section = file.section_by_name(".modinfo").ok_or("no such section")?;
        Ok(Self::parse(section.data().map_err(|error| error.to_string())?))
    }

    fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for entry in section.split(|byte| *byte == 0) {
            let entry = String::from_utf8_lossy(entry);
            match entry.split_once('=') {
                Some(("depends", names)) => {
                    info.depends.extend(
                        names
                            .split(',')
                            .filter(|name| !name.is_empty())
                            .map(canonical_name),
                    );
                }
                Some(("softdep", text)) => info.softdeps.extend(soft_before(text)),
                Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
                _ => {}
            }
        }
        info
    }
}

/// The names after `pre:` in a softdep line; `post:` ones are optional helpers and stay out.
fn soft_before(text: &str) -> Vec<String> {
    let mut before = false;
    let mut names = Vec::new();
    for word in text.split_whitespace() {
        match word {
            "pre:" => before = true,
            "post:" => before = false,
            name if before => names.push(canonical_name(name)),
            _ => {}
        }
    }
    names
}

fn strip_compression(path: &str) -> &str {
    [".xz", ".zst", ".gz"]
        .iter()
        .find_map(|suffix| path.strip_suffix(suffix))
        .unwrap_or(path)
}

fn module_name(path: &str) -> Option<String> {
    let file = strip_compression(path).rsplit('/').next()?;
    file.strip_suffix(".ko").map(canonical_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF64 object with a `.modinfo` section: header, names, modinfo, three section headers.
    fn module(modinfo: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let names_at = 64_u64;
        let info_at = names_at + names.len() as u64;
        let headers_at = (info_at + modinfo.len() as u64).next_multiple_of(8);
        let mut elf = vec![0_u8; 64];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[16] = 1; // ET_REL
        elf[18] = 62; // EM_X86_64
        elf[20] = 1;
        elf[40..48].copy_from_slice(&headers_at.to_le_bytes());
        elf[52] = 64;
        elf[58] = 64;
        elf[60] = 3;
        elf[62] = 2;
        elf.extend(names);
        elf.extend(modinfo.as_bytes());
        elf.resize(usize::try_from(headers_at).unwrap() + 64, 0);
        for (name, kind, at, length) in [
            (1_u32, 1_u32, info_at, modinfo.len()),
            (10, 3, names_at, names.len()),
        ] {
            let mut header = [0_u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[24..32].copy_from_slice(&at.to_le_bytes());
            header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
            elf.extend(header);
        }
        elf
    }

    fn set(modules: &[(&str, &str)], builtin: &str) -> ModuleSet {
        ModuleSet::new(
            modules
                .iter()
                .map(|(path, info)| ((*path).to_owned(), module(info))),
            builtin,
        )
    }

    fn names(ready: &[ReadyModule]) -> Vec<&str> {
        ready.iter().map(|module| module.name.as_str()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let set = set(
            &[
                ("kernel/a.ko", "depends=b-one,c\0alias=pci:*\0license=GPL\0"),
                ("kernel/b_one.ko", "depends=c\0"),
                ("kernel/c.ko", "depends=\0"),
                ("kernel/unused.ko", "depends=\0"),
            ],
            "",
        );
        let ready = set.closure(&["a", "c"]).unwrap();
        assert_eq!(names(&ready), ["c", "b_one", "a"]);
        assert_eq!(ready[2].aliases, ["pci:*"]);
        assert_eq!(ready[2].depends, ["b_one", "c"]);
    }

    #[test]
    fn built_in_modules_are_skipped_and_soft_ones_found_by_algorithm() {
        let set = set(
            &[
                (
                    "k/ext4.ko",
                    "depends=mbcache\0softdep=pre: crc32c nothere post: late\0",
                ),
                ("k/crc32c_generic.ko", ""),
            ],
            "kernel/fs/mbcache.ko\nkernel/drivers/virtio-pci.ko\n",
        );
        assert_eq!(
            names(&set.closure(&["virtio_pci", "ext4"]).unwrap()),
            ["crc32c_generic", "ext4"]
        );
    }

    #[test]
    fn missing_modules_name_who_wants_them() {
        let set = set(&[("k/a.ko", "depends=gone\0")], "");
        let error = set.closure(&["a"]).unwrap_err().to_string();
        assert!(
            error.contains("gone") && error.contains("needed by a,"),
            "{error}"
        );
        assert!(matches!(set.closure(&["b"]), Err(ModuleError::NotFound { .. })));
    }

    #[test]
    fn circles_and_files_that_are_no_modules_are_refused() {
        let circle = set(&[("k/a.ko", "depends=b\0"), ("k/b.ko", "depends=a\0")], "");
        assert!(matches!(circle.closure(&["a"]), Err(ModuleError::Circle { .. })));
        let text = ModuleSet::new([("k/a.ko".to_owned(), b"\x7fELF".to_vec())], "");
        assert!(matches!(text.closure(&["a"]), Err(ModuleError::ModInfo { .. })));
        let garbage = ModuleSet::new([("k/a.ko.xz".to_owned(), b"\xfd7zXZ\0bad".to_vec())], "");
        assert!(matches!(garbage.closure(&["a"]), Err(ModuleError::Unpack { .. })));
    }
}
