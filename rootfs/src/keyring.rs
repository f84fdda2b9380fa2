//! The archives' public keys and our policy on them.
//!
//! The `pgp` crate checks signatures; who may sign, until when, and through which subkey is decided here.

use std::io::Cursor;

use pgp::{
    composed::{CleartextSignedMessage, Deserializable as _, SignedPublicKey, SignedPublicSubKey},
    crypto::hash::HashAlgorithm,
    packet::{Signature, SignatureType},
    types::{KeyDetails, SignedUser, Tag, Timestamp},
};
use thiserror::Error;

use crate::Archive;

/// How far a signature may lie in the future, for clocks that run late, in seconds.
const CLOCK_SLACK: u64 = 600;

/// The built-in keys: archive, primary key fingerprint, certificate.
const TRUSTED: &[(Archive, &str, &[u8])] = &[
    (
        Archive::Main,
        "04b54c3cdca79751b16bc6b5225629df75b188bd",
        include_bytes!("../keys/debian-archive-trixie-automatic.gpg"),
    ),
    (
        Archive::Main,
        "41587f7db8c774bccf131416762f67a0b2c39de4",
        include_bytes!("../keys/debian-archive-trixie-stable.gpg"),
    ),
    (
        Archive::Security,
        "5e04a1e3223a19a20706e20f9904613d4cce68c6",
        include_bytes!("../keys/debian-archive-trixie-security-automatic.gpg"),
    ),
];

/// Certificates that may sign, each for one archive.
#[derive(Debug, Clone)]
pub(crate) struct Keyring {
    certificates: Vec<(Archive, SignedPublicKey)>,
}

/// Why a key or a signature is not accepted.
#[derive(Debug, Error)]
pub enum KeyError {
    /// A certificate cannot be read.
    #[error("cannot read the certificate {fingerprint}")]
    BadCertificate {
        /// The fingerprint it should have.
        fingerprint: String,
        /// Why.
        source: Box<pgp::errors::Error>,
    },
    /// A certificate is another one than its table entry says.
    #[error("certificate has fingerprint {found}, expected {expected}")]
    WrongFingerprint {
        /// The fingerprint it should have.
        expected: String,
        /// The one it has.
        found: String,
    },
    /// The text is not a clear-signed message.
    #[error("{name} is not a clear-signed message")]
    NotSigned {
        /// Which file.
        name: String,
        /// Why.
        source: Box<pgp::errors::Error>,
    },
    /// No signature by a trusted, valid key matches the text.
    #[error("{name} has no valid signature by a trusted key of the {archive:?} archive: {reasons}")]
    Untrusted {
        /// Which file.
        name: String,
        /// Whose keys were tried.
        archive: Archive,
        /// What was wrong with each signature.
        reasons: String,
    },
}

impl Keyring {
    /// The keys of the Debian archives.
    pub(crate) fn debian() -> Result<Self, KeyError> {
        let certificates = TRUSTED.iter().map(|(archive, fingerprint, bytes)| {
            let certificate = read_certificate(fingerprint, bytes)?;
            Ok((*archive, certificate))
        });
        Ok(Self {
            certificates: certificates.collect::<Result<_, KeyError>>()?,
        })
    }

    #[cfg(test)]
    pub(crate) fn of(certificates: Vec<(Archive, SignedPublicKey)>) -> Self {
        Self { certificates }
    }

    /// The signed text of `message`, if one of its signatures is by a key of `archive` that is valid at `now`
    /// (seconds since 1970).
    pub(crate) fn verify(
        &self,
        archive: Archive,
        name: &str,
        message: &[u8],
        now: u64,
    ) -> Result<String, KeyError> {
        let (message, _) =
            CleartextSignedMessage::from_armor(message).map_err(|error| KeyError::NotSigned {
                name: name.to_owned(),
                source: Box::new(error),
            })?;
        let text = message.signed_text();
        let keys = || {
            self.certificates
                .iter()
                .filter(|(of, _)| *of == archive)
                .map(|(_, certificate)| certificate)
        };
        let mut reasons = Vec::new();
        for signature in message.signatures() {
            for certificate in keys() {
                match check(certificate, signature, &text, now) {
                    Ok(()) => return Ok(text.replace("\r\n", "\n")),
                    Err(reason) => reasons.push(format!("{}: {reason}", short(certificate))),
                }
            }
        }
        Err(KeyError::Untrusted {
            name: name.to_owned(),
            archive,
            reasons: reasons.join("; "),
        })
    }
}

