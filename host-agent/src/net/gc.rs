//! Removes what instances left in the namespace of this process, found by its marks alone.
//!
//! Needs no store, no configuration and no host agent; what is in use (a VMM holds a link, a process holds a table) is
//! left alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_reconcile::iptables as xtables;
use sovereign_reconcile::leftovers::{self, Whose};
use sovereign_reconcile::names::Mark;
use sovereign_reconcile::plan::Plan;

use super::chain;
use super::filter::Enforcer;
use super::ground::{self, Opened};
use super::iptables::{self, Namespace};
use super::kernel::Kernel;
use super::nft::Nft;
use super::switches::Switches;
use super::taps::{Source, TunPool};
use super::{apply, notify};
use crate::inspect::lock_holder;
use crate::netns::{Stage, StageFailure};

/// Instances whose records are looked for.
const INSTANCES: usize = 1_024;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub struct Collected {
    /// What was removed, or with a dry run would be, one line each.
    pub removed: Vec<String>,
    /// What could not be removed, and why.
    pub failed: Vec<String>,
    /// Instances that are in use, by how their links begin.
    pub used: BTreeSet<String>,
    /// What was left as it is, and why.
    pub left: Vec<String>,
}

/// Whether anything is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is only told.
    Dry,
    /// It is removed.
    Remove,
}

/// The records of switches of all instances below a directory whose host agent is dead.
#[must_use]
pub fn dead_records(states: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(states).into_iter().flatten().flatten();
    let mut records: Vec<PathBuf> = entries
        .take(INSTANCES)
        .filter_map(|entry| {
            let layout = Layout {
                instance: Name::parse(entry.file_name().to_str()?).ok()?,
                run: PathBuf::new(),
                state: entry.path(),
            };
            let is_dead = lock_holder(&layout.lock()).is_none();
            Some(layout.switched()).filter(|record| is_dead && record.exists())
        })
        .collect();
    records.sort();
    records
}

/// Collects the leftovers of one instance, or of all that are not in use. `switched` are the files that keep what
/// switches were, where they are known: those that are still as we set them are put back, unless another instance is in
/// use, which may need them.
///
/// # Errors
/// The step that failed before anything was changed.
pub async fn collect(
    instance: Option<&Name>,
    switched: Vec<PathBuf>,
    mode: Mode,
) -> Result<Collected, StageFailure> {
    let Opened {
        requests,
        netfilter,
        switches: place,
        ..
    } = ground::open_own()?;
    let mut kernel = Kernel::over(requests);
    let observed = kernel.observe().await;
    let observed = observed.map_err(|error| StageFailure::new(Stage::Netlink, chain(&error)))?;
    let mut collected = Collected {
        used: leftovers::used(&observed),
        ..Collected::default()
    };
    let mut nft = netfilter.and_then(|(requests, events)| {
        Nft::over(requests, events, notify::RECEIVE_BUFFER, "sovereign-gc").ok()
    });
    // A kernel without nf_tables has no tables of ours.
    let tables = match &mut nft {
        Some(nft) => nft.leftovers().await.unwrap_or_default(),
        None => BTreeSet::new(),
    };
    let held = tables.iter().filter(|table| table.held.is_some());
    collected.used.extend(held.map(|table| table.tag.clone()));
    let whose = match instance {
        Some(instance) => Whose::One(Mark::of(instance)),
        None => Whose::AllBut(collected.used.clone()),
    };
    let plan = leftovers::plan(&whose, &observed);
    for table in tables.iter().filter(|table| whose.includes(&table.tag)) {
        let name = format!("packet filter table {} {}: remove", table.family, table.name);
        let outcome = match (&mut nft, mode) {
            (Some(nft), Mode::Remove) => nft.remove_leftover(table).await.map_err(|error| chain(&error)),
            _ => Ok(()),
        };
        collected.note(name, outcome);
    }
    collected.chains(&whose, mode).await;
    let io = |error| StageFailure::io(Stage::Proc, &error);
    let mut none = Switches::open(place.try_clone().map_err(io)?, PathBuf::new()).map_err(io)?;
    collected
        .plan(&plan, mode, &mut kernel, &mut none, &observed)
        .await;
    let ours = instance.map(|instance| Mark::of(instance).prefix);
    let others = collected.used.iter().any(|used| Some(used) != ours.as_ref());
    let mut told = BTreeSet::new();
    for record in switched {
        let mut switches = match place
            .try_clone()
            .and_then(|place| Switches::open(place, record.clone()))
        {
            Ok(switches) => switches,
            Err(error) => {
                collected.failed.push(error.to_string()); // with its path
                continue;
            }
        };
        let passed_over = match mode {
            Mode::Dry => switches.unreadable(),
            Mode::Remove => switches.set_aside(),
        };
        collected.failed.extend(passed_over);
        let mut plan = Plan::default();
        // One that two instances set is put back once.
        let steps = switches.to_restore().into_iter();
        plan.steps
            .extend(steps.filter(|step| mode == Mode::Remove || told.insert(step.to_string())));
        if others {
            let steps = plan.steps.iter();
            collected
                .left
                .extend(steps.map(|step| format!("{step}: another instance is in use")));
            continue;
        }
        collected
            .plan(&plan, mode, &mut kernel, &mut switches, &observed)
            .await;
        // What is left in it is of another boot, or somebody set it since.
        if mode == Mode::Remove
            && switches.to_restore().is_empty()
            && switches.unreadable().is_none()
            && let Err(error) = crate::files::remove(&record)
        {
            collected.failed.push(format!("{error:#}"));
        }
    }
    Ok(collected)
}

