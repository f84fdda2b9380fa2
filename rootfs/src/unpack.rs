//! xz and Zstandard with a limit on what comes out.

use std::io::{self, Read};

use thiserror::Error;

/// Why data do not unpack.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The decompressor refused them.
    #[error("damaged {format} data")]
    Damaged {
        /// `xz` or `zstd`.
        format: &'static str,
        /// What the decompressor said.
        source: io::Error,
    },
    /// They expand to more than allowed.
    #[error("{format} data expand to more than {max} bytes")]
    TooLong {
        /// `xz` or `zstd`.
        format: &'static str,
        /// The limit in bytes.
        max: u64,
    },
}

/// Unpacks xz data to at most `max` bytes.
pub(crate) fn unxz(bytes: &[u8], max: u64) -> Result<Vec<u8>, UnpackError> {
    limited("xz", lzma_rust2::XzReader::new(bytes, true), max)
}

/// Unpacks one Zstandard frame to at most `max` bytes.
pub(crate) fn unzstd(bytes: &[u8], max: u64) -> Result<Vec<u8>, UnpackError> {
    let damaged = |source| UnpackError::Damaged {
        format: "zstd",
        source,
    };
    let reader = ruzstd::decoding::StreamingDecoder::new(bytes)
        .map_err(|error| damaged(io::Error::other(error.to_string())))?;
    limited("zstd", reader, max)
}

fn limited(format: &'static str, reader: impl Read, max: u64) -> Result<Vec<u8>, UnpackError> {
    let mut output = Vec::new();
    reader
        .take(max + 1)
        .read_to_end(&mut output)
        .map_err(|source| UnpackError::Damaged { format, source })?;
    if output.len() as u64 > max {
        Err(UnpackError::TooLong { format, max })
    } else {
        Ok(output)
    }
}
