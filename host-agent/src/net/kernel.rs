//! Route netlink of one namespace: dumps as values, and changes that were acknowledged.
//!
//! One request at a time: the kernel allows one dump per socket. A change counts as made
//! only when the kernel's acknowledgement was seen; a socket that fails once is not used
//! again (the caller takes a fresh one).

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::time::Duration;

use futures::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::TokioSocket;
use rtnetlink::Handle;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use tokio::task::AbortHandle;

use super::observed::{Fold, Observed};

/// An answer of the kernel must be complete within this time.
const ANSWER: Duration = Duration::from_secs(5);
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

/// A socket for requests. Its task ends when this is dropped.
#[derive(Debug)]
pub struct Kernel {
    handle: Handle,
    task: AbortHandle,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Kernel {
    /// Speaks over a route netlink socket that was opened in the namespace. Needs a tokio runtime.
    #[must_use]
    pub fn over(socket: OwnedFd) -> Self {
        let (mut connection, handle, _) = rtnetlink::from_socket(passed_socket(socket));
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        let task = tokio::spawn(connection).abort_handle();
        Self { handle, task }
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
        let answers = self.request(request).await?;
        match answers.into_iter().next().map(|first| first.payload) {
            Some(NetlinkPayload::InnerMessage(found)) => Ok(found),
            _ => Err(KernelError::NoAnswer),
        }
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
        request: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, KernelError> {
        let stream = self.handle.request(request).map_err(|_| KernelError::NoAnswer)?;
        let answers: Vec<_> = tokio::time::timeout(ANSWER, stream.collect())
            .await
            .map_err(|_| KernelError::NoAnswer)?;
        for answer in &answers {
            if let NetlinkPayload::Error(refusal) = &answer.payload
                && refusal.code.is_some()
            {
                return Err(KernelError::Refused(refusal.to_io()));
            }
        }
        Ok(answers)
    }
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
