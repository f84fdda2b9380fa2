//! What should be there, computed from what somebody asked for. Pure.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;

use crate::names::{self, LinkName, Mac, Mark};

/// Guests of one bridge, at most.
pub const GUESTS: usize = 64;
/// The smallest MTU with which IPv6 works, and the largest of a TAP.
const MTU: std::ops::RangeInclusive<u32> = 1280..=65_521;
/// The MTU of a fresh Ethernet link.
pub const DEFAULT_MTU: u32 = 1500;

/// What is asked of an instance's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSpec {
    /// The host's own addresses on the bridge; none: guests reach each other only.
    pub addresses: BTreeSet<HostAddress>,
    /// Bytes of the largest packet on it.
    pub mtu: u32,
    /// The guests that have a network card.
    pub guests: BTreeSet<Name>,
}

impl Default for NetworkSpec {
    fn default() -> Self {
        Self {
            addresses: BTreeSet::new(),
            mtu: DEFAULT_MTU,
            guests: BTreeSet::new(),
        }
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
    /// Two addresses of one subnet.
    #[error("{0} and {1} are in one subnet")]
    SameSubnet(HostAddress, HostAddress),
}

/// The bridge of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: LinkName,
    /// Its pinned hardware address.
    pub mac: Mac,
    /// Its addresses.
    pub addresses: BTreeSet<HostAddress>,
}

/// The links, addresses and routes that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What ours carry.
    pub mark: Mark,
    /// Whether `lo` is ours to set up: in a private namespace only.
    pub loopback: bool,
    /// The MTU of all our links.
    pub mtu: u32,
    /// The bridge; `None` removes everything that carries the mark.
    pub bridge: Option<Bridge>,
    /// A TAP for each guest; each is a port of the bridge.
    pub taps: BTreeMap<LinkName, Name>,
}

impl Wanted {
    /// What a spec means in a private namespace.
    ///
    /// # Errors
    /// [`WantedError`].
    pub fn private(instance: &Name, spec: &NetworkSpec) -> Result<Self, WantedError> {
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
        let mut taps = BTreeMap::new();
        for guest in &spec.guests {
            let name = names::tap(instance, guest);
            if let Some(other) = taps.insert(name.clone(), guest.clone()) {
                return Err(WantedError::SameLink(other, guest.clone(), name));
            }
        }
        Ok(Self {
            mark: Mark::of(instance),
            loopback: true,
            mtu: spec.mtu,
            bridge: Some(Bridge {
                name: names::bridge(instance),
                mac: names::bridge_mac(instance),
                addresses: spec.addresses.clone(),
            }),
            taps,
        })
    }

    /// Nothing of an instance.
    #[must_use]
    pub fn nothing(instance: &Name) -> Self {
        Self {
            mark: Mark::of(instance),
            loopback: false,
            mtu: DEFAULT_MTU,
            bridge: None,
            taps: BTreeMap::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn spec(guests: usize) -> NetworkSpec {
        NetworkSpec {
            addresses: [HostAddress::parse("192.168.100.1/24").unwrap()].into(),
            guests: (0..guests).map(|n| name(&format!("g{n}"))).collect(),
            ..NetworkSpec::default()
        }
    }

    #[test]
    fn a_spec_becomes_a_bridge_and_taps() {
        let wanted = Wanted::private(&name("default"), &spec(GUESTS)).unwrap();
        assert_eq!(wanted.taps.len(), GUESTS);
        let bridge = wanted.bridge.unwrap();
        assert_eq!((bridge.name.as_str(), bridge.addresses.len()), ("sv5pkj", 1));
        assert!(Wanted::nothing(&name("default")).bridge.is_none());
    }

    #[test]
    fn limits_are_named() {
        let instance = name("default");
        let refused = |spec: &NetworkSpec| Wanted::private(&instance, spec).unwrap_err();
        assert_eq!(refused(&spec(GUESTS + 1)), WantedError::TooMany(GUESTS + 1));
        for mtu in [0, 1279, 65_522] {
            assert_eq!(refused(&NetworkSpec { mtu, ..spec(1) }), WantedError::Mtu(mtu));
        }
        let mut twice = spec(1);
        twice
            .addresses
            .insert(HostAddress::parse("192.168.100.9/24").unwrap());
        assert!(matches!(refused(&twice), WantedError::SameSubnet(..)));
    }
}
