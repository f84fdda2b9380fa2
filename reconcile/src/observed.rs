//! What is there: links, addresses and routes of one namespace, as values.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;

use crate::names::{LinkName, Mac};
use crate::route::Route;
use crate::rule::Rule;
use crate::sysctl::Sysctl;

/// What a link is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Kind {
    /// `lo`.
    Loopback,
    /// A bridge.
    Bridge,
    /// A TAP.
    Tap,
    /// Anything else.
    Other,
}

/// A link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its number: never used again soon, unlike a name.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its device group.
    pub group: u32,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it was set up.
    pub up: bool,
    /// Whether it has carrier; of a TAP: whether a process holds it.
    pub carrier: bool,
    /// The bridge it is a port of.
    pub controller: Option<u32>,
    /// It is a port that reaches the bridge and no other such port.
    #[serde(default)]
    pub isolated: bool,
}

/// An address on a link.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Address {
    /// The link.
    pub link: u32,
    /// The address.
    pub ip: IpAddr,
    /// The length of its subnet in bits.
    pub prefix: u8,
    /// Whether it carries our mark.
    pub ours: bool,
    /// Who opens a connection without choosing an address does not get this one, or not for long: it is secondary,
    /// temporary, deprecated, not checked yet, or not for beyond the link.
    #[serde(default)]
    pub passed_over: bool,
}

/// The state of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Observed {
    /// All links by index.
    pub links: BTreeMap<u32, Link>,
    /// All addresses.
    pub addresses: BTreeSet<Address>,
    /// Routes that matter.
    pub routes: BTreeSet<Route>,
    /// Rules that matter.
    #[serde(default)]
    pub rules: BTreeSet<Rule>,
    /// Switches that somebody asked for, those that there are.
    #[serde(default, with = "pairs")]
    pub sysctls: BTreeMap<Sysctl, i64>,
}

/// JSON has no keys but texts: a map of switches is a list of pairs there.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serializer};

    use crate::sysctl::Sysctl;

    pub(super) fn serialize<S: Serializer>(map: &BTreeMap<Sysctl, i64>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(map)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<BTreeMap<Sysctl, i64>, D::Error> {
        Ok(Vec::deserialize(from)?.into_iter().collect())
    }
}

impl Address {
    /// The address with its subnet; `None` for a length that its family does not have.
    #[must_use]
    pub fn place(&self) -> Option<Prefix> {
        Prefix::new(self.ip, self.prefix)
    }
}

impl Observed {
    /// A namespace that was just made: `lo`, down.
    #[must_use]
    pub fn fresh() -> Self {
        let lo = Link {
            index: 1,
            name: "lo".to_owned(),
            kind: Kind::Loopback,
            group: 0,
            mac: None,
            mtu: 65_536,
            up: false,
            carrier: false,
            controller: None,
            isolated: false,
        };
        Self {
            links: BTreeMap::from([(lo.index, lo)]),
            ..Self::default()
        }
    }

    /// The link of this name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.values().find(|link| link.name == name)
    }

    /// The addresses of a link.
    pub fn addresses_of(&self, link: u32) -> impl Iterator<Item = &Address> {
        let first = Address {
            link,
            ip: Ipv4Addr::UNSPECIFIED.into(),
            prefix: 0,
            ours: false,
            passed_over: false,
        };
        self.addresses.range(first..).take_while(move |a| a.link == link)
    }

    /// Takes a link out, with what is on it and its switches.
    pub fn remove_link(&mut self, index: u32) {
        let link = self.links.remove(&index);
        let of_it = |of: &LinkName| link.as_ref().is_some_and(|link| link.name == of.as_str());
        self.sysctls.retain(|sysctl, _| !sysctl.link().is_some_and(of_it));
        self.addresses.retain(|address| address.link != index);
        self.routes.retain(|route| route.link != Some(index));
    }

    /// Takes an address out, whatever mark it carries.
    pub fn remove_address(&mut self, gone: &Address) {
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (gone.link, gone.ip, gone.prefix);
        self.addresses.retain(|address| !same(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_goes_whatever_its_mark_and_no_other_does() {
        let address = |link, ip: &str, prefix, ours| Address {
            link,
            ip: ip.parse().unwrap(),
            prefix,
            ours,
            passed_over: false,
        };
        let all = [
            address(2, "10.0.0.1", 24, true),
            address(2, "10.0.0.1", 16, true),
            address(2, "10.0.0.2", 24, true),
            address(3, "10.0.0.1", 24, true),
        ];
        let mut seen = Observed {
            addresses: all.iter().cloned().collect(),
            ..Observed::default()
        };
        seen.remove_address(&address(2, "10.0.0.1", 24, false));
        assert_eq!(seen.addresses, all[1..].iter().cloned().collect());
    }
}
