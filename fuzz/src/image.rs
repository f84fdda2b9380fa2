//! What the build reads of archives, packages and kernels.

use sovereign_kernel::fuzz as kernel;
use sovereign_rootfs::fuzz as rootfs;

pub(crate) fn compressed(data: &[u8]) {
    const MOST: u64 = 1 << 20;
    if let Ok(bytes) = sovereign_kernel::decompress(data, MOST) {
        assert!(bytes.len() as u64 <= MOST);
    }
}

pub(crate) fn kernel_image(data: &[u8]) {
    let _ = sovereign_kernel::vmlinux(data);
}

pub(crate) fn module(data: &[u8]) {
    kernel::module(data);
}

pub(crate) fn kernel_config(data: &[u8]) {
    let _ = sovereign_kernel::missing(&String::from_utf8_lossy(data))
        .into_iter()
        .count();
}

pub(crate) fn deb(data: &[u8]) {
    rootfs::deb(data);
}

pub(crate) fn tar(data: &[u8]) {
    rootfs::tar(data);
}

pub(crate) fn inrelease(data: &[u8]) {
    rootfs::inrelease(data);
}

pub(crate) fn packages(data: &[u8]) {
    rootfs::packages(data);
}

pub(crate) fn lock(data: &[u8]) {
    rootfs::lock(data);
}

pub(crate) fn elf_needed(data: &[u8]) {
    rootfs::elf_needed(data);
}
