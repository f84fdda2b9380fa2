//! How one network interface is to be: the bridge and the TAPs of a host, the card of a guest, the loopback.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sovereign_protocol::interface::Prefix;

use crate::names::LinkName;

/// The name of the loopback in every network namespace.
pub const LOOPBACK: &str = "lo";

/// What an interface is to be. What is not said is left as it is, and so is what others put on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: LinkName,
    /// It is to be up; `false` leaves it as it is.
    pub up: bool,
    /// Bytes of its largest packet.
    pub mtu: Option<u32>,
    /// Its addresses; others that carry our mark go.
    pub addresses: BTreeSet<Prefix>,
    /// Where its default routes in the main table lead, one of a family; others that carry our mark go.
    pub gateways: BTreeSet<IpAddr>,
    /// The routes to its addresses' subnets, which the kernel makes with the addresses, are put back.
    pub connected: bool,
}

impl Interface {
    /// One that is left as it is, but for what carries our mark.
    #[must_use]
    pub fn bare(name: LinkName) -> Self {
        Self {
            name,
            up: false,
            mtu: None,
            addresses: BTreeSet::new(),
            gateways: BTreeSet::new(),
            connected: false,
        }
    }

    /// The loopback; the kernel gives it its addresses when it comes up, but nobody else puts them back. `ipv6`: this
    /// kernel speaks it, and it is not switched off.
    ///
    /// # Panics
    /// Never: these are a link's name and lengths of addresses.
    #[must_use]
    pub fn loopback(ipv6: bool) -> Self {
        let v4 = Prefix::new(Ipv4Addr::LOCALHOST.into(), 8);
        let v6 = Prefix::new(Ipv6Addr::LOCALHOST.into(), 128).filter(|_| ipv6);
        Self {
            up: true,
            addresses: v4.into_iter().chain(v6).collect(),
            ..Self::bare(LinkName::parse(LOOPBACK).expect("two letters are a name"))
        }
    }
}
