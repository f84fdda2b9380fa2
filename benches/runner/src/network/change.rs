//! A foreign change and the moment at which the kernel tells that it is undone, seen from outside.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::BorrowedFd;

/// RTMGRP_IPV4_RULE.
pub(super) const RULE_GROUP: u32 = 0x80;
/// Of NFNLGRP_NFTABLES.
pub(super) const NFT_GROUP: u32 = 1 << 6;
/// The kind of nf_tables' messages.
pub(super) const NEW_TABLE: u16 = 10 << 8;
pub(super) const DELETE_TABLE: u16 = 10 << 8 | 2;
pub(super) const NEW_GENERATION: u16 = 10 << 8 | 15;
/// A repair that takes longer does not come.
const PATIENCE: i64 = 5;
/// NFPROTO_INET and NFPROTO_IPV4.
pub(super) const INET: u8 = 1;
pub(super) const IPV4: u8 = 2;

/// What is taken away.
pub(super) enum Change {
    /// One of our rules.
    Rule(RuleMessage),
    /// A table: its family and its name.
    Table(u8, String),
}

impl Change {
    /// The rule of ours that leads to guests.
    pub(super) fn rule() -> Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        let mut message = RuleMessage::default();
        message.header.family = AddressFamily::Inet;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetRule(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        socket.send(&written(request), 0)?;
        loop {
            for message in read(&socket)? {
                match message.payload {
                    NetlinkPayload::Done(_) => bail!("there is no rule of ours"),
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(rule)) if is_ours(&rule) => {
                        return Ok(Self::Rule(rule));
                    }
                    _ => {}
                }
            }
        }
    }

    /// A request that undoes it, with an acknowledgement.
    pub(super) fn made(&self, tables: &[u8]) -> Vec<u8> {
        match self {
            Self::Rule(rule) => {
                let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewRule(rule.clone()));
                request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
                written(request)
            }
            Self::Table(..) => batch(tables),
        }
    }

    fn deleted(&self) -> Vec<u8> {
        match self {
            Self::Rule(rule) => {
                let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelRule(rule.clone()));
                request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
                written(request)
            }
            Self::Table(family, name) => {
                let mut delete = head(DELETE_TABLE, NLM_F_REQUEST | NLM_F_ACK, *family, 0);
                let length = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
                delete.extend(length.to_ne_bytes());
                delete.extend(1_u16.to_ne_bytes());
                delete.extend(name.as_bytes());
                delete.resize((delete.len() + 1).next_multiple_of(4), 0);
                sized(&mut delete);
                batch(&delete)
            }
        }
    }

    /// Whether a datagram tells that it was taken away or, if not, that it is back.
    pub(super) fn told(&self, datagram: &[u8], back: bool) -> Result<bool> {
        match self {
            Self::Rule(_) => Ok(parsed(datagram)?.iter().any(|message| match &message.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(rule)) => back && is_ours(rule),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRule(rule)) => !back && is_ours(rule),
                _ => false,
            })),
            Self::Table(family, name) => {
                let kind = if back { NEW_TABLE } else { DELETE_TABLE };
                let named = [name.as_bytes(), &[0]].concat();
                Ok(raw(datagram).any(|message| {
                    let of = message.get(24..24 + named.len());
                    kind_of(message) == kind && message.get(16) == Some(family) && of == Some(&named)
                }))
            }
        }
    }

    /// Whether a datagram ends what is told of one change.
    pub(super) fn ends(&self, datagram: &[u8]) -> bool {
        match self {
            Self::Rule(_) => true,
            Self::Table(..) => raw(datagram).any(|message| kind_of(message) == NEW_GENERATION),
        }
    }

    /// The protocol that it is made over, and the group that hears of it.
    pub(super) fn place(&self) -> (isize, u32) {
        match self {
            Self::Rule(_) => (NETLINK_ROUTE, RULE_GROUP),
            Self::Table(..) => (NETLINK_NETFILTER, NFT_GROUP),
        }
    }
}

/// Makes a change and waits until it is undone.
pub(super) struct Observer {
    change: Change,
    hands: Socket,
    ears: Socket,
    request: Vec<u8>,
    buffer: Vec<u8>,
}

