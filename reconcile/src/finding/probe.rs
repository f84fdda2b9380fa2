//! Where the kernel would send a packet, and which rule decided that.
//!
//! No packet is sent: RTM_GETROUTE is a question. The kernel's answer names the table; the rule follows from the rules that
//! are there: the first, in their order, that is about the packet and looks into that table. Rules before it were asked
//! and had no answer.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::route::{Route, RouteKind};
use crate::rule::{Rule, RuleAction};

/// Which packets a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// From a guest to elsewhere.
    Out,
    /// From elsewhere to a guest: answers, and connections to forwarded ports.
    In,
    /// From this host to a guest.
    Host,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Question {
    /// Of which family.
    pub family: Family,
    /// Which packets it is about.
    pub way: Way,
    /// Who sends; `None` for this host.
    pub from: Option<IpAddr>,
    /// Who shall get it.
    pub to: IpAddr,
    /// The link that it comes by; `None` for this host.
    pub iif: Option<String>,
}

/// The kernel's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It would be sent on.
    Sent {
        /// The table that knows.
        table: u32,
        /// The route's destination, where the kernel tells (RTM_F_FIB_MATCH).
        route: Option<Prefix>,
        /// The link.
        link: Option<String>,
        /// The next hop.
        gateway: Option<IpAddr>,
        /// Bytes of the largest packet by this route, where it is told.
        mtu: Option<u32>,
    },
    /// It is taken for this host's own, or for everybody.
    Local {
        /// The table that knows.
        table: u32,
    },
    /// It would not be sent.
    Refused(Refused),
}

/// Why a packet would not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refused {
    /// ENETUNREACH: no rule has an answer, or one says so.
    Unreachable,
    /// EHOSTUNREACH: a route says so, or this host does not forward what comes by that link.
    NotForwarded,
    /// EACCES: a rule or route prohibits it.
    Prohibited,
    /// EINVAL: a rule or route drops it, or it cannot have come from there; kernels of 2025 and later say this for a
    /// strict `rp_filter` as well.
    Dropped,
    /// EXDEV: an answer to its sender would leave by another link, and `rp_filter` is strict there.
    WrongLink,
    /// Another error number.
    Error(i32),
}

impl Refused {
    /// What an error number of a question means (net/ipv4/route.c, fib_frontend.c; net/ipv6/route.c).
    #[must_use]
    pub fn of(errno: i32) -> Self {
        match errno {
            101 => Self::Unreachable,
            113 => Self::NotForwarded,
            13 => Self::Prohibited,
            22 => Self::Dropped,
            18 => Self::WrongLink,
            other => Self::Error(other),
        }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable => f.write_str("unreachable"),
            Self::NotForwarded => f.write_str("host unreachable: not forwarded"),
            Self::Prohibited => f.write_str("prohibited"),
            Self::Dropped => {
                f.write_str("dropped, by a rule or route or because it cannot have come from there")
            }
            Self::WrongLink => {
                f.write_str("dropped: an answer would leave by another link (strict rp_filter)")
            }
            Self::Error(number) => write!(f, "error {number}"),
        }
    }
}

/// The rule that decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decided {
    /// The rule.
    pub rule: Rule,
    /// Nothing before it can have decided: all conditions are known.
    pub surely: bool,
}

/// A question with its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The question.
    pub question: Question,
    /// The answer.
    pub reply: Reply,
    /// The rule that decided; `None` where none did, or where it cannot be told.
    pub decided: Option<Decided>,
    /// All of it in one line, as `ip route get` is asked.
    pub text: String,
}

impl Probe {
    /// Works out the rule. `rules` in the order in which the kernel asks them; `routes` as they matter; `uid` of whoever
    /// sends, for packets of this host.
    #[must_use]
    pub fn of(question: Question, reply: Reply, rules: &[Rule], routes: &[&Route], uid: u32) -> Self {
        let decided = decide(&question, &reply, rules, routes, uid);
        let text = text(&question, &reply, decided.as_ref());
        Self {
            question,
            reply,
            decided,
            text,
        }
    }

    /// The link that the packet would leave by.
    #[must_use]
    pub fn link(&self) -> Option<&str> {
        match &self.reply {
            Reply::Sent { link, .. } => link.as_deref(),
            Reply::Local { .. } | Reply::Refused(_) => None,
        }
    }
}

