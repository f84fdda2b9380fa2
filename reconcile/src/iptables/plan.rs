//! The difference between wanted and observed, as text for `iptables-restore --noflush`.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::save::OEM_FORWARD;
use super::{Hook, Jump, Observed, Rule, Table, Wanted};

/// What `iptables-restore --noflush` is told; [`Display`](fmt::Display) is that text.
///
/// Each table is changed as a whole or not at all, tables one after the other. Rules that are deleted are named by
/// their text, never by a number that somebody else's change could move to another rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Restore {
    /// What changes, by table; none is empty.
    pub tables: BTreeMap<Table, Vec<Change>>,
}

/// One line of a [`Restore`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Makes a chain of ours, or empties it.
    Empty(String),
    /// Adds a rule at the end of a chain of ours.
    Append(String, Rule),
    /// Removes a rule of ours, the first that is called so.
    Delete(String, Rule),
    /// Adds a rule of ours before all others.
    Insert(String, Rule),
    /// Removes all rules of a chain of ours.
    Flush(String),
    /// Removes a chain of ours.
    Remove(String),
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty(chain) => write!(f, ":{chain} - [0:0]"),
            Self::Append(chain, rule) => write!(f, "-A {chain} {rule}"),
            Self::Delete(chain, rule) => write!(f, "-D {chain} {rule}"),
            Self::Insert(chain, rule) => write!(f, "-I {chain} {rule}"),
            Self::Flush(chain) => write!(f, "-F {chain}"),
            Self::Remove(chain) => write!(f, "-X {chain}"),
        }
    }
}

impl fmt::Display for Restore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (table, changes) in &self.tables {
            writeln!(f, "*{table}")?;
            for change in changes {
                writeln!(f, "{change}")?;
            }
            writeln!(f, "COMMIT")?;
        }
        Ok(())
    }
}

/// What makes the observed the wanted; `None` when it is.
///
/// Both must have the same tag; what was observed under another one says nothing about this.
#[must_use]
pub fn plan(wanted: &Wanted, observed: &Observed) -> Option<Restore> {
    debug_assert_eq!(wanted.tag, observed.tag, "observed for another instance");
    let tables: BTreeMap<_, _> = Table::ALL
        .into_iter()
        .map(|table| (table, changes(table, wanted, observed)))
        .filter(|(_, changes)| !changes.is_empty())
        .collect();
    (!tables.is_empty()).then_some(Restore { tables })
}

/// What removes all that is ours; `None` when nothing is.
#[must_use]
pub fn remove(observed: &Observed) -> Option<Restore> {
    let nothing = Wanted::nothing(&observed.tag).ok()?; // under no tag of ours nothing is ours
    plan(&nothing, observed)
}

fn changes(table: Table, wanted: &Wanted, observed: &Observed) -> Vec<Change> {
    let none = BTreeMap::new();
    let chains = wanted.chains.get(&table).unwrap_or(&none);
    let there = observed.chains.get(&table).unwrap_or(&none);
    let mut changes = Vec::new();
    for (name, rules) in chains
        .iter()
        .filter(|(name, rules)| there.get(*name) != Some(rules))
    {
        changes.push(Change::Empty(name.clone()));
        changes.extend(
            rules
                .iter()
                .map(|rule| Change::Append(name.clone(), rule.clone())),
        );
    }
    changes.extend(jumps(table, wanted, observed));
    let stale = || there.keys().filter(|name| !chains.contains_key(*name)).cloned();
    changes.extend(stale().map(Change::Flush)); // first all, because one may lead to another
    changes.extend(stale().map(Change::Remove));
    changes
}

fn jumps(table: Table, wanted: &Wanted, observed: &Observed) -> Vec<Change> {
    let mut at: BTreeMap<&str, Vec<&Rule>> = BTreeMap::new();
    for Jump { hook, rule, .. } in wanted.jumps.iter().filter(|jump| jump.table == table) {
        at.entry(chain_of(*hook, observed)).or_default().push(rule);
    }
    let mut there: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for guide in observed.guides.iter().filter(|guide| guide.table == table) {
        there.entry(&guide.chain).or_default().push(guide);
    }
    // A chain of which anything is wrong is done anew: of two equal rules only the first can be named.
    there.retain(|chain, guides| {
        let rules: Vec<_> = guides.iter().map(|guide| &guide.rule).collect();
        let right = guides.iter().all(|guide| guide.leads) && at.get(chain) == Some(&rules);
        if right {
            at.remove(chain);
        }
        !right
    });
    let gone = there.into_iter().flat_map(|(chain, guides)| {
        let delete = move |rule: &Rule| Change::Delete(chain.to_owned(), rule.clone());
        guides.into_iter().map(move |guide| delete(&guide.rule))
    });
    let made = at.into_iter().flat_map(|(chain, rules)| {
        let insert = move |rule: &Rule| Change::Insert(chain.to_owned(), rule.clone());
        rules.into_iter().rev().map(insert)
    });
    gone.chain(made).collect()
}

fn chain_of(hook: Hook, observed: &Observed) -> &'static str {
    match hook {
        Hook::Forward if observed.oem => OEM_FORWARD,
        Hook::Forward | Hook::MangleForward => "FORWARD",
        Hook::Prerouting | Hook::ManglePrerouting => "PREROUTING",
        Hook::Postrouting => "POSTROUTING",
        Hook::Output => "OUTPUT",
    }
}
