//! What a judgement stands on: everything that was looked at, of one moment as nearly as can be.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::name::Name;

use crate::family::Family;
use crate::names::LinkName;
use crate::nft;
use crate::observed::{Link, Observed};
use crate::route::Route;
use crate::rule::Rule;
use crate::wanted::Wanted;

use super::chain::Chains;
use super::probe::Probe;

/// What is ours, as it is meant now.
#[derive(Debug, Clone)]
pub struct Networked {
    /// Links, rules, ways out.
    pub wanted: Wanted,
    /// The guests with a card, with the addresses they may send from.
    pub guests: BTreeMap<Name, BTreeSet<IpAddr>>,
    /// What is known of their cards.
    pub cards: Cards,
}

/// What is known of guests' cards by who talks to them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cards {
    /// Guests whose VMM holds a card now.
    pub held: BTreeSet<Name>,
    /// Bytes of the largest packet of those that took over what they were told, and of those that will be told so when
    /// they boot. Any other guest is taken to send what its card takes.
    pub mtu: BTreeMap<Name, u32>,
}

impl Networked {
    /// The guests' bridge.
    #[must_use]
    pub fn bridge(&self) -> Option<&LinkName> {
        self.wanted.bridge.as_ref().map(|bridge| &bridge.name)
    }

    /// Whether guests have rules of their own in this family.
    pub(super) fn is_scoped(&self, family: Family) -> bool {
        self.wanted.rules.iter().any(|rule| rule.family == family)
    }
}

/// Switches that harm when they are set so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Switches {
    /// `rp_filter` by link; `all` is one of them.
    pub reverse_path: BTreeMap<String, i64>,
    /// Whether frames that a bridge passes on are given to the IPv4 and IPv6 filters; absent without br_netfilter.
    pub bridge_calls: BTreeMap<Family, bool>,
}

/// What one of iptables' programs printed of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// The program.
    pub program: String,
    /// Of which family.
    pub family: Family,
    /// All of its text.
    pub text: String,
}

/// A look at everything.
#[derive(Debug, Clone)]
pub struct Look {
    /// What is ours.
    pub ours: Networked,
    /// Links, addresses and routes that matter.
    pub observed: Observed,
    /// All rules of both families, each family's in the order in which the kernel asks them.
    pub rules: Vec<Rule>,
    /// All routes to guests' addresses, of whatever table but the local one.
    pub routes: Vec<Route>,
    /// Switches.
    pub switches: Switches,
    /// What the kernel answered.
    pub probes: Vec<Probe>,
    /// Tables of nf_tables with chains at `forward`, ours included.
    pub tables: Vec<nft::Table>,
    /// What iptables' programs say.
    pub saves: Vec<Saved>,
    /// Families of which our own links, addresses, routes or rules are not as wanted; their ways are not judged meanwhile.
    pub unsettled: BTreeSet<Family>,
}

impl Look {
    /// All chains that forwarded packets of a family meet, in words that can be followed.
    pub(super) fn filters(&self, family: Family) -> Vec<Chains> {
        let saved = self.saves.iter().filter(|saved| saved.family == family);
        let mut filters: Vec<Chains> = saved.flat_map(super::saved::chains).collect();
        let of_programs = |table: &nft::Table| filters.iter().any(|chains| chains.is_table(table));
        let native: Vec<&nft::Table> = self.tables.iter().filter(|table| !of_programs(table)).collect();
        let native = native
            .into_iter()
            .flat_map(|table| super::tables::chains(table, family));
        let native: Vec<Chains> = native.collect();
        filters.extend(native);
        filters
    }

    /// A link by its number.
    pub(super) fn link(&self, index: Option<u32>) -> Option<&Link> {
        self.observed.links.get(&index?)
    }

    /// The families that guests have addresses of.
    pub(super) fn families(&self) -> impl Iterator<Item = Family> + '_ {
        let bridge = self.ours.wanted.bridge.as_ref();
        let has = move |family: &Family| {
            bridge.is_some_and(|bridge| bridge.addresses.iter().any(|a| Family::of(a.ip()) == *family))
        };
        Family::BOTH.into_iter().filter(has)
    }

    /// Whether the MSS of TCP is clamped by us: seen, not believed.
    pub(super) fn clamps(&self, family: Family) -> bool {
        let tag = &self.ours.wanted.mark.prefix;
        let by_table = self.tables.iter().any(|table| {
            let ours = nft::marked(&table.comment) == Some(tag);
            let writes = |rule: &nft::Rule| {
                let mut steps = rule.expressions.iter();
                steps.any(|step| matches!(step, nft::Expression::WriteMss { .. }))
            };
            ours && table.chains.values().flat_map(|chain| &chain.rules).any(writes)
        });
        let clamp = format!("-A {tag}-clamp ");
        let by_chain = self.saves.iter().any(|saved| {
            let mut lines = saved.text.lines();
            saved.family == family && lines.any(|line| line.contains(&clamp) && line.contains("-j TCPMSS"))
        });
        by_table || by_chain
    }
}
