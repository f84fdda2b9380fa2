//! Subnets of guests, and addresses in them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::interface::Prefix;

/// Why a text is no subnet, or an address not in one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Not of the form address/prefix.
    #[error("{0:?} is not a subnet: write it as 192.168.100.0/24 or fd00:1234::/64")]
    Form(String),
    /// No room for two hosts, or no prefix of the family.
    #[error("{0}/{1}: the prefix must be 1 to 30 (IPv4) or 1 to 126 (IPv6)")]
    Prefix(IpAddr, u8),
    /// Bits beyond the prefix are set.
    #[error("{0}/{1} is an address in a subnet: its subnet is {2}")]
    HostBits(IpAddr, u8, Subnet),
    /// Loopback, multicast and the like.
    #[error("{0}/{1} is not for hosts: use a private range such as 192.168.100.0/24")]
    Reserved(IpAddr, u8),
    /// Another subnet's, or the network or broadcast address of this one.
    #[error("{0} is no host's address in {1}")]
    NotAHost(IpAddr, Subnet),
}

/// A range of addresses for hosts: `192.168.100.0/24`. Written with no bit beyond its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: IpAddr,
    prefix: u8,
}

/// A host's address together with its subnet's prefix: `192.168.100.1/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostAddress {
    ip: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// Parses a subnet.
    ///
    /// # Errors
    /// [`SubnetError`], which names the accepted form.
    pub fn parse(text: &str) -> Result<Self, SubnetError> {
        let (ip, prefix) = split(text)?;
        let subnet = Self::around(ip, prefix)?;
        if subnet.network != ip {
            return Err(SubnetError::HostBits(ip, prefix, subnet));
        }
        Ok(subnet)
    }

    fn around(ip: IpAddr, prefix: u8) -> Result<Self, SubnetError> {
        let longest = if ip.is_ipv4() { 30 } else { 126 };
        if !(1..=longest).contains(&prefix) {
            return Err(SubnetError::Prefix(ip, prefix));
        }
        let subnet = Self {
            network: masked(ip, prefix),
            prefix,
        };
        if is_reserved(ip) || is_reserved(subnet.network) {
            return Err(SubnetError::Reserved(ip, prefix));
        }
        Ok(subnet)
    }

    /// Its first address.
    #[must_use]
    pub fn network(&self) -> IpAddr {
        self.network
    }

    /// Its length in bits.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether an address is in it.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.network.is_ipv4() && masked(ip, self.prefix) == self.network
    }

    /// The host's own address in it: the first after the network's.
    #[must_use]
    pub fn first(&self) -> HostAddress {
        let ip = match self.network {
            IpAddr::V4(ip) => IpAddr::V4(Ipv4Addr::from(u32::from(ip) | 1)),
            IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) | 1)),
        };
        HostAddress {
            ip,
            prefix: self.prefix,
        }
    }

    /// A host's address in it.
    ///
    /// # Errors
    /// [`SubnetError::NotAHost`].
    pub fn host(&self, ip: IpAddr) -> Result<HostAddress, SubnetError> {
        if !self.contains(ip) || ip == self.network || Some(ip) == self.broadcast() {
            return Err(SubnetError::NotAHost(ip, *self));
        }
        Ok(HostAddress {
            ip,
            prefix: self.prefix,
        })
    }

    /// The broadcast address, which IPv6 has not.
    #[must_use]
    pub fn broadcast(&self) -> Option<IpAddr> {
        match self.network {
            IpAddr::V4(ip) => Some(IpAddr::V4(Ipv4Addr::from(
                u32::from(ip) | u32::MAX >> self.prefix,
            ))),
            IpAddr::V6(_) => None,
        }
    }
}

impl From<Subnet> for Prefix {
    /// # Panics
    /// Never: its length is one of its family.
    fn from(subnet: Subnet) -> Self {
        Self::new(subnet.network, subnet.prefix).expect("a subnet's length is one of its family")
    }
}

impl From<HostAddress> for Prefix {
    /// # Panics
    /// Never: its length is one of its family.
    fn from(address: HostAddress) -> Self {
        Self::new(address.ip, address.prefix).expect("a subnet's length is one of its family")
    }
}

impl HostAddress {
    /// Parses an address with its prefix.
    ///
    /// # Errors
    /// [`SubnetError`].
    pub fn parse(text: &str) -> Result<Self, SubnetError> {
        let (ip, prefix) = split(text)?;
        Self::new(ip, prefix)
    }

    /// An address in the subnet around it.
    ///
    /// # Errors
    /// [`SubnetError`].
    pub fn new(ip: IpAddr, prefix: u8) -> Result<Self, SubnetError> {
        Subnet::around(ip, prefix)?.host(ip)
    }

    /// The address.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        self.ip
    }

    /// The length of its subnet in bits.
    #[must_use]
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The subnet it is in.
    #[must_use]
    pub fn subnet(&self) -> Subnet {
        Subnet {
            network: masked(self.ip, self.prefix),
            prefix: self.prefix,
        }
    }
}

