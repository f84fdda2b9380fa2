//! The handshake before tarpc: fixed for ever, self-describing, proves the boot key.
//!
//! The dialer says H1, the listener answers H2 and a MAC, the dialer ends with H3, a MAC.
//! Each hello is a big-endian `u32` length and that many bytes of JSON (at most
//! [`HELLO_BYTES`]); unknown fields are ignored. A MAC is HMAC-SHA256 under the boot key
//! over a role label and every hello with its length, exactly as the bytes went over the
//! wire, so both ends agree on version, boot and channel or do not talk at all. It proves
//! identity; confidentiality is not claimed.

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::limits::{HANDSHAKE, HELLO_BYTES};
use crate::ways;

/// The oldest protocol version this build speaks.
pub const OLDEST: u16 = 1;
/// The newest protocol version this build speaks.
pub const NEWEST: u16 = 1;
/// What this build understands beyond the version, of documents that it is sent.
const CAPABILITIES: &[&str] = &[ways::CAPABILITY];
const MAC_BYTES: usize = 32;
const NONCE_BYTES: usize = 16;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// tarpc between host agent and guest agent.
    Guest,
    /// tarpc between ctl and host agent (identity by SO_PEERCRED, so the key is empty).
    Control,
    /// One byte stream: a forward, or the output of a command.
    Bulk,
}

/// The key of one boot of one guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct BootKey(String);

impl BootKey {
    /// A fresh key of 32 random bytes.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn generate() -> Result<Self, HandshakeError> {
        Ok(Self(random_hex::<32>()?))
    }

    /// The key of the control socket, where SO_PEERCRED tells who is there.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for BootKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BootKey(***)")
    }
}

/// How a handshake ended badly.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The peer said nothing, or too little, in time.
    #[error("the handshake did not end within {} s", HANDSHAKE.as_secs())]
    Timeout,
    /// The stream ended or broke.
    #[error("the stream broke during the handshake")]
    Stream(#[source] std::io::Error),
    /// A hello is longer than it may be.
    #[error("a hello of {0} bytes is over the limit of {HELLO_BYTES}")]
    TooLong(u32),
    /// A hello is not what it should be.
    #[error("a hello could not be read")]
    Malformed(#[source] serde_json::Error),
    /// The peer's MAC is not of this boot's key.
    #[error("the peer does not hold this boot's key")]
    WrongKey,
    /// The peer sent our own nonce back, or a channel we did not ask for.
    #[error("the peer reflected our hello")]
    Reflected,
    /// No common version.
    #[error(
        "no common protocol version: we speak {OLDEST} to {NEWEST}, the peer speaks {oldest} to {newest} (agent {agent})"
    )]
    Version {
        /// The peer's oldest.
        oldest: u16,
        /// The peer's newest.
        newest: u16,
        /// The peer's agent version.
        agent: String,
    },
    /// The listener is of another boot.
    #[error("the peer is of boot {theirs}, not {ours}")]
    WrongBoot {
        /// The boot that was asked for.
        ours: String,
        /// The listener's boot.
        theirs: String,
    },
    /// The kernel gave no randomness.
    #[error("no randomness for a nonce")]
    Random,
}

#[derive(Debug, Serialize, Deserialize)]
struct Hello1 {
    oldest: u16,
    newest: u16,
    agent: String,
    capabilities: Vec<String>,
    boot_id: String,
    channel: Channel,
    nonce: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Hello2 {
    Accepted(Accepted),
    Refused(Refused),
}

#[derive(Debug, Serialize, Deserialize)]
struct Accepted {
    version: u16,
    agent: String,
    capabilities: Vec<String>,
    nonce: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Refused {
    oldest: u16,
    newest: u16,
    agent: String,
    boot_id: String,
}

/// What both ends agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The protocol version.
    pub version: u16,
    /// What the connection is for.
    pub channel: Channel,
    /// The peer's agent version.
    pub peer_agent: String,
    /// What the peer can do beyond the version.
    pub peer_capabilities: Vec<String>,
}

/// The part of one boot that both ends must share.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The boot id that the host assigned.
    pub boot_id: String,
    /// The key of the boot.
    pub key: BootKey,
}

