//! What is in the way and not ours, so that it is left alone and told.

use std::fmt;

use serde::Serialize;
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::subnet::Subnet;

use crate::names::LinkName;
use crate::observed::{Address, Observed};

/// A part of a network that works or not without the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Links and addresses: that guests reach this host.
    Links,
    /// Routes, rules and switches: that they reach others.
    Routing,
    /// What is filtered and translated.
    Filter,
}

impl Part {
    /// All.
    pub const ALL: [Self; 3] = [Self::Links, Self::Routing, Self::Filter];
}

/// Something foreign in the place of something of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// The part that it stops.
    pub part: Part,
    /// What it is about, such as `link sv5pkj`.
    pub on: String,
    /// What is wrong.
    pub evidence: String,
}

/// A subnet that another link of this host is in as well: an address of ours there would cut the host off from it.
#[must_use]
pub fn in_use(observed: &Observed, bridge: &LinkName, subnet: Subnet) -> Option<Conflict> {
    let other = |a: &&Address| {
        let link = observed.links.get(&a.link);
        let theirs = Prefix::new(a.ip, a.prefix);
        link.is_some_and(|link| link.name != bridge.as_str())
            && (subnet.contains(a.ip) || theirs.is_some_and(|theirs| theirs.contains(subnet.network())))
    };
    let address = observed.addresses.iter().find(other)?;
    let link = observed.links.get(&address.link)?;
    Some(Conflict {
        part: Part::Links,
        on: format!("subnet {subnet}"),
        evidence: format!(
            "link {} has {}/{} in it: choose another [network] address",
            link.name.escape_debug(),
            address.ip,
            address.prefix
        ),
    })
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: conflict, {}", self.on, self.evidence)
    }
}
