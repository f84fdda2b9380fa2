//! What is asked of an instance's network. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use serde::{Deserialize, Serialize};
use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

use crate::family::Family;
use crate::filter::PortForward;
use crate::names::LinkName;
use crate::uplink::{Uplink, Vpn};

/// Guests of one bridge, at most; the kernel's own limit is 1,023 ports.
pub const GUESTS: usize = 1_000;
/// The smallest MTU with which IPv6 works, and the largest of a TAP.
const MTU: std::ops::RangeInclusive<u32> = 1280..=65_521;
/// The MTU of a fresh Ethernet link.
pub const DEFAULT_MTU: u32 = 1500;

/// What is asked of an instance's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// Where its links are.
    pub place: Place,
    /// The host's own addresses on the bridge; none: guests reach each other only.
    pub addresses: BTreeSet<HostAddress>,
    /// Bytes of the largest packet on it.
    pub mtu: u32,
    /// The guests that have a network card, with the addresses that they may send from.
    pub guests: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// By which way guests leave.
    pub uplink: Uplink,
    /// What they do while a VPN is up.
    pub vpn: Vpn,
    /// Guests do not reach each other.
    pub isolated: bool,
    /// Ports of this host that lead to guests.
    pub forwards: BTreeSet<PortForward>,
    /// Name servers on this host's own loopback, which guests of a private namespace ask through what leads them out.
    pub resolvers: BTreeSet<IpAddr>,
}

/// Where the links of a network are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Place {
    /// In a namespace of our own: `lo` is ours to set up, and nobody else is to be met.
    #[default]
    Private,
    /// In the namespace that the host agent itself is in.
    Host,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            place: Place::default(),
            addresses: BTreeSet::new(),
            mtu: DEFAULT_MTU,
            guests: BTreeMap::new(),
            uplink: Uplink::None,
            vpn: Vpn::default(),
            isolated: false,
            forwards: BTreeSet::new(),
            resolvers: BTreeSet::new(),
        }
    }
}

impl NetworkSpec {
    /// Whether this host sends packets of guests on.
    #[must_use]
    pub fn routes(&self) -> bool {
        self.uplink != Uplink::None || !self.forwards.is_empty()
    }

    /// Whether a program has to lead guests out of a namespace of our own.
    #[must_use]
    pub fn is_led_out(&self) -> bool {
        self.place == Place::Private && self.uplink != Uplink::None
    }

    /// The families that guests have addresses of.
    #[must_use]
    pub fn families(&self) -> BTreeSet<Family> {
        self.addresses.iter().map(|a| Family::of(a.ip())).collect()
    }
}

/// Why no network can be made of a spec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WantedError {
    /// More guests than [`GUESTS`].
    #[error("{0} guests are too many for one bridge: the limit is {GUESTS}")]
    TooMany(usize),
    /// An MTU that links do not take.
    #[error("an MTU of {0} bytes does not work: use 1280 to 65521")]
    Mtu(u32),
    /// Two guests whose long names digest to the same: rename one.
    #[error("guests {0} and {1} would share the link {2}: rename one of them")]
    SameLink(Name, Name, LinkName),
    /// Two forwards of one port.
    #[error("two forwards want {} port {}: it leads to {} and to {}", .0.0.transport, .0.1.ports, .0.0.to, .0.1.to)]
    SamePort(Box<(PortForward, PortForward)>),
    /// Two addresses of one subnet.
    #[error("{0} and {1} are in one subnet")]
    SameSubnet(HostAddress, HostAddress),
}

pub(super) fn check(spec: &NetworkSpec) -> Result<(), WantedError> {
    if spec.guests.len() > GUESTS {
        return Err(WantedError::TooMany(spec.guests.len()));
    }
    if !MTU.contains(&spec.mtu) {
        return Err(WantedError::Mtu(spec.mtu));
    }
    let mut subnets = BTreeMap::new();
    for address in &spec.addresses {
        if let Some(other) = subnets.insert(address.subnet(), *address) {
            return Err(WantedError::SameSubnet(other, *address));
        }
    }
    for forward in &spec.forwards {
        let others = spec.forwards.range((Bound::Excluded(forward), Bound::Unbounded));
        let takes = forward.takes();
        if let Some(other) = others.into_iter().find(|other| takes.collides(other.takes())) {
            return Err(WantedError::SamePort(Box::new((forward.clone(), other.clone()))));
        }
    }
    Ok(())
}