/// Whether a rule is about a packet; `None` when it has conditions that are not known.
#[must_use]
pub fn is_about(rule: &Rule, question: &Question, uid: u32) -> Option<bool> {
    let within = |prefix: Option<Prefix>, ip: Option<IpAddr>| {
        prefix.is_none_or(|prefix| ip.is_some_and(|ip| prefix.contains(ip)))
    };
    let iif = question.iif.as_deref().unwrap_or("lo");
    // The kernel asks for forwarded packets as its own user.
    let uid = if question.iif.is_some() { 0 } else { uid };
    let known = rule.family == question.family
        && within(rule.from, question.from)
        && within(rule.to, Some(question.to))
        && rule.iif.as_deref().is_none_or(|name| name == iif)
        && rule.mark.is_none_or(|(mark, mask)| mark & mask == 0)
        && rule
            .uids
            .is_none_or(|(first, last)| (first..=last).contains(&uid));
    // What else a rule asks may also turn it round ("not"): then nothing is known of it.
    match (rule.narrower, rule.family == question.family) {
        (_, false) => Some(false),
        (false, true) => Some(known),
        (true, true) => None,
    }
}

fn decide(
    question: &Question,
    reply: &Reply,
    rules: &[Rule],
    routes: &[&Route],
    uid: u32,
) -> Option<Decided> {
    let is_it = |rule: &Rule| match reply {
        Reply::Sent { table, .. } | Reply::Local { table } => rule.action == RuleAction::Lookup(*table),
        Reply::Refused(Refused::WrongLink | Refused::NotForwarded) => false, // no rule's doing
        Reply::Refused(refused) => match rule.action {
            RuleAction::Unreachable => *refused == Refused::Unreachable,
            RuleAction::Other => *refused != Refused::Unreachable,
            RuleAction::Lookup(table) => refuses(routes, table, question.to),
        },
    };
    let mut perhaps = None;
    for rule in rules.iter().filter(|rule| is_it(rule)) {
        match is_about(rule, question, uid) {
            Some(true) => {
                let surely = perhaps.is_none();
                return Some(Decided {
                    rule: rule.clone(),
                    surely,
                });
            }
            None => drop(perhaps.get_or_insert(rule)),
            Some(false) => {}
        }
    }
    perhaps.map(|rule| Decided {
        rule: rule.clone(),
        surely: false,
    })
}

/// Whether a table has a route that refuses.
fn refuses(routes: &[&Route], table: u32, to: IpAddr) -> bool {
    let is_so =
        |route: &&&Route| route.table == table && route.kind == RouteKind::Other && route.to.contains(to);
    routes.iter().any(|route| is_so(&route))
}

/// A rule as `ip rule` shows it.
#[must_use]
pub fn shown(rule: &Rule) -> String {
    let text = rule.to_string();
    let (priority, rest) = text.split_once(':').unwrap_or((&text, ""));
    let from = if rule.from.is_none() { " from all" } else { "" };
    let more = if rule.narrower {
        " (and more conditions)"
    } else {
        ""
    };
    let rest = rest
        .replace(" lookup 254", " lookup main")
        .replace(" lookup 255", " lookup local");
    format!("{priority}:{from}{rest}{more}")
}

fn text(question: &Question, reply: &Reply, decided: Option<&Decided>) -> String {
    let mut text = format!("ip route get {}", question.to);
    if let Some(from) = question.from {
        text += &format!(" from {from}");
    }
    if let Some(iif) = &question.iif {
        text += &format!(" iif {}", iif.escape_debug());
    }
    text += ": ";
    match reply {
        Reply::Sent {
            table,
            route,
            link,
            gateway,
            mtu,
        } => {
            text += &match route {
                Some(route) if route.length() == 0 => "default".to_owned(),
                Some(route) => route.to_string(),
                None => question.to.to_string(),
            };
            text += &gateway.map_or_else(String::new, |gateway| format!(" via {gateway}"));
            let link = link.as_deref().unwrap_or("a link that is gone");
            text += &format!(" dev {} table {}", link.escape_debug(), table_name(*table));
            text += &mtu.map_or_else(String::new, |mtu| format!(" mtu {mtu}"));
        }
        Reply::Local { table } => text += &format!("this host itself, table {}", table_name(*table)),
        Reply::Refused(refused) => text += &refused.to_string(),
    }
    match decided {
        Some(Decided { rule, surely: true }) => text += &format!(", by rule {}", shown(rule)),
        Some(Decided { rule, .. }) => text += &format!(", perhaps by rule {}", shown(rule)),
        None => {}
    }
    text
}

fn table_name(table: u32) -> String {
    match table {
        crate::route::MAIN => "main".to_owned(),
        255 => "local".to_owned(),
        other => other.to_string(),
    }
}
