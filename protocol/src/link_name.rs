//! Names of network links.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a link's name (IFNAMSIZ without its final zero).
pub const LINK_NAME_BYTES: usize = 15;
/// The name of a link: 1 to 15 bytes that the kernel and every tool take as they are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkName(String);

impl LinkName {
    /// A name, if it is one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let fits = (1..=LINK_NAME_BYTES).contains(&text.len());
        let plain = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        (fits && plain && text != "." && text != "..").then(|| Self(text.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as `struct ifreq` has it.
    #[must_use]
    pub fn padded(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..self.0.len()].copy_from_slice(self.0.as_bytes());
        bytes
    }
}

/// Why a text is no [`LinkName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a link")]
pub struct LinkNameError(String);

impl TryFrom<String> for LinkName {
    type Error = LinkNameError;

    fn try_from(text: String) -> Result<Self, LinkNameError> {
        Self::parse(&text).ok_or(LinkNameError(text))
    }
}

impl From<LinkName> for String {
    fn from(name: LinkName) -> Self {
        name.0
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_its_text() {
        let link = LinkName::try_from("sv5pkj".to_owned()).unwrap();
        assert_eq!(String::from(link), "sv5pkj");
        assert!(LinkName::try_from("a name with spaces".to_owned()).is_err());
    }

    #[test]
    fn only_plain_link_names_parse() {
        for good in ["lo", "eth0.1", "svabcd-sql", "fifteen-bytes-x"] {
            assert!(LinkName::parse(good).is_some(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "sixteen-bytes-xx", "ä", "a\n"] {
            assert!(LinkName::parse(bad).is_none(), "{bad:?}");
        }
        let longest = LinkName::parse("fifteen-bytes-x").unwrap();
        assert_eq!(&longest.padded(), b"fifteen-bytes-x\0");
    }
}