/// Runs the dialer's side.
///
/// # Errors
/// Every case of [`HandshakeError`], at the latest after [`HANDSHAKE`]. Not cancel safe:
/// drop the stream with the future.
pub async fn dial<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    channel: Channel,
) -> Result<Session, HandshakeError> {
    within(dial_unbounded(stream, identity, channel)).await
}

/// Runs the listener's side.
///
/// # Errors
/// As [`dial`].
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
) -> Result<Session, HandshakeError> {
    accept_knowing(stream, identity, CAPABILITIES).await
}

/// The same as an agent that understands only these, which is what older agents are to the dialer.
///
/// # Errors
/// As [`dial`].
pub async fn accept_knowing<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    capabilities: &[&str],
) -> Result<Session, HandshakeError> {
    within(accept_unbounded(stream, identity, capabilities)).await
}

async fn within<T>(run: impl Future<Output = Result<T, HandshakeError>>) -> Result<T, HandshakeError> {
    tokio::time::timeout(HANDSHAKE, run)
        .await
        .unwrap_or(Err(HandshakeError::Timeout))
}

async fn dial_unbounded<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    channel: Channel,
) -> Result<Session, HandshakeError> {
    let nonce = random_hex::<NONCE_BYTES>()?;
    let hello1 = encode(&Hello1 {
        oldest: OLDEST,
        newest: NEWEST,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: names(CAPABILITIES),
        boot_id: identity.boot_id.clone(),
        channel,
        nonce: nonce.clone(),
    })?;
    write_hello(stream, &hello1).await?;
    let hello2 = read_hello(stream).await?;
    let accepted = match serde_json::from_slice(&hello2).map_err(HandshakeError::Malformed)? {
        Hello2::Accepted(accepted) => accepted,
        Hello2::Refused(refused) => return Err(refusal(identity, refused)),
    };
    let theirs = read_mac(stream).await?;
    verify(&identity.key, b"listener", &[&hello1, &hello2], &theirs)?;
    if accepted.nonce == nonce {
        return Err(HandshakeError::Reflected);
    }
    if !(OLDEST..=NEWEST).contains(&accepted.version) {
        return Err(HandshakeError::Version {
            oldest: accepted.version,
            newest: accepted.version,
            agent: accepted.agent,
        });
    }
    let ours = sign(&identity.key, b"dialer", &[&hello1, &hello2]);
    stream.write_all(&ours).await.map_err(HandshakeError::Stream)?;
    stream.flush().await.map_err(HandshakeError::Stream)?;
    Ok(Session {
        version: accepted.version,
        channel,
        peer_agent: accepted.agent,
        peer_capabilities: accepted.capabilities,
    })
}

async fn accept_unbounded<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    identity: &Identity,
    knows: &[&str],
) -> Result<Session, HandshakeError> {
    let hello1 = read_hello(stream).await?;
    let hello: Hello1 = serde_json::from_slice(&hello1).map_err(HandshakeError::Malformed)?;
    let version = NEWEST.min(hello.newest);
    if version < OLDEST.max(hello.oldest) || hello.boot_id != identity.boot_id {
        let refused = Refused {
            oldest: OLDEST,
            newest: NEWEST,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: identity.boot_id.clone(),
        };
        write_hello(stream, &encode(&Hello2::Refused(refused))?).await?;
        return Err(refusal(
            identity,
            Refused {
                oldest: hello.oldest,
                newest: hello.newest,
                agent: hello.agent,
                boot_id: hello.boot_id,
            },
        ));
    }
    let hello2 = encode(&Hello2::Accepted(Accepted {
        version,
        agent: env!("CARGO_PKG_VERSION").to_owned(),
        capabilities: names(knows),
        nonce: random_hex::<NONCE_BYTES>()?,
    }))?;
    write_hello(stream, &hello2).await?;
    let ours = sign(&identity.key, b"listener", &[&hello1, &hello2]);
    stream.write_all(&ours).await.map_err(HandshakeError::Stream)?;
    stream.flush().await.map_err(HandshakeError::Stream)?;
    let theirs = read_mac(stream).await?;
    verify(&identity.key, b"dialer", &[&hello1, &hello2], &theirs)?;
    Ok(Session {
        version,
        channel: hello.channel,
        peer_agent: hello.agent,
        peer_capabilities: hello.capabilities,
    })
}

