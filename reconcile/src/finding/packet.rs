//! The packets that are asked about: what is known of them before one is sent.

use std::net::IpAddr;

use crate::family::Family;

/// What a packet is to its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The first of one.
    New,
    /// A later one.
    Established,
}

/// A TCP packet of some port on its way through this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) family: Family,
    /// The link that it comes by.
    pub(super) iif: String,
    /// The link that it leaves by.
    pub(super) oif: String,
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) state: State,
    /// Its destination was translated: a forwarded port.
    pub(super) translated: bool,
    /// It only goes from one port of a bridge to another.
    pub(super) bridged: bool,
}

/// Whether something holds of a packet of which not everything is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    /// Of all such packets.
    Yes,
    /// Of none, or only of some port, protocol or destination: a rule about those decides nothing about the others.
    No,
    /// It cannot be told.
    Perhaps,
}

impl Holds {
    pub(super) fn of(known: bool) -> Self {
        if known { Self::Yes } else { Self::No }
    }

    pub(super) fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            _ => Self::Perhaps,
        }
    }

    pub(super) fn negated(self, negated: bool) -> Self {
        match self {
            Self::Yes if negated => Self::No,
            Self::No if negated => Self::Yes,
            same => same,
        }
    }
}
