//! The only place that knows bincode: tarpc messages in length-delimited frames.
//!
//! bincode is fixed at 1.3.3 with fixed-int little-endian encoding, a size limit and
//! no trailing bytes. A tarpc request whose deadline overflows an `Instant` panics
//! *while it is deserialised* (FACTS section 8), so the deadline is read from the raw
//! bytes first and refused when it is over [`DEADLINE`].

use std::io;
use std::marker::PhantomData;
use std::pin::Pin;

use bincode::Options;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_serde::{Deserializer, Serializer};
use tokio_util::bytes::{Bytes, BytesMut};
use tokio_util::codec::LengthDelimitedCodec;

use crate::limits::{DEADLINE, FRAME_BYTES};

/// The transport that tarpc runs on, over any byte stream.
pub type Transport<S, In, Out> = tarpc::serde_transport::Transport<S, In, Out, Codec<In, Out>>;

/// Frames a byte stream for tarpc.
pub fn transport<S, In, Out>(stream: S) -> Transport<S, In, Out>
where
    S: AsyncRead + AsyncWrite,
    In: for<'de> Deserialize<'de> + Guarded,
    Out: Serialize,
{
    let frames = LengthDelimitedCodec::builder()
        .max_frame_length(FRAME_BYTES)
        .new_framed(stream);
    tarpc::serde_transport::new(frames, Codec(PhantomData))
}

/// bincode with fixed integers, a limit and no trailing bytes.
pub struct Codec<In, Out>(PhantomData<fn(Out) -> In>);

/// A message that can look at its raw bytes before anybody deserialises them.
pub trait Guarded {
    /// Refuses bytes that would harm the deserialiser.
    ///
    /// # Errors
    /// `InvalidData`, naming what is wrong.
    fn guard(bytes: &[u8]) -> io::Result<()>;
}

impl<T> Guarded for tarpc::Response<T> {
    fn guard(_: &[u8]) -> io::Result<()> {
        Ok(()) // a response carries no deadline
    }
}

impl<T> Guarded for tarpc::ClientMessage<T> {
    /// Enum tag `u32`; for a request (tag 0) deadline seconds `u64` and nanoseconds `u32`.
    fn guard(bytes: &[u8]) -> io::Result<()> {
        let (tag, rest) = take::<4>(bytes)?;
        if u32::from_le_bytes(tag) != 0 {
            return Ok(());
        }
        let (seconds, rest) = take::<8>(rest)?;
        let (nanoseconds, _) = take::<4>(rest)?;
        let seconds = u64::from_le_bytes(seconds);
        if seconds > DEADLINE.as_secs() || u32::from_le_bytes(nanoseconds) >= 1_000_000_000 {
            return Err(invalid(format!(
                "a deadline of {seconds} s is over the limit of {} s",
                DEADLINE.as_secs()
            )));
        }
        Ok(())
    }
}

impl<In, Out> Deserializer<In> for Codec<In, Out>
where
    In: for<'de> Deserialize<'de> + Guarded,
{
    type Error = io::Error;

    fn deserialize(self: Pin<&mut Self>, source: &BytesMut) -> io::Result<In> {
        In::guard(source)?;
        decode(source)
    }
}

impl<In, Out: Serialize> Serializer<Out> for Codec<In, Out> {
    type Error = io::Error;

    fn serialize(self: Pin<&mut Self>, item: &Out) -> io::Result<Bytes> {
        encode(item).map(Bytes::from)
    }
}

/// Writes one message.
///
/// # Errors
/// `InvalidData` when it is larger than a frame.
pub fn encode(item: &impl Serialize) -> io::Result<Vec<u8>> {
    options().serialize(item).map_err(|e| invalid(e.to_string()))
}

/// Reads one message.
///
/// # Errors
/// `InvalidData` when the bytes are not exactly one message.
pub fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> io::Result<T> {
    options().deserialize(bytes).map_err(|e| invalid(e.to_string()))
}

fn options() -> impl Options {
    bincode::DefaultOptions::new()
        .with_fixint_encoding()
        .with_little_endian()
        .with_limit(FRAME_BYTES as u64)
        .reject_trailing_bytes()
}

fn take<const N: usize>(bytes: &[u8]) -> io::Result<([u8; N], &[u8])> {
    bytes
        .split_first_chunk::<N>()
        .map(|(head, rest)| (*head, rest))
        .ok_or_else(|| invalid("a message ends in its first fields".to_owned()))
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tarpc::ClientMessage;

    fn request(seconds: u64, nanoseconds: u32) -> Vec<u8> {
        let mut bytes = 0u32.to_le_bytes().to_vec();
        bytes.extend(seconds.to_le_bytes());
        bytes.extend(nanoseconds.to_le_bytes());
        bytes
    }

    #[test]
    fn a_deadline_over_the_limit_is_refused_before_it_is_deserialised() {
        for (seconds, nanoseconds) in [
            (u64::MAX, 0),
            (3_601, 0),
            (1, 1_000_000_000),
            (u64::MAX, u32::MAX),
        ] {
            let error = ClientMessage::<u8>::guard(&request(seconds, nanoseconds)).unwrap_err();
            assert!(error.to_string().contains("deadline"), "{error}");
        }
        assert!(ClientMessage::<u8>::guard(&request(3_600, 999_999_999)).is_ok());
    }

    #[test]
    fn the_guard_reads_the_prefix_that_tarpc_writes() {
        let context = tarpc::context::current();
        let message = ClientMessage::Request(tarpc::Request {
            context,
            id: 1,
            message: 7u8,
        });
        let bytes = encode(&message).unwrap();
        let (tag, rest) = take::<4>(&bytes).unwrap();
        let (seconds, _) = take::<8>(rest).unwrap();
        assert_eq!(u32::from_le_bytes(tag), 0);
        assert!(
            (8..=10).contains(&u64::from_le_bytes(seconds)),
            "tarpc's default deadline is 10 s"
        );
    }

    #[test]
    fn trailing_bytes_and_oversized_lengths_are_refused() {
        assert!(decode::<u8>(&[1, 2]).is_err());
        assert!(decode::<Vec<u8>>(&u64::MAX.to_le_bytes()).is_err());
        assert!(encode(&vec![0u8; FRAME_BYTES]).is_err());
    }

    #[tokio::test]
    async fn a_message_survives_the_transport() {
        use futures::{SinkExt, StreamExt};
        type Answer = tarpc::Response<String>;
        let (near, far) = tokio::io::duplex(16);
        let mut near = transport::<_, Answer, Answer>(near);
        let mut far = transport::<_, Answer, Answer>(far);
        let sent = tarpc::Response {
            request_id: 7,
            message: Ok("all of it".to_owned()),
        };
        let (written, read) = tokio::join!(near.send(sent), far.next());
        written.unwrap();
        let read = read.unwrap().unwrap();
        assert_eq!(
            (read.request_id, read.message.unwrap().as_str()),
            (7, "all of it")
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_codec_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if ClientMessage::<crate::v1::Cursor>::guard(&bytes).is_ok() {
                let _ = decode::<ClientMessage<crate::v1::Cursor>>(&bytes);
            }
        }
    }
}
