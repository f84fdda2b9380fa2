//! Which sockets of this network namespace wait for others: TCP that listens, UDP that is bound and not connected.
//!
//! Asked of the kernel (sock_diag(7)), which answers about what waits only, however many connections there are; where
//! it has no such thing, /proc/net is read. Changes nothing.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::netlink::SOCK_DIAG;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, recv, sendto, socket_with,
};
use sovereign_protocol::port::Transport;

use crate::net::nft::attributes::{attributes, messages};

/// SOCK_DIAG_BY_FAMILY, NLMSG_ERROR, NLMSG_DONE, NLM_F_REQUEST | NLM_F_DUMP.
const BY_FAMILY: u16 = 20;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const DUMP: u16 = 0x301;
/// AF_INET, AF_INET6 in the kernel's bytes.
const FAMILIES: [u8; 2] = [2, 10];
/// Bit masks of TCP_CLOSE, which is what an unconnected UDP socket is in, and of TCP_LISTEN (net/tcp_states.h).
const UNCONNECTED: u32 = 1 << 7;
const LISTENING: u32 = 1 << 10;
/// sizeof(struct inet_diag_msg).
const SOCKET_BYTES: usize = 72;
/// INET_DIAG_SKV6ONLY.
const V6_ONLY: u16 = 11;
/// Bytes of one read; the kernel's datagrams are smaller.
const DATAGRAM: usize = 64 << 10;
/// The kernel answers at once.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(5);

/// A socket that waits for others.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listener {
    /// TCP or UDP.
    pub transport: Transport,
    /// Where it waits.
    pub local: SocketAddr,
    /// Of one at `::`: whether it takes IPv6 only. `None` where that cannot be seen.
    pub only_v6: Option<bool>,
    /// Whose it is.
    pub uid: u32,
    /// Its number in /proc/PID/fd; 0 for one of the kernel's own.
    pub inode: u64,
}

impl Listener {
    /// Whether it takes what comes for this address; `unseen` says what is taken where it cannot be seen.
    #[must_use]
    pub fn takes(&self, address: IpAddr, unseen: bool) -> bool {
        let ip = self.local.ip();
        let all = ip.is_unspecified() || address.is_unspecified();
        if ip.is_ipv4() == address.is_ipv4() {
            return ip == address || all;
        }
        let both = self.only_v6.map_or(unseen, |only| !only);
        ip.is_ipv6() && ip.is_unspecified() && both
    }
}

