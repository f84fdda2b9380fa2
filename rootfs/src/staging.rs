//! A tree written below a fresh directory, for the program that makes an image of it.

use std::{fs, io::Write as _, os::fd::OwnedFd, path::Path};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use crate::tree::{Node, Tree};

/// Writes `tree` below `root`, an empty directory that nobody else writes to. Every path is opened beneath `root`
/// without following links.
pub(crate) fn write(tree: &Tree, root: &Path) -> std::io::Result<()> {
    let root = rustix::fs::open(
        root,
        OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    for (path, node) in tree.iter() {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        let parent = beneath(&root, parent)?;
        match node {
            // The owner must be able to write into and remove what is staged.
            Node::Directory { .. } => rustix::fs::mkdirat(&parent, name, Mode::RWXU)?,
            Node::Link { target } => rustix::fs::symlinkat(target, &parent, name)?,
            Node::File { mode, content } => write_file(&parent, name, *mode, content)?,
        }
    }
    for (path, node) in tree.iter() {
        if let Node::Directory { mode } = node {
            let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
            rustix::fs::chmodat(
                beneath(&root, parent)?,
                name,
                Mode::from_raw_mode(mode | 0o700),
                AtFlags::empty(),
            )?;
        }
    }
    Ok(())
}

fn beneath(root: &OwnedFd, path: &str) -> std::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(
        root,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )?)
}

fn write_file(parent: &OwnedFd, name: &str, mode: u32, content: &[u8]) -> std::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = fs::File::from(rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(content)?;
    // Not through the umask.
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode | 0o400))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn a_tree_is_written_as_it_is() {
        let mut tree = Tree::default();
        tree.directory("tmp", 0o1777).unwrap();
        tree.file("usr/bin/x", 0o755, *b"text").unwrap();
        tree.link("escape", "/").unwrap();
        let root = tempfile::tempdir().unwrap();
        write(&tree, root.path()).unwrap();
        let mode = |path: &str| {
            fs::symlink_metadata(root.path().join(path))
                .unwrap()
                .permissions()
                .mode()
                & 0o7777
        };
        assert_eq!(
            (mode("tmp"), mode("usr"), mode("usr/bin/x")),
            (0o1777, 0o755, 0o755)
        );
        assert_eq!(fs::read(root.path().join("usr/bin/x")).unwrap(), b"text");
        assert_eq!(fs::read_link(root.path().join("escape")).unwrap(), Path::new("/"));
    }
}
