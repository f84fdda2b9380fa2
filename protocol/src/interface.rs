//! How a guest's network interface is to be: addresses, way out, name servers.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::domain::Domain;
use crate::limits::{ADDRESSES, NAME_SERVERS, SEARCH};
use crate::one_or_more;
use crate::ways::Ways;

/// Smallest and largest MTU that is accepted, in bytes; 1280 is what IPv6 needs.
pub const MTU: std::ops::RangeInclusive<u32> = 1280..=65_535;

/// An address and the length of its network's prefix, written as `192.168.100.2/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

/// Why a text is no [`Prefix`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no address with prefix length, such as 192.168.100.2/24 or fd00::2/64")]
pub struct PrefixError(String);

impl Prefix {
    /// An address in a network; `None` when the length is over 32, or over 128 for IPv6.
    #[must_use]
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let most = if address.is_ipv4() { 32 } else { 128 };
        (length <= most).then_some(Self { address, length })
    }

    /// The address.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The length of the network's prefix, in bits.
    #[must_use]
    pub fn length(&self) -> u8 {
        self.length
    }

    /// The network: the address without the bits beyond the prefix.
    #[must_use]
    pub fn network(&self) -> Self {
        let cut = |bits: u32| bits - u32::from(self.length);
        let address = match self.address {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(cut(32)).unwrap_or(0);
                IpAddr::from((u32::from(ip) & mask).to_be_bytes())
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(cut(128)).unwrap_or(0);
                IpAddr::from((u128::from(ip) & mask).to_be_bytes())
            }
        };
        Self {
            address,
            length: self.length,
        }
    }

    /// True when `other` is in the same network.
    #[must_use]
    pub fn contains(&self, other: IpAddr) -> bool {
        let same = |own: u128, other: u128, bits: u32| {
            let rest = bits - u32::from(self.length);
            (own ^ other).checked_shr(rest).unwrap_or(0) == 0
        };
        match (self.address, other) {
            (IpAddr::V4(own), IpAddr::V4(other)) => same(u32::from(own).into(), u32::from(other).into(), 32),
            (IpAddr::V6(own), IpAddr::V6(other)) => same(own.into(), other.into(), 128),
            _ => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let parse = || {
            let (address, length) = text.split_once('/')?;
            let plain = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
            let length = length.parse().ok().filter(|_| plain)?;
            Self::new(address.parse().ok()?, length)
        };
        parse().ok_or_else(|| PrefixError(text.chars().take(64).collect()))
    }
}

impl TryFrom<String> for Prefix {
    type Error = PrefixError;

    fn try_from(text: String) -> Result<Self, PrefixError> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

/// A guest's network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceSpec {
    /// Its own addresses, at most [`ADDRESSES`].
    pub addresses: Vec<Prefix>,
    /// Where everything else goes, one of each family; a neighbour in one of the addresses' networks.
    #[serde(default, rename = "gateway", with = "one_or_more")]
    pub gateways: Vec<IpAddr>,
    /// Name servers, at most [`NAME_SERVERS`].
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    /// Domains in which names without a dot are looked for, at most [`SEARCH`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<Domain>,
    /// Largest packet in bytes, within [`MTU`]; the driver's own without it.
    #[serde(default)]
    pub mtu: Option<u32>,
    /// Which way its packets leave the host: the host agent says it, and nobody asks for it.
    #[serde(default, skip_serializing_if = "Ways::is_empty")]
    pub ways: Ways,
}

