//! Names of DNS domains.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes of a name, and of each of its labels (RFC 1035).
const BYTES: usize = 253;
const LABEL_BYTES: usize = 63;

/// The name of a domain as a resolver takes it: labels of letters, digits, `-` and `_`, without a dot at the end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Domain(String);

/// Why a text is no [`Domain`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name of a domain, such as home.arpa")]
pub struct DomainError(String);

impl Domain {
    /// A name; one dot at its end is left out.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str) -> Result<Self, DomainError> {
        let bare = text.strip_suffix('.').unwrap_or(text);
        let plain = |label: &str| {
            (1..=LABEL_BYTES).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
        };
        if bare.len() <= BYTES && bare.split('.').all(plain) {
            Ok(Self(bare.to_owned()))
        } else {
            Err(DomainError(text.chars().take(64).collect()))
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Domain {
    type Error = DomainError;

    fn try_from(text: String) -> Result<Self, DomainError> {
        Self::parse(&text)
    }
}

impl From<Domain> for String {
    fn from(domain: Domain) -> Self {
        domain.0
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_is_labels_between_dots() {
        for good in [
            "local",
            "home.arpa",
            "_tcp.example",
            "a-b.c",
            "xn--mller-kva.example",
        ] {
            assert_eq!(Domain::parse(good).unwrap().as_str(), good);
        }
        assert_eq!(Domain::parse("home.arpa.").unwrap().as_str(), "home.arpa");
        let (label, name) = ("a".repeat(64), "a.".repeat(127) + "a");
        for bad in ["", ".", "a..b", ".a", "a b", "a\nb", "ü", "a/b", &label, &name] {
            assert!(Domain::parse(bad).is_err(), "{bad:?}");
        }
    }
}
