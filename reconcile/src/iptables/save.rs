//! What `iptables-save` says: only what is ours, and where it stands.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{Rule, Table};

/// What is ours in the tables of one family, whoever put it where it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Observed {
    /// What the names of our chains begin with.
    pub tag: String,
    /// Our chains and all their rules.
    pub chains: BTreeMap<Table, BTreeMap<String, Vec<Rule>>>,
    /// Our rules in chains that are not ours, in their order.
    pub guides: Vec<Guide>,
    /// FORWARD leads to the vendor's `oem_fwd` before anything else that is not ours, without a condition.
    pub oem: bool,
}

/// A rule of ours in a chain that is not: it leads into one of ours, or carries our comment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Guide {
    /// Its table.
    pub table: Table,
    /// Its chain.
    pub chain: String,
    /// The rule.
    pub rule: Rule,
    /// Nothing foreign stands before it in its chain but other instances' jumps, which want to be first as well.
    pub leads: bool,
}

/// The vendor's chain in FORWARD (AOSP system/netd, server/Controllers.cpp).
pub(super) const OEM_FORWARD: &str = "oem_fwd";

/// A rule is not longer than this, in bytes, even with line ends in its quotes.
const RULE_BYTES: usize = 8 << 10;

/// Reads what is ours out of `iptables-save`'s text, of any variant, with counters or without.
///
/// Never fails: what it does not understand is not ours. Keeps no more than is ours; how long the text may be is for
/// the caller to say.
#[must_use]
pub fn parse(tag: &str, save: &str) -> Observed {
    let mut reader = Reader {
        observed: Observed {
            tag: tag.to_owned(),
            ..Observed::default()
        },
        prefix: format!("{tag}-"),
        table: None,
        followed: BTreeSet::new(),
        first_forward: None,
        oem_exists: false,
    };
    records(save).for_each(|record| reader.record(record));
    reader.end()
}

/// The tags of all instances that have chains here; for finding leftovers without knowing whose they are.
#[must_use]
pub fn tags(save: &str) -> BTreeSet<String> {
    let chains = records(save).filter_map(|record| record.strip_prefix(':')?.split(' ').next());
    let tag = chains.filter_map(|name| name.split_once('-').filter(|(tag, _)| is_tag(tag)));
    tag.filter(|(_, role)| ROLES.contains(role))
        .map(|(tag, _)| tag.to_owned())
        .collect()
}

const ROLES: [&str; 5] = ["forward", "clamp", "post", "pre", "out"];

/// Whether an instance's links are called so ([`Mark`](crate::names::Mark)).
fn is_tag(text: &str) -> bool {
    let letters = text.strip_prefix("sv").unwrap_or_default();
    letters.len() == 4 && letters.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))
}

/// The jump of another instance, as we would make it.
fn is_siblings(rule: &Rule) -> bool {
    let words: Vec<&str> = rule.words().iter().map(String::as_str).collect();
    let ["-m", "comment", "--comment", tag, "-j", target] = words[..] else {
        return false;
    };
    let role = target.split_once('-').filter(|(whose, _)| *whose == tag);
    is_tag(tag) && role.is_some_and(|(_, role)| ROLES.contains(&role))
}

struct Reader {
    observed: Observed,
    /// Of our chains' names.
    prefix: String,
    table: Option<Table>,
    /// Chains in which a foreign rule was seen.
    followed: BTreeSet<(Table, String)>,
    /// The first rule of `filter` FORWARD that is neither ours nor a sibling's.
    first_forward: Option<Rule>,
    oem_exists: bool,
}

impl Reader {
    fn record(&mut self, record: &str) {
        if let Some(name) = record.strip_prefix('*') {
            self.table = Table::named(name);
        }
        let Some(table) = self.table else {
            return;
        };
        if let Some(chain) = record.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            if is_plain(chain) {
                self.chain(table, chain);
            }
        } else if let Some((chain, rule)) = rule_of(record).filter(|(chain, _)| is_plain(chain)) {
            self.rule(table, chain, rule);
        }
    }

    fn chain(&mut self, table: Table, chain: &str) {
        self.oem_exists |= table == Table::Filter && chain == OEM_FORWARD;
        if chain.starts_with(&self.prefix) {
            let chains = self.observed.chains.entry(table).or_default();
            chains.entry(chain.to_owned()).or_default();
        }
    }

    fn rule(&mut self, table: Table, chain: &str, text: &str) {
        if chain.starts_with(&self.prefix) {
            let chains = self.observed.chains.entry(table).or_default();
            let rule = Rule::parse(text).unwrap_or_else(Rule::unreadable);
            return chains.entry(chain.to_owned()).or_default().push(rule);
        }
        let place = (table, chain.to_owned());
        let follows = self.followed.contains(&place);
        if follows && !text.contains(&self.observed.tag) {
            return; // neither ours nor where anything of it depends on
        }
        let rule = Rule::parse(text);
        match rule {
            Some(rule) if self.is_ours(&rule) => self.observed.guides.push(Guide {
                table,
                chain: place.1,
                rule,
                leads: !follows,
            }),
            Some(rule) if is_siblings(&rule) => {}
            foreign => {
                if !follows && table == Table::Filter && chain == "FORWARD" {
                    self.first_forward = foreign;
                }
                self.followed.insert(place);
            }
        }
    }

    fn is_ours(&self, rule: &Rule) -> bool {
        let leads_to_us = rule.target().is_some_and(|to| to.starts_with(&self.prefix));
        leads_to_us || rule.value("--comment") == Some(&self.observed.tag)
    }

    fn end(self) -> Observed {
        let first = self.first_forward.unwrap_or_else(Rule::unreadable);
        Observed {
            oem: self.oem_exists && first.words() == ["-j", OEM_FORWARD],
            ..self.observed
        }
    }
}

/// Whether a chain's name can be written into one line without quotes; one that cannot is none of ours.
fn is_plain(chain: &str) -> bool {
    !chain.is_empty()
        && chain
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"\"'\\".contains(&b))
}

/// The chain and the arguments of `-A CHAIN ARGUMENTS`, with `[packets:bytes]` before it or not.
pub(crate) fn rule_of(record: &str) -> Option<(&str, &str)> {
    let counted = record.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    let record = counted.map_or(record, |(_, rest)| rest);
    let rest = record.strip_prefix("-A ")?;
    Some(rest.split_once(' ').unwrap_or((rest, "")))
}

/// Lines, but for line ends within quotes: a comment may have them, and what follows there is no rule.
pub(crate) fn records(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (record, after) = rest.split_at(record_end(rest));
        rest = after.strip_prefix('\n').unwrap_or(after);
        Some(record)
    })
}

/// Where the first record ends: at its line's end, where a quote is never closed or closed too late.
fn record_end(text: &str) -> usize {
    let line = text.find('\n').unwrap_or(text.len());
    if text.starts_with('#') || !text[..line].contains('"') {
        return line;
    }
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate().take(RULE_BYTES) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            b'\n' if !quoted => return at,
            _ => {}
        }
    }
    if quoted || text.len() > RULE_BYTES {
        line
    } else {
        text.len()
    }
}
