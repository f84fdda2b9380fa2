//! A packaged kernel image made into what a VMM starts fastest: an uncompressed ELF (x86-64) or Image (arm64).

use thiserror::Error;

use crate::decompress::{Compression, DecompressError, decompress};

// Offsets of the x86 setup header: Linux Documentation/arch/x86/boot.rst.
const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL_VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// First boot protocol with a payload offset.
const PROTOCOL_MIN: u16 = 0x0208;
const SECTOR: usize = 512;
/// Zero in the header means this many setup sectors.
const SETUP_SECTS_DEFAULT: usize = 4;
/// Longest kernel in bytes; Debian's have about 60 MiB.
const KERNEL_MAX: u64 = 512 << 20;
/// Offset of the magic of an arm64 Image: Linux Documentation/arch/arm64/booting.rst.
const ARM64_MAGIC: usize = 0x38;

/// Why an image is not a usable kernel.
#[derive(Debug, Error)]
pub enum VmlinuxError {
    /// Neither a bzImage, an ELF file nor an arm64 Image.
    #[error("kernel image is neither a bzImage, an ELF file nor an arm64 Image ({length} bytes)")]
    NotAKernel {
        /// Its length in bytes.
        length: usize,
    },
    /// The boot protocol is too old to name the payload.
    #[error("bzImage speaks boot protocol {version:#06x}, at least 0x0208 is needed")]
    OldProtocol {
        /// What it speaks.
        version: u16,
    },
    /// The header points outside the file.
    #[error("bzImage payload at {offset}+{length} lies outside its {total} bytes")]
    PayloadOutside {
        /// Start in bytes.
        offset: usize,
        /// Length in bytes.
        length: usize,
        /// File length in bytes.
        total: usize,
    },
    /// The payload does not decompress.
    #[error("cannot unpack the bzImage payload")]
    Payload(#[from] DecompressError),
    /// The payload is something else than a kernel.
    #[error("bzImage payload is not an ELF file")]
    PayloadNotElf,
}

/// The uncompressed kernel in `image`: the payload of a bzImage, or `image` itself when it is an ELF file or an
/// uncompressed arm64 Image.
///
/// # Errors
/// When the image is not a kernel or its payload does not unpack.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>, VmlinuxError> {
    if Compression::of(image) == Some(Compression::Elf) || is_arm64_image(image) {
        return Ok(image.to_vec());
    }
    let kernel = decompress(payload(image)?, KERNEL_MAX)?;
    if Compression::of(&kernel) != Some(Compression::Elf) {
        return Err(VmlinuxError::PayloadNotElf);
    }
    Ok(kernel)
}

fn is_arm64_image(image: &[u8]) -> bool {
    image.get(ARM64_MAGIC..ARM64_MAGIC + 4) == Some(b"ARM\x64".as_slice())
}

fn payload(image: &[u8]) -> Result<&[u8], VmlinuxError> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS".as_slice())
        || image.len() < PAYLOAD_LENGTH + 4
    {
        return Err(VmlinuxError::NotAKernel { length: image.len() });
    }
    let version = u16::from_le_bytes([image[PROTOCOL_VERSION], image[PROTOCOL_VERSION + 1]]);
    if version < PROTOCOL_MIN {
        return Err(VmlinuxError::OldProtocol { version });
    }
    let setup_sectors = match usize::from(image[SETUP_SECTS]) {
        0 => SETUP_SECTS_DEFAULT,
        sectors => sectors,
    };
    let length = word(image, PAYLOAD_LENGTH);
    let offset = ((setup_sectors + 1) * SECTOR).saturating_add(word(image, PAYLOAD_OFFSET));
    let outside = VmlinuxError::PayloadOutside {
        offset,
        length,
        total: image.len(),
    };
    image.get(offset..offset.saturating_add(length)).ok_or(outside)
}

fn word(image: &[u8], at: usize) -> usize {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&image[at..at + 4]);
    u32::from_le_bytes(bytes) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR];
        image[SETUP_SECTS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL_VERSION..PROTOCOL_VERSION + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image.extend([0xcc; 100]);
        image
    }

    #[test]
    fn payload_is_found_through_the_setup_header() {
        assert_eq!(
            vmlinux(&bzimage(b"\x7fELF and so on")).unwrap(),
            b"\x7fELF and so on"
        );
    }

    #[test]
    fn zstd_payload_with_appended_size_unpacks() {
        // printf '\177ELF' | zstd, then the size that the kernel's build appends.
        let frame = ruzstd::encoding::compress_to_vec(
            b"\x7fELF".as_slice(),
            ruzstd::encoding::CompressionLevel::Fastest,
        );
        let payload = [frame, 4_u32.to_le_bytes().to_vec()].concat();
        assert_eq!(vmlinux(&bzimage(&payload)).unwrap(), b"\x7fELF");
    }

    #[test]
    fn header_that_points_outside_is_refused() {
        let mut image = bzimage(b"\x7fELF");
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            vmlinux(&image),
            Err(VmlinuxError::PayloadOutside { .. })
        ));
    }

    #[test]
    fn old_protocol_and_other_files_are_refused() {
        let mut image = bzimage(b"\x7fELF");
        image[PROTOCOL_VERSION] = 7;
        assert!(matches!(
            vmlinux(&image),
            Err(VmlinuxError::OldProtocol { .. }) | Err(VmlinuxError::PayloadOutside { .. })
        ));
        assert!(matches!(
            vmlinux(b"#!/bin/sh"),
            Err(VmlinuxError::NotAKernel { length: 9 })
        ));
        assert!(matches!(
            vmlinux(&bzimage(b"garbage.")),
            Err(VmlinuxError::Payload(DecompressError::UnknownMagic { .. }))
        ));
    }

    #[test]
    fn arm64_image_passes_through() {
        let mut image = vec![0; 64];
        image[ARM64_MAGIC..].copy_from_slice(b"ARMd\0\0\0\0");
        assert_eq!(vmlinux(&image).unwrap(), image);
    }
}
