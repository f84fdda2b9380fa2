//! AF_VSOCK: the one file that uses tokio-vsock.

use std::io;

use tokio_vsock::{VsockAddr, VsockListener, VsockStream};

use super::{Address, DialError};

/// The context id of a guest's host.
pub const HOST_CID: u32 = 2;

pub(super) async fn dial(cid: u32, port: u32, address: &Address) -> Result<VsockStream, DialError> {
    VsockStream::connect(VsockAddr::new(cid, port))
        .await
        .map_err(|error| match error.raw_os_error() {
            Some(libc_errno::ECONNRESET) => DialError::NotListening(address.clone()),
            Some(libc_errno::ENODEV) => DialError::Gone(address.clone()),
            _ => DialError::Io(address.clone(), error),
        })
}

/// The errors of connect(2) on AF_VSOCK that have a meaning of their own (Linux numbers).
mod libc_errno {
    pub(super) const ENODEV: i32 = 19;
    pub(super) const ECONNRESET: i32 = 104;
}

/// A guest's listener on one port, for its host only.
#[derive(Debug)]
pub struct Listener(VsockListener);

impl Listener {
    /// Listens on `port` of this guest.
    ///
    /// # Errors
    /// The system's own, such as `AddrInUse`.
    pub fn bind(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(u32::MAX, port)).map(Self)
    }

    /// The next stream from the host; streams from elsewhere are closed. Cancel safe.
    ///
    /// # Errors
    /// The system's own.
    pub async fn accept(&mut self) -> io::Result<VsockStream> {
        loop {
            let (stream, peer) = self.0.accept().await?;
            if peer.cid() == HOST_CID {
                return Ok(stream);
            }
        }
    }
}
