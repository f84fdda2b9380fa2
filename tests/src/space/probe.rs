//! Packets of our own: echo requests, connections and datagrams from inside a namespace.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recvfrom, sendto, socket_with,
};

use super::{PACE, Space};

/// What must answer does so within this time, also on a machine that is busy with other tests.
pub const ANSWER: Duration = Duration::from_secs(10);
/// What is silent for so long does not answer: between our namespaces a packet takes less than a millisecond.
pub const SILENCE: Duration = Duration::from_millis(800);
/// Echo requests are this far apart.
const BETWEEN: Duration = Duration::from_millis(100);

/// A way that packets should go, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The guest sends an echo request to the internet.
    PingOut,
    /// The guest connects to the internet.
    TcpOut,
    /// A process of the machine, root's, connects to the guest.
    TcpIn,
}

impl Space {
    /// Whether one of many echo requests is answered within this time.
    ///
    /// # Errors
    /// The system's own; that there is no route is a silence.
    pub fn ping(&self, to: IpAddr, within: Duration) -> Result<bool> {
        self.enter(|| ping(to, within))?.map_err(Into::into)
    }

    /// What a TCP service says before it closes, asked once.
    ///
    /// # Errors
    /// The system's own, in words.
    pub fn ask_tcp(&self, to: SocketAddr, within: Duration) -> Result<String> {
        let ask = || {
            let mut stream = TcpStream::connect_timeout(&to, within)?;
            stream.set_read_timeout(Some(within))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            io::Result::Ok(text)
        };
        self.enter(ask)?.map_err(Into::into)
    }

    /// What a UDP service answers to one datagram.
    ///
    /// # Errors
    /// The system's own, in words.
    pub fn ask_udp(&self, to: SocketAddr, within: Duration) -> Result<String> {
        let ask = || {
            let any: SocketAddr = if to.is_ipv4() {
                ([0; 4], 0).into()
            } else {
                ([0u16; 8], 0).into()
            };
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?; // so that an ICMP error and nobody else's answer is heard
            socket.set_read_timeout(Some(within))?;
            socket.send(b"hello")?;
            let mut answer = [0; 512];
            let length = socket.recv(&mut answer)?;
            io::Result::Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        self.enter(ask)?.map_err(Into::into)
    }
}

/// Asks until it is so; for what must come to be true.
///
/// # Errors
/// After [`ANSWER`].
pub(crate) fn soon(what: &str, is_so: impl Fn(Duration) -> Result<bool>) -> Result<()> {
    let until = Instant::now() + ANSWER;
    loop {
        if is_so(SILENCE)? {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{what}: no answer within {ANSWER:?}");
        std::thread::sleep(PACE); // polls what may refuse at once
    }
}

fn ping(to: IpAddr, within: Duration) -> io::Result<bool> {
    let (family, protocol) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))?;
    let (until, identifier) = (Instant::now() + within, identifier());
    for number in 0u16.. {
        let now = Instant::now();
        if now >= until {
            break;
        }
        let next = until.min(now + BETWEEN);
        let sent = sendto(
            &socket,
            &request(to, identifier, number),
            SendFlags::empty(),
            &SocketAddr::new(to, 0),
        );
        if sent.is_err() {
            std::thread::sleep(PACE); // no route, just now
            continue;
        }
        while let Some(left) = next
            .checked_duration_since(Instant::now())
            .filter(|left| !left.is_zero())
        {
            let mut bytes = [0; 256];
            set_socket_timeout(&socket, Timeout::Recv, Some(left))?;
            match recvfrom(&socket, &mut bytes, RecvFlags::empty()) {
                Ok((length, _, from)) => {
                    let from = from.and_then(|from| SocketAddr::try_from(from).ok());
                    if from.is_some_and(|from| from.ip() == to)
                        && is_answer(to, identifier, &bytes[..length.min(256)])
                    {
                        return Ok(true);
                    }
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(false)
}

/// The identifier of the next series of requests (RFC 792, RFC 4443): with one for all, connection tracking would take
/// the next series for more of the last.
fn identifier() -> [u8; 2] {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes()
}

fn request(to: IpAddr, identifier: [u8; 2], number: u16) -> [u8; 8] {
    let kind = if to.is_ipv4() { 8 } else { 128 };
    let [high, low] = number.to_be_bytes();
    let mut message = [kind, 0, 0, 0, identifier[0], identifier[1], high, low];
    if to.is_ipv4() {
        let words = message
            .chunks(2)
            .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
        let sum: u32 = words.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        message[2..4].copy_from_slice(&sum.to_be_bytes()); // the kernel does that for IPv6
    }
    message
}

fn is_answer(to: IpAddr, identifier: [u8; 2], packet: &[u8]) -> bool {
    let header = if to.is_ipv4() {
        packet.first().map_or(0, |b| usize::from(b & 15) * 4)
    } else {
        0
    };
    let kind = if to.is_ipv4() { 0 } else { 129 };
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(&kind) && message.get(4..6) == Some(&identifier[..])
}
