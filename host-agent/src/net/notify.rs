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
/// RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, and the bits of RTNLGRP_IPV6_RULE,
/// _IPV4_NETCONF and _IPV6_NETCONF (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18 | 1 << 23 | 1 << 24;
/// RTM_NEWNETCONF: a switch of the kernel was set. Which one is seen by looking.
const NEW_SWITCH: u16 = 80;
/// NLM_F_REPLACE.
const REPLACES: u16 = 0x100;
/// Bytes of the kernel's buffer for what we have not read yet.
pub(super) const RECEIVE_BUFFER: usize = 1 << 20;

/// What a look into the socket brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// There was nothing.
    Nothing,
    /// Every message was folded in.
    All,
    /// The same, and switches of the kernel were set.
    AllAndSwitches,
    /// The kernel dropped some, or they could not be read: only a dump helps.
    Lost,
}

/// A subscription.
pub(super) struct Notifications {
    socket: TokioSocket,
    buffer: Vec<u8>,
    lost: bool,
    /// The port of whoever else made the last change.
    author: Option<u32>,
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
            author: None,
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

    /// The port of whoever else made the last change since this was asked; the kernel's own changes have none.
    pub(super) fn take_author(&mut self) -> Option<u32> {
        self.author.take()
    }

    /// Folds everything that is there into `observed`; changes by the ports of `own` sockets have no author.
    ///
    /// # Errors
    /// When the socket is of no use any more.
    pub(super) fn drain(&mut self, observed: &mut Observed, own: &[u32]) -> io::Result<Drained> {
        let mut lost = std::mem::take(&mut self.lost);
        let (mut taken, mut switches) = (0, false);
        while taken < MESSAGES {
            if self.buffer.is_empty() && self.read()?.is_break() {
                break;
            }
            lost |= std::mem::take(&mut self.lost);
            match fold(&self.buffer, observed, own) {
                Some(folded) => {
                    taken += folded.messages;
                    switches |= folded.switches;
                    self.author = folded.author.or(self.author);
                }
                None => lost = true,
            }
            self.buffer.clear();
        }
        lost |= taken >= MESSAGES;
        Ok(match (lost, switches) {
            (true, _) => Drained::Lost,
            (false, true) => Drained::AllAndSwitches,
            (false, false) if taken == 0 => Drained::Nothing,
            (false, false) => Drained::All,
        })
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

/// What one datagram brought.
#[derive(Debug, Default, PartialEq, Eq)]
struct Folded {
    messages: usize,
    switches: bool,
    author: Option<u32>,
}

/// Folds one datagram; `None` when a message in it cannot be read.
fn fold(mut bytes: &[u8], observed: &mut Observed, own: &[u32]) -> Option<Folded> {
    let mut folded = Folded::default();
    while !bytes.is_empty() {
        let header = NetlinkBuffer::new_checked(bytes).ok()?;
        let (length, replaces) = (header.length() as usize, header.flags() & REPLACES != 0);
        let author = Some(header.port_number()).filter(|port| *port > 0 && !own.contains(port));
        folded.author = author.or(folded.author);
        let is_switch = header.message_type() == NEW_SWITCH;
        let (message, rest) = bytes.split_at_checked(length)?;
        if is_switch {
            folded.switches = true;
        } else {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message).ok()?;
            if let NetlinkPayload::InnerMessage(inner) = message.payload {
                observed.fold(&inner, replaces);
            }
        }
        bytes = rest
            .get(length.next_multiple_of(4) - length..)
            .unwrap_or_default();
        folded.messages += 1;
    }
    Some(folded)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rule that a socket added, as the kernel tells it.
    fn rule_by(port: u32) -> Vec<u8> {
        let body = [2u8, 0, 0, 0, 254, 0, 0, 1, 0, 0, 0, 0];
        let length = u32::try_from(16 + body.len()).unwrap();
        let parts: [&[u8]; 6] = [
            &length.to_ne_bytes(),
            &32u16.to_ne_bytes(), // RTM_NEWRULE
            &[0; 2],
            &1u32.to_ne_bytes(),
            &port.to_ne_bytes(),
            &body,
        ];
        parts.concat()
    }

    #[test]
    fn who_changed_something_is_remembered_beside_our_own_change_and_we_are_not() {
        let author = |ports: &[u32]| {
            let datagram: Vec<u8> = ports.iter().flat_map(|port| rule_by(*port)).collect();
            let folded = fold(&datagram, &mut Observed::default(), &[5, 6]).unwrap();
            assert_eq!(folded.messages, ports.len());
            folded.author
        };
        assert_eq!(author(&[5, 6, 0]), None);
        assert_eq!(author(&[5, 77, 6]), Some(77), "his came with the news of ours");
        assert_eq!(author(&[77, 78]), Some(78));
    }
}
