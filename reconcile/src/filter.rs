//! What packets of our guests may do, whatever program of the kernel enforces it. Pure.
//!
//! Made from what somebody asked for and from the links there are; a back end (`nft`, `iptables`) turns it into
//! objects of its own and compares those with what the kernel has. Two filters that are equal mean equal objects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use sovereign_protocol::port::{Ports, Taken, Transport};
use sovereign_protocol::subnet::Subnet;

use crate::names::{LinkName, Mac};

/// All that is filtered and translated for one instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Filter {
    /// How our tables and chains are called or begin, such as `sv5pkj`: the prefix of the instance's
    /// [`Mark`](crate::names::Mark).
    pub tag: String,
    /// The guests' bridge.
    pub bridge: LinkName,
    /// The guests' subnets; each has a way out if `way_out` says so.
    pub subnets: BTreeSet<Subnet>,
    /// Whether guests reach what is beyond this host.
    pub way_out: WayOut,
    /// Ports of this host that lead to guests.
    pub forwards: BTreeSet<PortForward>,
    /// Links by which those ask whose answers go back there, and the mark of each, within [`MASK`](crate::answers::MASK).
    pub answers: BTreeMap<LinkName, u32>,
    /// What each guest's link may send; guests that are not in it may send anything.
    pub senders: BTreeMap<LinkName, Sender>,
}

/// Whether and how guests reach what is beyond this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WayOut {
    /// They do not: what they send elsewhere is refused, so that they know at once.
    None,
    /// Under this host's address (masquerade), with the MSS of TCP clamped to the route's MTU.
    Masquerade,
}

/// A port of this host that leads to a guest by translation of the destination.
///
/// Reachable from other machines, from this host by any of its addresses but the loopback's (that would need
/// `route_localnet`, which opens the loopback to the network), and from guests (hairpin: translated back).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortForward {
    /// TCP or UDP.
    pub transport: Transport,
    /// The one address of this host that leads there; `None` for all of the family of `to`.
    pub listen: Option<IpAddr>,
    /// The ports here.
    pub ports: Ports,
    /// The guest's address.
    pub to: IpAddr,
    /// The first port there; the others follow.
    pub to_port: u16,
}

impl PortForward {
    /// What it takes of this host.
    #[must_use]
    pub fn takes(&self) -> Taken {
        let all = match self.to {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Taken {
            transport: self.transport,
            address: self.listen.unwrap_or(all),
            ports: self.ports,
        }
    }
}

/// What a guest may call itself: anything else that comes out of its link is dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sender {
    /// Its hardware address.
    #[serde(serialize_with = "crate::plan::as_text")]
    pub mac: Mac,
    /// Its addresses; IPv6 link-local ones and the unspecified address are always allowed, as neighbour discovery
    /// and duplicate detection need them.
    pub addresses: BTreeSet<IpAddr>,
}
