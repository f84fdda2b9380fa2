//! What iptables' programs say: chains to follow, copies of rules, and ports that others take.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::condition::Layer;
use sovereign_protocol::port::Transport;
use sovereign_protocol::subnet::Subnet;

use super::chain::{Action, Chains, Condition, Step};
use super::leftover::{Copies, LeftoverName};
use super::look::{Look, Saved};
use super::packet::{Holds, Packet, State};
use super::{Code, Finding, of_family};
use crate::family::Family;
use crate::filter::PortForward;
use crate::iptables::{Rule, records, rule_of};

/// Targets that decide nothing (man 8 iptables-extensions).
const GOES_ON: [&str; 24] = [
    "AUDIT",
    "CHECKSUM",
    "CLASSIFY",
    "CONNMARK",
    "CONNSECMARK",
    "CT",
    "DSCP",
    "ECN",
    "HL",
    "IDLETIMER",
    "LED",
    "LOG",
    "MARK",
    "NFLOG",
    "RATEEST",
    "SECMARK",
    "SET",
    "TCPMSS",
    "TCPOPTSTRIP",
    "TEE",
    "TOS",
    "TRACE",
    "TTL",
    "ULOG",
];
/// The chains that scripts append to.
const PILED: [(&str, &str); 2] = [("filter", "FORWARD"), ("nat", "POSTROUTING")];

/// A program's tables with their chains, each rule as it was printed.
struct Tables(BTreeMap<String, Table>);

#[derive(Default)]
struct Table {
    /// The policy; none of a chain that others call.
    policies: BTreeMap<String, String>,
    rules: BTreeMap<String, Vec<Rule>>,
}

fn read(text: &str) -> Tables {
    let mut tables: BTreeMap<String, Table> = BTreeMap::new();
    let mut name = String::new();
    for record in records(text) {
        if let Some(table) = record.strip_prefix('*') {
            table.trim_end().clone_into(&mut name);
        } else if let Some(chain) = record.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (chain, policy) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let table = tables.entry(name.clone()).or_default();
            table.policies.insert(chain.to_owned(), policy.to_owned());
            table.rules.entry(chain.to_owned()).or_default();
        } else if let Some((chain, rule)) = rule_of(record) {
            let table = tables.entry(name.clone()).or_default();
            let rule = Rule::parse(rule).unwrap_or_else(Rule::unreadable);
            table.rules.entry(chain.to_owned()).or_default().push(rule);
        }
    }
    Tables(tables)
}

/// The chains that forwarded packets meet.
pub(super) fn chains(saved: &Saved) -> Vec<Chains> {
    let tables = read(&saved.text).0.into_iter();
    let forwards = tables.filter(|(name, table)| {
        ["filter", "mangle", "security"].contains(&name.as_str()) && table.policies.contains_key("FORWARD")
    });
    let of = |(name, table): (String, Table)| Chains {
        program: saved.program.clone(),
        table: format!("{} {name}", word(saved.family)),
        base: "FORWARD".to_owned(),
        is_nf: saved
            .text
            .lines()
            .next()
            .is_some_and(|line| line.contains("(nf_tables)")),
        drops: table
            .policies
            .get("FORWARD")
            .is_some_and(|policy| policy == "DROP"),
        chains: table
            .rules
            .iter()
            .map(|(chain, rules)| {
                let step = |rule: &Rule| step(rule, &table);
                (chain.clone(), rules.iter().map(step).collect())
            })
            .collect(),
    };
    forwards.map(of).collect()
}

fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

fn step(rule: &Rule, table: &Table) -> Step {
    let goes = rule.value("-g");
    let action = match (goes, rule.target()) {
        (Some(chain), _) => Action::Goto(chain.to_owned()),
        (None, None) if rule.words().is_empty() => Action::Unknown, // cannot be read
        (None, None) => Action::Continue,
        (None, Some("ACCEPT")) => Action::Accept,
        (None, Some("DROP" | "REJECT")) => Action::Drop,
        (None, Some("RETURN")) => Action::Return,
        (None, Some(chain)) if table.rules.contains_key(chain) => Action::Jump(chain.to_owned()),
        (None, Some(target)) if GOES_ON.contains(&target) => Action::Continue,
        (None, Some(_)) => Action::Unknown,
    };
    Step {
        holds,
        condition: Condition::Words(rule.words().to_vec()),
        action,
        text: format!("rule \"{rule}\""),
    }
}

