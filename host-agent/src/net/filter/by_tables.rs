//! By nf_tables: those of our tables that are not as meant are replaced as a whole, in one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use sovereign_reconcile::filter::{Filter, PortForward};
use sovereign_reconcile::nft::{self, Family};

use super::super::nft::{Able, FAMILIES, Nft, NftError, Ownership};
use super::{FilterError, chain};

/// What is there of ours.
enum There {
    /// Nobody has looked, or somebody else changed it since.
    Unknown,
    /// A table has our name and not our mark, or is held by another process.
    Blocked(String),
    /// These, but for those families of which somebody else changed something since.
    Seen(nft::Tables, BTreeSet<Family>),
}

/// Our tables.
pub(in super::super) struct Tables {
    nft: Nft,
    able: Able,
    there: There,
    /// What the last filter that was asked for means, so that it is not worked out at each turn.
    meant: Option<(Filter, nft::Tables)>,
}

impl Tables {
    /// What an agent left that is gone is taken over as it is: then a restart changes no rule.
    pub(super) async fn of(mut nft: Nft, able: Able) -> Self {
        nft.set_ownership(able.ownership);
        let _ = nft.adopt().await; // the look that follows says what is in the way
        Self {
            nft,
            able,
            there: There::Unknown,
            meant: None,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        match self.able.ownership {
            Ownership::Owned => "nf_tables, owned by the host agent",
            Ownership::Plain => "nf_tables",
        }
    }

    pub(super) async fn wait(&mut self) -> io::Result<()> {
        self.nft.wait().await
    }

    /// A change by somebody else is not looked at: it is undone whatever it was.
    pub(super) async fn take(&mut self) -> Result<Option<String>, FilterError> {
        let changes = self.nft.take().map_err(|error| NftError::NoAnswer(Some(error)))?;
        if changes.lost {
            self.look().await?;
        } else if let There::Seen(_, doubtful) = &mut self.there {
            doubtful.extend(&changes.families);
        } else if changes.ours {
            self.there = There::Unknown;
        }
        let by = changes.by.filter(|_| changes.ours);
        Ok(by.map(|other| format!("process {} ({})", other.pid, other.name.escape_debug())))
    }

    pub(super) async fn look(&mut self) -> Result<(), FilterError> {
        self.nft.take().map_err(|error| NftError::NoAnswer(Some(error)))?; // older than the look
        self.there = match self.nft.observe().await {
            Ok(there) => There::Seen(there, BTreeSet::new()),
            Err(error) if error.socket_lives() => There::Blocked(chain(&error)),
            Err(error) => return Err(error.into()),
        };
        Ok(())
    }

    pub(super) fn differs(&mut self, filter: Option<&Filter>) -> Result<bool, String> {
        self.mean(filter).map_err(|error| chain(&error))?;
        match &self.there {
            There::Unknown => Ok(true),
            There::Blocked(why) => Err(why.clone()),
            There::Seen(..) => Ok(!self.differing().is_empty()),
        }
    }

    /// The families of which the table is not as meant, or may not be.
    fn differing(&self) -> BTreeSet<Family> {
        let There::Seen(there, doubtful) = &self.there else {
            return FAMILIES.into();
        };
        let nothing = nft::Tables::new();
        let meant = self.meant.as_ref().map_or(&nothing, |(_, meant)| meant);
        let others = there.symmetric_difference(meant).map(|table| table.family);
        others.chain(doubtful.iter().copied()).collect()
    }

    pub(super) async fn set(&mut self, filter: Option<&Filter>) -> Result<(), FilterError> {
        self.mean(filter)?;
        let nothing = nft::Tables::new();
        let meant = self.meant.as_ref().map_or(&nothing, |(_, meant)| meant);
        let families = self.differing();
        self.there = There::Unknown;
        self.nft.replace(meant, &families).await?;
        self.there = There::Seen(meant.clone(), BTreeSet::new()); // the transaction was this, whole
        Ok(())
    }

    /// What was asked for and is not done, for status.
    pub(super) fn lacks(&self, filter: &Filter) -> Vec<String> {
        let unmarked = "this kernel has no marks of connections (CONFIG_NF_CONNTRACK_MARK): answers to who asks by another \
                        link than the way out go astray";
        let lacks_marks = !self.able.marks && !filter.answers.is_empty();
        let marks = lacks_marks.then(|| unmarked.to_owned());
        refused(filter).into_values().chain(marks).collect()
    }

    fn mean(&mut self, filter: Option<&Filter>) -> Result<(), nft::FilterError> {
        if self.meant.as_ref().map(|(of, _)| of) == filter {
            return Ok(());
        }
        self.meant = None;
        self.meant = match filter {
            Some(filter) => Some((filter.clone(), tables(filter, self.able.marks)?)),
            None => None,
        };
        Ok(())
    }
}

/// What a filter means, but for the forwards that cannot be said, and without marks where connections have none.
pub(in super::super) fn tables(filter: &Filter, marks: bool) -> Result<nft::Tables, nft::FilterError> {
    let refused = nft::impossible(filter);
    if refused.is_empty() && (marks || filter.answers.is_empty()) {
        return nft::tables(filter);
    }
    let mut possible = filter.clone();
    if !marks {
        possible.answers.clear();
    }
    possible.forwards.retain(|forward| !refused.contains_key(forward));
    nft::tables(&possible)
}

/// The forwards that cannot be said in nf_tables, and why.
pub(super) fn refused(filter: &Filter) -> BTreeMap<PortForward, String> {
    let why = |(forward, error): (PortForward, nft::FilterError)| {
        let text = format!(
            "{} {} to {}: {error}",
            forward.transport, forward.ports, forward.to
        );
        (forward, text)
    };
    nft::impossible(filter).into_iter().map(why).collect()
}
