//! A log-in with a password (SCRAM-SHA-256, RFC 5802 and 7677), the client's side.

use anyhow::{Context, Result, ensure};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use super::base64;

/// No channel binding, no other identity (RFC 5802, `gs2-header`).
const HEADER: &str = "n,,";

/// What is said first, without the header.
fn bare(nonce: &str) -> String {
    format!("n=,r={nonce}") // PostgreSQL takes the user of its own message
}

/// The first message.
pub(super) fn first(nonce: &str) -> String {
    format!("{HEADER}{}", bare(nonce))
}

/// The last message, and what the server must say to it.
///
/// # Errors
/// When the server's first message is not as the standard has it.
pub(super) fn last(password: &str, nonce: &str, server: &str) -> Result<(String, String)> {
    let part = |key: &str| {
        let mut parts = server.split(',');
        parts
            .find_map(|part| part.strip_prefix(key))
            .with_context(|| format!("no {key} in {server:?}"))
    };
    let (both, salt, count) = (part("r=")?, part("s=")?, part("i=")?.parse()?);
    ensure!(both.starts_with(nonce), "the nonce of somebody else");
    let salt = base64::decode(salt).context("a salt that is no base64")?;
    let without_proof = format!("c={},r={both}", base64::encode(HEADER.as_bytes()));
    let signed = format!("{},{server},{without_proof}", bare(nonce));
    let salted = stretch(password.as_bytes(), &salt, count)?;
    let client = code(&salted, &[b"Client Key"])?;
    let signature = code(&Sha256::digest(client), &[signed.as_bytes()])?;
    let proof: Vec<u8> = client
        .iter()
        .zip(signature)
        .map(|(one, other)| one ^ other)
        .collect();
    let answer = code(&code(&salted, &[b"Server Key"])?, &[signed.as_bytes()])?;
    Ok((
        format!("{without_proof},p={}", base64::encode(&proof)),
        format!("v={}", base64::encode(&answer)),
    ))
}

/// `Hi` of RFC 5802.
fn stretch(password: &[u8], salt: &[u8], count: u32) -> Result<[u8; 32]> {
    let mut last = code(password, &[salt, &1u32.to_be_bytes()])?;
    let mut sum = last;
    for _ in 1..count {
        last = code(password, &[&last])?;
        sum.iter_mut().zip(last).for_each(|(sum, byte)| *sum ^= byte);
    }
    Ok(sum)
}

fn code(key: &[u8], message: &[&[u8]]) -> Result<[u8; 32]> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key)?;
    message.iter().for_each(|part| mac.update(part));
    Ok(mac.finalize().into_bytes().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7677, section 3, but for the user, whom PostgreSQL's clients leave out: as Python's hashlib computes it.
    #[test]
    fn the_proof_is_that_of_the_standard() -> Result<()> {
        let nonce = "rOprNGfwEbeRWgbNEkqO";
        let server = "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (said, answer) = last("pencil", nonce, server)?;
        assert_eq!(first(nonce), "n,,n=,r=rOprNGfwEbeRWgbNEkqO");
        assert_eq!((said.as_str(), answer.as_str()), PENCIL);
        assert!(last("pencil", "other", server).is_err());
        Ok(())
    }

    const PENCIL: (&str, &str) = (
        "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=qvT2SWdEH5Q06albL+hjSYuUhCG7VndFyzIb7CK4n9k=",
        "v=3HO6Qt1M4MKJrmlKaoOqLAI0/0TV0HZe7J9H3MBtSOg=",
    );
}