/// Whether a rule is about a packet. Words that are not known leave it open.
fn holds(condition: &Condition, packet: &Packet) -> Holds {
    let Condition::Words(words) = condition else {
        return Holds::Perhaps;
    };
    let (mut all, mut negated) = (Holds::Yes, false);
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        let one = match word {
            "!" => {
                negated = true;
                continue;
            }
            "-j" | "-g" => break, // what follows are the target's own
            "-m" => {
                value(); // its own words follow
                continue;
            }
            "-i" => Holds::of(is_link(value(), &packet.iif)),
            "-o" => Holds::of(is_link(value(), &packet.oif)),
            "-s" => contains(value(), packet.from),
            "-d" => contains(value(), packet.to),
            "-p" => Holds::of(["tcp", "6", "all", "0"].contains(&value())),
            "--comment" => {
                value();
                Holds::Yes
            }
            "--ctstate" | "--state" => states(value(), packet),
            "--ctstatus" => match value() {
                "DNAT" => Holds::of(packet.translated),
                _ => Holds::Perhaps,
            },
            "--dst-type" | "--src-type" => Holds::of(value() != "LOCAL"),
            "--physdev-is-bridged" => Holds::of(packet.bridged),
            "--physdev-in" | "--physdev-out" => {
                value();
                if packet.bridged { Holds::Perhaps } else { Holds::No }
            }
            // Some ports, some packets: that says nothing about the others, negated or not.
            "--dport" | "--sport" | "--dports" | "--sports" | "--ports" | "--icmp-type" | "--icmpv6-type" => {
                return Holds::No;
            }
            "--tcp-flags" => {
                value();
                return Holds::No;
            }
            "--syn" => Holds::of(packet.state == State::New),
            _ => Holds::Perhaps,
        };
        all = all.and(one.negated(std::mem::take(&mut negated)));
        if all == Holds::No {
            return Holds::No;
        }
    }
    all
}

/// Whether a name is meant by an option, which may end with a plus.
fn is_link(option: &str, name: &str) -> bool {
    match option.strip_suffix('+') {
        Some(begin) => name.starts_with(begin),
        None => option == name,
    }
}

fn contains(subnet: &str, ip: std::net::IpAddr) -> Holds {
    let (address, length) = subnet.split_once('/').unwrap_or((subnet, ""));
    let Ok(address) = address.parse::<std::net::IpAddr>() else {
        return Holds::Perhaps;
    };
    let whole = if address.is_ipv4() { 32 } else { 128 };
    let length = if length.is_empty() {
        Some(whole)
    } else {
        length.parse().ok()
    };
    let prefix = length.and_then(|length| sovereign_protocol::interface::Prefix::new(address, length));
    prefix.map_or(Holds::Perhaps, |prefix| Holds::of(prefix.contains(ip)))
}

fn states(list: &str, packet: &Packet) -> Holds {
    let known = |state: &str| match state {
        "NEW" => packet.state == State::New,
        "ESTABLISHED" => packet.state == State::Established,
        "DNAT" => packet.translated,
        _ => false, // INVALID, RELATED, UNTRACKED, SNAT: others
    };
    Holds::of(list.split(',').any(known))
}

/// Copies of rules, and ports that others take.
pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let mut found = Vec::new();
    for family in look.families() {
        let copies = copies(look, family);
        found.extend((!copies.is_empty()).then(|| duplicates(family, &copies)));
        found.extend(taken(look, family));
    }
    found
}

/// Rules that stand several times in one chain, each named once.
pub(super) fn copies(look: &Look, family: Family) -> Vec<Copies> {
    let mut found: Vec<Copies> = Vec::new();
    for saved in look.saves.iter().filter(|saved| saved.family == family) {
        let tables = read(&saved.text).0;
        for (table, chain) in PILED {
            let rules = tables.get(table).and_then(|tables| tables.rules.get(chain));
            for copy in piled(look, rules.map_or(&[][..], Vec::as_slice)) {
                let copy = Copies {
                    program: saved.program.clone(),
                    family,
                    table: table.to_owned(),
                    chain: chain.to_owned(),
                    ..copy
                };
                let same = |other: &Copies| {
                    (&other.table, &other.rule, other.count) == (&copy.table, &copy.rule, copy.count)
                };
                if !found.iter().any(same) {
                    found.push(copy); // two names of one program say the same
                }
            }
        }
    }
    found
}

fn piled(look: &Look, rules: &[Rule]) -> Vec<Copies> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (first, rule) in rules.iter().enumerate() {
        let count = rules.iter().filter(|other| *other == rule).count();
        if count < 2 || !seen.insert(rule) || !is_a_scripts(look, rule) {
            continue;
        }
        found.push(Copies {
            program: String::new(),
            family: Family::V4,
            table: String::new(),
            chain: String::new(),
            rule: rule.to_string(),
            count,
            first: first + 1,
            removable: is_final(rule),
        });
    }
    found
}

/// Whether a rule takes all packets that it is about, at each time: a copy after it never meets one.
fn is_final(rule: &Rule) -> bool {
    let ends = ["ACCEPT", "DROP", "REJECT", "MASQUERADE"].contains(&rule.target().unwrap_or_default());
    let counts = [
        "limit",
        "hashlimit",
        "connlimit",
        "statistic",
        "quota",
        "quota2",
        "recent",
        "time",
        "nth",
        "random",
    ];
    ends && !rule.words().iter().any(|word| counts.contains(&word.as_str()))
}