impl InterfaceSpec {
    /// The first contradiction: the key below `interface`, and the problem.
    ///
    /// # Errors
    /// See above.
    pub fn check(&self) -> Result<(), (String, String)> {
        let wrong = |key: String, problem: String| Err((key, problem));
        if self.addresses.is_empty() || self.addresses.len() > ADDRESSES {
            let problem = format!(
                "{} addresses; 1 to {ADDRESSES} are accepted",
                self.addresses.len()
            );
            return wrong("addresses".into(), problem);
        }
        for (index, prefix) in self.addresses.iter().enumerate() {
            let key = || format!("addresses[{index}]");
            if let Some(problem) = unusable(prefix) {
                return wrong(key(), format!("{prefix} {problem}"));
            }
            if self.addresses[..index]
                .iter()
                .any(|a| a.address == prefix.address)
            {
                return wrong(key(), format!("{} is there twice", prefix.address));
            }
        }
        one_or_more::one_of_each_family(self.gateways.iter().copied())
            .map_err(|problem| ("gateway".to_owned(), problem))?;
        for gateway in self.gateways.iter().copied() {
            if self.addresses.iter().any(|prefix| prefix.address == gateway) {
                return wrong("gateway".into(), format!("{gateway} is the guest itself"));
            }
            if !self.addresses.iter().any(|prefix| prefix.contains(gateway)) {
                let problem = format!("{gateway} is in none of the addresses' networks");
                return wrong("gateway".into(), problem);
            }
        }
        if self.dns.len() > NAME_SERVERS {
            let problem = format!(
                "{} name servers; the resolver reads {NAME_SERVERS}",
                self.dns.len()
            );
            return wrong("dns".into(), problem);
        }
        if let Some(server) = self.dns.iter().find(|s| s.is_unspecified() || s.is_multicast()) {
            return wrong("dns".into(), format!("{server} is no address of a server"));
        }
        if self.search.len() > SEARCH {
            let problem = format!("{} domains; {SEARCH} are searched", self.search.len());
            return wrong("search".into(), problem);
        }
        match self.mtu {
            Some(mtu) if !MTU.contains(&mtu) => wrong(
                "mtu".into(),
                format!("{mtu} is not from {} to {}", MTU.start(), MTU.end()),
            ),
            _ => Ok(()),
        }
    }
}

