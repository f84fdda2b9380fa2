//! The chains and jumps that a filter means, and what iptables cannot do of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;
use sovereign_protocol::port::Ports;
use sovereign_protocol::subnet::Subnet;

use super::{CHAIN_BYTES, Rule, Table};
use crate::answers::MASK;
use crate::filter::{Filter, PortForward, WayOut};
use crate::names::LinkName;

/// The two programs, one for each version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// `iptables`.
    V4,
    /// `ip6tables`.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    fn has(self, ip: IpAddr) -> bool {
        ip.is_ipv4() == (self == Self::V4)
    }

    fn loopback(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.0/8",
            Self::V6 => "::1/128",
        }
    }

    /// "Administratively prohibited": says more than the closed port of the default.
    fn refusal(self) -> &'static str {
        match self {
            Self::V4 => "icmp-admin-prohibited",
            Self::V6 => "icmp6-adm-prohibited",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Where a jump into a chain of ours stands: before every foreign rule of a chain that is not ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hook {
    /// In the vendor's `oem_fwd` where FORWARD leads there first, as on Android, else in FORWARD itself.
    Forward,
    /// FORWARD of the table mangle.
    MangleForward,
    /// What came from elsewhere.
    Prerouting,
    /// PREROUTING of the table mangle.
    ManglePrerouting,
    /// What leaves.
    Postrouting,
    /// What this host sends.
    Output,
}

/// A rule that leads from a chain that is not ours into one of ours.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Jump {
    /// Its table.
    pub table: Table,
    /// Where it stands.
    pub hook: Hook,
    /// The rule.
    pub rule: Rule,
}

/// All that is ours in the tables of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wanted {
    /// What the names of our chains begin with, and the comment of each rule.
    pub tag: String,
    /// Our chains and all their rules.
    pub chains: BTreeMap<Table, BTreeMap<String, Vec<Rule>>>,
    /// What leads into them.
    pub jumps: BTreeSet<Jump>,
    /// What was asked for and is not done; for status.
    pub lacks: BTreeSet<Lack>,
}

/// What a filter asks for and these tables cannot do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case", tag = "lack")]
pub enum Lack {
    /// Frames from one port of a bridge to another never come here, so a guest may call itself what it likes to its
    /// neighbours. What it sends beyond the bridge is refused unless it comes from one of the guests' subnets.
    Senders {
        /// The links that nobody checks.
        links: BTreeSet<LinkName>,
    },
    /// There is no table `filter`: nothing is refused.
    Filtering {
        /// Of this family.
        family: Family,
    },
    /// There is no table `nat`: what guests send elsewhere is refused.
    WayOut {
        /// Of this family.
        family: Family,
    },
    /// There is no table `mangle`: the MSS of TCP stays as it is.
    Clamp {
        /// Of this family.
        family: Family,
    },
    /// Connections have no marks: who asks by another link than the way out is not answered.
    Answers {
        /// Of this family.
        family: Family,
    },
    /// A forward that leads nowhere.
    Forward {
        /// The forward.
        forward: PortForward,
        /// Why.
        why: ForwardLack,
    },
}

/// Why a forward cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ForwardLack {
    /// There is no table `nat`.
    NoNat,
    /// It listens on the loopback, which needs `route_localnet` and opens the loopback to the network.
    Loopback,
    /// From one version of IP to the other.
    Families,
    /// The ports there would go beyond 65535.
    Ports,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Senders { links } => {
                f.write_str("iptables does not see what guests send to each other: not checked are")?;
                links.iter().try_for_each(|link| write!(f, " {link}"))
            }
            Self::Filtering { family } => write!(f, "no {family} table filter: nothing is refused"),
            Self::WayOut { family } => write!(f, "no {family} table nat: guests have no {family} way out"),
            Self::Clamp { family } => write!(f, "no {family} table mangle: the MSS of TCP is not clamped"),
            Self::Answers { family } => write!(
                f,
                "no {family} target CONNMARK: answers to who asks by another link than the way out go astray"
            ),
            Self::Forward { forward, why } => {
                write!(f, "{} {} to {}: ", forward.transport, forward.ports, forward.to)?;
                f.write_str(match why {
                    ForwardLack::NoNat => "no table nat of its family",
                    ForwardLack::Loopback => "the loopback is not forwarded",
                    ForwardLack::Families => "from one version of IP to the other",
                    ForwardLack::Ports => "its ports go beyond 65535",
                })
            }
        }
    }
}

/// What works of one family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Able {
    /// The tables.
    pub tables: BTreeSet<Table>,
    /// Whether connections have marks (the target CONNMARK).
    pub marks: bool,
}

/// A tag that cannot begin the name of a chain.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} cannot begin the names of chains: letters, digits, - and _, at most {max} bytes", max = TAG_BYTES)]
pub struct TagError(String);

const LONGEST_ROLE: usize = "-forward".len();
const TAG_BYTES: usize = CHAIN_BYTES - LONGEST_ROLE;

