//! All that software can have configured in a namespace, as lines that are equal when it is.

use std::fmt;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use super::Space;

/// Lines in their order; each begins with what it is of: `link`, `address`, `rule4`, `rule6`, `route4`, `route6`,
/// `iptables-legacy`, `ip6tables-legacy`, `iptables-nft`, `ip6tables-nft`, `nft` or `sysctl`.
///
/// Counters, handles and lifetimes are not in it, nor the link-local addresses and routes that the kernel makes by
/// itself: they come when duplicate detection is done.
#[derive(Clone, PartialEq, Eq)]
pub struct State(pub Vec<String>);

impl State {
    /// What is only here, with `-`, and what is only there, with `+`; empty when both are the same.
    #[must_use]
    pub fn difference(&self, later: &Self) -> Vec<String> {
        if self == later {
            return Vec::new();
        }
        let gone = self
            .0
            .iter()
            .filter(|line| !later.0.contains(line))
            .map(|line| format!("-{line}"));
        let new = later
            .0
            .iter()
            .filter(|line| !self.0.contains(line))
            .map(|line| format!("+{line}"));
        let mut all: Vec<String> = gone.chain(new).collect();
        if all.is_empty() {
            all.push("the same lines in another order or number".to_owned());
        }
        all
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl Space {
    /// Everything that `is_ours` does not say of its line.
    ///
    /// # Errors
    /// When a program fails.
    pub fn foreign_state(&self, is_ours: impl Fn(&str) -> bool) -> Result<State> {
        let mut lines = Vec::new();
        links(&self.ip_json("-details address show")?, &mut lines);
        for (kind, line) in [
            ("rule4", "ip -4 -N -details rule show"),
            ("rule6", "ip -6 -N -details rule show"),
            ("route4", "ip -4 -N -details route show table all"),
            ("route6", "ip -6 -N -details route show table all"),
        ] {
            let said = self.sh(line)?;
            let made = said.lines().map(lasting).filter(|line| !is_link_local(line));
            lines.extend(made.map(|line| format!("{kind} {line}")));
        }
        for program in [
            "iptables-legacy",
            "ip6tables-legacy",
            "iptables-nft",
            "ip6tables-nft",
        ] {
            chains(program, &self.sh(&format!("{program}-save"))?, &mut lines);
        }
        nft(
            &serde_json::from_str(&self.sh("nft -j list ruleset")?)?,
            &mut lines,
        );
        self.enter(|| sysctls(Path::new("/proc/sys/net"), &mut lines))?;
        lines.retain(|line| !is_ours(line));
        Ok(State(lines))
    }
}

fn links(shown: &[Value], lines: &mut Vec<String>) {
    for link in shown {
        let name = link["ifname"].as_str().unwrap_or_default();
        let mut line = format!("link {name}");
        for key in ["ifindex", "mtu", "group", "master", "address", "ifalias"] {
            line += &format!(" {key}={}", link[key]);
        }
        let up = link["flags"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|flag| flag == "UP");
        lines.push(format!("{line} kind={} up={up}", link["linkinfo"]["info_kind"]));
        let addresses = link["addr_info"].as_array().into_iter().flatten();
        for address in addresses.filter(|address| address["scope"] != "link") {
            let mut line = format!("address {name}");
            for key in ["local", "prefixlen", "scope", "label", "metric", "protocol"] {
                line += &format!(" {key}={}", address[key]);
            }
            lines.push(line);
        }
    }
}

/// Whether a route's destination is so; a type may stand before it.
fn is_link_local(line: &str) -> bool {
    let begin = line.split(' ').take(2);
    let mut known = begin.map(|word| word.starts_with("fe80:") || word == "ff00::/8");
    known.any(|known| known)
}

/// A line of `ip` without lifetimes.
fn lasting(line: &str) -> String {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    while let Some(at) = words.iter().position(|word| *word == "expires") {
        words.drain(at..words.len().min(at + 2));
    }
    words.join(" ")
}

fn chains(program: &str, save: &str, lines: &mut Vec<String>) {
    let mut table = "";
    for line in save.lines() {
        match line.split_at_checked(1) {
            Some(("*", name)) => table = name,
            Some((":", _)) => {
                let chain = line.split(" [").next().unwrap_or(line);
                lines.push(format!("{program} {table} {chain}"));
            }
            Some(("-", _)) => lines.push(format!("{program} {table} {line}")),
            _ => {} // comments, COMMIT
        }
    }
}

fn nft(ruleset: &Value, lines: &mut Vec<String>) {
    for object in ruleset["nftables"].as_array().into_iter().flatten() {
        if object.get("metainfo").is_none() {
            let mut object = object.clone();
            forget(&mut object);
            lines.push(format!("nft {object}"));
        }
    }
}

fn forget(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for key in ["handle", "packets", "bytes"] {
                map.remove(key);
            }
            map.values_mut().for_each(forget);
        }
        Value::Array(values) => values.iter_mut().for_each(forget),
        _ => {}
    }
}

/// Sysctls that stand still; what cannot be read is a secret or a button.
fn sysctls(dir: &Path, lines: &mut Vec<String>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir).into_iter().flatten().flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for path in entries.iter().map(std::fs::DirEntry::path) {
        if path.is_dir() {
            sysctls(&path, lines);
        } else if !path.ends_with("nf_conntrack_count") {
            let Ok(value) = std::fs::read_to_string(&path) else {
                continue;
            };
            let name = path.strip_prefix("/proc/sys").unwrap_or(&path).display();
            lines.push(format!("sysctl {name} {}", value.trim()));
        }
    }
}