/// All of them.
///
/// # Errors
/// The system's own.
pub fn listeners() -> io::Result<Vec<Listener>> {
    asked().or_else(|_| {
        let tables = [
            (Transport::Tcp, "tcp"),
            (Transport::Tcp, "tcp6"),
            (Transport::Udp, "udp"),
            (Transport::Udp, "udp6"),
        ];
        let mut found = Vec::new();
        for (transport, table) in tables {
            match fs::read_to_string(format!("/proc/net/{table}")) {
                Ok(text) => found.extend(text.lines().filter_map(|line| line_of(transport, line))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // no IPv6 here
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    })
}

/// The sockets that this process holds.
#[must_use]
pub fn ours() -> BTreeSet<u64> {
    sockets_of(Path::new("/proc/self")).collect()
}

/// The process that holds a socket, and its program's name.
#[must_use]
pub fn holder(inode: u64) -> Option<(u32, String)> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .find_map(|pid| {
            let process = Path::new("/proc").join(pid.to_string());
            sockets_of(&process).find(|socket| *socket == inode)?;
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            Some((pid, name.trim().to_owned()))
        })
}

fn sockets_of(process: &Path) -> impl Iterator<Item = u64> {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.filter_map(|file| {
        let target = fs::read_link(file.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    })
}

fn asked() -> io::Result<Vec<Listener>> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(SOCK_DIAG))?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    let kernel = rustix::net::netlink::SocketAddrNetlink::new(0, 0);
    let mut found = Vec::new();
    let mut buffer = vec![0; DATAGRAM];
    for (transport, states) in [(Transport::Tcp, LISTENING), (Transport::Udp, UNCONNECTED)] {
        for family in FAMILIES {
            let question = question(family, transport, states);
            sendto(
                &socket,
                &question,
                SendFlags::empty(),
                &SocketAddrAny::from(kernel),
            )?;
            loop {
                let (length, _) = recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
                let datagram = buffer.get(..length).unwrap_or_default();
                if answer(transport, datagram, &mut found)? {
                    break;
                }
            }
        }
    }
    Ok(found)
}

/// struct nlmsghdr and struct inet_diag_req_v2, whose addresses and ports are not looked at by a dump.
fn question(family: u8, transport: Transport, states: u32) -> Vec<u8> {
    const LENGTH: usize = 16 + 56;
    let mut bytes = Vec::with_capacity(LENGTH);
    bytes.extend(u32::try_from(LENGTH).unwrap_or_default().to_ne_bytes());
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(DUMP.to_ne_bytes());
    bytes.extend([0; 8]); // one question at a time
    bytes.extend([family, transport.number(), 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.resize(LENGTH, 0);
    bytes
}

/// Takes in a datagram of an answer; whether it was the last one.
fn answer(transport: Transport, datagram: &[u8], found: &mut Vec<Listener>) -> io::Result<bool> {
    for message in messages(datagram) {
        let message = message.map_err(|_| io::ErrorKind::InvalidData)?;
        match message.kind {
            DONE => return Ok(true),
            ERROR => {
                let code = message
                    .body
                    .first_chunk()
                    .map_or(0, |code| i32::from_ne_bytes(*code));
                return Err(Errno::from_raw_os_error(-code).into());
            }
            BY_FAMILY => found.extend(socket_of(transport, message.body)),
            _ => {}
        }
    }
    Ok(false)
}

/// struct inet_diag_msg with its attributes (linux/inet_diag.h).
fn socket_of(transport: Transport, body: &[u8]) -> Option<Listener> {
    let (head, rest) = body.split_at_checked(SOCKET_BYTES)?;
    let port = u16::from_be_bytes([head[4], head[5]]);
    let ip = match head[0] {
        2 => IpAddr::from(<[u8; 4]>::try_from(&head[8..12]).ok()?),
        10 => IpAddr::from(<[u8; 16]>::try_from(&head[8..24]).ok()?).to_canonical(),
        _ => return None,
    };
    let long = |at: usize| {
        head.get(at..at + 4)?
            .first_chunk()
            .map(|bytes| u32::from_ne_bytes(*bytes))
    };
    let only_v6 = attributes(rest)
        .filter_map(Result::ok)
        .find(|(kind, _)| *kind == V6_ONLY)
        .and_then(|(_, value)| value.first().map(|only| *only != 0));
    Some(Listener {
        transport,
        local: SocketAddr::new(ip, port),
        only_v6,
        uid: long(64)?,
        inode: u64::from(long(68)?),
    })
}

/// A line of /proc/net/{tcp,udp}{,6} (proc_pid_net(5)) about one that waits: addresses are hexadecimal words of the
/// host's byte order.
fn line_of(transport: Transport, line: &str) -> Option<Listener> {
    let waits = match transport {
        Transport::Tcp => "0A",
        Transport::Udp => "07",
    };
    let words: Vec<&str> = line.split_whitespace().collect();
    let (address, port) = words.get(1)?.split_once(':')?;
    let mut bytes = Vec::with_capacity(16);
    for word in address.as_bytes().chunks(8) {
        let word = std::str::from_utf8(word).ok().filter(|word| word.len() == 8)?;
        let word = u32::from_str_radix(word, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
        _ => return None,
    };
    (*words.get(3)? == waits).then_some(())?;
    Some(Listener {
        transport,
        local: SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?),
        only_v6: None,
        uid: words.get(7)?.parse().ok()?,
        inode: words.get(9)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{bind, sockopt};
    use std::net::{TcpListener, UdpSocket};

    /// A UDP socket of IPv6 at an address of the loopback, and where it is.
    fn six(address: std::net::Ipv6Addr) -> (rustix::fd::OwnedFd, SocketAddr) {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET6, SocketType::DGRAM, flags, None).unwrap();
        sockopt::set_ipv6_v6only(&socket, false).unwrap();
        bind(&socket, &SocketAddr::from((address, 0))).unwrap();
        let address = SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap();
        (
            socket,
            SocketAddr::new(address.ip().to_canonical(), address.port()),
        )
    }

    #[test]
    fn what_waits_here_is_seen_and_what_does_not_is_not() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let connected = UdpSocket::bind("127.0.0.1:0").unwrap();
        connected.connect(udp.local_addr().unwrap()).unwrap();
        // The kernel makes a socket of IPv6 one of IPv6 only when it is bound to such an address.
        let mapped = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        let ((_both, both), (_only, only)) = (six(mapped), six(std::net::Ipv6Addr::LOCALHOST));
        let (seen, ours) = (listeners().unwrap(), ours());
        let find = |transport, local: SocketAddr| {
            let found = seen.iter().find(|l| (l.transport, l.local) == (transport, local));
            found.filter(|listener| ours.contains(&listener.inode)).cloned()
        };
        let own = find(Transport::Tcp, tcp.local_addr().unwrap()).unwrap();
        let (pid, _) = holder(own.inode).unwrap();
        assert_eq!(pid, std::process::id());
        assert!(find(Transport::Udp, udp.local_addr().unwrap()).is_some());
        assert_eq!(find(Transport::Udp, tcp.local_addr().unwrap()), None);
        assert_eq!(find(Transport::Udp, connected.local_addr().unwrap()), None);
        let at = |address| find(Transport::Udp, address).unwrap();
        assert_eq!((at(both).only_v6, at(only).only_v6), (Some(false), Some(true)));
    }

    #[test]
    fn lines_of_all_tables_are_read_and_nonsense_is_not() {
        let v4 = "   0: 0100007F:3C48 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 77 1 x";
        let listener = line_of(Transport::Tcp, v4).unwrap();
        assert_eq!(
            (listener.local, listener.uid, listener.inode),
            ("127.0.0.1:15432".parse().unwrap(), 1000, 77)
        );
        assert_eq!(line_of(Transport::Udp, v4), None, "it is connected");
        let v6 = "   1: 00000000000000000000000000000000:3C48 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 78 1";
        let six = line_of(Transport::Tcp, v6).unwrap();
        let four: IpAddr = "127.0.0.1".parse().unwrap();
        assert!(six.takes(four, true) && !six.takes(four, false));
        for line in [
            "",
            "sl local_address",
            "0: zz:1 x 0A",
            "0: 01:1 0 0A 0 0 0 0 0 0",
            "0: ééé:1 0 0A 0 0 0 0 0 0",
        ] {
            assert_eq!(line_of(Transport::Tcp, line), None, "{line}");
        }
    }

    #[test]
    fn nonsense_of_a_kernel_is_an_error_or_nothing() {
        let mut found = Vec::new();
        assert!(answer(Transport::Tcp, &[1, 0, 0, 0], &mut found).is_err());
        let mut refused = question(2, Transport::Tcp, LISTENING);
        refused[4..6].copy_from_slice(&ERROR.to_ne_bytes());
        refused[16..20].copy_from_slice(&(-2i32).to_ne_bytes());
        let error = answer(Transport::Tcp, &refused, &mut found).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(2));
        assert_eq!(socket_of(Transport::Tcp, &[2; 71]), None);
        assert_eq!(socket_of(Transport::Tcp, &[9; 72]), None);
        assert!(found.is_empty());
    }
}
