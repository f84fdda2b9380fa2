//! Route netlink of one namespace: dumps as values, and changes that were acknowledged.
//!
//! One request at a time: the kernel allows one dump per socket. A change counts as made
//! only when the kernel's acknowledgement was seen; a socket that fails once is not used
//! again (the caller takes a fresh one).
//!
//! Of our own, because the kernel does a change while it is sent: its answer is there when the call returns, and is
//! read without a task, a channel or a wait in between. The messages are those of `netlink-packet-route`.

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_MULTIPART, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use super::observed::{Fold, Observed};

/// An answer of the kernel must be complete within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// Bytes of one read; the kernel's datagrams are smaller.
const DATAGRAM: usize = 64 << 10;
/// NLMSG_MIN_TYPE: the kinds below are the protocol's own.
const FIRST_OBJECT: u16 = 16;
/// A dump that others changed on the way is asked for again, this many times.
const DUMPS: u32 = 16;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The kernel refused the request; the socket is fine.
    #[error("the kernel refused")]
    Refused(#[source] io::Error),
    /// No complete answer came: nothing is known, and the socket is not to be used again.
    #[error("no complete answer from the kernel")]
    NoAnswer,
    /// The answer is none that is known here: this question has none, and the socket is fine.
    #[error("an answer that cannot be understood")]
    Unreadable,
    /// Every dump was changed on the way.
    #[error("the links changed during each of {DUMPS} dumps")]
    Unsteady,
}

impl KernelError {
    /// Whether the kernel refused with this error number.
    #[must_use]
    pub fn is(&self, errno: rustix::io::Errno) -> bool {
        matches!(self, Self::Refused(error) if error.raw_os_error() == Some(errno.raw_os_error()))
    }

    /// Whether the socket may be used again.
    #[must_use]
    pub fn socket_lives(&self) -> bool {
        !matches!(self, Self::NoAnswer)
    }
}

/// A socket for requests.
pub struct Kernel {
    socket: TokioSocket,
    /// By which others hear who made a change; 0, which is the kernel's, before the first request.
    port: u32,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Kernel {
    /// Speaks over a route netlink socket that was opened in the namespace. Needs a tokio runtime.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        Self {
            socket: passed_socket(socket),
            port: 0,
            sequence: 0,
            buffer: Vec::with_capacity(DATAGRAM),
        }
    }

    /// By which notifications say that we made a change: the port of this socket, which the kernel chooses with the first
    /// request, and that of the first socket of this process.
    #[must_use]
    pub fn own_ports(&self) -> [u32; 2] {
        [self.port, std::process::id()]
    }

    /// Makes one change; `flags` beside REQUEST and ACK. Not cancel safe: the change may be made.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), KernelError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let answers = self.request(request).await?;
        match answers.last().map(|last| &last.payload) {
            Some(NetlinkPayload::Error(ack)) if ack.code.is_none() => Ok(()),
            _ => Err(KernelError::NoAnswer),
        }
    }

    /// Asks for one object.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn get(&mut self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, KernelError> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST;
        object(self.request(request).await?)
    }

    /// Asks for all objects of a kind; whole and of one moment, or an error.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn dump(
        &mut self,
        message: &RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
        for _ in 0..DUMPS {
            let mut request = NetlinkMessage::from(message.clone());
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let answers = self.request(request).await?;
            let done = answers.last().map(|last| &last.payload);
            if !matches!(done, Some(NetlinkPayload::Done(_))) {
                return Err(KernelError::NoAnswer);
            }
            let steady = |answer: &NetlinkMessage<_>| answer.header.flags & NLM_F_DUMP_INTR == 0;
            if answers.iter().all(steady) {
                return Ok(answers.into_iter().filter_map(inner).collect());
            }
        }
        Err(KernelError::Unsteady)
    }

    /// Looks at all links, addresses, routes and rules.
    ///
    /// # Errors
    /// [`KernelError`].
    pub async fn observe(&mut self) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        let route = |family| {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            RouteNetlinkMessage::GetRoute(message)
        };
        let rule = |family| {
            let mut message = RuleMessage::default();
            message.header.family = family;
            RouteNetlinkMessage::GetRule(message)
        };
        for what in [
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            route(AddressFamily::Inet),
            route(AddressFamily::Inet6),
            rule(AddressFamily::Inet),
            rule(AddressFamily::Inet6),
        ] {
            let messages = match self.dump(&what).await {
                Err(error) if error.is(Errno::AFNOSUPPORT) || error.is(Errno::OPNOTSUPP) => Vec::new(),
                other => other?,
            };
            messages.iter().for_each(|message| observed.take(message));
        }
        Ok(observed)
    }

    /// All answers to a request, the last one included; a refusal is an error.
    async fn request(
        &mut self,
        mut request: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, KernelError> {
        self.sequence = self.sequence.wrapping_add(1);
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        let answered = tokio::time::timeout(ANSWER, self.ask(&bytes)).await;
        let answers = answered.map_err(|_| KernelError::NoAnswer)??;
        for answer in &answers {
            if let NetlinkPayload::Error(refusal) = &answer.payload
                && refusal.code.is_some()
            {
                return Err(KernelError::Refused(refusal.to_io()));
            }
        }
        Ok(answers)
    }

    async fn ask(&mut self, request: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, KernelError> {
        let sent = self.socket.send(request).await;
        sent.map_err(|_| KernelError::NoAnswer)?;
        if self.port == 0 {
            let mut address = SocketAddr::new(0, 0);
            let known = self.socket.socket_ref().get_address(&mut address);
            known.map_err(|_| KernelError::NoAnswer)?;
            self.port = address.port_number();
        }
        let mut answers = Vec::new();
        loop {
            self.buffer.clear();
            let there = self.socket.socket_ref().recv_from(&mut self.buffer, 0);
            let from = match there {
                Ok((_, from)) => from,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.buffer.clear();
                    let from = self.socket.recv_from(&mut self.buffer).await;
                    from.map_err(|_| KernelError::NoAnswer)?
                }
                Err(_) => return Err(KernelError::NoAnswer),
            };
            // Everybody can send to a netlink socket whose port is known.
            if from.port_number() == 0 && take(&self.buffer, self.sequence, &mut answers)? {
                return Ok(answers);
            }
        }
    }
}

