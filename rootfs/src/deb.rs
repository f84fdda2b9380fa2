//! Reading a .deb: an `ar` archive around a compressed `tar`.

use std::io::Read;

use sovereign_kernel::{DecompressError, decompress};
use thiserror::Error;

use crate::tree::{Tree, TreeError};

/// Most bytes that one package may unpack to.
const UNPACKED_MAX: u64 = 1 << 30;
const AR_MAGIC: &[u8] = b"!<arch>\n";
const AR_HEADER: usize = 60;

/// Why a package cannot be read.
#[derive(Debug, Error)]
pub enum DebError {
    /// Not an `ar` archive, or cut short.
    #[error("not a .deb: {reason}")]
    Ar {
        /// What is wrong.
        reason: &'static str,
    },
    /// The data member does not unpack.
    #[error("cannot unpack {member}")]
    Unpack {
        /// The member's name.
        member: String,
        /// Why.
        source: DecompressError,
    },
    /// The data member has an unknown compression.
    #[error("member {member} has an unsupported compression")]
    Compression {
        /// The member's name.
        member: String,
    },
    /// The tar inside is damaged.
    #[error("damaged tar archive")]
    Tar(#[source] std::io::Error),
    /// An entry of the tar is refused.
    #[error("entry {path:?} is refused")]
    Entry {
        /// Its path.
        path: String,
        /// Why.
        source: TreeError,
    },
    /// An entry is a device, a pipe or unknown.
    #[error("entry {path:?} is neither file, directory nor link (type {kind:?})")]
    Kind {
        /// Its path.
        path: String,
        /// The tar type byte.
        kind: char,
    },
    /// An entry's name is not UTF-8.
    #[error("an entry's name or link target is not UTF-8: {name}")]
    Name {
        /// The name, with replacement characters.
        name: String,
    },
}

/// The files that a package installs.
pub(crate) fn read(deb: &[u8]) -> Result<Tree, DebError> {
    let (member, data) = data_member(deb)?;
    let unpack = |source| DebError::Unpack {
        member: member.clone(),
        source,
    };
    match member.as_str() {
        "data.tar.xz" | "data.tar.zst" => read_tar(&decompress(data, UNPACKED_MAX).map_err(unpack)?),
        "data.tar" => read_tar(data),
        _ => Err(DebError::Compression { member }),
    }
}

/// Name and content of the member `data.tar*`.
fn data_member(deb: &[u8]) -> Result<(String, &[u8]), DebError> {
    let short = || DebError::Ar { reason: "cut short" };
    let mut rest = deb.strip_prefix(AR_MAGIC).ok_or(DebError::Ar {
        reason: "no ar magic",
    })?;
    while !rest.is_empty() {
        let (header, after) = rest.split_at_checked(AR_HEADER).ok_or_else(short)?;
        let text = std::str::from_utf8(header).map_err(|_| DebError::Ar {
            reason: "odd member header",
        })?;
        let field = |from: usize, to: usize| text.get(from..to).unwrap_or_default().trim_end();
        let size: usize = field(48, 58).parse().map_err(|_| DebError::Ar {
            reason: "odd member size",
        })?;
        let (data, next) = after.split_at_checked(size).ok_or_else(short)?;
        let name = field(0, 16).trim_end_matches('/');
        if name.starts_with("data.tar") {
            return Ok((name.to_owned(), data));
        }
        rest = next.get(size % 2..).unwrap_or_default();
    }
    Err(DebError::Ar {
        reason: "no data member",
    })
}

/// The entries of an uncompressed tar.
pub(crate) fn read_tar(bytes: &[u8]) -> Result<Tree, DebError> {
    let mut tree = Tree::default();
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().map_err(DebError::Tar)? {
        add_entry(&mut tree, entry.map_err(DebError::Tar)?)?;
    }
    Ok(tree)
}

fn add_entry(tree: &mut Tree, mut entry: tar::Entry<'_, &[u8]>) -> Result<(), DebError> {
    let path = text(&entry.path_bytes())?;
    let target = entry
        .link_name_bytes()
        .map(|name| text(&name))
        .transpose()?
        .unwrap_or_default();
    let mode = entry.header().mode().map_err(DebError::Tar)?;
    let kind = entry.header().entry_type();
    let added = match kind {
        tar::EntryType::Directory => tree.directory(&path, mode),
        tar::EntryType::Symlink => tree.link(&path, &target),
        tar::EntryType::Link => tree.hard_link(&path, &target),
        tar::EntryType::Regular => {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).map_err(DebError::Tar)?;
            tree.file(&path, mode, content)
        }
        _ => {
            return Err(DebError::Kind {
                path,
                kind: char::from(kind.as_byte()),
            });
        }
    };
    added.map_err(|source| DebError::Entry { path, source })
}

fn text(bytes: &[u8]) -> Result<String, DebError> {
    let name = || DebError::Name {
        name: String::from_utf8_lossy(bytes).into_owned(),
    };
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{TarEntry, deb};

    fn refused(entries: &[TarEntry]) -> DebError {
        read(&deb(entries)).unwrap_err()
    }

    #[test]
    fn files_directories_and_links_are_read() {
        let tree = read(&deb(&[
            TarEntry::directory("./usr/"),
            TarEntry::file("./usr/a", b"text"),
            TarEntry::link("./usr/l", "../../etc/x"),
            TarEntry::hard_link("./usr/h", "./usr/a"),
        ]))
        .unwrap();
        assert_eq!(tree.content("usr/a"), Some(b"text".as_slice()));
        assert_eq!(tree.content("usr/h"), Some(b"text".as_slice()));
        assert!(tree.get("usr/l").is_some());
    }

    #[test]
    fn entries_that_leave_the_tree_are_refused() {
        for path in ["../evil", "./a/../../evil", "/etc/passwd"] {
            assert!(
                matches!(
                    refused(&[TarEntry::file(path, b"x")]),
                    DebError::Entry {
                        source: TreeError::BadPath { .. },
                        ..
                    }
                ),
                "{path}"
            );
        }
    }

    #[test]
    fn a_file_through_a_link_is_refused() {
        let error = refused(&[TarEntry::link("./d", "/etc"), TarEntry::file("./d/passwd", b"x")]);
        assert!(
            matches!(
                error,
                DebError::Entry {
                    source: TreeError::Through { .. },
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn hard_links_out_of_the_archive_are_refused() {
        for target in ["../../etc/shadow", "/etc/shadow", "./not-there"] {
            let error = refused(&[TarEntry::hard_link("./a", target)]);
            assert!(
                matches!(
                    error,
                    DebError::Entry {
                        source: TreeError::BadHardLink { .. },
                        ..
                    }
                ),
                "{error}"
            );
        }
    }

    #[test]
    fn devices_and_pipes_are_refused() {
        for kind in [tar::EntryType::Char, tar::EntryType::Block, tar::EntryType::Fifo] {
            assert!(matches!(
                refused(&[TarEntry::of_kind("./dev/x", kind)]),
                DebError::Kind { .. }
            ));
        }
    }

    #[test]
    fn other_and_cut_files_are_refused() {
        let whole = deb(&[TarEntry::file("./a", b"x")]);
        for bytes in [b"".as_slice(), b"!<arch>\n", b"not a deb at all", &whole[..100]] {
            assert!(matches!(read(bytes), Err(DebError::Ar { .. })));
        }
        let odd = String::from_utf8_lossy(&whole).replace("data.tar  ", "data.tar.q");
        assert!(matches!(read(odd.as_bytes()), Err(DebError::Compression { .. })));
    }
}
