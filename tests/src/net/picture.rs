//! What an independent observer sees: `ip`, `nsenter` and /proc.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::all_processes;

/// What `ip -json` says of a namespace.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    links: Vec<Value>,
    /// Destination and device.
    routes: Vec<(String, String)>,
}

impl Picture {
    pub(super) fn of(pid: u32) -> Result<Self> {
        let json = |line: &str| -> Result<Vec<Value>> { Ok(serde_json::from_str(&inside(pid, line)?)?) };
        let links = json("ip -json -details address show")?;
        Ok(Self {
            links: links.iter().map(lasting).collect(),
            routes: json("ip -json -4 route show table main")?
                .iter()
                .chain(&json("ip -json -6 route show table main")?)
                .map(|route| (text(&route["dst"]), text(&route["dev"])))
                .collect(),
        })
    }

    /// A link by its name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Value> {
        self.links.iter().find(|link| link["ifname"] == name)
    }

    /// The names of all links.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.links
            .iter()
            .filter_map(|link| link["ifname"].as_str())
            .collect()
    }

    /// The global addresses of a link, with their prefixes.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Vec<String> {
        let all = self.link(name).and_then(|link| link["addresses"].as_array());
        let shown = |a: &Value| format!("{}/{}", text(&a["ip"]), a["prefix"]);
        all.into_iter().flatten().map(shown).collect()
    }

    /// The destinations of the main table that lead to a link.
    #[must_use]
    pub fn routes(&self, name: &str) -> Vec<&str> {
        let of = self.routes.iter().filter(|(_, dev)| dev == name);
        of.map(|(destination, _)| destination.as_str()).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A link without what moves by itself: timers, carrier, addresses that the kernel makes.
fn lasting(link: &Value) -> Value {
    let mut kept = serde_json::Map::new();
    for key in ["ifindex", "ifname", "mtu", "group", "master", "address"] {
        kept.insert(key.to_owned(), link[key].clone());
    }
    let info = &link["linkinfo"];
    kept.insert("kind".to_owned(), info["info_kind"].clone());
    if info["info_kind"] == "tun" {
        kept.insert("tun".to_owned(), info["info_data"].clone());
    }
    let flags = link["flags"].as_array().into_iter().flatten();
    kept.insert("up".to_owned(), flags.into_iter().any(|flag| flag == "UP").into());
    let addresses = link["addr_info"].as_array().into_iter().flatten();
    let addresses: Vec<Value> = addresses
        .filter(|a| a["scope"] == "global")
        .map(|a| serde_json::json!({"ip": a["local"], "prefix": a["prefixlen"], "label": a["label"]}))
        .collect();
    kept.insert("addresses".to_owned(), addresses.into());
    kept.into()
}

/// Runs a command line in the network namespace of a process, as root.
///
/// # Errors
/// With what it said, when it failed.
pub fn inside(pid: u32, line: &str) -> Result<String> {
    let target = pid.to_string();
    let output = Command::new("nsenter")
        .args(["--target", &target, "--net", "--", "sh", "-c", line])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {} {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The number of a process's network namespace.
///
/// # Errors
/// When there is no such process.
pub fn namespace_of(pid: u32) -> Result<String> {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/net"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Processes that are in a network namespace or hold a descriptor of it.
#[must_use]
pub fn holders(namespace: &str) -> Vec<u32> {
    let points = |path: PathBuf| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy() == namespace);
    let holds = |pid: u32| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
        descriptors
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| points(entry.path()))
    };
    let is_in = |pid: u32| points(format!("/proc/{pid}/ns/net").into());
    all_processes()
        .into_iter()
        .filter(|pid| is_in(*pid) || holds(*pid))
        .collect()
}