impl Wanted {
    /// Nothing: all that carries the tag goes.
    ///
    /// # Errors
    /// [`TagError`].
    pub fn nothing(tag: &str) -> Result<Self, TagError> {
        let fits = (1..=TAG_BYTES).contains(&tag.len()) && !tag.starts_with('-');
        let plain = tag
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if !(fits && plain) {
            return Err(TagError(tag.chars().take(64).collect()));
        }
        Ok(Self {
            tag: tag.to_owned(),
            chains: BTreeMap::new(),
            jumps: BTreeSet::new(),
            lacks: BTreeSet::new(),
        })
    }

    /// A chain of ours and what leads there.
    fn chain(&mut self, table: Table, role: &str, hook: Hook, rules: Vec<Rule>) {
        let name = format!("{}-{role}", self.tag);
        let rule = Rule::of(&format!("-m comment --comment {} -j {name}", self.tag));
        self.chains.entry(table).or_default().insert(name, rules);
        self.jumps.insert(Jump { table, hook, rule });
    }
}

/// What a filter means for one family of which this works.
///
/// The chain of `filter` is there for every family that has the table, so that what nobody asked for is refused.
///
/// # Errors
/// [`TagError`].
pub fn wanted(filter: &Filter, family: Family, able: &Able) -> Result<Wanted, TagError> {
    let tables = &able.tables;
    let mut wanted = Wanted::nothing(&filter.tag)?;
    let part = Part::of(filter, family, tables, &mut wanted.lacks);
    if !filter.senders.is_empty() {
        let links = filter.senders.keys().cloned().collect();
        wanted.lacks.insert(Lack::Senders { links });
    }
    if tables.contains(&Table::Filter) {
        wanted.chain(Table::Filter, "forward", Hook::Forward, part.forward());
    } else {
        wanted.lacks.insert(Lack::Filtering { family });
    }
    if !part.forwards.is_empty() || !part.masqueraded.is_empty() {
        if tables.contains(&Table::Mangle) {
            wanted.chain(Table::Mangle, "clamp", Hook::MangleForward, part.clamp());
        } else {
            wanted.lacks.insert(Lack::Clamp { family });
        }
        if !part.forwards.is_empty() && !filter.answers.is_empty() {
            if able.marks && tables.contains(&Table::Mangle) {
                wanted.chain(Table::Mangle, "asked", Hook::MangleForward, part.asked());
                wanted.chain(Table::Mangle, "answers", Hook::ManglePrerouting, part.answers());
            } else {
                wanted.lacks.insert(Lack::Answers { family });
            }
        }
        wanted.chain(Table::Nat, "post", Hook::Postrouting, part.post());
    }
    if !part.forwards.is_empty() {
        wanted.chain(Table::Nat, "pre", Hook::Prerouting, part.forwards());
        wanted.chain(Table::Nat, "out", Hook::Output, part.forwards());
    }
    Ok(wanted)
}

/// What of a filter concerns one family and can be done there.
struct Part<'a> {
    filter: &'a Filter,
    family: Family,
    subnets: Vec<Subnet>,
    /// Those of them that have a way out.
    masqueraded: Vec<Subnet>,
    forwards: Vec<(&'a PortForward, Ports)>,
}

impl<'a> Part<'a> {
    fn of(filter: &'a Filter, family: Family, tables: &BTreeSet<Table>, lacks: &mut BTreeSet<Lack>) -> Self {
        let nat = tables.contains(&Table::Nat);
        let subnets = filter.subnets.iter().copied();
        let subnets: Vec<_> = subnets.filter(|subnet| family.has(subnet.network())).collect();
        let out = filter.way_out == WayOut::Masquerade && !subnets.is_empty();
        if out && !nat {
            lacks.insert(Lack::WayOut { family });
        }
        let mut forwards = Vec::new();
        for forward in filter.forwards.iter().filter(|forward| family.has(forward.to)) {
            match target(forward, family, nat) {
                Ok(ports) => forwards.push((forward, ports)),
                Err(why) => {
                    let forward = forward.clone();
                    lacks.insert(Lack::Forward { forward, why });
                }
            }
        }
        Self {
            filter,
            family,
            masqueraded: if out && nat { subnets.clone() } else { Vec::new() },
            subnets,
            forwards,
        }
    }

    /// A rule with our comment between what it matches and what it does.
    fn rule(&self, matches: &str, target: &str) -> Rule {
        let comment = &self.filter.tag;
        Rule::of(&format!("{matches} -m comment --comment {comment} -j {target}"))
    }

