//! Notifications of a namespace: links, addresses and routes, as they change.

use std::io;
use std::ops::ControlFlow;

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::kernel::passed_socket;
use super::observed::{Fold, Observed};

/// What one turn takes at most; with more, it looks for itself.
const MESSAGES: usize = 4_096;
/// Bytes of one read; the kernel's datagrams are smaller.
const DATAGRAM: usize = 64 << 10;
/// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
/// Bytes of the kernel's buffer for what we have not read yet.
pub(super) const RECEIVE_BUFFER: usize = 1 << 20;

/// What a look into the socket brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// Every message was folded in.
    All,
    /// The kernel dropped some, or they could not be read: only a dump helps.
    Lost,
}

/// A subscription.
pub(super) struct Notifications {
    socket: TokioSocket,
    buffer: Vec<u8>,
    lost: bool,
}

impl Notifications {
    /// Subscribes with a socket that was opened in the namespace and not bound.
    pub(super) fn over(socket: OwnedFd, receive_buffer: usize) -> io::Result<Self> {
        use rustix::net::sockopt;
        let bytes = receive_buffer;
        if sockopt::set_socket_recv_buffer_size_force(&socket, bytes).is_err() {
            sockopt::set_socket_recv_buffer_size(&socket, bytes)?; // capped by rmem_max
        }
        let mut socket = passed_socket(socket);
        socket.socket_mut().bind(&SocketAddr::new(0, GROUPS))?;
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(DATAGRAM),
            lost: false,
        })
    }

    /// Waits until there is something to take. Cancel safe: what was read stays in the buffer.
    ///
    /// # Errors
    /// When the socket is of no use any more.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() || self.lost {
            return Ok(());
        }
        match self.socket.recv(&mut self.buffer).await {
            Err(error) if is_overrun(&error) => self.lost = true,
            other => other?,
        }
        Ok(())
    }

    /// Folds everything that is there into `observed`.
    ///
    /// # Errors
    /// When the socket is of no use any more.
    pub(super) fn drain(&mut self, observed: &mut Observed) -> io::Result<Drained> {
        let mut lost = std::mem::take(&mut self.lost);
        let mut taken = 0;
        while taken < MESSAGES {
            if self.buffer.is_empty() && self.read()?.is_break() {
                break;
            }
            lost |= std::mem::take(&mut self.lost);
            match fold(&self.buffer, observed) {
                Some(count) => taken += count,
                None => lost = true,
            }
            self.buffer.clear();
        }
        lost |= taken >= MESSAGES;
        Ok(if lost { Drained::Lost } else { Drained::All })
    }

    fn read(&mut self) -> io::Result<ControlFlow<()>> {
        match self.socket.socket_ref().recv(&mut self.buffer, 0) {
            Ok(_) => Ok(ControlFlow::Continue(())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(ControlFlow::Break(())),
            Err(error) if is_overrun(&error) => {
                self.lost = true;
                Ok(ControlFlow::Continue(()))
            }
            Err(error) => Err(error),
        }
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error())
}

/// Folds one datagram; `None` when a message in it cannot be read.
fn fold(mut bytes: &[u8], observed: &mut Observed) -> Option<usize> {
    let mut count = 0;
    while !bytes.is_empty() {
        let length = NetlinkBuffer::new_checked(bytes).ok()?.length() as usize;
        let (message, rest) = bytes.split_at_checked(length)?;
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).ok()?;
        if let NetlinkPayload::InnerMessage(inner) = message.payload {
            observed.take(&inner);
        }
        bytes = rest
            .get(length.next_multiple_of(4) - length..)
            .unwrap_or_default();
        count += 1;
    }
    Some(count)
}
