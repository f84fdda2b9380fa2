//! What one module says about itself: `.modinfo` and the symbols it exports.

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use crate::modules::canonical_name;

/// Longest alias or symbol that is kept, in bytes; the longest ones of a Debian kernel have about 300.
const NAME_MAX: usize = 1024;
/// Most symbols that one module exports; the most of a Debian kernel are about 1,500.
const EXPORTS_MAX: usize = 1 << 16;

/// The entries of `.modinfo` that matter, and the exported symbols, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ModuleInfo {
    /// Canonical names.
    pub(crate) depends: Vec<String>,
    pub(crate) softdeps: Vec<String>,
    pub(crate) aliases: Vec<String>,
    pub(crate) exports: Vec<String>,
}

impl ModuleInfo {
    pub(crate) fn read(elf: &[u8]) -> Result<Self, String> {
        let file = object::read::elf::ElfFile64::<object::Endianness>::parse(elf)
            .map_err(|error| error.to_string())?;
        let section = file.section_by_name(".modinfo").ok_or("no such section")?;
        let mut info = Self::parse(section.data().map_err(|error| error.to_string())?);
        info.exports = exports(&file);
        Ok(info)
    }

    fn parse(section: &[u8]) -> Self {
        let mut info = Self::default();
        for entry in section
            .split(|byte| *byte == 0)
            .filter(|entry| entry.len() <= NAME_MAX)
        {
            let entry = String::from_utf8_lossy(entry);
            match entry.split_once('=') {
                Some(("depends", names)) => info.depends.extend(
                    names
                        .split(',')
                        .filter(|name| !name.is_empty())
                        .map(canonical_name),
                ),
                Some(("softdep", text)) => info.softdeps.push(text.to_owned()),
                Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
                _ => {}
            }
        }
        info
    }

    /// The names after `pre:` of the soft dependencies; `post:` ones are optional helpers and stay out.
    pub(crate) fn soft_before(&self) -> Vec<String> {
        let mut names = Vec::new();
        for text in &self.softdeps {
            let mut before = false;
            for word in text.split_whitespace() {
                match word {
                    "pre:" => before = true,
                    "post:" => before = false,
                    name if before => names.push(canonical_name(name)),
                    _ => {}
                }
            }
        }
        names
    }
}

/// As depmod finds them: a checksum symbol for each export, or else (kernels without MODVERSIONS) the list of names.
fn exports(file: &object::read::elf::ElfFile64<'_>) -> Vec<String> {
    let named = |bytes: &[u8]| {
        let name = std::str::from_utf8(bytes).ok()?;
        (!name.is_empty() && name.len() <= NAME_MAX).then(|| name.to_owned())
    };
    let checksums = file
        .symbols()
        .filter_map(|symbol| named(symbol.name_bytes().ok()?.strip_prefix(b"__crc_")?));
    let exports: Vec<String> = checksums.take(EXPORTS_MAX).collect();
    if !exports.is_empty() {
        return exports;
    }
    let list = file
        .section_by_name("__ksymtab_strings")
        .and_then(|section| section.data().ok());
    let names = list.unwrap_or_default().split(|byte| *byte == 0);
    names.filter_map(named).take(EXPORTS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Module;

    #[test]
    fn entries_and_exports_are_read() {
        let module = Module {
            modinfo: "depends=b-one,c\0alias=pci:*\0license=GPL\0alias=x-y\0softdep=pre: crc32c post: late\0softdep=z\0",
            exports: &["one", "two"],
            needs: &["other"],
        };
        let info = ModuleInfo::read(&module.elf()).unwrap();
        assert_eq!(info.depends, ["b_one", "c"]);
        assert_eq!(info.aliases, ["pci:*", "x-y"]);
        assert_eq!(info.exports, ["one", "two"]);
        assert_eq!(info.softdeps, ["pre: crc32c post: late", "z"]);
        assert_eq!(info.soft_before(), ["crc32c"]);
    }

    #[test]
    fn exports_without_checksums_come_from_the_list() {
        let module = Module {
            modinfo: "depends=\0",
            exports: &["one"],
            needs: &[],
        };
        let mut elf = module.elf();
        let at = elf.windows(6).position(|part| part == b"__crc_").unwrap();
        elf[at] = b'x';
        assert_eq!(ModuleInfo::read(&elf).unwrap().exports, ["one"]);
    }

    #[test]
    fn names_beyond_the_limit_are_left_out() {
        let long = format!("alias={}\0alias=short\0", "x".repeat(NAME_MAX));
        assert_eq!(ModuleInfo::parse(long.as_bytes()).aliases, ["short"]);
    }
}
