//! TAP devices by way of `/dev/net/tun`: the kernel makes them by ioctl only, not by netlink.
//!
//! The device belongs to the namespace in which the descriptor was *opened*; who calls the
//! ioctl, and where, does not matter (FACTS section 11).

use std::ffi::c_int;
use std::io;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::ioctl::{self, Getter, IntegerSetter, Updater, opcode};

use super::names::LinkName;

const PATH: &str = "/dev/net/tun";
const IFF_TAP: u16 = 0x0002;
const IFF_PERSIST: u16 = 0x0800;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const IFF_TUN_EXCL: u16 = 0x8000;
/// What QEMU's `-netdev tap,fd=` expects; the same at every attach, or it is EINVAL.
const FLAGS: u16 = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;

const TUNSETIFF: ioctl::Opcode = opcode::write::<c_int>(b'T', 202);
const TUNSETPERSIST: ioctl::Opcode = opcode::write::<c_int>(b'T', 203);
const TUNSETOWNER: ioctl::Opcode = opcode::write::<c_int>(b'T', 204);
const TUNGETIFF: ioctl::Opcode = opcode::read::<u32>(b'T', 210);

/// `struct ifreq` as TUNSETIFF and TUNGETIFF use it; 40 bytes on 64-bit kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Opens an unattached descriptor in the calling thread's network namespace.
///
/// # Errors
/// The system's own: ENOENT without the driver, EACCES where the node is not ours to open.
pub(crate) fn open_unattached() -> io::Result<OwnedFd> {
    Ok(open(PATH, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// Makes a TAP that lives as long as `tun` is open.
///
/// # Errors
/// EBUSY when a device of this name exists already; EPERM without the capability.
pub(crate) fn create(tun: impl AsFd, name: &LinkName) -> io::Result<()> {
    set_interface(tun, name, FLAGS | IFF_TUN_EXCL)
}

/// Attaches `tun` to an existing TAP: from now on it has carrier.
///
/// # Errors
/// EBUSY when another process holds it; `NotFound` when there was no such persistent TAP
/// (the one that the kernel made instead goes away with `tun`).
pub(crate) fn attach(tun: &OwnedFd, name: &LinkName) -> io::Result<()> {
    set_interface(tun, name, FLAGS)?;
    // SAFETY: TUNGETIFF fills in one `struct ifreq`, whose layout and size `InterfaceRequest` has.
    #[allow(unsafe_code, reason = "TUNGETIFF has no safe wrapper")]
    let got: InterfaceRequest = unsafe { ioctl::ioctl(tun, Getter::<TUNGETIFF, InterfaceRequest>::new()) }?;
    if got.flags & IFF_PERSIST == 0 {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such TAP"));
    }
    Ok(())
}

/// Lets a TAP live on without a descriptor, attachable by its owner alone.
///
/// # Errors
/// The system's own.
pub(crate) fn persist(tun: impl AsFd, owner: u32) -> io::Result<()> {
    // SAFETY: both take an integer by value: a user id, and a truth value.
    #[allow(unsafe_code, reason = "TUNSETOWNER and TUNSETPERSIST have no safe wrappers")]
    unsafe {
        ioctl::ioctl(&tun, IntegerSetter::<TUNSETOWNER>::new_usize(owner as usize))?;
        ioctl::ioctl(&tun, IntegerSetter::<TUNSETPERSIST>::new_usize(1))?;
    }
    Ok(())
}

fn set_interface(tun: impl AsFd, name: &LinkName, flags: u16) -> io::Result<()> {
    let mut request = InterfaceRequest {
        name: name.padded(),
        flags,
        rest: [0; 22],
    };
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose layout and size `InterfaceRequest` has.
    #[allow(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
    unsafe {
        ioctl::ioctl(tun, Updater::<TUNSETIFF, InterfaceRequest>::new(&mut request))?;
    }
    Ok(())
}

const _: () = assert!(size_of::<InterfaceRequest>() == 40);