fn names(capabilities: &[&str]) -> Vec<String> {
    capabilities.iter().map(|name| (*name).to_owned()).collect()
}

fn refusal(identity: &Identity, refused: Refused) -> HandshakeError {
    if refused.boot_id == identity.boot_id {
        HandshakeError::Version {
            oldest: refused.oldest,
            newest: refused.newest,
            agent: refused.agent,
        }
    } else {
        HandshakeError::WrongBoot {
            ours: identity.boot_id.clone(),
            theirs: refused.boot_id,
        }
    }
}

fn mac(key: &BootKey, label: &[u8], hellos: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key.0.as_bytes()).expect("HMAC takes a key of any length");
    for part in std::iter::once(&label).chain(hellos) {
        mac.update(&(part.len() as u64).to_be_bytes());
        mac.update(part);
    }
    mac
}

fn sign(key: &BootKey, label: &[u8], hellos: &[&[u8]]) -> [u8; MAC_BYTES] {
    mac(key, label, hellos).finalize().into_bytes().into()
}

/// Compares in constant time.
fn verify(
    key: &BootKey,
    label: &[u8],
    hellos: &[&[u8]],
    theirs: &[u8; MAC_BYTES],
) -> Result<(), HandshakeError> {
    mac(key, label, hellos)
        .verify_slice(theirs)
        .map_err(|_| HandshakeError::WrongKey)
}

fn encode(hello: &impl Serialize) -> Result<Vec<u8>, HandshakeError> {
    serde_json::to_vec(hello).map_err(HandshakeError::Malformed)
}

async fn write_hello<S: AsyncWrite + Unpin>(stream: &mut S, hello: &[u8]) -> Result<(), HandshakeError> {
    let length = u32::try_from(hello.len()).unwrap_or(u32::MAX);
    if hello.len() > HELLO_BYTES {
        return Err(HandshakeError::TooLong(length));
    }
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend_from_slice(hello);
    stream.write_all(&frame).await.map_err(HandshakeError::Stream)?;
    stream.flush().await.map_err(HandshakeError::Stream)
}

async fn read_hello<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Vec<u8>, HandshakeError> {
    let length = stream.read_u32().await.map_err(HandshakeError::Stream)?;
    if length as usize > HELLO_BYTES {
        return Err(HandshakeError::TooLong(length));
    }
    let mut hello = vec![0; length as usize];
    stream
        .read_exact(&mut hello)
        .await
        .map_err(HandshakeError::Stream)?;
    Ok(hello)
}

async fn read_mac<S: AsyncRead + Unpin>(stream: &mut S) -> Result<[u8; MAC_BYTES], HandshakeError> {
    let mut mac = [0; MAC_BYTES];
    stream
        .read_exact(&mut mac)
        .await
        .map_err(HandshakeError::Stream)?;
    Ok(mac)
}

