//! A directory tree in memory: hostile archives meet no host file system here.

use std::{collections::BTreeMap, sync::Arc};

use thiserror::Error;

/// Most entries of one tree.
const ENTRIES_MAX: usize = 200_000;
/// Longest path in bytes.
const PATH_MAX: usize = 1024;
/// Most file content of one tree in bytes.
const CONTENT_MAX: u64 = 2 << 30;
/// Most symbolic links followed for one path.
const LINKS_MAX: usize = 40;
/// Permission bits that are kept; set-user-id and set-group-id have no place in a guest that runs one service.
const MODE_MASK: u32 = 0o1777;

/// One entry of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory {
        /// Permission bits.
        mode: u32,
    },
    /// A regular file.
    File {
        /// Permission bits.
        mode: u32,
        /// Its content.
        content: Arc<[u8]>,
    },
    /// A symbolic link.
    Link {
        /// What it points to, as written.
        target: String,
    },
}

/// A directory tree; paths are relative to its root, without leading or trailing slash.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    content: u64,
}

/// Why an entry is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TreeError {
    /// The path leaves the tree, is absolute or too long.
    #[error("path {path:?} is absolute, too long or leaves the tree")]
    BadPath {
        /// The path.
        path: String,
    },
    /// The path goes through something that is not a directory.
    #[error("path {path:?} goes through {through:?}, which is a link or a file")]
    Through {
        /// The path.
        path: String,
        /// The entry on the way.
        through: String,
    },
    /// Another kind of entry is already there.
    #[error("path {path:?} is already there as another kind of entry")]
    Occupied {
        /// The path.
        path: String,
    },
    /// A hard link to something that is not a file of the tree.
    #[error("hard link {path:?} points to {target:?}, which is no file of the archive")]
    BadHardLink {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// Too many entries or too much content.
    #[error("tree has more than {ENTRIES_MAX} entries or {CONTENT_MAX} bytes at {path:?}")]
    TooLarge {
        /// The entry that was too much.
        path: String,
    },
}

/// The normal form of a path from an archive: no `./`, no trailing slash; empty for the root.
pub(crate) fn normalise(path: &str) -> Result<String, TreeError> {
    let bad = || TreeError::BadPath {
        path: path.to_owned(),
    };
    if path.starts_with('/') || path.len() > PATH_MAX || path.contains('\0') {
        return Err(bad());
    }
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if parts.contains(&"..") {
        Err(bad())
    } else {
        Ok(parts.join("/"))
    }
}

fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

