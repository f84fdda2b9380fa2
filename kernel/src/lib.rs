//! What a guest kernel must have, and how a packaged one is made ready.
//!
//! Owns the kernel contract ([`REQUIREMENTS`]) and, behind the feature `build`, turns the files of a kernel
//! package into an uncompressed image and a load order of modules. It never downloads, writes or loads anything.

mod requirement;

pub use requirement::{Proof, REQUIREMENTS, Requirement, missing};

#[cfg(feature = "build")]
mod catalogue;
#[cfg(feature = "build")]
mod decompress;
#[cfg(feature = "fuzz")]
pub mod fuzz;
#[cfg(test)]
#[cfg(feature = "build")]
mod hostile_tests;
#[cfg(feature = "build")]
mod module_index;
#[cfg(feature = "build")]
mod module_info;
#[cfg(feature = "build")]
mod modules;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "build")]
mod vmlinux;
#[cfg(feature = "build")]
mod xz;

#[cfg(feature = "build")]
pub use self::{
    catalogue::Catalogue,
    decompress::{Compression, DecompressError, decompress},
    module_index::ModuleIndex,
    modules::{ModuleError, ModuleSet, canonical_name},
    vmlinux::{VmlinuxError, vmlinux},
};