/// A rule that names the guests' bridge or subnet, or hides whoever sends; and that is none of ours.
fn is_a_scripts(look: &Look, rule: &Rule) -> bool {
    let mark = &look.ours.wanted.mark.prefix;
    if rule.value("--comment") == Some(mark) || rule.words().is_empty() {
        return false;
    }
    let bridge = look.ours.bridge().map(crate::names::LinkName::as_str);
    let names_bridge = bridge.is_some() && (rule.value("-i") == bridge || rule.value("-o") == bridge);
    let bridge = look.ours.wanted.bridge.iter();
    let subnets: Vec<Subnet> = bridge
        .flat_map(|bridge| bridge.addresses.iter().map(|address| address.subnet()))
        .collect();
    let within = |option: &str| {
        let ip = rule
            .value(option)
            .and_then(|text| text.split('/').next()?.parse().ok());
        ip.is_some_and(|ip| subnets.iter().any(|subnet| subnet.contains(ip)))
    };
    names_bridge || within("-s") || within("-d") || rule.target() == Some("MASQUERADE")
}

fn duplicates(family: Family, copies: &[Copies]) -> Finding {
    let removable = copies.iter().any(|copies| copies.removable);
    let first = &copies[0];
    Finding {
        layer: Layer::Nat,
        code: Code::DuplicateRules,
        family: Some(family),
        subject: of_family(family, &format!("{} {}", first.table, first.chain)),
        what: format!(
            "{family}: rules stand several times in {}: a script appended them without looking.",
            first.chain
        ),
        evidence: copies.iter().map(ToString::to_string).collect(),
        check: format!("{} -t {} | sort | uniq -d", first.program, first.table),
        wrong_if: "it prints no rule of this chain".to_owned(),
        fix: if removable {
            format!("sovereign doctor --fix={}", LeftoverName::DuplicateRules)
        } else {
            let program = first.program.strip_suffix("-save").unwrap_or(&first.program);
            format!("{program} -t {} -D {} {}", first.table, first.chain, first.rule)
        },
        leftover: removable.then_some(LeftoverName::DuplicateRules),
        risk: "none: the first copy of each rule stays where it is; what makes them may make them again"
            .to_owned(),
        stops: false,
    }
}

/// Foreign rules that take a port which is to lead to a guest.
fn taken(look: &Look, family: Family) -> Option<Finding> {
    let forwards = look.ours.wanted.filter.as_ref().map(|filter| &filter.forwards)?;
    let forwards = || forwards.iter().filter(|forward| Family::of(forward.to) == family);
    let mark = &look.ours.wanted.mark.prefix;
    for saved in look.saves.iter().filter(|saved| saved.family == family) {
        let tables = read(&saved.text).0;
        let rules = tables.get("nat").into_iter().flat_map(|nat| &nat.rules);
        for (chain, rule) in rules.flat_map(|(chain, rules)| rules.iter().map(move |rule| (chain, rule))) {
            let is_ours = rule.value("--comment") == Some(mark);
            let takes = ["DNAT", "REDIRECT"].contains(&rule.target().unwrap_or_default()) && !is_ours;
            let Some(forward) = forwards().find(|forward| takes && is_about(rule, forward)) else {
                continue;
            };
            return Some(port_taken(family, saved, (chain, rule), forward));
        }
    }
    None
}

fn is_about(rule: &Rule, forward: &PortForward) -> bool {
    let transport = match forward.transport {
        Transport::Tcp => "tcp",
        Transport::Udp => "udp",
    };
    let elsewhere = |option| {
        let ip = rule
            .value(option)
            .and_then(|text| text.split('/').next()?.parse().ok());
        ip.is_some_and(|ip: std::net::IpAddr| forward.listen.is_some_and(|listen| listen != ip))
    };
    let port = rule.value("--dport").and_then(|text| {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        Some(first.parse::<u16>().ok()?..=last.parse::<u16>().ok()?)
    });
    let overlaps = port
        .is_some_and(|ports| *ports.start() <= forward.ports.last() && *ports.end() >= forward.ports.first());
    rule.value("-p") == Some(transport) && overlaps && !elsewhere("-d")
}

fn port_taken(family: Family, saved: &Saved, (chain, rule): (&str, &Rule), forward: &PortForward) -> Finding {
    let program = saved.program.strip_suffix("-save").unwrap_or(&saved.program);
    Finding {
        layer: Layer::Nat,
        code: Code::PortTaken,
        family: Some(family),
        subject: of_family(family, &format!("{} {}", forward.transport, forward.ports)),
        what: format!(
            "{family}: a rule of another program takes {} port {}, which is to lead to {}.",
            forward.transport, forward.ports, forward.to
        ),
        evidence: vec![format!("{}: -A {chain} {rule}", saved.program)],
        check: format!("{program} -t nat -L {chain} -v -n"),
        wrong_if: "the rule's packet counter stays when somebody connects".to_owned(),
        fix: format!("choose another port, or: {program} -t nat -D {chain} {rule}"),
        leftover: None,
        risk: "whoever made the rule may need it".to_owned(),
        stops: false,
    }
}