impl Observer {
    pub(super) fn of(change: Change) -> Result<Self> {
        let (protocol, group) = change.place();
        let (mut hands, mut ears) = (Socket::new(protocol)?, Socket::new(protocol)?);
        hands.bind_auto()?;
        ears.set_rx_buf_sz(4 << 20)?;
        ears.bind(&SocketAddr::new(0, group))?;
        Ok(Self {
            request: change.deleted(),
            change,
            hands,
            ears,
            buffer: Vec::with_capacity(64 << 10),
        })
    }

    /// From just before the change is asked for until just after the kernel's word of the repair was read.
    pub(super) fn round(&mut self) -> Result<Duration> {
        while ready(&self.ears, 0)? {
            self.hear()?; // of the last repair
        }
        let begun = Instant::now();
        self.hands.send(&self.request, 0)?;
        let (mut gone, mut back) = (false, false);
        loop {
            ensure!(
                ready(&self.ears, PATIENCE)?,
                "nobody undid it (told of the change: {gone})"
            );
            self.hear()?;
            gone |= self.change.told(&self.buffer, false)?;
            back |= gone && self.change.told(&self.buffer, true)?;
            if back && self.change.ends(&self.buffer) {
                break;
            }
        }
        let took = begun.elapsed();
        let mut answer = Vec::with_capacity(64 << 10);
        self.hands.recv(&mut answer, 0)?;
        let code = raw(&answer).next().and_then(|message| message.get(16..20));
        ensure!(code == Some(&[0; 4]), "the change was refused: {code:?}");
        Ok(took)
    }

    fn hear(&mut self) -> Result<()> {
        self.buffer.clear();
        self.ears.recv(&mut self.buffer, 0).context("no news")?;
        Ok(())
    }
}

fn ready(socket: &Socket, seconds: i64) -> Result<bool> {
    use std::os::fd::AsRawFd;
    // SAFETY: the socket outlives the borrow.
    #[allow(unsafe_code, reason = "netlink-sys lends its descriptor in no other way")]
    let socket = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    let mut all = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    Ok(poll(&mut all, Some(&time))? > 0)
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes
        .contains(&RuleAttribute::Priority(sovereign_reconcile::rule::TO_GUESTS))
}

fn written(mut message: NetlinkMessage<RouteNetlinkMessage>) -> Vec<u8> {
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn read(socket: &Socket) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut bytes = Vec::with_capacity(64 << 10);
    socket.recv(&mut bytes, 0)?;
    parsed(&bytes)
}

fn parsed(datagram: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    raw(datagram)
        .map(|message| Ok(NetlinkMessage::deserialize(message)?))
        .collect()
}

/// The messages of a datagram.
pub(super) fn raw(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        let message = datagram.get(..length).filter(|message| message.len() >= 16)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Its kind.
pub(super) fn kind_of(message: &[u8]) -> u16 {
    u16::from_ne_bytes([message[4], message[5]])
}

/// The two frames around some messages of nf_tables; the last one's acknowledgement is asked for.
fn batch(messages: &[u8]) -> Vec<u8> {
    let mut all = head(16, NLM_F_REQUEST, 0, 10);
    sized(&mut all);
    let begin = all.len();
    all.extend(messages);
    let (mut at, mut last) = (begin, begin);
    while let Some(length) = all.get(at..).and_then(<[u8]>::first_chunk) {
        last = at;
        at += u32::from_ne_bytes(*length) as usize;
    }
    all[last + 6] |= 4; // NLM_F_ACK
    let mut end = head(17, NLM_F_REQUEST, 0, 10);
    sized(&mut end);
    all.extend(end);
    all
}

fn head(kind: u16, flags: u16, family: u8, resource: u16) -> Vec<u8> {
    let mut head = vec![0; 4];
    head.extend(kind.to_ne_bytes());
    head.extend(flags.to_ne_bytes());
    head.extend([0; 8]);
    head.extend([family, 0]);
    head.extend(resource.to_be_bytes());
    head
}

fn sized(message: &mut [u8]) {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    message[..4].copy_from_slice(&length.to_ne_bytes());
}
