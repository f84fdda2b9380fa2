//! Byte streams between host and guest: three transports, one way to dial, never a fallback.

use std::fmt;
use std::path::PathBuf;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::limits::DIAL;

mod hybrid;
mod unix;
pub mod vsock;

pub use unix::bind_unix;

/// A byte stream of any transport.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A byte stream whose transport does not matter any more.
pub type BoxStream = Box<dyn Stream>;

/// Where a listener is. The configuration names the transport; nothing is ever tried instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket that leads to a guest's ports by `CONNECT port`.
    Hybrid {
        /// The socket.
        path: PathBuf,
        /// The port in the guest.
        port: u32,
    },
    /// A Unix socket that is the listener itself.
    Unix {
        /// The socket.
        path: PathBuf,
    },
    /// AF_VSOCK: only where the configuration says `transport = "vsock"`.
    Vsock {
        /// The guest's context id.
        cid: u32,
        /// The port in the guest.
        port: u32,
    },
}

/// How a dial ended badly.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The way is there but nobody listens at its end yet: dial again.
    #[error("nobody listens at {0} yet")]
    NotListening(Address),
    /// The way itself is gone: the VMM has ended.
    #[error("{0} is gone")]
    Gone(Address),
    /// Nothing answered within the limit.
    #[error("{0} did not answer within {limit} s", limit = DIAL.as_secs())]
    Timeout(Address),
    /// The peer answered with something that is not the transport's protocol.
    #[error("{0} answered {1:?} instead of OK")]
    Protocol(Address, String),
    /// Anything else.
    #[error("cannot dial {0}")]
    Io(Address, #[source] std::io::Error),
}

/// Opens a stream within [`DIAL`]. Cancel safe: a dropped dial leaves nothing behind.
///
/// # Errors
/// [`DialError`], always with the address.
pub async fn dial(address: &Address) -> Result<BoxStream, DialError> {
    let opened = async {
        match address {
            Address::Hybrid { path, port } => hybrid::dial(path, *port, address).await.map(boxed),
            Address::Unix { path } => unix::dial(path, address).await.map(boxed),
            Address::Vsock { cid, port } => vsock::dial(*cid, *port, address).await.map(boxed),
        }
    };
    tokio::time::timeout(DIAL, opened)
        .await
        .unwrap_or_else(|_| Err(DialError::Timeout(address.clone())))
}

fn boxed<S: Stream + 'static>(stream: S) -> BoxStream {
    Box::new(stream)
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hybrid { path, port } => write!(f, "{} port {port}", path.display()),
            Self::Unix { path } => write!(f, "{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock {cid}:{port}"),
        }
    }
}

#[cfg(test)]
mod conformance;
