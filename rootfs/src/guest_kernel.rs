//! A kernel package made ready once per version: uncompressed kernel, modules for the initramfs, modules for the agent
//! disk. Kept as a directory of the cache that appears whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sovereign_kernel::{ModuleError, ModuleIndex, ModuleSet, ReadyModule, VmlinuxError};
use thiserror::Error;

use crate::{
    deb::{self, DebError},
    initramfs::{InitramfsFile, segment},
    tree::{Node, Tree, TreeError},
};

/// Counted up whenever the same package should be made ready in another way.
pub(crate) const KERNEL_FORMAT: u32 = 1;

/// Modules that init loads before it can mount the root.
pub(crate) const EARLY_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "erofs",
    "ext4",
    "virtio_rng",
    "virtio_net",
    "vsock",
    "vmw_vsock_virtio_transport",
    "overlay",
];

/// Modules that services ask for later; with the early ones they are on the agent disk.
pub(crate) const LATE_MODULES: &[&str] = &[
    "tun",
    "nf_tables",
    "nf_conntrack",
    "nf_nat",
    "nft_chain_nat",
    "nft_compat",
    "nft_ct",
    "nft_fib_inet",
    "nft_limit",
    "nft_log",
    "nft_masq",
    "nft_nat",
    "nft_redir",
    "nft_reject_inet",
];

const VMLINUX: &str = "vmlinux";
const EARLY_SEGMENT: &str = "modules.cpio";
const LATE_DIRECTORY: &str = "late";
const DESCRIPTION: &str = "kernel.json";

/// A kernel that is ready in the cache.
#[derive(Debug, Clone)]
pub(crate) struct GuestKernel {
    directory: PathBuf,
    description: Description,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Description {
    version: String,
    /// Files of the agent disk, relative to `/modules/<version>`.
    late: Vec<String>,
}

/// Why a kernel package cannot be made ready.
#[derive(Debug, Error)]
pub enum GuestKernelError {
    /// The package cannot be read.
    #[error("cannot read kernel package {name}")]
    Package {
        /// The package.
        name: String,
        /// Why.
        source: DebError,
    },
    /// A part of the package is not where it should be.
    #[error("kernel package {name} has no {part}")]
    Part {
        /// The package.
        name: String,
        /// What is missing.
        part: &'static str,
    },
    /// The kernel lacks what guests need.
    #[error("kernel package {name} lacks {symbols}")]
    Requirements {
        /// The package.
        name: String,
        /// Kconfig symbols.
        symbols: String,
    },
    /// The kernel image is not usable.
    #[error("cannot unpack the kernel of {name}")]
    Vmlinux {
        /// The package.
        name: String,
        /// Why.
        source: VmlinuxError,
    },
    /// A module is missing or damaged.
    #[error("cannot make the modules of {name} ready")]
    Modules {
        /// The package.
        name: String,
        /// Why.
        source: ModuleError,
    },
    /// Two modules collide.
    #[error("cannot lay out the modules")]
    Tree(#[from] TreeError),
    /// A file operation of the cache failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> GuestKernelError {
    move |source| GuestKernelError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

impl GuestKernel {
    /// The kernel in `directory`, if one was made ready there.
    pub(crate) fn open(directory: &Path) -> Option<Self> {
        let description = serde_json::from_slice(&fs::read(directory.join(DESCRIPTION)).ok()?).ok()?;
        Some(Self {
            directory: directory.to_owned(),
            description,
        })
    }

    /// Makes the package `name` ready in `directory`.
    pub(crate) fn prepare(name: &str, package: &[u8], directory: &Path) -> Result<Self, GuestKernelError> {
        let tree = deb::read(package).map_err(|source| GuestKernelError::Package {
            name: name.to_owned(),
            source,
        })?;
        let parts = Parts::of(name, &tree)?;
        check_requirements(name, parts.config)?;
        let kernel = sovereign_kernel::vmlinux(parts.image).map_err(|source| GuestKernelError::Vmlinux {
            name: name.to_owned(),
            source,
        })?;
        let modules = parts.modules(&tree);
        let closure = |wanted: &[&str]| {
            modules
                .closure(wanted)
                .map_err(|source| GuestKernelError::Modules {
                    name: name.to_owned(),
                    source,
                })
        };
        let early =
            early_segment(&closure(EARLY_MODULES)?).map_err(io_error("build", Path::new(EARLY_SEGMENT)))?;
        let late = late_files(&closure(&[EARLY_MODULES, LATE_MODULES].concat())?, &modules);
        let description = Description {
            version: parts.version.to_owned(),
            late: late.iter().map(|(path, _)| path.clone()).collect(),
        };
        store(directory, &description, &kernel, &early, &late)?;
        Ok(Self {
            directory: directory.to_owned(),
            description,
        })
    }

    pub(crate) fn version(&self) -> &str {
        &self.description.version
    }

    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.directory.join(VMLINUX)
    }

    /// The initramfs: one segment with `init`, one with the modules in load order.
    pub(crate) fn initramfs(&self, init: Vec<u8>) -> Result<Vec<u8>, GuestKernelError> {
        let init = InitramfsFile {
            path: "init".to_owned(),
            mode: 0o755,
            bytes: init,
        };
        let path = self.directory.join(EARLY_SEGMENT);
        let mut bytes = segment(&["dev", "proc", "run", "sys"], &[init])
            .map_err(io_error("build", Path::new("initramfs")))?;
        bytes.extend(fs::read(&path).map_err(io_error("read", &path))?);
        Ok(bytes)
    }

    /// The agent disk: `/sovereign-guest` and `/modules/<version>/…`.
    pub(crate) fn agent_tree(&self, agent: Vec<u8>) -> Result<Tree, GuestKernelError> {
        let mut tree = Tree::default();
        tree.file("sovereign-guest", 0o755, agent)?;
        for name in &self.description.late {
            let path = self.directory.join(LATE_DIRECTORY).join(name);
            let bytes = fs::read(&path).map_err(io_error("read", &path))?;
            tree.file(
                &format!("modules/{}/{name}", self.description.version),
                0o644,
                bytes,
            )?;
        }
        Ok(tree)
    }
}

/// The parts of a kernel package.
struct Parts<'a> {
    version: &'a str,
    image: &'a [u8],
    config: &'a str,
}

impl<'a> Parts<'a> {
    fn of(name: &str, tree: &'a Tree) -> Result<Self, GuestKernelError> {
        let missing = |part| GuestKernelError::Part {
            name: name.to_owned(),
            part,
        };
        let (version, image) = tree
            .iter()
            .find_map(kernel_image)
            .ok_or_else(|| missing("/boot/vmlinuz-*"))?;
        let config = tree
            .content(&format!("boot/config-{version}"))
            .and_then(|text| std::str::from_utf8(text).ok());
        Ok(Self {
            version,
            image,
            config: config.ok_or_else(|| missing("/boot/config-*"))?,
        })
    }

