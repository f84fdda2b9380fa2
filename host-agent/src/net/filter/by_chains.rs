//! By iptables: chains of our own and what leads into them, family by family.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sovereign_reconcile::filter::{Filter, PortForward};
use sovereign_reconcile::iptables::{Family, Lack, Observed, Restore, TagError, Wanted, plan, wanted};
use tokio::time::Instant;

use super::super::iptables::{Iptables, Variant};
use super::{FilterError, chain};

/// Between two looks that nothing but another change asked for.
const LOOK: Duration = Duration::from_secs(1);
/// Between two looks where nothing changes that the kernel tells of: two families cost 5 ms of processor time (measured).
const QUIET: Duration = Duration::from_secs(10);

/// Our chains.
pub(in super::super) struct Chains {
    programs: Iptables,
    tag: String,
    /// As of the last look, of each family that works here.
    there: Option<BTreeMap<Family, Observed>>,
    looked: Instant,
}

impl Chains {
    pub(super) fn of(programs: Iptables, tag: &str) -> Self {
        Self {
            programs,
            tag: tag.to_owned(),
            there: None,
            looked: Instant::now(),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self.programs.variant() {
            Variant::Plain => "iptables",
            Variant::Nft => "iptables-nft",
            Variant::Legacy => "iptables-legacy",
        }
    }

    pub(super) fn due(&self) -> Instant {
        self.looked + LOOK
    }

    /// Until somebody may have changed them: x_tables tell nothing. Cancel safe.
    pub(super) async fn wait(&self) {
        tokio::time::sleep_until(self.looked + QUIET).await;
    }

    fn families(&self) -> impl Iterator<Item = Family> {
        let works = |family: &Family| !self.programs.able(*family).tables.is_empty();
        Family::ALL.into_iter().filter(works)
    }

    pub(super) async fn look(&mut self) -> Result<(), FilterError> {
        self.looked = Instant::now();
        let mut there = BTreeMap::new();
        for family in self.families() {
            there.insert(family, self.programs.observe(family, &self.tag).await?);
        }
        self.there = Some(there);
        Ok(())
    }

    pub(super) fn differs(&self, filter: Option<&Filter>) -> Result<bool, String> {
        let plans = self.plans(filter).map_err(|error| chain(&error))?;
        Ok(self.there.is_none() || !plans.is_empty())
    }

    pub(super) async fn set(&mut self, filter: Option<&Filter>) -> Result<(), FilterError> {
        if self.there.is_none() {
            self.look().await?;
        }
        for (family, change) in self.plans(filter)? {
            self.programs.apply(family, &change).await?;
        }
        self.look().await
    }

    fn plans(&self, filter: Option<&Filter>) -> Result<Vec<(Family, Restore)>, TagError> {
        let mut plans = Vec::new();
        for (family, there) in self.there.iter().flatten() {
            let wanted = self.wanted(filter, *family)?;
            plans.extend(plan(&wanted, there).map(|change| (*family, change)));
        }
        Ok(plans)
    }

    fn wanted(&self, filter: Option<&Filter>, family: Family) -> Result<Wanted, TagError> {
        match filter {
            Some(filter) => wanted(filter, family, &self.programs.able(family)),
            None => Wanted::nothing(&self.tag),
        }
    }

    pub(super) fn refused(&self, filter: &Filter) -> BTreeMap<PortForward, String> {
        if filter.forwards.is_empty() {
            return BTreeMap::new();
        }
        let wanted = Family::ALL
            .into_iter()
            .filter_map(|family| self.wanted(Some(filter), family).ok());
        let of = |lack: Lack| match &lack {
            Lack::Forward { forward, .. } => Some((forward.clone(), lack.to_string())),
            _ => None,
        };
        wanted.flat_map(|wanted| wanted.lacks).filter_map(of).collect()
    }

    pub(super) fn lacks(&self, filter: Option<&Filter>) -> Vec<String> {
        let wanted = self
            .families()
            .filter_map(|family| self.wanted(filter, family).ok());
        let all: BTreeSet<String> = wanted
            .flat_map(|wanted| wanted.lacks.into_iter().map(|lack| lack.to_string()))
            .collect();
        all.into_iter().collect() // both families may lack the same
    }
}
