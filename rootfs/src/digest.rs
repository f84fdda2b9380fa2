//! Digests as lower-case hexadecimal text, the form in which repositories and locks carry them.

use sha2::{Digest as _, Sha256};

/// Digest of `bytes`.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-1 of `bytes`: an address where others use it as one, never proof of anything.
pub(crate) fn sha1_hex(bytes: &[u8]) -> String {
    use sha1::Digest as _;
    hex(&sha1::Sha1::digest(bytes))
}

/// Lower-case hexadecimal digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether `text` can be a SHA-256: anything else must not become a file name.
pub(crate) fn is_sha256(text: &str) -> bool {
    is_hex(text, 64)
}

/// Whether `text` can be a SHA-1.
pub(crate) fn is_sha1(text: &str) -> bool {
    is_hex(text, 40)
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
