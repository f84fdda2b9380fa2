//! Connections that were opened by a way out of the host which is no longer the way: what was heard of it, and which
//! connections end. Pure.
//!
//! They look alive for many minutes, because nobody is there any more who could say that they are dead. Whoever holds one
//! gets an error at once instead and opens it anew. Nothing ends that another way out of the host does not concern: what
//! others opened to us, what stays within our own networks, and what a tunnel carries.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use sovereign_protocol::condition::{Key, Layer, Verdict};
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_protocol::ways::Ways;

/// Refusals that an event names, of many.
const NAMED: usize = 3;

/// What of a TCP socket's state matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is, or is about to be, connected on our behalf or another's.
    Connected,
    /// It takes connections.
    Listening,
    /// Nobody holds it, or it is not ours to say whose it is.
    Other,
}

/// A TCP socket as the kernel lists it, addresses of IPv4 as such.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// Its state.
    pub state: State,
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// The interface that it is bound to; 0 for none.
    pub link: u32,
}

/// The families whose way out is another one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Moved {
    /// Whether none has moved.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn holds(self, ip: IpAddr) -> bool {
        if ip.is_ipv4() { self.v4 } else { self.v6 }
    }
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.v4, self.v6) {
            (true, true) => "IPv4 and IPv6",
            (true, false) => "IPv4",
            (false, true) => "IPv6",
            (false, false) => "nothing",
        })
    }
}

/// What was last heard. It outlives the agent, so that a move while it restarts is not missed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    ways: Ways,
    /// Our own networks.
    networks: Vec<Prefix>,
}

impl Heard {
    /// Takes in what the host says now: which families have moved. The first number of a family is no move, and without
    /// one nothing is said.
    pub fn hear(&mut self, interface: &InterfaceSpec) -> Moved {
        let moved = |heard: &mut Option<u64>, now: Option<u64>| {
            let is_other = heard.zip(now).is_some_and(|(heard, now)| heard != now);
            *heard = now.or(*heard);
            is_other
        };
        self.networks.clone_from(&interface.addresses);
        Moved {
            v4: moved(&mut self.ways.v4, interface.ways.v4),
            v6: moved(&mut self.ways.v6, interface.ways.v6),
        }
    }

    /// Our addresses with their networks.
    #[must_use]
    pub fn networks(&self) -> &[Prefix] {
        &self.networks
    }
}

/// Where we are: what was and is our own, and which interface has which address.
#[derive(Debug, Clone, Default)]
pub struct Ground {
    /// Addresses that the host gave us, with their networks: those of before and those of now.
    pub networks: Vec<Prefix>,
    /// All addresses that there are now, with the number of their interface.
    pub addresses: BTreeMap<IpAddr, u32>,
}

/// The places in a list of all sockets of those that were opened here, to beyond our own networks, by a former way.
#[must_use]
pub fn former(sockets: &[Socket], ground: &Ground, moved: Moved) -> Vec<usize> {
    let listening = sockets.iter().filter(|socket| socket.state == State::Listening);
    let theirs: BTreeSet<u16> = listening.map(|socket| socket.local.port()).collect();
    let is_former = |socket: &Socket| {
        socket.state == State::Connected
            && !theirs.contains(&socket.local.port())
            && moved.holds(socket.remote.ip())
            && ground.is_of_card(socket)
            && ground.is_beyond(socket.remote.ip())
    };
    let all = sockets.iter().enumerate();
    all.filter(|(_, socket)| is_former(socket))
        .map(|(at, _)| at)
        .collect()
}

impl Ground {
    /// Whether it leaves by the host's card: not by a tunnel, which has addresses of its own.
    fn is_of_card(&self, socket: &Socket) -> bool {
        let local = socket.local.ip();
        let has = self.networks.iter().any(|network| network.address() == local);
        has && (socket.link == 0 || self.addresses.get(&local) == Some(&socket.link))
    }

    fn is_beyond(&self, remote: IpAddr) -> bool {
        let near = self.networks.iter().any(|network| network.contains(remote));
        !near && !self.addresses.contains_key(&remote) && is_elsewhere(remote)
    }
}

/// Whether packets to it leave the host, if they leave us; not so of those that Tailscale carries.
fn is_elsewhere(ip: IpAddr) -> bool {
    let tailnet = [
        Prefix::new(IpAddr::V4(Ipv4Addr::new(100, 64, 0, 0)), 10),
        Prefix::new(
            IpAddr::V6(Ipv6Addr::new(0xfd7a, 0x115c, 0xa1e0, 0, 0, 0, 0, 0)),
            48,
        ),
    ];
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    let nowhere = ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local;
    !nowhere && !tailnet.into_iter().flatten().any(|network| network.contains(ip))
}

/// What came of ending them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Why.
    pub moved: Moved,
    /// How many are gone.
    pub ended: usize,
    /// Why others are not.
    pub refused: Vec<String>,
}

impl Ended {
    /// Where it stands in the journal.
    #[must_use]
    pub fn key() -> Key {
        Key::new(Layer::Interface, "net.ways")
    }

    /// What stands there.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let Self {
            moved,
            ended,
            refused,
        } = self;
        let text = format!(
            "the host's way out for {moved} is another one: connections of the former one ended: {ended}"
        );
        if refused.is_empty() {
            return Verdict::yes("ConnectionsEnded", text);
        }
        let why = refused.iter().take(NAMED).map(String::as_str);
        let why: Vec<&str> = why.collect();
        let text = format!("{text}, not ended: {} ({})", refused.len(), why.join("; "));
        Verdict::no("ConnectionsNotEnded", text)
    }
}

#[cfg(test)]
#[path = "former_tests.rs"]
mod tests;