fn read_certificate(fingerprint: &str, bytes: &[u8]) -> Result<SignedPublicKey, KeyError> {
    let certificate =
        SignedPublicKey::from_bytes(Cursor::new(bytes)).map_err(|error| KeyError::BadCertificate {
            fingerprint: fingerprint.to_owned(),
            source: Box::new(error),
        })?;
    let found = certificate.primary_key.fingerprint().to_string();
    if found == fingerprint {
        Ok(certificate)
    } else {
        Err(KeyError::WrongFingerprint {
            expected: fingerprint.to_owned(),
            found,
        })
    }
}

fn short(certificate: &SignedPublicKey) -> String {
    certificate.primary_key.legacy_key_id().to_string()
}

/// Whether `signature` over `text` counts: strong, current, and by the primary key or a bound signing subkey.
fn check(
    certificate: &SignedPublicKey,
    signature: &Signature,
    text: &str,
    now: u64,
) -> Result<(), &'static str> {
    if !matches!(signature.typ(), Some(SignatureType::Binary | SignatureType::Text)) {
        return Err("not a signature over a document");
    }
    current(signature, now)?;
    let made = seconds(signature.created().ok_or("signature without a date")?);
    let primary = primary_flags(certificate, now)?;
    if signature
        .verify(&certificate.primary_key, text.as_bytes())
        .is_ok()
    {
        return if primary.sign {
            Ok(())
        } else {
            Err("primary key may not sign documents")
        };
    }
    for subkey in &certificate.public_subkeys {
        if signature.verify(&subkey.key, text.as_bytes()).is_ok() {
            if made < seconds(subkey.key.created_at()) {
                return Err("signature is older than its key");
            }
            return subkey_may_sign(certificate, subkey, now);
        }
    }
    Err("not signed by it, or the text was changed")
}

/// Strong hash, made in the past, not expired.
fn current(signature: &Signature, now: u64) -> Result<(), &'static str> {
    if !matches!(
        signature.hash_alg(),
        Some(HashAlgorithm::Sha256 | HashAlgorithm::Sha384 | HashAlgorithm::Sha512)
    ) {
        return Err("weak hash");
    }
    let made = seconds(signature.created().ok_or("signature without a date")?);
    if made > now + CLOCK_SLACK {
        return Err("signature lies in the future (is the clock right?)");
    }
    let life = signature
        .signature_expiration_time()
        .map_or(0, |life| u64::from(life.as_secs()));
    if life != 0 && made + life <= now {
        Err("signature has expired")
    } else {
        Ok(())
    }
}

struct Flags {
    sign: bool,
}

/// The powers of the primary key, if it is neither revoked nor expired: by the newest self-signature over a user id,
/// else over the key itself. Debian's keys carry direct signatures that only name revokers and no expiry, made after
/// those over the user id: the newest of each sort must hold.
fn primary_flags(certificate: &SignedPublicKey, now: u64) -> Result<Flags, &'static str> {
    let key = &certificate.primary_key;
    let details = &certificate.details;
    if details
        .revocation_signatures
        .iter()
        .any(|signature| signature.verify_key(key).is_ok())
    {
        return Err("key is revoked");
    }
    let direct = details
        .direct_signatures
        .iter()
        .filter(|signature| signature.verify_key(key).is_ok());
    let direct = newest(direct, now);
    let users = newest(
        details
            .users
            .iter()
            .flat_map(|user| user_signatures(certificate, user)),
        now,
    );
    for signature in [direct, users].into_iter().flatten() {
        unexpired(seconds(key.created_at()), signature, now)?;
    }
    let newest = users.or(direct).ok_or("key has no valid self-signature")?;
    Ok(Flags {
        sign: newest.key_flags().sign(),
    })
}

fn newest<'a>(signatures: impl Iterator<Item = &'a Signature>, now: u64) -> Option<&'a Signature> {
    signatures
        .filter(|signature| current(signature, now).is_ok())
        .max_by_key(|signature| signature.created())
}

/// Valid self-signatures over a user id; none when it is revoked.
fn user_signatures<'a>(certificate: &SignedPublicKey, user: &'a SignedUser) -> Vec<&'a Signature> {
    let valid = |signature: &&Signature| {
        signature
            .verify_certification(&certificate.primary_key, Tag::UserId, &user.id)
            .is_ok()
    };
    let signatures: Vec<&Signature> = user.signatures.iter().filter(valid).collect();
    let revoked = signatures
        .iter()
        .any(|signature| signature.typ() == Some(SignatureType::CertRevocation));
    if revoked { Vec::new() } else { signatures }
}

