//! Bulk streams: forwards and the output of commands, on connections of their own.
//!
//! After the handshake the dialer sends one [`Open`], the listener answers [`Answer`]
//! (each a big-endian `u32` length and JSON), then both send frames: kind `u8`, lane `u8`,
//! length `u32` big-endian, payload. `End` ends one lane in one direction (FIN), `Abort`
//! everything in both (RST). A stream that ends without either is an error, never silence.

use std::io;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::limits::{BULK_CHUNK_BYTES, BULK_OPEN_BYTES};
use crate::name::Name;
use crate::operation::OperationId;

/// What a bulk stream leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Open {
    /// A TCP port on the guest's own loopback.
    Tcp {
        /// The port.
        port: u16,
    },
    /// A command in the guest. Lane 0 is its input, lanes 1 and 2 are its outputs, `Exit` ends it.
    /// It runs once: asked for again it is refused while it runs, and then is `Exit` alone.
    Exec {
        /// The same id is the same operation.
        operation: OperationId,
        /// Program and arguments.
        argv: Vec<String>,
        /// The guest's user that runs it, `root` if none is named.
        user: Option<String>,
    },
    /// To the host agent only: the same for one of its guests.
    Guest {
        /// The guest.
        guest: Name,
        /// What to open there.
        open: Box<Open>,
    },
}

/// The answer to [`Open`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Answer {
    /// Frames follow.
    Opened,
    /// Nothing follows.
    Refused {
        /// What stands in the way.
        reason: String,
    },
}

/// The lane of a TCP stream, and of a command's standard input.
pub const LANE_MAIN: u8 = 0;
/// A command's standard output.
pub const LANE_OUT: u8 = 1;
/// A command's standard error.
pub const LANE_ERR: u8 = 2;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Bytes of a lane, at most [`BULK_CHUNK_BYTES`].
    Data {
        /// The lane.
        lane: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The sender's direction of a lane is complete.
    End {
        /// The lane.
        lane: u8,
    },
    /// Both directions are off; the code is an errno of the sender.
    Abort {
        /// The errno.
        code: u32,
    },
    /// A command ended: exit code, or 128 + signal.
    Exit {
        /// The code.
        status: u32,
    },
}

const KIND_DATA: u8 = 1;
const KIND_END: u8 = 2;
const KIND_ABORT: u8 = 3;
const KIND_EXIT: u8 = 4;

/// Writes one JSON message with its length.
///
/// # Errors
/// `InvalidData` over [`BULK_OPEN_BYTES`], else the stream's own.
pub async fn write_message<S: AsyncWrite + Unpin>(
    stream: &mut S,
    message: &impl Serialize,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > BULK_OPEN_BYTES {
        return Err(invalid("an opening message is over its limit"));
    }
    let mut frame = (bytes.len() as u32).to_be_bytes().to_vec();
    frame.extend(bytes);
    stream.write_all(&frame).await?;
    stream.flush().await
}