    fn forward(&self) -> Vec<Rule> {
        let bridge = &self.filter.bridge;
        let state = "-m conntrack --ctstate";
        let mut rules = vec![
            self.rule(&format!("-o {bridge} {state} RELATED,ESTABLISHED"), "ACCEPT"),
            self.rule(&format!("-o {bridge} {state} DNAT"), "ACCEPT"),
            // What guests answer to those who came through a forward.
            self.rule(&format!("-i {bridge} {state} DNAT --ctdir REPLY"), "ACCEPT"),
            // With br_netfilter, frames between ports of one bridge come here too.
            self.rule(&format!("-i {bridge} -o {bridge}"), "ACCEPT"),
        ];
        if !self.masqueraded.is_empty() {
            // Translation does not see them: they would leave with a guest's own address.
            rules.push(self.rule(&format!("-i {bridge} {state} INVALID"), "DROP"));
        }
        for subnet in &self.masqueraded {
            rules.push(self.rule(&format!("-s {subnet} -i {bridge}"), "ACCEPT"));
        }
        let refusal = format!("REJECT --reject-with {}", self.family.refusal());
        rules.push(self.rule(&format!("-i {bridge}"), &refusal));
        rules.push(self.rule(&format!("-o {bridge}"), "DROP"));
        rules
    }

    fn clamp(&self) -> Vec<Rule> {
        let bridge = &self.filter.bridge;
        let syn = "-p tcp -m tcp --tcp-flags SYN,RST SYN";
        ["-i", "-o"]
            .map(|way| self.rule(&format!("{way} {bridge} {syn}"), "TCPMSS --clamp-mss-to-pmtu"))
            .into()
    }

    /// The connections of those who ask by a link get its mark.
    fn asked(&self) -> Vec<Rule> {
        let bridge = &self.filter.bridge;
        let rule = |(link, mark): (&LinkName, &u32)| {
            let asked = format!("-i {link} -o {bridge} -m conntrack --ctstate DNAT --ctdir ORIGINAL");
            self.rule(&asked, &format!("CONNMARK --set-xmark {mark:#x}/{MASK:#x}"))
        };
        self.filter.answers.iter().map(rule).collect()
    }

    /// What guests send of such a connection carries it.
    fn answers(&self) -> Vec<Rule> {
        let bridge = &self.filter.bridge;
        let answer = format!("-i {bridge} -m conntrack --ctstate DNAT --ctdir REPLY");
        let target = format!("CONNMARK --restore-mark --nfmask {MASK:#x} --ctmask {MASK:#x}");
        vec![self.rule(&answer, &target)]
    }

    fn post(&self) -> Vec<Rule> {
        let bridge = &self.filter.bridge;
        let out = self.masqueraded.iter();
        let out = out.map(|subnet| self.rule(&format!("-s {subnet} ! -o {bridge}"), "MASQUERADE"));
        let forwarded_to = |net: &&Subnet| self.forwards.iter().any(|(forward, _)| net.contains(forward.to));
        let hairpin = self.subnets.iter().filter(forwarded_to);
        let hairpin = hairpin.map(|net| {
            let matches = format!("-s {net} -d {net} -o {bridge} -m conntrack --ctstate DNAT");
            self.rule(&matches, "MASQUERADE")
        });
        out.chain(hairpin).collect()
    }

    /// One rule for a forward, ranges too: `first-last/base` keeps the distance to the first port (kernel 4.18,
    /// iptables 1.8.0; without a base the kernel would choose among the ports by itself).
    fn forwards(&self) -> Vec<Rule> {
        let rule = |(forward, there): &(&PortForward, Ports)| {
            let here = forward.ports;
            let transport = forward.transport;
            let port = format!("-m {transport} --dport {}", colon(here));
            let matches = match forward.listen {
                Some(ip) => {
                    let bits = if ip.is_ipv4() { 32 } else { 128 };
                    format!("-d {ip}/{bits} -p {transport} {port}")
                }
                None => {
                    let loopback = self.family.loopback();
                    format!("! -d {loopback} -p {transport} -m addrtype --dst-type LOCAL {port}")
                }
            };
            let to = match forward.to {
                IpAddr::V4(ip) => ip.to_string(),
                IpAddr::V6(ip) => format!("[{ip}]"),
            };
            let to = match here.span() {
                0 => format!("{to}:{there}"),
                _ if here == *there => forward.to.to_string(),
                _ => format!("{to}:{there}/{}", here.first()),
            };
            self.rule(&matches, &format!("DNAT --to-destination {to}"))
        };
        self.forwards.iter().map(rule).collect()
    }
}

/// The ports there, or why there are none.
fn target(forward: &PortForward, family: Family, nat: bool) -> Result<Ports, ForwardLack> {
    match forward.listen {
        _ if !nat => return Err(ForwardLack::NoNat),
        Some(ip) if !family.has(ip) => return Err(ForwardLack::Families),
        Some(ip) if ip.is_loopback() => return Err(ForwardLack::Loopback),
        _ => {}
    }
    let there = forward.ports.moved_to(forward.to_port);
    there.ok_or(ForwardLack::Ports)
}

/// A range as iptables writes it.
fn colon(ports: Ports) -> String {
    match ports.span() {
        0 => ports.first().to_string(),
        _ => format!("{}:{}", ports.first(), ports.last()),
    }
}
