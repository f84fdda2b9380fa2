//! Decompression of packages, indexes, kernel payloads and modules, told apart by their magic numbers, within limits.

use std::io::Read;

use thiserror::Error;

use crate::xz;

/// Largest dictionary in bytes; `xz -9` asks for this much. That of Zstandard is limited by `ruzstd` (128 MiB).
const DICTIONARY_MAX: u64 = 64 << 20;

/// How data are compressed.
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
    /// The frame around the compressed data is cut or damaged.
    #[error("the framing of {compression:?} data is damaged")]
    Framing {
        /// What the data claims to be.
        compression: Compression,
    },
    /// More output than allowed.
    #[error("{compression:?} data expands to more than {max} bytes")]
    TooLarge {
        /// What the data claims to be.
        compression: Compression,
        /// The limit in bytes.
        max: u64,
    },
    /// More memory than allowed.
    #[error("unpacking takes a dictionary of {dictionary} bytes, more than {DICTIONARY_MAX}")]
    Dictionary {
        /// Its size in bytes.
        dictionary: u64,
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

/// Decompresses one stream to at most `max` bytes; bytes after its end are ignored (the kernel appends the size). An
/// ELF file is given back as it is.
///
/// # Errors
/// When the data are damaged, of an unknown kind, or take more room than allowed.
pub fn decompress(bytes: &[u8], max: u64) -> Result<Vec<u8>, DecompressError> {
    let compression = Compression::of(bytes).ok_or_else(|| DecompressError::UnknownMagic {
        magic: bytes.iter().take(6).copied().collect(),
    })?;
    match compression {
        Compression::Elf => limited(bytes, compression, max),
        Compression::Gzip => Err(DecompressError::Unsupported(compression)),
        Compression::Xz => {
            let needs = xz::needs(bytes).ok_or(DecompressError::Framing { compression })?;
            if needs.dictionary > DICTIONARY_MAX {
                return Err(DecompressError::Dictionary {
                    dictionary: needs.dictionary,
                });
            }
            if needs.unpacked > max {
                return Err(DecompressError::TooLarge { compression, max });
            }
            limited(lzma_rust2::XzReader::new(bytes, false), compression, max)
        }
        Compression::Zstd => {
            let reader =
                ruzstd::decoding::StreamingDecoder::new(bytes).map_err(|error| DecompressError::Corrupt {
                    compression,
                    source: std::io::Error::other(error.to_string()),
                })?;
            limited(reader, compression, max)
        }
    }
}

fn limited(reader: impl Read, compression: Compression, max: u64) -> Result<Vec<u8>, DecompressError> {
    let mut output = Vec::new();
    reader
        .take(max.saturating_add(1))
        .read_to_end(&mut output)
        .map_err(|source| DecompressError::Corrupt { compression, source })?;
    if output.len() as u64 > max {
        return Err(DecompressError::TooLarge { compression, max });
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn xz(content: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn expansion_is_limited() {
        // Zeros shrink well: the limit is on what comes out.
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        let zstd = ruzstd::encoding::compress_to_vec([0; 100_000].as_slice(), level);
        for bomb in [xz(&[0; 100_000]), zstd] {
            assert!(matches!(
                decompress(&bomb, 99_999),
                Err(DecompressError::TooLarge { .. })
            ));
            assert_eq!(decompress(&bomb, 100_000).unwrap().len(), 100_000);
        }
        assert!(matches!(
            decompress(b"\x7fELF", 3),
            Err(DecompressError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_greedy_dictionary_is_refused_before_it_is_allocated() {
        let mut greedy = xz(b"small");
        let at = greedy.windows(2).position(|two| two == [0x21, 1]).unwrap();
        greedy[at + 2] = 40;
        let error = decompress(&greedy, 1 << 20).unwrap_err();
        assert!(matches!(error, DecompressError::Dictionary { dictionary } if dictionary == u32::MAX.into()));
    }
}
