//! The file as written: every key that may stand in it, and nothing about what it means.

use std::collections::BTreeMap;

use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    #[serde(default)]
    pub(super) build: Build,
    #[serde(default)]
    pub(super) network: Network,
    #[serde(default)]
    pub(super) guest: BTreeMap<String, Guest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Network {
    pub(super) namespace: Option<String>,
    pub(super) address: Option<OneOrMore>,
    pub(super) uplink: Option<OneOrMore>,
    pub(super) vpn: Option<String>,
    #[serde(default)]
    pub(super) dns: Vec<String>,
    #[serde(default)]
    pub(super) search: Vec<String>,
    pub(super) mtu: Option<i64>,
    pub(super) isolated: Option<bool>,
}

/// One word, or a list of them.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    pub(super) fn words(&self) -> Vec<&str> {
        match self {
            Self::One(word) => vec![word],
            Self::More(words) => words.iter().map(String::as_str).collect(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Build {
    pub(super) mirror: Option<String>,
    pub(super) snapshot: Option<String>,
    pub(super) recipe: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Guest {
    pub(super) memory: Option<String>,
    pub(super) vcpus: Option<i64>,
    pub(super) data: Option<String>,
    pub(super) address: Option<OneOrMore>,
    #[serde(default)]
    pub(super) dns: Vec<String>,
    pub(super) restart: Option<String>,
    pub(super) restart_wedged: Option<bool>,
    pub(super) tailscale: Option<Tailscale>,
    #[serde(default)]
    pub(super) service: BTreeMap<String, Service>,
    #[serde(default)]
    pub(super) forward: Vec<Forward>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Service {
    pub(super) kind: String,
    pub(super) port: Option<i64>,
    pub(super) requires: Option<String>,
    pub(super) limits: Option<Limits>,
    #[serde(default)]
    pub(super) settings: BTreeMap<String, toml::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Limits {
    pub(super) memory: Option<String>,
    pub(super) cpu: Option<String>,
    pub(super) tasks: Option<i64>,
}

/// A table without keys: that it is there says it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tailscale {}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Forward {
    pub(super) name: String,
    pub(super) service: Option<String>,
    pub(super) listen: String,
    pub(super) port: Option<i64>,
    pub(super) via: Option<String>,
    pub(super) protocol: Option<String>,
}
