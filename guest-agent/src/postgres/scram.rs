//! What PostgreSQL keeps of a password (SCRAM-SHA-256, RFC 7677): made, and compared with a password.
//!
//! `SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>`, the last three in base64. Passwords are printable
//! ASCII (`core::apply::admit`), which SASLprep leaves as it is.

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// PostgreSQL's own number.
const ITERATIONS: u32 = 4_096;
/// A verifier with more is not looked at: it would take too long.
const MOST_ITERATIONS: u32 = 1_000_000;
/// Bytes of a new salt.
pub const SALT_BYTES: usize = 16;
const METHOD: &str = "SCRAM-SHA-256";

/// The verifier of a password.
#[must_use]
pub fn verifier(password: &str, salt: &[u8; SALT_BYTES]) -> String {
    with(password, ITERATIONS, salt)
}

/// True when this verifier is of this password.
#[must_use]
pub fn matches(verifier: &str, password: &str) -> bool {
    let parts = || {
        let (parameters, _) = verifier
            .strip_prefix(METHOD)?
            .strip_prefix('$')?
            .split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let iterations = iterations
            .parse()
            .ok()
            .filter(|count| (1..=MOST_ITERATIONS).contains(count))?;
        Some((iterations, decode(salt)?))
    };
    parts().is_some_and(|(iterations, salt)| with(password, iterations, &salt) == verifier)
}

fn with(password: &str, iterations: u32, salt: &[u8]) -> String {
    let salted = stretch(password.as_bytes(), salt, iterations);
    let stored = Sha256::digest(code(&salted, &[b"Client Key"]));
    let server = code(&salted, &[b"Server Key"]);
    format!(
        "{METHOD}${iterations}:{}${}:{}",
        encode(salt),
        encode(&stored),
        encode(&server)
    )
}

/// `Hi` of RFC 5802, which is PBKDF2 with one block.
fn stretch(password: &[u8], salt: &[u8], iterations: u32) -> [u8; 32] {
    let mut last = code(password, &[salt, &1u32.to_be_bytes()]);
    let mut sum = last;
    for _ in 1..iterations {
        last = code(password, &[&last]);
        for (sum, byte) in sum.iter_mut().zip(last) {
            *sum ^= byte;
        }
    }
    sum
}

fn code(key: &[u8], message: &[&[u8]]) -> [u8; 32] {
    // HMAC takes keys of every length.
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("a key of any length");
    message.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn encode(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for n in 0..4 {
            let index = usize::try_from(bits >> (18 - 6 * n) & 63).unwrap_or(0);
            text.push(if n <= chunk.len() {
                char::from(ALPHABET[index])
            } else {
                '='
            });
        }
    }
    text
}

fn decode(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u32>> = text
        .trim_end_matches('=')
        .bytes()
        .map(|byte| {
            ALPHABET
                .iter()
                .position(|b| *b == byte)
                .and_then(|at| u32::try_from(at).ok())
        })
        .collect();
    let mut bytes = Vec::new();
    for chunk in digits?.chunks(4) {
        let bits = chunk.iter().fold(0, |bits, digit| bits << 6 | digit) << (6 * (4 - chunk.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..chunk.len()]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The example of RFC 7677, as Python's hashlib computes it too.
    const PENCIL: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    #[test]
    fn the_example_of_the_standard_comes_out() {
        let salt: [u8; SALT_BYTES] = decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap().try_into().unwrap();
        assert_eq!(verifier("pencil", &salt), PENCIL);
        assert!(matches(PENCIL, "pencil"));
        assert!(!matches(PENCIL, "pencil2"));
    }

    #[test]
    fn what_is_no_verifier_matches_nothing() {
        for wrong in [
            "",
            "md5abc",
            "SCRAM-SHA-256$0:AA==$a:b",
            "SCRAM-SHA-256$4000000000:AA==$a:b",
            "SCRAM-SHA-256$1:??$a:b",
            "SCRAM-SHA-256$1$",
        ] {
            assert!(!matches(wrong, ""), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn base64_goes_both_ways(bytes in prop::collection::vec(any::<u8>(), 0..50)) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }

        #[test]
        fn no_text_panics(text in "(SCRAM-SHA-256\\$)?[0-9]{0,3}[:$]?\\PC{0,20}") {
            let _ = matches(&text, "x");
        }
    }
}
