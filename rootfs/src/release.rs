//! A suite's Release file: is it the suite we asked for, is it current, what digests does it vouch for.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::{date, digest::is_sha256};

/// What a Release file vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Release {
    /// When it was made, in seconds since 1970.
    pub(crate) date: u64,
    files: BTreeMap<String, Vouched>,
}

/// Digest and length of a file of the suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vouched {
    pub(crate) sha256: String,
    /// In bytes.
    pub(crate) size: u64,
}

/// Why a signed Release file is not usable.
#[derive(Debug, Error)]
pub enum ReleaseError {
    /// A mirror answered with another suite.
    #[error("asked for suite {wanted}, the mirror's Release file is for {found:?}")]
    WrongSuite {
        /// The suite asked for.
        wanted: String,
        /// The code name in the file.
        found: String,
    },
    /// It is past its date: an attacker may be replaying it.
    #[error("Release file of {suite} has expired ({valid_until})")]
    Expired {
        /// The suite.
        suite: String,
        /// Its `Valid-Until`.
        valid_until: String,
    },
    /// It is older than one seen before.
    #[error("Release file of {suite} is older than one seen before ({date} < {seen}, seconds since 1970)")]
    Older {
        /// The suite.
        suite: String,
        /// Its date.
        date: u64,
        /// The newest date seen.
        seen: u64,
    },
    /// A field is absent or unreadable.
    #[error("Release file of {suite} has no usable {field}")]
    Field {
        /// The suite.
        suite: String,
        /// The field.
        field: &'static str,
    },
    /// It vouches for no such file.
    #[error("Release file of {suite} lists no {path}")]
    NotListed {
        /// The suite.
        suite: String,
        /// The file.
        path: String,
    },
}

impl Release {
    /// Reads a Release text whose signature was checked, for `suite` at `now` (seconds since 1970); `seen` is the
    /// newest date known from before.
    pub(crate) fn parse(suite: &str, text: &str, now: u64, seen: Option<u64>) -> Result<Self, ReleaseError> {
        let missing = |field| ReleaseError::Field {
            suite: suite.to_owned(),
            field,
        };
        let found = field(text, "Codename").ok_or_else(|| missing("Codename"))?;
        if found != suite {
            return Err(ReleaseError::WrongSuite {
                wanted: suite.to_owned(),
                found: found.to_owned(),
            });
        }
        let date = field(text, "Date")
            .and_then(date::parse)
            .ok_or_else(|| missing("Date"))?;
        if let Some(valid_until) = field(text, "Valid-Until") {
            let until = date::parse(valid_until).ok_or_else(|| missing("Valid-Until"))?;
            if until <= now {
                return Err(ReleaseError::Expired {
                    suite: suite.to_owned(),
                    valid_until: valid_until.to_owned(),
                });
            }
        }
        if let Some(seen) = seen.filter(|seen| date < *seen) {
            return Err(ReleaseError::Older {
                suite: suite.to_owned(),
                date,
                seen,
            });
        }
        Ok(Self {
            date,
            files: files(text),
        })
    }

    /// What it says about `path`, relative to the suite's directory.
    pub(crate) fn file(&self, suite: &str, path: &str) -> Result<&Vouched, ReleaseError> {
        let absent = || ReleaseError::NotListed {
            suite: suite.to_owned(),
            path: path.to_owned(),
        };
        self.files.get(path).ok_or_else(absent)
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

fn files(text: &str) -> BTreeMap<String, Vouched> {
    let list = text
        .lines()
        .skip_while(|line| line.trim_end() != "SHA256:")
        .skip(1);
    list.take_while(|line| line.starts_with(' '))
        .filter_map(file_line)
        .collect()
}

fn file_line(line: &str) -> Option<(String, Vouched)> {
    let mut words = line.split_whitespace();
    let sha256 = words.next().filter(|text| is_sha256(text))?.to_owned();
    let size = words.next()?.parse().ok()?;
    Some((words.next()?.to_owned(), Vouched { sha256, size }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_795_000_000;

    fn text() -> String {
        let digest = "ab".repeat(32);
        format!(
            "Origin: X\nCodename: trixie\nDate: Thu, 12 Nov 2026 00:00:00 UTC\nValid-Until: Fri, 27 Nov 2026 00:12:42 UTC\n\
             MD5Sum:\n d41d 1 main/a\nSHA256:\n {digest} 7 main/a\n zz 8 main/bad\nSHA512:\n {digest} 9 main/late\n"
        )
    }

    #[test]
    fn only_sha256_entries_count() {
        let release = Release::parse("trixie", &text(), NOW, None).unwrap();
        assert_eq!(release.file("trixie", "main/a").unwrap().size, 7);
        assert!(matches!(
            release.file("trixie", "main/bad"),
            Err(ReleaseError::NotListed { .. })
        ));
        assert!(matches!(
            release.file("trixie", "main/late"),
            Err(ReleaseError::NotListed { .. })
        ));
    }

    #[test]
    fn wrong_expired_replayed_and_incomplete_files_are_refused() {
        let parse = |suite, text: &str, now, seen| Release::parse(suite, text, now, seen).unwrap_err();
        assert!(matches!(
            parse("bookworm", &text(), NOW, None),
            ReleaseError::WrongSuite { .. }
        ));
        assert!(matches!(
            parse("trixie", &text(), NOW + 10_000_000, None),
            ReleaseError::Expired { .. }
        ));
        assert!(matches!(
            parse("trixie", &text(), NOW, Some(NOW)),
            ReleaseError::Older { .. }
        ));
        let undated = text().replace("Date: Thu,", "Date: Thu");
        assert!(matches!(
            parse("trixie", &undated, NOW, None),
            ReleaseError::Field { field: "Date", .. }
        ));
    }
}
