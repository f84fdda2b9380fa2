//! The two netlink sockets: one to ask and change, one that tells of changes. Bound to the network namespace of
//! the thread that opens them.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::net::unix::pipe::Receiver;

use super::wire::{self, List, Message};

/// The kernel fills its answers up to 32 KiB.
const BUFFER_BYTES: usize = 32 << 10;
/// Messages of one list; a guest has a few dozen.
const LIST_MESSAGES: usize = 100_000;
/// Read of each notification; the rest is cut off, as only that it came matters.
const HEAD: usize = 16;
/// A list that changes while it is made is asked for again, so often.
const LIST_TRIES: usize = 4;
/// Notifications that are read before the next look, which sees everything anyway.
const NEWS: usize = 1_024;
// linux/rtnetlink.h: RTMGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

fn open(groups: u32, flags: SockFlag) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | flags,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

/// Asks and changes. The kernel has its answer ready when the request returns, so nothing here waits.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens the socket.
    ///
    /// # Errors
    /// The system's own.
    pub fn open() -> io::Result<Self> {
        let socket = open(0, SockFlag::empty())?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(1))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// Sends a request that is acknowledged.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn change(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> io::Result<()> {
        let sequence = self.send(request)?;
        loop {
            for received in self.receive()? {
                match received.message {
                    Message::Answer(0) if received.sequence == sequence => return Ok(()),
                    Message::Answer(error) if received.sequence == sequence => {
                        return Err(io::Error::from_raw_os_error(error));
                    }
                    _ => {} // the rest of an answer that nobody waited for
                }
            }
        }
    }

    /// Lists everything of a kind, as one consistent whole.
    ///
    /// # Errors
    /// The kernel's refusal, or that the list does not end or does not stand still.
    pub fn list(&mut self, list: List) -> io::Result<Vec<Message>> {
        for _ in 0..LIST_TRIES {
            if let Some(messages) = self.list_once(list)? {
                return Ok(messages);
            }
        }
        Err(io::Error::other(format!("{list:?} change all the time")))
    }

    /// `None` when the list changed while it was made.
    fn list_once(&mut self, list: List) -> io::Result<Option<Vec<Message>>> {
        let sequence = self.send(|sequence| wire::list(list, sequence))?;
        let (mut messages, mut consistent) = (Vec::new(), true);
        for count in 0.. {
            if count > LIST_MESSAGES {
                break;
            }
            for received in self.receive()?.into_iter().filter(|r| r.sequence == sequence) {
                consistent &= !received.interrupted;
                match received.message {
                    Message::Done => return Ok(consistent.then_some(messages)),
                    Message::Answer(error) if error != 0 => return Err(io::Error::from_raw_os_error(error)),
                    Message::Answer(_) | Message::Other => {}
                    message => messages.push(message),
                }
            }
            if messages.len() > LIST_MESSAGES {
                break;
            }
        }
        Err(io::Error::other(format!("{list:?} do not end")))
    }

    fn send(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(self.sequence);
        sendto(
            self.socket.as_raw_fd(),
            &bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> io::Result<Vec<wire::Received>> {
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        Ok(wire::parse(&self.buffer[..length]))
    }
}

/// Tells that links, addresses or routes changed; what changed is seen by looking.
#[derive(Debug)]
pub struct News {
    /// A pipe in name only: tokio's safe way to wait for any descriptor (`AsyncFd` is unsafe to register).
    socket: Receiver,
}

impl News {
    /// Subscribes; must be called within a tokio runtime.
    ///
    /// # Errors
    /// The system's own.
    pub fn subscribe() -> io::Result<Self> {
        let socket = open(GROUPS, SockFlag::SOCK_NONBLOCK)?;
        Ok(Self {
            socket: Receiver::from_file_unchecked(File::from(socket))?,
        })
    }

    /// Returns when something changed since the last [`News::forget`]. Cancel safe.
    ///
    /// # Errors
    /// The system's own.
    pub async fn wait(&self) -> io::Result<()> {
        loop {
            self.socket.readable().await?;
            // Through tokio, so that it learns when there is nothing left to be ready for.
            let told = self.socket.try_read(&mut [0; HEAD]);
            if was_told(told)? {
                return Ok(());
            }
        }
    }

    /// Throws away what was told so far, and tells whether there was any: whoever looks afterwards sees it.
    ///
    /// Asks the kernel itself: tokio's `try_read` answers from its last poll and misses what came since.
    pub fn forget(&self) -> bool {
        let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        let told = || was_told(recv(socket, &mut [0; HEAD], flags).map_err(io::Error::from));
        (0..NEWS).take_while(|_| matches!(told(), Ok(true))).count() > 0
    }
}

/// True when there was something; lost notifications (ENOBUFS) are news as well.
fn was_told(read: io::Result<usize>) -> io::Result<bool> {
    match read {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