fn subkey_may_sign(
    certificate: &SignedPublicKey,
    subkey: &SignedPublicSubKey,
    now: u64,
) -> Result<(), &'static str> {
    let primary = &certificate.primary_key;
    let bound = |signature: &&Signature| signature.verify_subkey_binding(primary, &subkey.key).is_ok();
    let valid: Vec<&Signature> = subkey.signatures.iter().filter(bound).collect();
    if valid
        .iter()
        .any(|signature| signature.typ() == Some(SignatureType::SubkeyRevocation))
    {
        return Err("subkey is revoked");
    }
    let newest = newest(valid.into_iter(), now).ok_or("subkey is not bound to its primary key")?;
    unexpired(seconds(subkey.key.created_at()), newest, now)?;
    if !newest.key_flags().sign() {
        return Err("subkey may not sign documents");
    }
    // Without the subkey's own word, anybody could claim a foreign signing key as theirs.
    let back = newest
        .embedded_signature()
        .ok_or("subkey does not acknowledge its primary key")?;
    back.verify_primary_key_binding(&subkey.key, primary)
        .map_err(|_| "subkey does not acknowledge its primary key")
}

fn unexpired(created: u64, binding: &Signature, now: u64) -> Result<(), &'static str> {
    let life = binding
        .key_expiration_time()
        .map_or(0, |life| u64::from(life.as_secs()));
    if created > now + CLOCK_SLACK {
        return Err("key was made in the future (is the clock right?)");
    }
    if life != 0 && created + life <= now {
        Err("key has expired")
    } else {
        Ok(())
    }
}

fn seconds(time: Timestamp) -> u64 {
    u64::from(time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NOW, Signer};

    #[test]
    fn the_built_in_certificates_are_those_of_the_table_and_valid() {
        let keyring = Keyring::debian().unwrap();
        assert_eq!(keyring.certificates.len(), TRUSTED.len());
        for (_, certificate) in &keyring.certificates {
            primary_flags(certificate, NOW).unwrap();
            assert_eq!(
                primary_flags(certificate, NOW + 20 * 365 * 86_400).err(),
                Some("key has expired")
            );
        }
        assert!(matches!(
            read_certificate(TRUSTED[0].1, TRUSTED[1].2),
            Err(KeyError::WrongFingerprint { .. })
        ));
    }

    #[test]
    fn primary_and_bound_subkeys_may_sign() {
        for signer in [Signer::primary(), Signer::subkey()] {
            let keyring = signer.keyring();
            assert_eq!(
                keyring
                    .verify(Archive::Main, "x", &signer.sign("a: b\n"), signer.now())
                    .unwrap()
                    .trim_end(),
                "a: b"
            );
        }
    }

    fn reason(keyring: &Keyring, archive: Archive, message: &[u8], now: u64) -> String {
        keyring
            .verify(archive, "x", message, now)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn other_keys_archives_texts_and_times_are_refused() {
        let (signer, other) = (Signer::primary(), Signer::primary());
        let message = signer.sign("hello\n");
        let changed = String::from_utf8(message.clone())
            .unwrap()
            .replace("hello", "jello");
        let now = signer.now();
        assert!(reason(&other.keyring(), Archive::Main, &message, now).contains("not signed by it"));
        assert!(reason(&signer.keyring(), Archive::Security, &message, now).contains("no valid signature"));
        assert!(
            reason(&signer.keyring(), Archive::Main, changed.as_bytes(), now).contains("text was changed")
        );
        assert!(reason(&signer.keyring(), Archive::Main, &message, now - 86_400).contains("future"));
        assert!(reason(&signer.keyring(), Archive::Main, b"hello\n", now).contains("not a clear-signed"));
    }

    #[test]
    fn a_subkey_of_another_certificate_is_refused() {
        let (signer, thief) = (Signer::subkey(), Signer::primary());
        let message = signer.sign("hello\n");
        let mut stolen = thief.certificate();
        stolen.public_subkeys = signer.certificate().public_subkeys;
        let keyring = Keyring::of(vec![(Archive::Main, stolen)]);
        assert!(reason(&keyring, Archive::Main, &message, signer.now()).contains("not bound"));
    }
}
