//! A tree made into an erofs image by `mkfs.erofs`, the same bytes for the same tree and program.

use std::{
    ffi::OsStr,
    fs,
    os::{fd::AsRawFd as _, unix::fs::PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::fs::MemfdFlags;
use thiserror::Error;

use crate::{staging, tree::Tree};

/// The program.
const PROGRAM: &str = "mkfs.erofs";
/// The same for every image: an image is told by its digest, not by its UUID.
const UUID: &str = "5eed0000-0000-4000-8000-736f76657265";
/// Directories searched after PATH: ordinary users often lack them there.
const MORE_DIRECTORIES: &[&str] = &["/usr/sbin", "/usr/bin", "/sbin"];

/// What a full disk, quota or file size limit is called; the last is what the program says of a write cut short.
const NO_ROOM: [&str; 4] = [
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "was truncated",
];

/// How file contents are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    /// Compressed, for content that shrinks.
    Lz4,
    /// As they are, for content that is compressed already: lz4hc would only take its time.
    Plain,
}

/// Why there is no image.
#[derive(Debug, Error)]
pub enum ErofsError {
    /// The program is not installed.
    #[error("{PROGRAM} is not in PATH: install the package erofs-utils")]
    NoProgram,
    /// It cannot be started.
    #[error("cannot run {}", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It failed.
    #[error("{} failed ({status}): {message}", program.display())]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The end of what it said.
        message: String,
    },
    /// There is no room for the image.
    #[error("{} has no room: {message}", program.display())]
    NoRoom {
        /// The program.
        program: PathBuf,
        /// The end of what it said.
        message: String,
    },
    /// The tree or the image cannot be written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// `mkfs.erofs` of this machine.
#[derive(Debug, Clone)]
pub(crate) struct Mkfs {
    program: PathBuf,
    version: String,
}

impl Mkfs {
    /// Finds the program and asks its version.
    ///
    /// # Errors
    /// When it is not installed or cannot be run.
    pub(crate) fn find() -> Result<Self, ErofsError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = search(&path).ok_or(ErofsError::NoProgram)?;
        // Version 1.5 knows -V but ends with an error after printing it; the first line is the same in all versions.
        let output = Command::new(&program)
            .arg("-V")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| ErofsError::Run {
                program: program.clone(),
                source,
            })?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        let version = text
            .lines()
            .find(|line| line.starts_with(PROGRAM))
            .unwrap_or(PROGRAM)
            .trim()
            .to_owned();
        Ok(Self { program, version })
    }

    #[cfg(test)]
    pub(crate) fn fake() -> Self {
        Self {
            program: PathBuf::from("/nonexistent"),
            version: String::new(),
        }
    }

    /// Name and version, as it says itself.
    pub(crate) fn version(&self) -> &str {
        &self.version
    }

    /// An image of `tree` by way of `work`, an empty directory, read from its begin.
    ///
    /// The image is made in memory: on a full disk mkfs.erofs (1.5) takes a failed write of compressed data for data
    /// that do not shrink, keeps the file as it is and ends well, with another image (seen: 69 MB instead of 54).
    ///
    /// # Errors
    /// When the tree cannot be staged or the program fails.
    pub(crate) fn image(&self, tree: &Tree, packing: Packing, work: &Path) -> Result<fs::File, ErofsError> {
        let io = |action, path: &Path| {
            let path = path.to_owned();
            move |source| ErofsError::Io { action, path, source }
        };
        let root = work.join("root");
        fs::create_dir(&root).map_err(io("create", &root))?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o755))
            .map_err(io("set the mode of", &root))?;
        staging::write(tree, &root).map_err(io("stage a tree in", &root))?;
        let memory = rustix::fs::memfd_create("erofs image", MemfdFlags::CLOEXEC)
            .map_err(|error| io("make memory for", &root)(error.into()))?;
        let image = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
        self.run(packing, Path::new(&image), &root)?;
        // Never read or written here before: it is at its begin.
        Ok(memory.into())
    }

    fn run(&self, packing: Packing, image: &Path, root: &Path) -> Result<(), ErofsError> {
        let compression = (packing == Packing::Lz4).then_some("-zlz4hc");
        let output = Command::new(&self.program)
            .args(compression)
            .args([
                "--quiet",
                "-x-1",
                "--force-uid=0",
                "--force-gid=0",
                "-T0",
                &format!("-U{UUID}"),
            ])
            .args([image, root])
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .map_err(|source| ErofsError::Run {
                program: self.program.clone(),
                source,
            })?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr)
            .trim()
            .escape_debug()
            .to_string();
        let message: String = text
            .chars()
            .rev()
            .take(500)
            .collect::<Vec<_>>()
            .into_iter()
            .rev()
            .collect();
        let program = self.program.clone();
        // It says strerror's texts, without a locale in English, and ends with 1 for every reason.
        if NO_ROOM.iter().any(|text| message.contains(text)) {
            return Err(ErofsError::NoRoom { program, message });
        }
        Err(ErofsError::Failed {
            program,
            status: output.status,
            message,
        })
    }
}

fn search(path: &OsStr) -> Option<PathBuf> {
    let directories = std::env::split_paths(path).chain(MORE_DIRECTORIES.iter().map(PathBuf::from));
    let executable = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
    };
    directories
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(PROGRAM))
        .find(executable)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        let mkfs = Mkfs::find().expect("the tests need erofs-utils");
        let mut tree = Tree::default();
        for at in 0..50 {
            tree.file(&format!("usr/d{}/f{at}", at % 7), 0o644, vec![at; 5000])
                .unwrap();
        }
        tree.link("bin", "usr/bin").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let image = |packing| {
            let work = tempfile::tempdir_in(&directory).unwrap();
            let mut bytes = Vec::new();
            let mut image = mkfs.image(&tree, packing, work.path()).unwrap();
            image.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let packed = image(Packing::Lz4);
        assert!(packed == image(Packing::Lz4));
        let plain = image(Packing::Plain);
        assert!(plain == image(Packing::Plain) && !packed.is_empty() && packed.len() < plain.len());
    }
}
