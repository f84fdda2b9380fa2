//! Names that are safe in paths, socket names, host names and terminals.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::limits::NAME_CHARS;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a name: use 1 to {NAME_CHARS} of a-z, 0-9 and '-', starting with a letter")]
pub struct NameError {
    text: String,
}

/// A name of a guest, service or instance: `[a-z][a-z0-9-]{0,31}`, not ending in `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Parses a name.
    ///
    /// # Errors
    /// [`NameError`] when the text has another form.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let first = text.chars().next().is_some_and(|c| c.is_ascii_lowercase());
        let rest = text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if first && rest && text.len() <= NAME_CHARS && !text.ends_with('-') {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError {
                text: text.chars().take(2 * NAME_CHARS).collect(),
            })
        }
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::parse(&text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl std::str::FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_safe_names_parse() {
        for good in ["a", "sql", "forge-2", &"x".repeat(32)] {
            assert_eq!(Name::parse(good).map(|n| n.to_string()), Ok(good.to_owned()));
        }
        for bad in [
            "",
            "2a",
            "Sql",
            "a/b",
            "..",
            "a-",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(33),
        ] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(Name::parse("sql").unwrap().as_str(), "sql");
        let shown = Name::parse(&"x".repeat(1_000)).unwrap_err().text;
        assert_eq!(
            shown.len(),
            2 * NAME_CHARS,
            "a hostile text does not fill the message"
        );
    }
}