    fn modules(&self, tree: &Tree) -> ModuleSet {
        let prefixes = ["usr/lib/modules", "lib/modules"].map(|base| format!("{base}/{}/", self.version));
        let inside = |path: &str| {
            prefixes
                .iter()
                .find_map(|prefix| path.strip_prefix(prefix.as_str()))
                .map(str::to_owned)
        };
        let builtin = prefixes
            .iter()
            .find_map(|prefix| tree.content(&format!("{prefix}modules.builtin")));
        let files = tree.iter().filter_map(|(path, node)| match node {
            Node::File { content, .. } => Some((inside(path)?, content.to_vec())),
            _ => None,
        });
        ModuleSet::new(files, &String::from_utf8_lossy(builtin.unwrap_or_default()))
    }
}

fn kernel_image<'a>((path, node): (&'a str, &'a Node)) -> Option<(&'a str, &'a [u8])> {
    let version = path
        .strip_prefix("boot/vmlinuz-")
        .or_else(|| path.strip_prefix("boot/vmlinux-"))?;
    match node {
        Node::File { content, .. } => Some((version, content)),
        _ => None,
    }
}

fn check_requirements(name: &str, config: &str) -> Result<(), GuestKernelError> {
    let missing: Vec<&str> = sovereign_kernel::missing(config)
        .iter()
        .map(|requirement| requirement.symbol)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(GuestKernelError::Requirements {
        name: name.to_owned(),
        symbols: missing.join(", "),
    })
}