/// Why an address cannot be a guest's own.
fn unusable(prefix: &Prefix) -> Option<&'static str> {
    let address = prefix.address;
    if address.is_unspecified() || address.is_multicast() || prefix.length == 0 {
        return Some("is no address of one host");
    }
    if address.is_loopback() {
        return Some("belongs to the loopback");
    }
    let IpAddr::V4(v4) = address else { return None };
    let host = u32::from(v4) & u32::MAX.checked_shr(prefix.length.into()).unwrap_or(0);
    let edge = host == 0 || host == u32::MAX.checked_shr(prefix.length.into()).unwrap_or(0);
    (v4.is_broadcast() || (prefix.length < 31 && edge)).then_some("is the network or its broadcast")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    fn spec(addresses: &[&str], gateway: Option<&str>) -> InterfaceSpec {
        InterfaceSpec {
            addresses: addresses.iter().map(|text| prefix(text)).collect(),
            gateways: gateway.into_iter().map(|text| text.parse().unwrap()).collect(),
            ..InterfaceSpec::default()
        }
    }

    #[test]
    fn a_prefix_is_an_address_and_a_length() {
        assert_eq!(prefix("192.168.100.2/24").to_string(), "192.168.100.2/24");
        assert_eq!(prefix("fd00::2/64").length(), 64);
        for wrong in [
            "",
            "1.2.3.4",
            "1.2.3.4/33",
            "1.2.3.4/",
            "1.2.3.4/+8",
            "::/129",
            "1.2.3/8",
            "a/8",
        ] {
            assert!(wrong.parse::<Prefix>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_holds_its_neighbours_only() {
        let own = prefix("10.1.2.3/23");
        assert!(own.contains("10.1.3.255".parse().unwrap()));
        assert!(!own.contains("10.1.4.0".parse().unwrap()));
        assert!(!own.contains("::ffff:10.1.2.4".parse().unwrap()));
        assert!(prefix("fd00::1/64").contains("fd00::ffff".parse().unwrap()));
        assert!(!prefix("fd00::1/64").contains("fd00:0:0:1::1".parse().unwrap()));
        for (own, network) in [
            ("10.1.3.3/23", "10.1.2.0/23"),
            ("1.2.3.4/32", "1.2.3.4/32"),
            ("1.2.3.4/0", "0.0.0.0/0"),
            ("fd00::1:2/64", "fd00::/64"),
            ("fd00::1/0", "::/0"),
        ] {
            assert_eq!(prefix(own).network(), prefix(network));
        }
        assert!(prefix("1.2.3.4/32").contains("1.2.3.4".parse().unwrap()));
        assert!(!prefix("1.2.3.4/32").contains("1.2.3.5".parse().unwrap()));
    }

    #[test]
    fn contradictions_are_named_with_their_key() {
        let two = |gateways: [&str; 2]| InterfaceSpec {
            gateways: gateways.map(|text| text.parse().unwrap()).into(),
            ..spec(&["10.0.0.2/24", "fd00::2/64"], None)
        };
        assert_eq!(two(["10.0.0.1", "fd00::1"]).check(), Ok(()));
        let cases: [(InterfaceSpec, &str); 15] = [
            (two(["10.0.0.1", "10.0.0.3"]), "gateway"),
            (two(["10.0.0.1", "fd01::1"]), "gateway"),
            (
                InterfaceSpec {
                    search: vec![Domain::parse("a.example").unwrap(); SEARCH + 1],
                    ..spec(&["10.0.0.2/24"], None)
                },
                "search",
            ),
            (spec(&[], None), "addresses"),
            (spec(&["10.0.0.2/24", "10.0.0.2/16"], None), "addresses[1]"),
            (spec(&["10.0.0.0/24"], None), "addresses[0]"),
            (spec(&["10.0.0.255/24"], None), "addresses[0]"),
            (spec(&["127.0.0.2/8"], None), "addresses[0]"),
            (spec(&["224.0.0.1/8"], None), "addresses[0]"),
            (spec(&["10.0.0.2/0"], None), "addresses[0]"),
            (spec(&["10.0.0.2/24"], Some("10.0.1.1")), "gateway"),
            (spec(&["10.0.0.2/24"], Some("10.0.0.2")), "gateway"),
            (
                InterfaceSpec {
                    dns: vec!["1.1.1.1".parse().unwrap(); 4],
                    ..spec(&["10.0.0.2/24"], None)
                },
                "dns",
            ),
            (
                InterfaceSpec {
                    dns: vec!["0.0.0.0".parse().unwrap()],
                    ..spec(&["10.0.0.2/24"], None)
                },
                "dns",
            ),
            (
                InterfaceSpec {
                    mtu: Some(576),
                    ..spec(&["10.0.0.2/24"], None)
                },
                "mtu",
            ),
        ];
        for (spec, key) in cases {
            assert_eq!(spec.check().unwrap_err().0, key, "{spec:?}");
        }
        let good = ["10.0.0.2/24", "10.9.9.9/32", "10.8.8.0/31", "fd00::/64"];
        assert_eq!(spec(&good, Some("10.0.0.1")).check(), Ok(()));

        let many: Vec<String> = (2..=ADDRESSES + 2).map(|n| format!("10.0.0.{n}/24")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(spec(&many[1..], None).check(), Ok(()));
        assert_eq!(spec(&many, None).check().unwrap_err().0, "addresses");
        let mut servers = spec(&["10.0.0.2/24"], None);
        servers.dns = vec!["1.1.1.1".parse().unwrap(); NAME_SERVERS];
        assert_eq!(servers.check(), Ok(()));
    }

    proptest! {
        #[test]
        fn a_prefix_survives_its_text(address: IpAddr, length in 0u8..=128) {
            if let Some(own) = Prefix::new(address, length) {
                prop_assert_eq!(prefix(&own.to_string()), own);
                prop_assert!(own.contains(address) && own.contains(own.network().address()));
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<Prefix>();
        }
    }
}
