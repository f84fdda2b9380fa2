//! The last initramfs segment of a boot, and the sealed memfd that carries the whole.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use sovereign_protocol::boot::{AGENT_PORT, BootRecord, PATH};
use sovereign_protocol::handshake::{BootKey, random_hex};

/// Bytes of entropy for the guest's kernel.
const SEED_BYTES: usize = 64;
/// A file for its owner only.
const MODE: u32 = 0o100_600;

/// A record for a boot that begins now.
///
/// # Errors
/// When the kernel gives no randomness.
pub fn fresh_record(wall_ns: i64) -> anyhow::Result<BootRecord> {
    Ok(BootRecord {
        version: 1,
        boot_id: random_hex::<16>()?,
        key: BootKey::generate()?,
        wall_ns,
        seed: random_hex::<SEED_BYTES>()?,
        port: AGENT_PORT,
        format_data: true,
    })
}

/// The initramfs of one boot in a sealed memfd, read by QEMU as `/proc/self/fd/N`.
///
/// # Errors
/// Naming the initramfs.
pub fn initramfs(base: &Path, record: &BootRecord) -> anyhow::Result<OwnedFd> {
    write(base, record).with_context(|| format!("cannot make a boot initramfs from {}", base.display()))
}

fn write(base: &Path, record: &BootRecord) -> io::Result<OwnedFd> {
    let fd = memfd_create(
        "sovereign-initramfs",
        MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC,
    )?;
    let mut file = File::from(fd);
    let mut bytes = Vec::new();
    File::open(base)?.read_to_end(&mut bytes)?;
    file.write_all(&padded(bytes))?;
    file.write_all(&padded(segment(record)?))?;
    let fd = OwnedFd::from(file);
    fcntl_add_seals(
        &fd,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL,
    )?;
    Ok(fd)
}

/// One uncompressed cpio archive with `boot.json`.
fn segment(record: &BootRecord) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(record)?;
    let size = u32::try_from(json.len()).unwrap_or(u32::MAX);
    let mut writer = cpio::NewcBuilder::new(PATH.trim_start_matches('/'))
        .mode(MODE)
        .nlink(1)
        .write(Vec::new(), size);
    writer.write_all(&json)?;
    cpio::newc::trailer(writer.finish()?)
}

/// The kernel drops a segment silently that does not begin at a multiple of 4.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom};

    #[test]
    fn the_record_is_the_last_segment_aligned_and_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        std::fs::write(&base, b"12345").unwrap();
        let record = fresh_record(7).unwrap();
        let mut file = File::from(initramfs(&base, &record).unwrap());
        assert!(file.write_all(b"x").is_err());
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(&bytes[..8], b"12345\0\0\0");
        assert_eq!(bytes.len() % 4, 0);
        let mut entry = cpio::NewcReader::new(&bytes[8..]).unwrap();
        assert_eq!((entry.entry().name(), entry.entry().mode()), ("boot.json", MODE));
        let mut json = Vec::new();
        entry.read_to_end(&mut json).unwrap();
        assert_eq!(BootRecord::parse(&json).unwrap(), record);
    }

    #[test]
    fn every_boot_has_its_own_id_key_and_seed() {
        let (a, b) = (fresh_record(0).unwrap(), fresh_record(0).unwrap());
        assert!(a.boot_id != b.boot_id && a.key != b.key && a.seed != b.seed);
    }
}
