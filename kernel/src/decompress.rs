//! Decompression of kernel payloads and modules, told apart by their magic numbers.

use std::io::Read;

use thiserror::Error;

/// Longest output of one decompression in bytes; a cloud kernel is about 60 MiB.
pub(crate) const OUTPUT_MAX: u64 = 512 << 20;

/// Compression of a kernel payload or module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// xz (LZMA2).
    Xz,
    /// Zstandard.
    Zstd,
    /// gzip; recognised, not supported (no Debian kernel of interest uses it).
    Gzip,
    /// Not compressed: an ELF file.
    Elf,
}

/// Why data could not be decompressed.
#[derive(Debug, Error)]
pub enum DecompressError {
    /// The first bytes match nothing known.
    #[error("cannot tell the compression from first bytes {magic:02x?}")]
    UnknownMagic {
        /// The first bytes.
        magic: Vec<u8>,
    },
    /// Recognised, not supported.
    #[error("compression {0:?} is not supported")]
    Unsupported(Compression),
    /// The decompressor refused the data.
    #[error("cannot decompress {compression:?} data")]
    Corrupt {
        /// What the data claims to be.
        compression: Compression,
        /// What the decompressor said.
        source: std::io::Error,
    },
    /// More output than allowed.
    #[error("{compression:?} data expands to more than {max} bytes")]
    TooLarge {
        /// What the data claims to be.
        compression: Compression,
        /// The limit in bytes.
        max: u64,
    },
}

impl Compression {
    /// Tells the compression from the first bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x7f, b'E', b'L', b'F', ..] => Some(Self::Elf),
            _ => None,
        }
    }
}

/// Decompresses one stream; bytes after its end are ignored (the kernel appends the size).
pub(crate) fn decompress(bytes: &[u8]) -> Result<Vec<u8>, DecompressError> {
    let compression = Compression::of(bytes).ok_or_else(|| DecompressError::UnknownMagic {
        magic: bytes.iter().take(6).copied().collect(),
    })?;
    match compression {
        Compression::Elf => Ok(bytes.to_vec()),
        Compression::Gzip => Err(DecompressError::Unsupported(compression)),
        Compression::Xz => read_limited(lzma_rust2::XzReader::new(bytes, false), compression),
        Compression::Zstd => {
            let reader =
                ruzstd::decoding::StreamingDecoder::new(bytes).map_err(|error| DecompressError::Corrupt {
                    compression,
                    source: std::io::Error::other(error.to_string()),
                })?;
            read_limited(reader, compression)
        }
    }
}

fn read_limited(reader: impl Read, compression: Compression) -> Result<Vec<u8>, DecompressError> {
    let mut output = Vec::new();
    reader
        .take(OUTPUT_MAX + 1)
        .read_to_end(&mut output)
        .map_err(|source| DecompressError::Corrupt { compression, source })?;
    if output.len() as u64 > OUTPUT_MAX {
        return Err(DecompressError::TooLarge {
            compression,
            max: OUTPUT_MAX,
        });
    }
    Ok(output)
}
