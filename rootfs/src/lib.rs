//! Guest images from a signed Debian repository, without root, apt, dpkg or mount.
//!
//! Owns the way from a recipe to finished files: signed index -> lock -> packages -> tree in memory -> erofs, and the
//! kernel with its initramfs. It never runs anything from a package and writes only to the cache and the lock file.

mod arch;
mod archive;
mod build;
mod date;
mod deb;
mod digest;
mod download;
mod erofs;
mod fetch;
#[cfg(test)]
mod fixture;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod guest_kernel;
#[cfg(test)]
mod hostile_tests;
mod index;
mod initramfs;
mod keyring;
mod lock;
mod locking;
mod manifest;
mod mirror;
mod needed;
mod parallel;
mod prune;
mod recipe;
mod release;
mod repository;
mod resolver;
mod scratch;
mod seal;
mod source;
mod staging;
mod store;
#[cfg(test)]
mod testing;
mod tree;
mod version;
mod workshop;

pub use sovereign_kernel::DecompressError;

pub use arch::Arch;
pub use archive::Archive;
pub use build::{Build, Error, Progress, build, find};
pub use deb::DebError;
pub use download::DownloadError;
pub use erofs::ErofsError;
pub use fetch::FetchError;
pub use guest_kernel::GuestKernelError;
pub use initramfs::{InitramfsFile, segment};
pub use keyring::KeyError;
pub use lock::{Lock, LockError, LockedPackage};
pub use manifest::Artifacts;
pub use mirror::{MirrorError, Mirrors};
pub use needed::NeededError;
pub use prune::{PruneError, Pruned, prune};
pub use release::ReleaseError;
pub use repository::RepositoryError;
pub use store::StoreError;
pub use tree::{Node, Tree, TreeError};
pub use version::compare as compare_versions;