/// `/modules/NNN-name.ko` and `/modules.order`, the list of them in load order.
fn early_segment(modules: &[ReadyModule]) -> io::Result<Vec<u8>> {
    let path = |(at, module): (usize, &ReadyModule)| format!("modules/{at:03}-{}.ko", module.name);
    let paths: Vec<String> = modules.iter().enumerate().map(path).collect();
    let order: String = paths.iter().map(|path| format!("{path}\n")).collect();
    let mut files: Vec<InitramfsFile> = paths
        .into_iter()
        .zip(modules)
        .map(|(path, module)| InitramfsFile {
            path,
            mode: 0o644,
            bytes: module.bytes.clone(),
        })
        .collect();
    files.push(InitramfsFile {
        path: "modules.order".to_owned(),
        mode: 0o644,
        bytes: order.into_bytes(),
    });
    segment(&["modules"], &files)
}

/// Modules and the indexes by which modprobe finds them.
fn late_files(modules: &[ReadyModule], set: &ModuleSet) -> Vec<(String, Vec<u8>)> {
    let (dependencies, aliases) = sovereign_kernel::indexes(modules);
    let builtin: ModuleIndex = set
        .builtin()
        .map(|name| (name.to_owned(), vec![String::new()]))
        .collect();
    let mut files: Vec<(String, Vec<u8>)> = modules
        .iter()
        .map(|module| (module.path.clone(), module.bytes.clone()))
        .collect();
    files.push((
        "modules.dep".to_owned(),
        sovereign_kernel::dependency_text(modules).into_bytes(),
    ));
    for (name, index) in [("dep", dependencies), ("alias", aliases), ("builtin", builtin)] {
        files.push((
            format!("modules.{name}.bin"),
            sovereign_kernel::index_bytes(&index),
        ));
    }
    files
}

fn store(
    directory: &Path,
    description: &Description,
    kernel: &[u8],
    early: &[u8],
    late: &[(String, Vec<u8>)],
) -> Result<(), GuestKernelError> {
    let parent = directory.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    let work = tempfile::tempdir_in(parent).map_err(io_error("create a directory in", parent))?;
    let root = work.path().join("kernel");
    let write = |name: &str, bytes: &[u8]| {
        let path = root.join(name);
        let parent = path.parent().unwrap_or(&root);
        fs::create_dir_all(parent).map_err(io_error("create", parent))?;
        fs::write(&path, bytes)
            .and_then(|()| fs::File::open(&path)?.sync_all())
            .map_err(io_error("write", &path))
    };
    write(VMLINUX, kernel)?;
    write(EARLY_SEGMENT, early)?;
    for (name, bytes) in late {
        write(&format!("{LATE_DIRECTORY}/{name}"), bytes)?;
    }
    let text =
        serde_json::to_vec_pretty(description).map_err(|error| io_error("write", &root)(error.into()))?;
    write(DESCRIPTION, &text)?;
    match fs::rename(&root, directory) {
        // Another build was faster and made the same.
        Err(_) if GuestKernel::open(directory).is_some() => Ok(()),
        result => result.map_err(io_error("create", directory)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incomplete_packages_are_named() {
        let mut tree = Tree::default();
        let part = |tree: &Tree| {
            Parts::of("k", tree)
                .err()
                .map(|error| error.to_string())
                .unwrap_or_default()
        };
        assert!(part(&tree).contains("/boot/vmlinuz-*"));
        tree.file("boot/vmlinuz-6.1-cloud", 0o644, *b"x").unwrap();
        assert!(part(&tree).contains("/boot/config-*"));
        tree.file("boot/config-6.1-cloud", 0o644, *b"CONFIG_TUN=m\n")
            .unwrap();
        let parts = Parts::of("k", &tree).unwrap();
        assert_eq!(parts.version, "6.1-cloud");
        let error = check_requirements("k", parts.config).unwrap_err().to_string();
        assert!(error.contains("SYSVIPC") && !error.contains("TUN,"), "{error}");
    }

    #[test]
    fn the_early_segment_lists_modules_in_load_order() {
        let module = |name: &str| ReadyModule {
            name: name.to_owned(),
            path: String::new(),
            bytes: b"elf".to_vec(),
            depends: vec![],
            aliases: vec![],
        };
        let text = String::from_utf8_lossy(&early_segment(&[module("z"), module("a")]).unwrap()).into_owned();
        assert!(text.contains("modules/000-z.ko\nmodules/001-a.ko\n"), "{text}");
    }
}