/// `N` random bytes as lower-case hex.
///
/// # Errors
/// [`HandshakeError::Random`].
pub fn random_hex<const N: usize>() -> Result<String, HandshakeError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| HandshakeError::Random)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    fn identity() -> Identity {
        Identity {
            boot_id: "b1".into(),
            key: BootKey("k".into()),
        }
    }

    fn hello1(newest: u16, boot: &str) -> Vec<u8> {
        let text = format!(
            r#"{{"oldest":{newest},"newest":{newest},"agent":"9","capabilities":[],"boot_id":"{boot}","channel":"guest","nonce":"00","future":1}}"#
        );
        let mut frame = (text.len() as u32).to_be_bytes().to_vec();
        frame.extend(text.bytes());
        frame
    }

    #[tokio::test]
    async fn both_ends_agree() {
        let (mut a, mut b) = duplex(64);
        let (ours, yours) = (identity(), identity());
        let (dialed, accepted) = tokio::join!(dial(&mut a, &ours, Channel::Bulk), accept(&mut b, &yours));
        let (dialed, accepted) = (dialed.unwrap(), accepted.unwrap());
        assert_eq!((dialed.version, dialed.channel), (1, Channel::Bulk));
        assert_eq!(dialed, accepted);
        assert_eq!(dialed.peer_capabilities, ["ways"]);
    }

    #[tokio::test]
    async fn another_key_is_refused_by_the_dialer_first() {
        let (mut a, mut b) = duplex(4096);
        let other = Identity {
            key: BootKey("other".into()),
            ..identity()
        };
        let ours = identity();
        let (dialed, accepted) = tokio::join!(
            async {
                let result = dial(&mut a, &ours, Channel::Guest).await;
                drop(a);
                result
            },
            accept(&mut b, &other)
        );
        assert!(matches!(dialed, Err(HandshakeError::WrongKey)));
        assert!(matches!(accepted, Err(HandshakeError::Stream(_))));
    }

    #[tokio::test]
    async fn a_dialer_without_the_key_is_refused() {
        let (mut a, mut b) = duplex(4096);
        let listener = tokio::spawn(async move { accept(&mut b, &identity()).await });
        a.write_all(&hello1(1, "b1")).await.unwrap();
        read_hello(&mut a).await.unwrap();
        let reflected = read_mac(&mut a).await.unwrap();
        a.write_all(&reflected).await.unwrap();
        assert!(matches!(listener.await.unwrap(), Err(HandshakeError::WrongKey)));
    }

    #[tokio::test]
    async fn version_and_boot_mismatches_are_named_on_both_ends() {
        let (mut a, mut b) = duplex(4096);
        a.write_all(&hello1(7, "b1")).await.unwrap();
        let refused = accept(&mut b, &identity()).await.unwrap_err();
        assert!(
            refused.to_string().contains("the peer speaks 7 to 7"),
            "{refused}"
        );

        let (mut a, mut b) = duplex(4096);
        let newer = Identity {
            boot_id: "b2".into(),
            ..identity()
        };
        let ours = identity();
        let (dialed, accepted) = tokio::join!(dial(&mut a, &ours, Channel::Guest), accept(&mut b, &newer));
        assert!(matches!(dialed, Err(HandshakeError::WrongBoot { theirs, .. }) if theirs == "b2"));
        assert!(matches!(accepted, Err(HandshakeError::WrongBoot { theirs, .. }) if theirs == "b1"));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends_after_the_limit() {
        let (mut a, _b) = duplex(4096);
        let begun = tokio::time::Instant::now();
        assert!(matches!(
            dial(&mut a, &identity(), Channel::Guest).await,
            Err(HandshakeError::Timeout)
        ));
        assert_eq!(begun.elapsed().as_secs(), HANDSHAKE.as_secs());
    }

    #[tokio::test]
    async fn hostile_headers_and_texts_are_typed_errors() {
        for (bytes, want) in [
            (u32::MAX.to_be_bytes().to_vec(), "over the limit"),
            ([&4u32.to_be_bytes()[..], b"null"].concat(), "could not be read"),
            (vec![0, 0], "broke"),
        ] {
            let (mut a, mut b) = duplex(4096);
            a.write_all(&bytes).await.unwrap();
            drop(a);
            let error = accept(&mut b, &identity()).await.unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    #[tokio::test]
    async fn a_handshake_byte_by_byte_passes() {
        let (mut a, mut b) = duplex(1);
        let (ours, yours) = (identity(), identity());
        let (dialed, accepted) = tokio::join!(dial(&mut a, &ours, Channel::Guest), accept(&mut b, &yours));
        assert!(dialed.is_ok() && accepted.is_ok());
    }

    #[test]
    fn keys_are_fresh_long_and_not_shown() {
        let (one, two) = (BootKey::generate().unwrap(), BootKey::generate().unwrap());
        assert_ne!(one, two);
        assert_eq!(one.0.len(), 64);
        assert_eq!(format!("{one:?}"), "BootKey(***)");
    }

    #[tokio::test]
    async fn a_hello_may_be_as_long_as_its_limit_and_no_longer() {
        let (mut a, mut b) = duplex(2 * HELLO_BYTES);
        write_hello(&mut a, &[b'x'; HELLO_BYTES]).await.unwrap();
        assert_eq!(read_hello(&mut b).await.unwrap().len(), HELLO_BYTES);
        let error = write_hello(&mut a, &[b'x'; HELLO_BYTES + 1]).await.unwrap_err();
        assert!(matches!(error, HandshakeError::TooLong(4097)), "{error}");
        a.write_u32(HELLO_BYTES as u32 + 1).await.unwrap();
        assert!(matches!(
            read_hello(&mut b).await,
            Err(HandshakeError::TooLong(4097))
        ));
    }
}
