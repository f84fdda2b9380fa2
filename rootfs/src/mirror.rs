//! Where the archives are: the caller's word, else what this machine's apt uses, else debootstrap's default.
//!
//! No host name is built in. Integrity comes from signatures, so plain http is enough; an `https` entry of apt is
//! asked over http because this crate carries no TLS.

use std::{
    fs,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::Archive;

/// Longest configuration file that is read, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

/// Base addresses of the archives, without a trailing slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirrors {
    /// The distribution.
    pub main: String,
    /// Security updates.
    pub security: String,
}

/// Why no mirror is known.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// Nothing names one.
    #[error(
        "no Debian mirror known: set `[build] mirror = \"http://…/debian\"` in sovereign.toml (neither apt nor debootstrap of this machine names one)"
    )]
    Unknown,
    /// The caller's address cannot be used.
    #[error("mirror {address:?} is not of the form http://host/path")]
    BadAddress {
        /// The address.
        address: String,
    },
    /// The caller's snapshot service cannot be used.
    #[error("snapshot service {address:?} is not of the form http://host/path")]
    BadSnapshot {
        /// The address.
        address: String,
    },
}

impl Mirrors {
    /// The mirrors to use: `explicit`, else found below the system root `/`.
    ///
    /// # Errors
    /// When nothing names a mirror or `explicit` is not an http address.
    pub fn discover(explicit: Option<&str>) -> Result<Self, MirrorError> {
        if let Some(address) = explicit {
            let address = http_base(address).ok_or_else(|| MirrorError::BadAddress {
                address: address.to_owned(),
            })?;
            return Ok(Self {
                security: security_beside(&address),
                main: address,
            });
        }
        Self::below(Path::new("/")).ok_or(MirrorError::Unknown)
    }

    fn below(root: &Path) -> Option<Self> {
        let addresses: Vec<String> = apt_files(root)
            .iter()
            .flat_map(|path| apt_addresses(path))
            .collect();
        if let Some(mirrors) = choose(&addresses) {
            return Some(mirrors);
        }
        let scripts = sorted_files(&root.join("usr/share/debootstrap/scripts"));
        scripts
            .iter()
            .find_map(|path| choose(&debootstrap_addresses(&read_small(path)?)))
    }

    /// The base address of an archive.
    #[must_use]
    pub fn of(&self, archive: Archive) -> &str {
        match archive {
            Archive::Main => &self.main,
            Archive::Security => &self.security,
        }
    }
}

/// `address` without a trailing slash, when it is a plain http one.
pub(crate) fn http_base(address: &str) -> Option<String> {
    let address = address.trim_end_matches('/');
    let rest = address.strip_prefix("http://")?;
    (!rest.is_empty() && !rest.starts_with('/')).then(|| address.to_owned())
}

fn choose(addresses: &[String]) -> Option<Mirrors> {
    let usable: Vec<String> = addresses.iter().filter_map(|address| plain(address)).collect();
    let main = usable
        .iter()
        .find(|address| address.ends_with("/debian"))?
        .clone();
    let security = usable
        .iter()
        .find(|address| address.ends_with("/debian-security"));
    Some(Mirrors {
        security: security.cloned().unwrap_or_else(|| security_beside(&main)),
        main,
    })
}

fn plain(address: &str) -> Option<String> {
    let rest = address
        .strip_prefix("http://")
        .or_else(|| address.strip_prefix("https://"))?;
    Some(format!("http://{}", rest.trim_end_matches('/')))
}

/// The security archive on the host of a main archive.
fn security_beside(main: &str) -> String {
    let base = main.strip_suffix("/debian").unwrap_or(main);
    format!("{base}/debian-security")
}

fn apt_files(root: &Path) -> Vec<PathBuf> {
    let apt = root.join("etc/apt");
    let mut files = vec![apt.join("sources.list")];
    files.extend(sorted_files(&apt.join("sources.list.d")));
    files
}

fn sorted_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    files
}

fn read_small(path: &Path) -> Option<String> {
    let metadata = fs::metadata(path).ok()?;
    if metadata.is_file() && metadata.len() <= CONFIG_MAX {
        fs::read_to_string(path).ok()
    } else {
        None
    }
}

fn apt_addresses(path: &Path) -> Vec<String> {
    match (
        path.extension().and_then(|extension| extension.to_str()),
        read_small(path),
    ) {
        (Some("sources"), Some(text)) => deb822_addresses(&text),
        (Some("list"), Some(text)) => one_line_addresses(&text),
        _ => Vec::new(),
    }
}