impl Tree {
    /// Adds a directory, or sets the permissions of one.
    ///
    /// # Errors
    /// When the path is bad, goes through a link or is taken by something else.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), TreeError> {
        self.insert(
            path,
            Node::Directory {
                mode: mode & MODE_MASK,
            },
        )
    }

    /// Adds or replaces a file.
    ///
    /// # Errors
    /// When the path is bad, goes through a link, is a directory, or the tree grows too large.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Arc<[u8]>>) -> Result<(), TreeError> {
        self.insert(
            path,
            Node::File {
                mode: mode & MODE_MASK,
                content: content.into(),
            },
        )
    }

    /// Adds or replaces a symbolic link; its target is free, because nothing here follows it out of the tree.
    ///
    /// # Errors
    /// When the path is bad, goes through a link or is a directory.
    pub fn link(&mut self, path: &str, target: &str) -> Result<(), TreeError> {
        if target.is_empty() || target.len() > PATH_MAX || target.contains('\0') {
            return Err(TreeError::BadPath {
                path: target.to_owned(),
            });
        }
        self.insert(
            path,
            Node::Link {
                target: target.to_owned(),
            },
        )
    }

    /// Adds a second name for a file that is already there.
    ///
    /// # Errors
    /// When the target is no file of the tree or the path is bad.
    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<(), TreeError> {
        let bad = || TreeError::BadHardLink {
            path: path.to_owned(),
            target: target.to_owned(),
        };
        let name = normalise(target).map_err(|_| bad())?;
        match self.nodes.get(&name) {
            Some(node @ Node::File { .. }) => self.insert(path, node.clone()),
            _ => Err(bad()),
        }
    }

    fn insert(&mut self, path: &str, node: Node) -> Result<(), TreeError> {
        let path = normalise(path)?;
        if path.is_empty() {
            let is_directory = matches!(node, Node::Directory { .. });
            return if is_directory {
                Ok(())
            } else {
                Err(TreeError::BadPath { path })
            };
        }
        for ancestor in ancestors(&path) {
            match self.nodes.get(ancestor) {
                Some(Node::Directory { .. }) => {}
                None => {
                    self.nodes
                        .insert(ancestor.to_owned(), Node::Directory { mode: 0o755 });
                }
                Some(_) => {
                    return Err(TreeError::Through {
                        through: ancestor.to_owned(),
                        path: path.clone(),
                    });
                }
            }
        }
        let is_directory = |node: &Node| matches!(node, Node::Directory { .. });
        if self
            .nodes
            .get(&path)
            .is_some_and(|old| is_directory(old) != is_directory(&node))
        {
            return Err(TreeError::Occupied { path });
        }
        if let Node::File { content, .. } = &node {
            self.content = self.content.saturating_add(content.len() as u64);
        }
        if self.content > CONTENT_MAX || self.nodes.len() >= ENTRIES_MAX {
            return Err(TreeError::TooLarge { path });
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    /// Adds all entries of `other`, as a package manager adds a package.
    ///
    /// # Errors
    /// As for single entries.
    pub fn merge(&mut self, other: Self) -> Result<(), TreeError> {
        other
            .nodes
            .into_iter()
            .try_for_each(|(path, node)| self.insert(&path, node))
    }

    /// Removes the entries for which `drop` holds, and directories that become empty by that.
    pub(crate) fn prune(&mut self, drop: impl Fn(&str) -> bool) {
        let gone: Vec<String> = self.nodes.keys().filter(|path| drop(path)).cloned().collect();
        for path in &gone {
            self.nodes.remove(path);
        }
        for path in gone.iter().rev() {
            self.remove_empty_parents(path);
        }
    }

    fn remove_empty_parents(&mut self, path: &str) {
        let mut path = path;
        while let Some((parent, _)) = path.rsplit_once('/') {
            let below = format!("{parent}/");
            let next = self.nodes.range(below.clone()..).next();
            if next.is_some_and(|(name, _)| name.starts_with(&below)) {
                return;
            }
            self.nodes.remove(parent);
            path = parent;
        }
    }

    /// The entry at a path, links not followed.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// The content of a file, links not followed.
    #[must_use]
    pub fn content(&self, path: &str) -> Option<&[u8]> {
        match self.nodes.get(path) {
            Some(Node::File { content, .. }) => Some(content),
            _ => None,
        }
    }

    /// All entries, each directory before what it holds.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// The path of what `path` names once every link on the way is followed inside the tree.
    #[must_use]
    pub fn resolve(&self, path: &str) -> Option<String> {
        let mut todo: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    done.pop();
                    continue;
                }
                _ => done.push(part),
            }
            if let Node::Link { target } = self.nodes.get(&done.join("/"))? {
                links += 1;
                if links > LINKS_MAX {
                    return None;
                }
                done.pop();
                if target.starts_with('/') {
                    done.clear();
                }
                todo.extend(target.split('/').rev().map(str::to_owned));
            }
        }
        Some(done.join("/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_tree_are_refused() {
        let mut tree = Tree::default();
        for path in ["../x", "a/../../x", "/etc/passwd", "a/..", "a\0b"] {
            assert!(
                matches!(tree.file(path, 0o644, *b"x"), Err(TreeError::BadPath { .. })),
                "{path:?}"
            );
        }
        assert!(matches!(
            tree.file(&"x".repeat(PATH_MAX + 1), 0o644, *b"x"),
            Err(TreeError::BadPath { .. })
        ));
        assert_eq!(tree, Tree::default());
    }

    #[test]
    fn nothing_goes_through_a_link_or_replaces_a_directory() {
        let mut tree = Tree::default();
        tree.link("lib", "/etc").unwrap();
        assert!(matches!(
            tree.file("lib/passwd", 0o644, *b"x"),
            Err(TreeError::Through { .. })
        ));
        tree.file("./a/b", 0o4755, *b"x").unwrap();
        assert!(matches!(
            tree.file("a/b/c", 0o644, *b"x"),
            Err(TreeError::Through { .. })
        ));
        assert!(matches!(tree.link("a", "/etc"), Err(TreeError::Occupied { .. })));
        assert!(matches!(tree.get("a/b"), Some(Node::File { mode: 0o755, .. })));
    }

    #[test]
    fn hard_links_stay_inside() {
        let mut tree = Tree::default();
        tree.file("a", 0o644, *b"x").unwrap();
        tree.link("l", "/etc/shadow").unwrap();
        tree.hard_link("b", "./a").unwrap();
        assert_eq!(tree.content("b"), Some(b"x".as_slice()));
        for target in ["../a", "/etc/shadow", "gone", "l"] {
            assert!(
                matches!(tree.hard_link("c", target), Err(TreeError::BadHardLink { .. })),
                "{target}"
            );
        }
    }

    #[test]
    fn links_resolve_inside_the_tree() {
        let mut tree = Tree::default();
        tree.file("usr/lib/x/libc.so.6", 0o644, *b"x").unwrap();
        tree.link("lib", "usr/lib").unwrap();
        tree.link("usr/lib/libc.so", "/lib/x/../x/libc.so.6").unwrap();
        tree.link("loop", "loop").unwrap();
        assert_eq!(
            tree.resolve("lib/libc.so").as_deref(),
            Some("usr/lib/x/libc.so.6")
        );
        assert_eq!(
            tree.resolve("../../lib/libc.so").as_deref(),
            Some("usr/lib/x/libc.so.6")
        );
        assert_eq!(tree.resolve("loop"), None);
        assert_eq!(tree.resolve("lib/none"), None);
    }

    #[test]
    fn pruning_removes_emptied_directories_only() {
        let mut tree = Tree::default();
        tree.file("usr/share/doc/a/x", 0o644, *b"x").unwrap();
        tree.file("usr/share/keep", 0o644, *b"x").unwrap();
        tree.directory("srv", 0o755).unwrap();
        tree.prune(|path| path.starts_with("usr/share/doc"));
        let paths: Vec<_> = tree.iter().map(|(path, _)| path).collect();
        assert_eq!(paths, ["srv", "usr", "usr/share", "usr/share/keep"]);
    }
}
