//! The kernel's TCP sockets over sock_diag: listed, and ended one by one.
//!
//! Own code as in [`super::wire`]: lengths come from the kernel and are checked all the same. The socket is bound to the
//! network namespace of the thread that opens it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::core::former::{Socket, State};

// linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h, linux/in.h, net/tcp_states.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const TCP_ESTABLISHED: u8 = 1;
const TCP_SYN_SENT: u8 = 2;
const TCP_FIN_WAIT1: u8 = 4;
const TCP_FIN_WAIT2: u8 = 5;
const TCP_CLOSE_WAIT: u8 = 8;
const TCP_LAST_ACK: u8 = 9;
const TCP_LISTEN: u8 = 10;
const TCP_CLOSING: u8 = 11;
/// The states of sockets that somebody holds, or that the kernel still ends: one bit each.
const STATES: u32 = 1 << TCP_ESTABLISHED
    | 1 << TCP_SYN_SENT
    | 1 << TCP_FIN_WAIT1
    | 1 << TCP_FIN_WAIT2
    | 1 << TCP_CLOSE_WAIT
    | 1 << TCP_LAST_ACK
    | 1 << TCP_LISTEN
    | 1 << TCP_CLOSING;
/// nlmsghdr.
const HEADER: usize = 16;
/// inet_diag_sockid: ports, addresses, interface, cookie.
const ID: usize = 48;
/// inet_diag_msg: four bytes before the id, twenty after it.
const MESSAGE: usize = 4 + ID + 20;
/// The kernel fills its answers up to 32 KiB.
const BUFFER_BYTES: usize = 32 << 10;
/// Sockets of one list; more are not looked at.
const LIST_SOCKETS: usize = 100_000;

/// A socket of the kernel's list, with what names it there: the same ends may be another socket's a moment later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed {
    /// What it is.
    pub socket: Socket,
    family: u8,
    id: [u8; ID],
}

/// A message from the kernel, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The end of a list.
    Done,
    /// The answer to a request: 0 or an errno.
    Answer(i32),
    /// A TCP socket.
    Socket(Box<Listed>),
    /// Something else.
    Other,
}

/// Asks for the sockets of one family.
#[must_use]
pub fn list(ipv6: bool, sequence: u32) -> Vec<u8> {
    let family = if ipv6 { AF_INET6 } else { AF_INET };
    request(
        SOCK_DIAG_BY_FAMILY,
        NLM_F_DUMP,
        sequence,
        family,
        STATES,
        &[0; ID],
    )
}

/// Ends a socket: whoever holds it gets ECONNABORTED.
#[must_use]
pub fn destroy(listed: &Listed, sequence: u32) -> Vec<u8> {
    request(
        SOCK_DESTROY,
        NLM_F_ACK,
        sequence,
        listed.family,
        STATES,
        &listed.id,
    )
}