fn split(text: &str) -> Result<(IpAddr, u8), SubnetError> {
    let form = || SubnetError::Form(text.chars().take(64).collect());
    let (ip, prefix) = text.split_once('/').ok_or_else(form)?;
    let digits = (1..=3).contains(&prefix.len()) && prefix.bytes().all(|b| b.is_ascii_digit());
    match (ip.parse(), prefix.parse()) {
        (Ok(ip), Ok(prefix)) if digits => Ok((ip, prefix)),
        _ => Err(form()),
    }
}

fn masked(ip: IpAddr, prefix: u8) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(ip) & mask))
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(prefix.min(128)))
                .unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(ip) & mask))
        }
    }
}

/// Addresses that the kernel takes for something else than hosts of a subnet.
fn is_reserved(ip: IpAddr) -> bool {
    ip.is_loopback()
        || ip.is_multicast()
        || ip.is_unspecified()
        || match ip {
            IpAddr::V4(ip) => matches!(ip.octets()[0], 0 | 127 | 240..),
            IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some() || ip.is_unicast_link_local(),
        }
}

macro_rules! as_text {
    ($type:ident, $address:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.$address, self.prefix)
            }
        }

        impl TryFrom<String> for $type {
            type Error = SubnetError;

            fn try_from(text: String) -> Result<Self, SubnetError> {
                Self::parse(&text)
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }

        impl std::str::FromStr for $type {
            type Err = SubnetError;

            fn from_str(text: &str) -> Result<Self, SubnetError> {
                Self::parse(text)
            }
        }
    };
}

as_text!(Subnet, network);
as_text!(HostAddress, ip);

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        Subnet::parse(text).unwrap()
    }

    #[test]
    fn subnets_are_read_as_they_are_written() {
        for good in ["192.168.100.0/24", "10.0.0.0/8", "192.168.1.4/30", "fd00:1::/64"] {
            assert_eq!(subnet(good).to_string(), good);
        }
        let cases = [
            ("192.168.100.0", "write it as"),
            ("192.168.100.0/", "write it as"),
            ("192.168.100.0/+24", "write it as"),
            ("192.168.100.0/1000", "write it as"),
            ("192.168.100/24", "write it as"),
            ("", "write it as"),
            ("192.168.100.0/31", "prefix"),
            ("192.168.100.0/0", "prefix"),
            ("fd00::/127", "prefix"),
            ("192.168.100.1/24", "its subnet is 192.168.100.0/24"),
            ("fd00::1/64", "its subnet is fd00::/64"),
            ("fd00:1:2:3:4::/40", "its subnet is fd00:1::/40"),
            ("10.1.2.3/12", "its subnet is 10.0.0.0/12"),
            ("127.0.0.0/8", "not for hosts"),
            ("224.0.0.0/8", "not for hosts"),
            ("0.0.0.0/8", "not for hosts"),
            ("96.0.0.0/1", "not for hosts"),
            ("255.0.0.0/8", "not for hosts"),
            ("fe80::/64", "not for hosts"),
            ("::ffff:10.0.0.0/120", "not for hosts"),
        ];
        for (bad, says) in cases {
            let error = Subnet::parse(bad).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    #[test]
    fn addresses_are_hosts_of_their_subnet() {
        let net = subnet("192.168.100.0/24");
        assert_eq!(net.first().to_string(), "192.168.100.1/24");
        assert_eq!(subnet("fd00:1::/64").first().to_string(), "fd00:1::1/64");
        let guest = net.host([192, 168, 100, 2].into()).unwrap();
        assert_eq!(
            (guest.to_string().as_str(), guest.subnet()),
            ("192.168.100.2/24", net)
        );
        for bad in ["192.168.100.0", "192.168.100.255", "192.168.101.1", "fd00::1"] {
            assert!(net.host(bad.parse().unwrap()).is_err(), "{bad}");
        }
        assert_eq!(
            HostAddress::parse("10.1.2.3/8").unwrap().subnet(),
            subnet("10.0.0.0/8")
        );
        assert!(HostAddress::parse("10.0.0.0/8").is_err());
        assert!(HostAddress::parse("127.0.0.1/8").is_err());
        assert_eq!(net.broadcast(), Some([192, 168, 100, 255].into()));
        assert_eq!((net.prefix(), guest.prefix()), (24, 24));
        assert_eq!(subnet("fd00::/64").broadcast(), None);
    }

    #[test]
    fn json_is_the_text() {
        let net = subnet("10.0.0.0/8");
        assert_eq!(serde_json::to_string(&net).unwrap(), "\"10.0.0.0/8\"");
        assert_eq!(serde_json::from_str::<Subnet>("\"10.0.0.0/8\"").unwrap(), net);
        assert!(serde_json::from_str::<HostAddress>("\"10.0.0.0/8\"").is_err());
    }
}
