//! Which way out of the host packets of a guest take now, as numbers that only ever are equal or not.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What an agent announces in its handshake that understands [`Ways`] in documents, and with them a search list and a gateway
/// of each family. Others refuse a document with a key that they do not know, so they are told nothing of these.
pub const CAPABILITY: &str = "ways";

/// A number for each family that has a way out, which counts up each time that the way is another one.
///
/// The host agent keeps it on disk: its restart changes nothing, and a move while no agent ran is counted afterwards.
/// A family without a number says nothing: who heard one before keeps it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ways {
    /// Of IPv4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v4: Option<u64>,
    /// Of IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub v6: Option<u64>,
}

impl Ways {
    /// Whether nothing is said of any family.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What concerns somebody with these addresses.
    #[must_use]
    pub fn of(self, addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut ways = Self::default();
        for address in addresses {
            match address {
                IpAddr::V4(_) => ways.v4 = self.v4,
                IpAddr::V6(_) => ways.v6 = self.v6,
            }
        }
        ways
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_that_nobody_has_is_nobodys_concern() {
        let ways = Ways {
            v4: Some(1),
            v6: Some(2),
        };
        let of = |addresses: &[&str]| ways.of(addresses.iter().map(|text| text.parse().unwrap()));
        assert!(of(&[]).is_empty());
        assert_eq!(
            of(&["10.0.0.1", "10.0.0.2"]),
            Ways {
                v4: Some(1),
                v6: None
            }
        );
        assert_eq!(of(&["fd00::1", "10.0.0.2"]), ways);
    }

    #[test]
    fn what_is_not_known_is_not_written() {
        assert_eq!(serde_json::to_string(&Ways::default()).unwrap(), "{}");
        let one = Ways {
            v4: None,
            v6: Some(7),
        };
        assert_eq!(serde_json::to_string(&one).unwrap(), r#"{"v6":7}"#);
        assert_eq!(serde_json::from_str::<Ways>(r#"{"v6":7}"#).unwrap(), one);
        assert!(serde_json::from_str::<Ways>(r#"{"v8":7}"#).is_err());
    }
}