/// The `URIs` of enabled `deb` stanzas of a `.sources` file.
fn deb822_addresses(text: &str) -> Vec<String> {
    let uncommented: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let stanzas = uncommented.split(|line| line.trim().is_empty());
    stanzas.flat_map(stanza_addresses).collect()
}

fn stanza_addresses(stanza: &[&str]) -> Vec<String> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in stanza {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = fields.last_mut() {
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.to_ascii_lowercase(), value.to_owned()));
        }
    }
    let words = |wanted: &str| -> Vec<String> {
        let values = fields.iter().filter(|(name, _)| name == wanted);
        values
            .flat_map(|(_, value)| value.split_whitespace().map(str::to_owned))
            .collect()
    };
    let disabled = words("enabled")
        .iter()
        .any(|word| word.eq_ignore_ascii_case("no"));
    if disabled || !words("types").iter().any(|word| word == "deb") {
        Vec::new()
    } else {
        words("uris")
    }
}

/// The addresses of the `deb` lines of a `.list` file.
fn one_line_addresses(text: &str) -> Vec<String> {
    text.lines().filter_map(one_line_address).collect()
}

fn one_line_address(line: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb")?;
    let rest = rest.starts_with([' ', '\t']).then(|| rest.trim_start())?;
    let rest = match rest.strip_prefix('[') {
        Some(options) => options.split_once(']')?.1.trim_start(),
        None => rest,
    };
    rest.split_whitespace().next().map(str::to_owned)
}

/// The addresses of `default_mirror` and `DEF_MIRROR=` lines of a debootstrap script.
fn debootstrap_addresses(text: &str) -> Vec<String> {
    let value = |line: &str| -> Option<String> {
        let line = line.trim();
        let value = line
            .strip_prefix("default_mirror ")
            .or_else(|| line.strip_prefix("DEF_MIRROR="))?;
        Some(value.trim().trim_matches(['"', '\'']).to_owned())
    };
    text.lines().filter_map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(main: &str, security: &str) -> Mirrors {
        Mirrors {
            main: main.to_owned(),
            security: security.to_owned(),
        }
    }

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn an_explicit_mirror_wins_and_must_be_http() {
        let found = Mirrors::discover(Some("http://m.example/debian/")).unwrap();
        assert_eq!(
            found,
            mirrors("http://m.example/debian", "http://m.example/debian-security")
        );
        for address in ["https://m.example/debian", "m.example", "http://", "file:///srv"] {
            assert!(
                matches!(
                    Mirrors::discover(Some(address)),
                    Err(MirrorError::BadAddress { .. })
                ),
                "{address}"
            );
        }
    }

    #[test]
    fn deb822_sources_are_read() {
        let text = "# a comment\nTypes: deb deb-src\nURIs: https://other.example/apt\nSuites: x\n\n\
            Enabled: no\nTypes: deb\nURIs: http://off.example/debian\n\n\
            Types: deb\n# http://comment.example/debian\nURIs:\n http://a.example/debian/\nSuites: trixie\n\n\
            Types: deb\nURIs: http://s.example/debian-security\nSuites: trixie-security\n";
        let root = root(&[("etc/apt/sources.list.d/debian.sources", text)]);
        assert_eq!(
            Mirrors::below(root.path()),
            Some(mirrors(
                "http://a.example/debian",
                "http://s.example/debian-security"
            ))
        );
    }

    #[test]
    fn one_line_sources_are_read() {
        let text = "# deb http://comment.example/debian x main\ndeb-src http://src.example/debian x main\n\
            deb [signed-by=/k arch=amd64] https://l.example/debian x main\n";
        let root = root(&[
            ("etc/apt/sources.list", text),
            ("etc/apt/sources.list.d/x.save", "deb http://z.example/debian x"),
        ]);
        assert_eq!(
            Mirrors::below(root.path()),
            Some(mirrors(
                "http://l.example/debian",
                "http://l.example/debian-security"
            ))
        );
    }

    #[test]
    fn debootstrap_is_the_last_resort() {
        let script = "default_mirror http://d.example/debian\nmirror_style release\n";
        let files = [
            ("usr/share/debootstrap/scripts/sid", script),
            ("etc/apt/sources.list", "deb http://u.example/ubuntu x main\n"),
        ];
        let found = Mirrors::below(root(&files).path());
        assert_eq!(
            found,
            Some(mirrors(
                "http://d.example/debian",
                "http://d.example/debian-security"
            ))
        );
        assert_eq!(Mirrors::below(root(&files[1..]).path()), None);
    }
}