/// Reads one JSON message with its length.
///
/// # Errors
/// `InvalidData` over [`BULK_OPEN_BYTES`] or for other JSON, else the stream's own.
pub async fn read_message<T: for<'de> Deserialize<'de>, S: AsyncRead + Unpin>(
    stream: &mut S,
) -> io::Result<T> {
    let length = stream.read_u32().await? as usize;
    if length > BULK_OPEN_BYTES {
        return Err(invalid("an opening message is over its limit"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await?;
    serde_json::from_slice(&bytes).map_err(Into::into)
}

/// Writes one frame.
///
/// # Errors
/// The stream's own.
pub async fn write_frame<S: AsyncWrite + Unpin>(stream: &mut S, frame: &Frame) -> io::Result<()> {
    let (kind, lane, payload): (u8, u8, &[u8]) = match frame {
        Frame::Data { lane, bytes } => (KIND_DATA, *lane, bytes),
        Frame::End { lane } => (KIND_END, *lane, &[]),
        Frame::Abort { code } => (KIND_ABORT, 0, &code.to_be_bytes()),
        Frame::Exit { status } => (KIND_EXIT, 0, &status.to_be_bytes()),
    };
    let mut header = [kind, lane, 0, 0, 0, 0];
    header[2..].copy_from_slice(&(payload.len() as u32).to_be_bytes());
    stream.write_all(&header).await?;
    stream.write_all(payload).await?;
    stream.flush().await
}

/// Reads one frame. Not cancel safe.
///
/// # Errors
/// `UnexpectedEof` when the stream ends, `InvalidData` for anything that is no frame.
pub async fn read_frame<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Frame> {
    let mut header = [0; 6];
    stream.read_exact(&mut header).await?;
    let [kind, lane, length @ ..] = header;
    let length = u32::from_be_bytes(length) as usize;
    match (kind, length) {
        (KIND_DATA, 1..=BULK_CHUNK_BYTES) => {
            let mut bytes = vec![0; length];
            stream.read_exact(&mut bytes).await?;
            Ok(Frame::Data { lane, bytes })
        }
        (KIND_END, 0) => Ok(Frame::End { lane }),
        (KIND_ABORT, 4) => Ok(Frame::Abort {
            code: stream.read_u32().await?,
        }),
        (KIND_EXIT, 4) => Ok(Frame::Exit {
            status: stream.read_u32().await?,
        }),
        _ => Err(invalid("not a bulk frame")),
    }
}

/// Carries a local byte stream over lane 0 until both directions have ended.
///
/// # Errors
/// The first of either side; `ConnectionAborted` when the peer aborted. The caller
/// then resets its local stream, so that the failure is seen there too.
pub async fn carry<L, B>(local: L, bulk: B) -> io::Result<()>
where
    L: AsyncRead + AsyncWrite,
    B: AsyncRead + AsyncWrite,
{
    let (local_read, local_write) = tokio::io::split(local);
    let (bulk_read, bulk_write) = tokio::io::split(bulk);
    tokio::try_join!(outward(local_read, bulk_write), inward(bulk_read, local_write))?;
    Ok(())
}

async fn outward<L: AsyncRead + Unpin, B: AsyncWrite + Unpin>(mut local: L, mut bulk: B) -> io::Result<()> {
    let mut chunk = vec![0; BULK_CHUNK_BYTES];
    loop {
        match local.read(&mut chunk).await {
            Ok(0) => return write_frame(&mut bulk, &Frame::End { lane: LANE_MAIN }).await,
            Ok(n) => {
                let bytes = chunk[..n].to_vec();
                write_frame(
                    &mut bulk,
                    &Frame::Data {
                        lane: LANE_MAIN,
                        bytes,
                    },
                )
                .await?;
            }
            Err(error) => {
                let code = error.raw_os_error().unwrap_or_default().unsigned_abs();
                write_frame(&mut bulk, &Frame::Abort { code }).await?;
                return Err(error);
            }
        }
    }
}

async fn inward<L: AsyncWrite + Unpin, B: AsyncRead + Unpin>(mut bulk: B, mut local: L) -> io::Result<()> {
    loop {
        match read_frame(&mut bulk).await? {
            Frame::Data {
                lane: LANE_MAIN,
                bytes,
            } => {
                local.write_all(&bytes).await?;
                local.flush().await?;
            }
            Frame::End { lane: LANE_MAIN } => return local.shutdown().await,
            Frame::Abort { code } => {
                let text = format!("the peer aborted with errno {code}");
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, text));
            }
            _ => return Err(invalid("a frame of another lane in a TCP stream")),
        }
    }
}

fn invalid(text: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::duplex;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Data {
                lane: 2,
                bytes: vec![1; BULK_CHUNK_BYTES],
            },
            Frame::End { lane: 1 },
            Frame::Abort { code: 104 },
            Frame::Exit { status: 137 },
        ]
    }

    #[tokio::test]
    async fn frames_survive_the_way() {
        for frame in frames() {
            let (mut a, mut b) = duplex(1 << 20);
            write_frame(&mut a, &frame).await.unwrap();
            assert_eq!(read_frame(&mut b).await.unwrap(), frame);
        }
    }

    #[tokio::test]
    async fn an_opening_message_survives_the_way_and_has_a_limit() {
        let (mut a, mut b) = duplex(1 << 20);
        let operation = OperationId::generate().unwrap();
        let open = |letters: usize| Open::Exec {
            operation: operation.clone(),
            argv: vec!["x".repeat(letters)],
            user: None,
        };
        let frame = serde_json::to_vec(&open(0)).unwrap().len();
        let longest = open(BULK_OPEN_BYTES - frame);
        write_message(&mut a, &longest).await.unwrap();
        assert_eq!(read_message::<Open, _>(&mut b).await.unwrap(), longest);
        let over = open(BULK_OPEN_BYTES - frame + 1);
        assert!(write_message(&mut a, &over).await.is_err());
        a.write_u32(BULK_OPEN_BYTES as u32 + 1).await.unwrap();
        let error = read_message::<Open, _>(&mut b).await.unwrap_err();
        assert!(error.to_string().contains("over its limit"), "{error}");
    }

    #[tokio::test]
    async fn half_close_passes_and_the_other_direction_goes_on() {
        let (user, near) = duplex(64);
        let (host, guest) = duplex(64);
        let (far, service) = duplex(64);
        let (mut user, mut service) = (user, service);
        let story = async {
            user.write_all(b"question").await.unwrap();
            user.shutdown().await.unwrap();
            let mut asked = String::new();
            service.read_to_string(&mut asked).await.unwrap();
            service.write_all(b"answer").await.unwrap();
            service.shutdown().await.unwrap();
            let mut answered = String::new();
            user.read_to_string(&mut answered).await.unwrap();
            (asked, answered)
        };
        let (one, two, said) = tokio::join!(carry(near, host), carry(far, guest), story);
        assert!(one.is_ok() && two.is_ok());
        assert_eq!(said, ("question".to_owned(), "answer".to_owned()));
    }

    #[tokio::test]
    async fn an_end_without_a_frame_and_an_abort_are_errors() {
        let (_user, near) = duplex(64);
        let (host, guest) = duplex(64);
        drop(guest);
        assert!(carry(near, host).await.is_err());

        let (_user, near) = duplex(64);
        let (host, mut guest) = duplex(64);
        write_frame(&mut guest, &Frame::Abort { code: 104 })
            .await
            .unwrap();
        let error = carry(near, host).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_or_allocate_beyond_a_chunk(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _ = runtime.block_on(read_frame(&mut &bytes[..]));
            let _ = runtime.block_on(read_message::<Open, _>(&mut &bytes[..]));
        }
    }
}
