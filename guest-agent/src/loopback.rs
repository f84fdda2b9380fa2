//! The interface `lo`: brought up and given 127.0.0.1/8 by rtnetlink, and dialled to see whether it works.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::os::fd::AsRawFd;

/// A loopback dial must answer within this time.
pub const DIAL: Duration = Duration::from_secs(1);
/// The index of `lo` in every network namespace (net/core/net_namespace.c registers it first).
const LO: i32 = 1;

// linux/netlink.h, linux/rtnetlink.h, linux/if.h
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const AF_INET: u8 = 2;
const RT_SCOPE_HOST: u8 = 254;

/// Brings `lo` up with 127.0.0.1/8; right to do when it is already so.
///
/// # Errors
/// The system's own.
pub fn raise() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&socket, ReceiveTimeout, &TimeVal::seconds(1))?;
    for request in [link_up(), address()] {
        sendto(
            socket.as_raw_fd(),
            &request,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut answer = [0; 4096];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        acknowledged(&answer[..length])?;
    }
    Ok(())
}

/// Connects to a listener of its own on 127.0.0.1 and passes one byte through.
///
/// # Errors
/// What stood in the way; `TimedOut` after [`DIAL`] is how a down `lo` looks with a default route.
pub fn dial() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address: SocketAddr = listener.local_addr()?;
    let mut near = TcpStream::connect_timeout(&address, DIAL)?;
    let (mut far, _) = listener.accept()?;
    far.set_read_timeout(Some(DIAL))?;
    near.write_all(b"?")?;
    let mut byte = [0];
    far.read_exact(&mut byte)
}

fn link_up() -> Vec<u8> {
    // ifinfomsg: family, pad, type u16, index i32, flags u32, change u32
    let mut body = vec![0; 4];
    body.extend(LO.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    body.extend(IFF_UP.to_ne_bytes());
    message(RTM_NEWLINK, 0, &body)
}

fn address() -> Vec<u8> {
    // ifaddrmsg: family, prefix length, flags, scope, index u32
    let mut body = vec![AF_INET, 8, 0, RT_SCOPE_HOST];
    body.extend(LO.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        body.extend(8u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(Ipv4Addr::LOCALHOST.octets());
    }
    message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body)
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    // nlmsghdr: length u32, type u16, flags u16, sequence u32, port u32
    let mut bytes = u32::try_from(16 + body.len()).unwrap_or(0).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend_from_slice(body);
    bytes
}

fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let field = |at: usize| {
        answer
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map(i32::from_ne_bytes)
    };
    let kind = answer
        .get(4..6)
        .and_then(|b| b.try_into().ok())
        .map(u16::from_ne_bytes);
    match (kind, field(16)) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(error)) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "rtnetlink answered without an acknowledgement",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_sizes_of_their_headers() {
        assert_eq!((link_up().len(), address().len()), (32, 40));
        assert_eq!(link_up()[..4], 32u32.to_ne_bytes());
    }

    #[test]
    fn only_an_acknowledgement_counts() {
        let mut ack = message(NLMSG_ERROR, 0, &0i32.to_ne_bytes());
        assert!(acknowledged(&ack).is_ok());
        ack[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledged(&ack).unwrap_err().raw_os_error(), Some(1));
        assert!(acknowledged(&[]).is_err());
    }

    #[test]
    fn a_working_loopback_answers() {
        dial().unwrap();
    }
}
