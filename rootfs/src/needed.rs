//! Does every program of a tree find the libraries it names?

use std::collections::BTreeSet;

use object::{
    Endianness,
    elf::{self, FileHeader64},
    read::elf::{Dyn as _, FileHeader as _},
};
use thiserror::Error;

use crate::{
    Arch,
    tree::{Node, Tree},
};

/// Longest name of a library in bytes, as in a directory.
const SONAME_MAX: usize = 255;
/// Most libraries that one file needs.
const NEEDED_MAX: usize = 1024;

/// What an ELF check found wrong.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NeededError {
    /// A library is not there.
    #[error("{file} needs {soname}, which no package of the recipe brings")]
    Missing {
        /// The program or library.
        file: String,
        /// What it needs.
        soname: String,
    },
    /// An ELF file is damaged.
    #[error("cannot read the ELF file {file}: {reason}")]
    Damaged {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
}

/// Checks every ELF file of `tree`.
pub(crate) fn check(tree: &Tree, arch: Arch) -> Result<(), NeededError> {
    let directories = [
        format!("usr/lib/{}", arch.triplet()),
        "usr/lib".to_owned(),
        "usr/lib64".to_owned(),
    ];
    let mut found: BTreeSet<String> = BTreeSet::new();
    for (file, node) in tree.iter() {
        let Node::File { content, .. } = node else {
            continue;
        };
        if !content.starts_with(&elf::ELFMAG) {
            continue;
        }
        let needed = needed(content).map_err(|reason| NeededError::Damaged {
            file: file.to_owned(),
            reason,
        })?;
        for soname in needed {
            if found.contains(&soname) {
                continue;
            }
            let exists = |directory: &String| is_file(tree, &format!("{directory}/{soname}"));
            if !directories.iter().any(exists) {
                return Err(NeededError::Missing {
                    file: file.to_owned(),
                    soname,
                });
            }
            found.insert(soname);
        }
    }
    Ok(())
}

fn is_file(tree: &Tree, path: &str) -> bool {
    tree.resolve(path)
        .is_some_and(|path| tree.content(&path).is_some())
}

pub(crate) fn needed(content: &[u8]) -> Result<Vec<String>, String> {
    let text = |error: object::Error| error.to_string();
    let header = FileHeader64::<Endianness>::parse(content).map_err(text)?;
    let endian = header.endian().map_err(text)?;
    let sections = header.sections(endian, content).map_err(text)?;
    let Some((entries, strings)) = sections.dynamic(endian, content).map_err(text)? else {
        return Ok(Vec::new());
    };
    let strings = sections.strings(endian, content, strings).map_err(text)?;
    let mut names = Vec::new();
    for entry in entries.iter().filter(|entry| entry.tag(endian) == elf::DT_NEEDED) {
        let name = entry.string(endian, strings).map_err(text)?;
        // Entries may share one long string: without limits a small file would fill the memory.
        if name.len() > SONAME_MAX || names.len() >= NEEDED_MAX {
            return Err("it needs too much".to_owned());
        }
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test program itself is a dynamic ELF file on every machine that guests are built on.
    fn tree_with_self() -> (Tree, Vec<String>) {
        let program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let needed = needed(&program).unwrap();
        let mut tree = Tree::default();
        tree.file("usr/bin/program", 0o755, program).unwrap();
        (tree, needed)
    }

    #[test]
    fn a_missing_library_is_named_with_its_user() {
        let (mut tree, needed) = tree_with_self();
        assert!(needed.iter().any(|soname| soname.starts_with("libc.so")));
        let (last, others) = needed.split_last().unwrap();
        for soname in others {
            tree.file(&format!("usr/lib/x86_64-linux-gnu/{soname}"), 0o644, *b"x")
                .unwrap();
        }
        let missing = NeededError::Missing {
            file: "usr/bin/program".to_owned(),
            soname: last.clone(),
        };
        assert_eq!(check(&tree, Arch::Amd64), Err(missing));
        tree.link(&format!("usr/lib64/{last}"), "../lib/real").unwrap();
        assert!(
            check(&tree, Arch::Amd64).is_err(),
            "a dangling link is no library"
        );
        tree.file("usr/lib/real", 0o644, *b"x").unwrap();
        assert_eq!(check(&tree, Arch::Amd64), Ok(()));
    }

    #[test]
    fn a_name_that_no_directory_can_hold_is_damage() {
        let mut shell = std::fs::read("/bin/sh").unwrap();
        let first = needed(&shell).unwrap().remove(0);
        let at = shell
            .windows(first.len())
            .position(|part| part == first.as_bytes())
            .unwrap();
        // What follows in the table of strings becomes part of the name.
        shell[at..at + SONAME_MAX].fill(b'x');
        // Where that table ends within the name, it is the table that is damaged.
        assert!(needed(&shell).is_err());
    }

    #[test]
    fn damaged_files_are_reported() {
        let mut tree = Tree::default();
        tree.file("usr/bin/x", 0o755, *b"\x7fELF").unwrap();
        assert!(matches!(
            check(&tree, Arch::Amd64),
            Err(NeededError::Damaged { .. })
        ));
    }
}
