//! The shim: parent of one guest's VMM, owner of its QMP socket, vsock device and console.
//!
//! It outlives the host agent; its own death is the VMM's (PR_SET_PDEATHSIG). One shim is
//! one VMM process is one boot is one key. It never restarts anything.

pub mod accel;
pub mod boot_segment;
pub mod console;
pub mod contract;
pub mod qemu;
pub mod qmp;
pub mod run;
pub mod vmm;
