//! A [`Filter`](crate::filter::Filter) in the words of `iptables-save` and `iptables-restore`. Pure.
//!
//! For kernels without nf_tables, as phones have them, and for machines whose other rules are there. We own chains
//! whose names begin with the tag and a dash, and the rules that lead into them; no other rule is ever named:
//!
//! ```text
//!  filter  oem_fwd, else FORWARD    -> TAG-forward   before netd's and Docker's DROP
//!  mangle  FORWARD                  -> TAG-asked, -clamp   marks of who asks; MSS of TCP
//!          PREROUTING               -> TAG-answers   marks of answers
//!  nat     POSTROUTING              -> TAG-post      masquerade, hairpin
//!          PREROUTING, OUTPUT       -> TAG-pre, -out forwards
//! ```
//!
//! [`wanted()`] makes the chains, [`parse`] reads what `iptables-save` says, [`plan()`] is the difference as text for
//! `iptables-restore --noflush`; `None` is the proof that nothing differs. Rules are made in the form in which the
//! programs print them (1.8.9, legacy and nft alike), so that equal rules are equal texts.

#[cfg(any(test, feature = "simulated"))]
pub mod model;
mod plan;
mod rule;
mod save;
mod wanted;

#[cfg(test)]
mod tests;

pub use plan::{Change, Restore, plan, remove};
pub use rule::Rule;
pub use save::{Guide, Observed, parse, tags};
pub(crate) use save::{records, rule_of};
pub use wanted::{Able, Family, ForwardLack, Hook, Jump, Lack, TagError, Wanted, wanted};

use std::fmt;

use serde::Serialize;

/// The longest name of a chain, in bytes (`XT_EXTENSION_MAXNAMELEN` without its zero and the jump's sign).
pub const CHAIN_BYTES: usize = 28;

/// The tables that we have chains in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Table {
    /// What passes.
    Filter,
    /// What is changed but for addresses.
    Mangle,
    /// Translation of addresses.
    Nat,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Mangle, Self::Nat];

    /// Its name for the programs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.name() == name)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