impl Collected {
    fn note(&mut self, what: String, outcome: Result<(), String>) {
        match outcome {
            Ok(()) => self.removed.push(what),
            Err(why) => self.failed.push(format!("{what}: {why}")),
        }
    }

    async fn plan(
        &mut self,
        plan: &Plan,
        mode: Mode,
        kernel: &mut Kernel,
        switches: &mut Switches,
        observed: &super::Observed,
    ) {
        let tuns = TunPool::new(Source::Own, Vec::new());
        let mut enforcer = Enforcer::None(String::new());
        let failures = match mode {
            Mode::Dry => Vec::new(),
            Mode::Remove => {
                let means = apply::Means {
                    kernel,
                    tuns: &tuns,
                    switches,
                    enforcer: &mut enforcer,
                    filter: None,
                };
                apply::apply(plan, observed, means).await
            }
        };
        for step in &plan.steps {
            let failure = failures.iter().find(|failure| failure.step == *step);
            let outcome = failure.map_or(Ok(()), |failure| Err(chain(&failure.error)));
            self.note(step.to_string(), outcome);
        }
    }

    /// In the tables of every variant of iptables that works: legacy and nft ones do not see each other's.
    async fn chains(&mut self, whose: &Whose, mode: Mode) {
        let mut working = None; // found out by changing nothing, which still makes empty tables
        for programs in iptables::installed() {
            for family in xtables::Family::ALL {
                let Ok(save) = programs.save(family).await else {
                    continue; // not installed, or not working here
                };
                for tag in xtables::tags(&save).into_iter().filter(|tag| whose.includes(tag)) {
                    let Some(change) = xtables::remove(&xtables::parse(&tag, &save)) else {
                        continue;
                    };
                    let outcome = match mode {
                        Mode::Dry => Ok(()),
                        Mode::Remove => {
                            if working.is_none() {
                                let found = iptables::probe(Namespace::Own).await;
                                working = Some(found.map(|found| found.working).unwrap_or_default());
                            }
                            let all = working.as_deref().unwrap_or_default();
                            let found = all.iter().find(|other| other.variant() == programs.variant());
                            found.unwrap_or(&programs).apply(family, &change).await
                        }
                    };
                    let what = format!("packet filter chains {family} {tag}: remove");
                    self.note(what, outcome.map_err(|error| chain(&error)));
                }
            }
        }
    }
}
