//! What old scripts left, removed only when somebody asks for it by its name.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ladder::lookups_of_main;
use super::look::Look;
use super::main_table;
use super::probe::shown;
use super::saved;
use crate::family::Family;
use crate::route::Route;
use crate::rule::Rule;

/// The names by which leftovers are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeftoverName {
    /// Rules that look everything up in main.
    RuleLookupMain,
    /// Default routes in main on a host that netd rules.
    DefaultInMain,
    /// Copies of rules in iptables; one of each stays.
    DuplicateRules,
}

impl LeftoverName {
    /// All.
    pub const ALL: [Self; 3] = [Self::RuleLookupMain, Self::DefaultInMain, Self::DuplicateRules];

    /// As it is asked for.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RuleLookupMain => "rule-lookup-main",
            Self::DefaultInMain => "default-in-main",
            Self::DuplicateRules => "duplicate-rules",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == name)
    }
}

impl fmt::Display for LeftoverName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Copies of one rule in one chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copies {
    /// The program that printed them, such as `iptables-save`.
    pub program: String,
    /// Of which family.
    pub family: Family,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's arguments, as they were printed.
    pub rule: String,
    /// How often it stands there.
    pub count: usize,
    /// The place of the first copy, from 1 on.
    pub first: usize,
    /// The first copy takes every packet that the others could, so that they do nothing.
    pub removable: bool,
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            chain,
            rule,
            count,
            ..
        } = self;
        write!(f, "{program}: {count} times -A {chain} {rule}")
    }
}

/// One thing to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Item {
    /// This rule.
    Rule(Rule),
    /// This route.
    Route(Route),
    /// All but one of these.
    Copies(Copies),
}

/// What goes when it is asked for by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leftover {
    /// Its name.
    pub name: LeftoverName,
    /// Each thing, and how it is called.
    pub items: Vec<(Item, String)>,
}

/// What was removed, or would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Each thing.
    pub removed: Vec<String>,
    /// What could not be, with the reason.
    pub failed: Vec<String>,
}

/// All that is there now, in the order of their names.
#[must_use]
pub fn leftovers(look: &Look) -> Vec<Leftover> {
    let all = LeftoverName::ALL.into_iter().map(|name| Leftover {
        name,
        items: look
            .families()
            .flat_map(|family| items(look, name, family))
            .collect(),
    });
    all.filter(|leftover| !leftover.items.is_empty()).collect()
}

fn items(look: &Look, name: LeftoverName, family: Family) -> Vec<(Item, String)> {
    match name {
        LeftoverName::RuleLookupMain => lookups_of_main(look, family)
            .map(|rule| {
                (
                    Item::Rule(rule.clone()),
                    format!("{family} rule {}: remove", shown(rule)),
                )
            })
            .collect(),
        LeftoverName::DefaultInMain => main_table::copies(look, family)
            .map(|route| {
                let text = format!(
                    "{family} route {}, table main: remove",
                    main_table::shown(look, route)
                );
                (Item::Route(route.clone()), text)
            })
            .collect(),
        LeftoverName::DuplicateRules => {
            let copies = saved::copies(look, family)
                .into_iter()
                .filter(|copies| copies.removable);
            copies
                .map(|copies| {
                    let extra = copies.count - 1;
                    let text = format!("{copies}: remove {extra}, keep one");
                    (Item::Copies(copies), text)
                })
                .collect()
        }
    }
}