/// The object that was asked for. The answer is complete, so whatever it is, the next one is read from its beginning.
fn object(answers: Vec<NetlinkMessage<RouteNetlinkMessage>>) -> Result<RouteNetlinkMessage, KernelError> {
    let first = answers.into_iter().next();
    first.and_then(inner).ok_or(KernelError::Unreadable)
}

/// Takes the answers to one request out of a datagram; whether the last one was among them. An object that cannot be
/// read is passed over: there are kinds that nobody here knows.
fn take(
    mut datagram: &[u8],
    sequence: u32,
    answers: &mut Vec<NetlinkMessage<RouteNetlinkMessage>>,
) -> Result<bool, KernelError> {
    let mut last = false;
    while !datagram.is_empty() {
        let header = NetlinkBuffer::new_checked(datagram).map_err(|_| KernelError::NoAnswer)?;
        let length = header.length() as usize;
        let message = datagram.get(..length).ok_or(KernelError::NoAnswer)?;
        if header.sequence_number() == sequence {
            let many = header.flags() & NLM_F_MULTIPART != 0;
            let object = header.message_type() >= FIRST_OBJECT;
            last |= !(many && object);
            match NetlinkMessage::deserialize(message) {
                Ok(answer) => answers.push(answer),
                Err(error) if object => tracing::debug!(%error, "an object that nobody can read"),
                Err(_) => return Err(KernelError::NoAnswer),
            }
        }
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(last)
}

/// A netlink socket that somebody else opened. Needs a tokio runtime.
pub(super) fn passed_socket(socket: OwnedFd) -> TokioSocket {
    // SAFETY: the descriptor is ours alone, and it moves into the socket that will close it.
    #[allow(unsafe_code, reason = "netlink-sys takes a passed descriptor in no other way")]
    unsafe {
        TokioSocket::from_raw_fd(socket.into_raw_fd())
    }
}

fn inner(answer: NetlinkMessage<RouteNetlinkMessage>) -> Option<RouteNetlinkMessage> {
    match answer.payload {
        NetlinkPayload::InnerMessage(message) => Some(message),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header with nothing behind it.
    fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = 16 + body.len() as u32;
        let parts: [&[u8]; 6] = [
            &length.to_ne_bytes(),
            &kind.to_ne_bytes(),
            &flags.to_ne_bytes(),
            &sequence.to_ne_bytes(),
            &[0; 4],
            body,
        ];
        parts.concat()
    }

    #[test]
    fn answers_end_with_the_first_that_is_not_one_of_many_and_others_are_passed_over() {
        const ACK: u16 = 2;
        const DONE: u16 = 3;
        const RULE: u16 = 32;
        let rule = [2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0];
        let taken = |datagram: &[u8]| {
            let mut answers = Vec::new();
            let last = take(datagram, 7, &mut answers).map_err(|_| ());
            (last, answers.len())
        };
        let many = message(RULE, NLM_F_MULTIPART, 7, &rule);
        assert_eq!(taken(&[many.clone(), many.clone()].concat()), (Ok(false), 2));
        let done = message(DONE, NLM_F_MULTIPART, 7, &[0; 4]);
        assert_eq!(taken(&[many.clone(), done].concat()), (Ok(true), 2));
        assert_eq!(taken(&message(RULE, 0, 7, &rule)), (Ok(true), 1));
        let ack = |sequence| message(ACK, 0, sequence, &[0; 20]);
        assert_eq!(taken(&ack(7)), (Ok(true), 1));
        assert_eq!(
            taken(&ack(6)),
            (Ok(false), 0),
            "of a request that nobody waits for"
        );
        assert_eq!(taken(&[ack(6), ack(7)].concat()), (Ok(true), 1));
        // One that was asked for is an error of that question alone.
        for odd in [message(RULE, 0, 7, &[2, 0, 0, 0]), ack(7)] {
            let mut answers = Vec::new();
            assert!(take(&odd, 7, &mut answers).unwrap());
            let error = object(answers).unwrap_err();
            assert!(error.socket_lives(), "{error}");
        }
        let mut answers = Vec::new();
        take(&message(RULE, 0, 7, &rule), 7, &mut answers).unwrap();
        assert!(matches!(object(answers), Ok(RouteNetlinkMessage::NewRule(_))));
        // What is no object of ours does not end a dump.
        let odd = message(RULE, NLM_F_MULTIPART, 7, &[2, 0, 0, 0]);
        assert_eq!(taken(&[odd, many].concat()), (Ok(false), 1));
        assert_eq!(taken(&message(ACK, 0, 7, &[])).0, Err(()));
        assert_eq!(taken(&[9; 15]).0, Err(()));
        let mut long = ack(7);
        long[0] = 200;
        assert_eq!(taken(&long).0, Err(()));
    }
}