fn request(kind: u16, flags: u16, sequence: u32, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    // nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32; then inet_diag_req_v2
    let length = HEADER + 8 + ID;
    let mut bytes = u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

/// The messages of a datagram with the requests that they answer; what follows a broken one is left out.
#[must_use]
pub fn parse(mut bytes: &[u8]) -> Vec<(u32, Message)> {
    let mut all = Vec::new();
    while let Some(length) = u32_at(bytes, 0).and_then(|length| usize::try_from(length).ok()) {
        let Some(message) = bytes.get(..length).filter(|_| length >= HEADER) else {
            break;
        };
        let (kind, sequence) = (u16_at(message, 4), u32_at(message, 8));
        let body = message.get(HEADER..).unwrap_or_default();
        let read = match kind {
            Some(NLMSG_DONE) => Message::Done,
            Some(NLMSG_ERROR) => u32_at(body, 0).map_or(Message::Other, |error| {
                Message::Answer(error.cast_signed().saturating_neg())
            }),
            Some(SOCK_DIAG_BY_FAMILY) => {
                listed(body).map_or(Message::Other, |listed| Message::Socket(Box::new(listed)))
            }
            _ => Message::Other,
        };
        all.push((sequence.unwrap_or_default(), read));
        bytes = bytes.get(length.saturating_add(3) & !3..).unwrap_or_default();
    }
    all
}

fn listed(body: &[u8]) -> Option<Listed> {
    let body = body.get(..MESSAGE)?;
    let (family, state) = (*body.first()?, *body.get(1)?);
    let id: [u8; ID] = body.get(4..4 + ID)?.try_into().ok()?;
    let end = |port: usize, address: usize| {
        let port = u16::from_be_bytes(id.get(port..port + 2)?.try_into().ok()?);
        let ip = match family {
            AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(id.get(address..address + 4)?).ok()?).into(),
            AF_INET6 => {
                let ip = Ipv6Addr::from(<[u8; 16]>::try_from(id.get(address..address + 16)?).ok()?);
                IpAddr::V6(ip).to_canonical() // of a socket of both families
            }
            _ => return None,
        };
        Some(SocketAddr::new(ip, port))
    };
    let state = match state {
        TCP_LISTEN => State::Listening,
        TCP_ESTABLISHED | TCP_SYN_SENT | TCP_FIN_WAIT1 | TCP_FIN_WAIT2 | TCP_CLOSE_WAIT | TCP_LAST_ACK
        | TCP_CLOSING => State::Connected,
        _ => State::Other,
    };
    Some(Listed {
        socket: Socket {
            state,
            local: end(0, 4)?,
            remote: end(2, 20)?,
            link: u32_at(&id, 36)?,
        },
        family,
        id,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// A socket for requests. The kernel has its answer ready when the request returns, so nothing here waits.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Diag {
    /// Opens it.
    ///
    /// # Errors
    /// The system's own.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(1))?;
        Ok(Self {
            socket,
            sequence: 0,
            buffer: vec![0; BUFFER_BYTES],
        })
    }

    /// All TCP sockets that somebody holds, of both families. A kernel without IPv6 has none of that.
    ///
    /// # Errors
    /// The kernel's refusal, or that the list does not end.
    pub fn sockets(&mut self) -> io::Result<Vec<Listed>> {
        let mut all = self.list(false)?;
        match self.list(true) {
            Ok(more) => all.extend(more),
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => {}
            Err(error) => return Err(error),
        }
        Ok(all)
    }

    /// Ends one; whether it was still there.
    ///
    /// # Errors
    /// The kernel's refusal: EOPNOTSUPP of one without INET_DIAG_DESTROY.
    pub fn destroy(&mut self, listed: &Listed) -> io::Result<bool> {
        let sequence = self.send(|sequence| destroy(listed, sequence))?;
        loop {
            for (answers, message) in self.receive()? {
                match message {
                    Message::Answer(0) if answers == sequence => return Ok(true),
                    Message::Answer(error) if answers == sequence => {
                        let gone = error == Errno::ENOENT as i32;
                        let error = io::Error::from_raw_os_error(error);
                        return if gone { Ok(false) } else { Err(error) };
                    }
                    _ => {} // the rest of an answer that nobody waited for
                }
            }
        }
    }

    fn list(&mut self, ipv6: bool) -> io::Result<Vec<Listed>> {
        let sequence = self.send(|sequence| list(ipv6, sequence))?;
        let mut sockets = Vec::new();
        while sockets.len() <= LIST_SOCKETS {
            for (_, message) in self.receive()?.into_iter().filter(|(of, _)| *of == sequence) {
                match message {
                    Message::Done => return Ok(sockets),
                    Message::Answer(error) if error != 0 => return Err(io::Error::from_raw_os_error(error)),
                    Message::Socket(listed) => sockets.push(*listed),
                    Message::Answer(_) | Message::Other => {}
                }
            }
        }
        Err(io::Error::other("the sockets do not end"))
    }

    fn send(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(self.sequence);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        Ok(self.sequence)
    }

    fn receive(&mut self) -> io::Result<Vec<(u32, Message)>> {
        let length = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
        Ok(parse(self.buffer.get(..length).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As the kernel writes it.
    fn message(family: u8, state: u8, ends: [(&[u8], u16); 2], link: u32) -> Vec<u8> {
        let [(local, sport), (remote, dport)] = ends;
        let mut body = vec![family, state, 0, 0];
        body.extend(sport.to_be_bytes());
        body.extend(dport.to_be_bytes());
        for address in [local, remote] {
            let mut padded = address.to_vec();
            padded.resize(16, 0);
            body.extend(padded);
        }
        body.extend(link.to_ne_bytes());
        body.extend([7; 8]); // the cookie
        body.resize(MESSAGE, 0);
        let mut bytes = u32::try_from(HEADER + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        bytes.extend([2, 0]); // of several
        bytes.extend(9u32.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes
    }

    fn only(bytes: &[u8]) -> Listed {
        match &parse(bytes)[..] {
            [(9, Message::Socket(listed))] => **listed,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_socket_is_read_and_named_as_the_kernel_named_it() {
        let bytes = message(
            AF_INET,
            TCP_SYN_SENT,
            [(&[192, 168, 100, 2], 40_000), (&[9, 9, 9, 9], 443)],
            2,
        );
        let listed = only(&bytes);
        let expected = Socket {
            state: State::Connected,
            local: "192.168.100.2:40000".parse().unwrap(),
            remote: "9.9.9.9:443".parse().unwrap(),
            link: 2,
        };
        assert_eq!(listed.socket, expected);
        let ends = destroy(&listed, 3);
        assert_eq!(ends.len(), HEADER + 8 + ID);
        assert_eq!(
            &ends[HEADER + 8..],
            &bytes[HEADER + 4..HEADER + 4 + ID],
            "cookie and all"
        );
        assert_eq!(&ends[HEADER..HEADER + 2], &[AF_INET, IPPROTO_TCP]);
    }

    #[test]
    fn a_socket_of_both_families_speaks_ipv4() {
        let mut mapped = [0; 16];
        mapped[10..].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 2]);
        let listed = only(&message(
            AF_INET6,
            TCP_ESTABLISHED,
            [(&mapped, 1), (&mapped, 2)],
            0,
        ));
        assert_eq!(listed.socket.local, "10.0.0.2:1".parse().unwrap());
        assert_eq!(listed.family, AF_INET6, "it is ended as what it is listed as");
        let listener = only(&message(
            AF_INET6,
            TCP_LISTEN,
            [(&[0; 16], 5432), (&[0; 16], 0)],
            0,
        ));
        assert_eq!(listener.socket.state, State::Listening);
        assert_eq!(listener.socket.local, "[::]:5432".parse().unwrap());
    }

    #[test]
    fn answers_are_told_from_ends() {
        let mut bytes = Vec::new();
        for (kind, body) in [(NLMSG_ERROR, -95i32), (NLMSG_ERROR, 0), (NLMSG_DONE, 0)] {
            bytes.extend(20u32.to_ne_bytes());
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 2]);
            bytes.extend(9u32.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(body.to_ne_bytes());
        }
        let messages: Vec<Message> = parse(&bytes).into_iter().map(|(_, message)| message).collect();
        assert_eq!(messages, [Message::Answer(95), Message::Answer(0), Message::Done]);
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_are_read_twice(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(&bytes).len() <= bytes.len() / HEADER);
        }

        #[test]
        fn a_damaged_message_does_not_panic(at in 0usize..88, value: u8, cut in 0usize..=88) {
            let mut bytes = message(AF_INET, TCP_ESTABLISHED, [(&[10, 0, 0, 1], 1), (&[10, 0, 0, 2], 2)], 0);
            bytes[at] = value;
            bytes.truncate(cut);
            prop_assert!(parse(&bytes).len() <= 1 || bytes.len() >= 2 * HEADER);
        }
    }
}
