//! The tables of nf_tables that enforce a [`Filter`](crate::filter::Filter), as values. Pure.
//!
//! A table reads back from the kernel as it was made: whoever speaks to the kernel decodes its dump into the same
//! [`Table`], and two tables that are equal do the same to every packet. So nothing needs to be remembered of what
//! was sent. What cannot be understood is kept as [`Expression::Unknown`] and the like, and is never equal to
//! anything wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

mod build;
mod difference;
mod expression;
mod matches;
mod senders;

pub use build::{FilterError, SHIFTED_PORTS, impossible, tables};
pub use difference::{Difference, differences};
pub use expression::{
    Base, Comparison, CtKey, Expression, MetaKey, NatFamily, NatKind, Refusal, Register, Verdict,
};
pub use senders::SENDER_ADDRESSES;

/// What packets a table sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// IPv4 and IPv6.
    Inet,
    /// ARP.
    Arp,
    /// Frames of a bridge.
    Bridge,
    /// Frames of a device.
    Netdev,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Ip,
        Self::Ip6,
        Self::Inet,
        Self::Arp,
        Self::Bridge,
        Self::Netdev,
    ];

    /// Its number in netlink (NFPROTO_*).
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Arp => 3,
            Self::Netdev => 5,
            Self::Bridge => 7,
            Self::Ip6 => 10,
        }
    }

    /// The family with a number.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.number() == number)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Inet => "inet",
            Self::Arp => "arp",
            Self::Bridge => "bridge",
            Self::Netdev => "netdev",
        })
    }
}

/// A table with all that is in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Table {
    /// What packets it sees.
    pub family: Family,
    /// Its name: the instance's tag.
    pub name: String,
    /// Its comment, which is our [`mark`].
    pub comment: String,
    /// Whether it works and is held as it should be; [`Standing::AsWanted`] in all that is wanted.
    pub standing: Standing,
    /// Objects in it that are not chains: sets, maps, counters. We make none.
    pub strangers: u32,
    /// Its chains by name.
    pub chains: BTreeMap<String, Chain>,
}

impl Table {
    /// A table of ours without chains.
    #[must_use]
    pub fn new(family: Family, tag: &str) -> Self {
        Self {
            family,
            name: tag.to_owned(),
            comment: mark(tag),
            standing: Standing::AsWanted,
            strangers: 0,
            chains: BTreeMap::new(),
        }
    }

    /// Its rules, of all chains.
    #[must_use]
    pub fn rules(&self) -> usize {
        self.chains.values().map(|chain| chain.rules.len()).sum()
    }
}

/// `inet sv5pkj`, as `nft` is told it.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

/// Whether a table works, and who may change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// It works, and only who should can change it.
    AsWanted,
    /// Somebody switched it off (`flags dormant`).
    Dormant,
    /// Everybody may change it, although it should be owned: its owner is gone, or it never had one.
    Unowned,
    /// It outlives its owner or has one, although it should be plain.
    Persistent,
    /// Another netlink socket owns it: its port.
    Held(u32),
    /// It has flags that we do not know.
    Unknown(u32),
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Chain {
    /// Where the kernel calls it; without it, other chains do.
    pub hook: Option<Hook>,
    /// Flags and devices that we do not set, as text; empty in all that is wanted.
    pub oddities: String,
    /// Its rules, in order.
    pub rules: Vec<Rule>,
}

impl Chain {
    /// A chain that the kernel calls; what no rule decides passes.
    #[must_use]
    pub fn at(kind: &str, point: Point, priority: i32) -> Self {
        Self {
            hook: Some(Hook {
                kind: kind.to_owned(),
                point,
                priority,
                policy: Policy::Accept,
            }),
            ..Self::default()
        }
    }

    /// Appends a rule.
    pub(crate) fn push<const N: usize>(&mut self, comment: impl Into<String>, parts: [Vec<Expression>; N]) {
        self.rules.push(Rule {
            comment: comment.into(),
            expressions: parts.into_iter().flatten().collect(),
        });
    }
}

/// Where, when and for what the kernel calls a chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hook {
    /// `filter`, `nat` or `route`.
    pub kind: String,
    /// Where on a packet's way.
    pub point: Point,
    /// Lower ones come first.
    pub priority: i32,
    /// What becomes of packets that no rule decided.
    pub policy: Policy,
}

/// A point on a packet's way; the numbers are the same for inet and bridge (NF_INET_*, NF_BR_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// As it comes in.
    Prerouting,
    /// On its way to a program here.
    Input,
    /// On its way through.
    Forward,
    /// From a program here.
    Output,
    /// As it leaves.
    Postrouting,
    /// Another one.
    Other(u32),
}

impl Point {
    const KNOWN: [Self; 5] = [
        Self::Prerouting,
        Self::Input,
        Self::Forward,
        Self::Output,
        Self::Postrouting,
    ];

    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Prerouting => 0,
            Self::Input => 1,
            Self::Forward => 2,
            Self::Output => 3,
            Self::Postrouting => 4,
            Self::Other(number) => number,
        }
    }

    /// The point with a number.
    #[must_use]
    pub fn of(number: u32) -> Self {
        let known = Self::KNOWN.into_iter().find(|point| point.number() == number);
        known.unwrap_or(Self::Other(number))
    }
}

/// What becomes of packets that no rule of a chain decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    /// They pass.
    Accept,
    /// They do not.
    Drop,
    /// Another verdict's number.
    Other(u32),
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// What `nft list` shows beside it; at most [`COMMENT_BYTES`].
    pub comment: String,
    /// What is done with a packet, from the first on, until one of them decides or does not match.
    pub expressions: Vec<Expression>,
}

/// The longest comment of a rule (`nft` takes 128).
pub const COMMENT_BYTES: usize = 127;

/// The comment of our tables, by which they are known: `sovereign sv5pkj v1`.
#[must_use]
pub fn mark(tag: &str) -> String {
    format!("sovereign {tag} v1")
}

/// The tag in the comment of a table of ours, of any version; `None` for other people's tables.
#[must_use]
pub fn marked(comment: &str) -> Option<&str> {
    let (tag, version) = comment.strip_prefix("sovereign ")?.split_once(" v")?;
    let is_version = (1..=9).contains(&version.len()) && version.bytes().all(|b| b.is_ascii_digit());
    (is_version && !tag.is_empty() && !tag.contains(' ')).then_some(tag)
}

/// All tables of an instance.
pub type Tables = BTreeSet<Table>;

#[cfg(test)]
mod tests;
