//! The kernel's switches that guests need.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::family::Family;
use crate::names::LinkName;

/// A switch. The order is that in which they are set: an uplink goes on taking router advertisements only if it was
/// told so before the host became a router.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sysctl {
    /// How strictly the sender of a packet is checked on a link: 0 not, 1 strictly, 2 loosely. The kernel takes the
    /// larger of this and the one for all links.
    ReversePath(LinkName),
    /// Whether our bridge takes router advertisements: 0, as only guests could send them.
    GuestAdvertisements(LinkName),
    /// Whether a link takes router advertisements: 2 also while this host is a router.
    AcceptAdvertisements(LinkName),
    /// Whether this host sends IPv4 packets on.
    ForwardV4,
    /// Whether this host sends IPv6 packets on.
    ForwardV6,
}

impl Sysctl {
    /// Its file under `/proc/sys/net`.
    #[must_use]
    pub fn file(&self) -> String {
        match self {
            Self::ReversePath(link) => format!("ipv4/conf/{link}/rp_filter"),
            Self::GuestAdvertisements(link) | Self::AcceptAdvertisements(link) => {
                format!("ipv6/conf/{link}/accept_ra")
            }
            Self::ForwardV4 => "ipv4/ip_forward".to_owned(),
            Self::ForwardV6 => "ipv6/conf/all/forwarding".to_owned(),
        }
    }

    /// What it is on a link that was just made, unless somebody changed the kernel's defaults.
    #[must_use]
    pub fn fresh(&self) -> i64 {
        match self {
            Self::GuestAdvertisements(_) | Self::AcceptAdvertisements(_) => 1,
            Self::ReversePath(_) | Self::ForwardV4 | Self::ForwardV6 => 0,
        }
    }

    /// The one family that it is about.
    #[must_use]
    pub fn family(&self) -> Family {
        match self {
            Self::ReversePath(_) | Self::ForwardV4 => Family::V4,
            Self::GuestAdvertisements(_) | Self::AcceptAdvertisements(_) | Self::ForwardV6 => Family::V6,
        }
    }

    /// The link that it is of, and goes with.
    #[must_use]
    pub fn link(&self) -> Option<&LinkName> {
        match self {
            Self::ReversePath(link) | Self::GuestAdvertisements(link) | Self::AcceptAdvertisements(link) => {
                Some(link)
            }
            Self::ForwardV4 | Self::ForwardV6 => None,
        }
    }

    /// Whether it goes with a link of ours, so that nothing is to be put back.
    #[must_use]
    pub fn goes_with_our_link(&self) -> bool {
        matches!(self, Self::ReversePath(_) | Self::GuestAdvertisements(_))
    }
}

impl fmt::Display for Sysctl {
    /// As the program `sysctl` writes it; dots of a link's name are written as slashes there.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file();
        let swapped = file.chars().map(|c| match c {
            '/' => '.',
            '.' => '/',
            other => other,
        });
        write!(f, "net.{}", swapped.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_names_are_those_of_the_kernel() {
        let link = |name| LinkName::parse(name).unwrap();
        let vlan = Sysctl::AcceptAdvertisements(link("eth0.7"));
        assert_eq!(vlan.file(), "ipv6/conf/eth0.7/accept_ra");
        assert_eq!(vlan.to_string(), "net.ipv6.conf.eth0/7.accept_ra");
        let bridge = Sysctl::GuestAdvertisements(link("sv5pkj"));
        assert_eq!(bridge.file(), "ipv6/conf/sv5pkj/accept_ra");
        assert!(bridge.goes_with_our_link() && bridge < Sysctl::ForwardV6);
        assert_eq!(Sysctl::ForwardV4.to_string(), "net.ipv4.ip_forward");
        assert!(vlan < Sysctl::ForwardV6, "set before the host becomes a router");
        assert!(Sysctl::ReversePath(link("sv5pkj")).goes_with_our_link() && !vlan.goes_with_our_link());
    }
}
