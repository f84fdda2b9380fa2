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
        let needed = needed(content).map_err(|error| NeededError::Damaged {
            file: file.to_owned(),
            reason: error.to_string(),
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

fn needed(content: &[u8]) -> object::Result<Vec<String>> {
    let header = FileHeader64::<Endianness>::parse(content)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, content)?;
    let Some((entries, strings)) = sections.dynamic(endian, content)? else {
        return Ok(Vec::new());
    };
    let strings = sections.strings(endian, content, strings)?;
    let wanted = entries.iter().filter(|entry| entry.tag(endian) == elf::DT_NEEDED);
    wanted
        .map(|entry| Ok(String::from_utf8_lossy(entry.string(endian, strings)?).into_owned()))
        .collect()
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
    fn damaged_files_are_reported() {
        let mut tree = Tree::default();
        tree.file("usr/bin/x", 0o755, *b"\x7fELF").unwrap();
        assert!(matches!(
            check(&tree, Arch::Amd64),
            Err(NeededError::Damaged { .. })
        ));
    }
}
