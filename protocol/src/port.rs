//! Ports of a transport protocol, single ones and ranges.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The protocols that have ports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// Its number in the IP header (IANA, "Protocol Numbers").
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// One port or several that follow each other; none is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

/// Why a text is no [`Ports`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no port: write it as 8080, or as 5000-5010 for a range")]
pub struct PortsError(String);

impl Ports {
    /// One port; `None` for 0.
    #[must_use]
    pub fn one(port: u16) -> Option<Self> {
        Self::range(port, port)
    }

    /// All from `first` to `last`; `None` when that is empty or has port 0.
    #[must_use]
    pub fn range(first: u16, last: u16) -> Option<Self> {
        (first > 0 && first <= last).then_some(Self { first, last })
    }

    /// Parses `8080` or `5000-5010`.
    ///
    /// # Errors
    /// [`PortsError`], which names the accepted form.
    pub fn parse(text: &str) -> Result<Self, PortsError> {
        let number = |text: &str| text.parse::<u16>().ok();
        let ports = match text.split_once('-') {
            None => number(text).and_then(Self::one),
            Some((first, last)) => number(first)
                .zip(number(last))
                .and_then(|(first, last)| Self::range(first, last)),
        };
        ports.ok_or_else(|| PortsError(text.to_owned()))
    }

    /// The first.
    #[must_use]
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last.
    #[must_use]
    pub fn last(self) -> u16 {
        self.last
    }

    /// How many they are, less one.
    #[must_use]
    pub fn span(self) -> u16 {
        self.last - self.first
    }

    /// Whether a port is in both.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// As many ports from `first` on; `None` when they do not fit.
    #[must_use]
    pub fn moved_to(self, first: u16) -> Option<Self> {
        Self::range(first, first.checked_add(self.span())?)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.span() {
            0 => write!(f, "{}", self.first),
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// What a listener or a forward takes of a host: ports of one transport at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// TCP or UDP.
    pub transport: Transport,
    /// The address; the unspecified one is all of its family, and of that family only.
    pub address: IpAddr,
    /// The ports there.
    pub ports: Ports,
}

impl Taken {
    /// Whether a packet could be meant for both.
    #[must_use]
    pub fn collides(self, other: Self) -> bool {
        let all = self.address.is_unspecified() || other.address.is_unspecified();
        let same_family = self.address.is_ipv4() == other.address.is_ipv4();
        let address = self.address == other.address || (all && same_family);
        address && self.transport == other.transport && self.ports.overlaps(other.ports)
    }
}

impl TryFrom<String> for Ports {
    type Error = PortsError;

    fn try_from(text: String) -> Result<Self, PortsError> {
        Self::parse(&text)
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> Self {
        ports.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_read_back_as_written() {
        for text in ["1", "65535", "5000-5010"] {
            assert_eq!(Ports::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Ports::parse("7-7").unwrap().to_string(), "7");
        for bad in ["", "0", "65536", "9-8", "0-3", "a", "1-2-3", "-1", "1-"] {
            assert!(Ports::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_overlap_and_move_as_wholes() {
        let ports = |text| Ports::parse(text).unwrap();
        assert!(ports("5-9").overlaps(ports("9")));
        assert!(!ports("5-9").overlaps(ports("10-12")));
        assert_eq!(ports("5000-5010").moved_to(80), Some(ports("80-90")));
        assert_eq!(ports("5000-5010").moved_to(65_530), None);
        assert_eq!(ports("5-9").moved_to(0), None);
        assert_eq!((Transport::Tcp.number(), Transport::Udp.number()), (6, 17));
    }
    #[test]
    fn what_is_taken_collides_where_a_packet_could_mean_both() {
        use Transport::{Tcp, Udp};
        let taken = |transport, address: &str, ports| Taken {
            transport,
            address: address.parse().unwrap(),
            ports: Ports::parse(ports).unwrap(),
        };
        let all = taken(Tcp, "0.0.0.0", "8080-8090");
        assert!(all.collides(taken(Tcp, "0.0.0.0", "8090")));
        assert!(all.collides(taken(Tcp, "10.0.0.5", "8080")));
        assert!(taken(Tcp, "10.0.0.5", "8080").collides(all));
        assert!(!all.collides(taken(Udp, "0.0.0.0", "8080")));
        assert!(!all.collides(taken(Tcp, "0.0.0.0", "8091")));
        assert!(!all.collides(taken(Tcp, "::", "8080")), "another family");
        let at = |address| taken(Tcp, address, "80");
        assert!(!at("10.0.0.5").collides(at("10.0.0.6")));
        assert!(at("10.0.0.5").collides(at("10.0.0.5")));
    }
}
