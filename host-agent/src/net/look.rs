//! The namespace of this process as a plan needs it, for `sovereign plan` while no agent runs: read and never changed.
//!
//! Netlink dumps, files of /proc/sys/net, and `iptables-save` where there are no nf_tables; no lock, no record.

use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};
use sovereign_protocol::name::Name;
use sovereign_reconcile::filter::Filter;
use sovereign_reconcile::iptables as xtables;
use sovereign_reconcile::names::Mark;
use sovereign_reconcile::nft::{self, Standing};
use sovereign_reconcile::view::{FilterLook, NetworkLook};
use sovereign_reconcile::wanted::{NetworkSpec, Wanted};

use super::chain;
use super::filter::by_tables;
use super::iptables;
use super::kernel::Kernel;
use super::nft::{Nft, NftError};
use super::notify::RECEIVE_BUFFER;
use super::switches::{Place, Switches};
use crate::netns::{Stage, StageFailure, netfilter_socket, route_socket};

/// Looks at what `spec` of an instance is about; without one at what is left when nothing is wanted. `switched` is the
/// file that keeps what its switches were.
///
/// # Errors
/// The step that failed; a spec of which no network can be made.
pub async fn look(
    instance: &Name,
    spec: Option<&NetworkSpec>,
    switched: PathBuf,
) -> Result<NetworkLook, StageFailure> {
    let mut kernel = Kernel::over(route_socket()?);
    let mut observed = kernel
        .observe()
        .await
        .map_err(|error| StageFailure::new(Stage::Netlink, chain(&error)))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open("/proc/sys/net", flags, Mode::empty())
        .map_err(|error| StageFailure::io(Stage::Proc, &error.into()))?;
    let switches = Switches::open(Place::Directory(directory), switched);
    let switches = switches.map_err(|error| StageFailure::io(Stage::Proc, &error))?;
    let nothing = NetworkSpec::default(); // is about no switch but those that were changed
    let watched = Wanted::watched(instance, spec.unwrap_or(&nothing), switches.switched(), &observed);
    observed.sysctls = switches.read(&watched);
    let wanted = match spec {
        Some(spec) => Wanted::of(instance, spec, switches.switched(), &observed)
            .map_err(|error| StageFailure::new(Stage::Netlink, error.to_string()))?,
        None => Wanted::nothing(instance, switches.switched(), &observed),
    };
    Ok(NetworkLook {
        filter: filter(&Mark::of(instance).prefix, wanted.filter.as_ref()).await?,
        switched: switches.switched().clone().into_iter().collect(),
        observed,
    })
}

async fn filter(tag: &str, wanted: Option<&Filter>) -> Result<FilterLook, StageFailure> {
    let (requests, events) = (netfilter_socket()?, netfilter_socket()?);
    let Ok(mut nft) = Nft::over(requests, events, RECEIVE_BUFFER, tag) else {
        return Ok(chains(tag, wanted).await); // an ordinary user may not ask
    };
    Ok(match nft.observe().await {
        Ok(there) => tables(there, wanted),
        Err(error @ NftError::Conflict { .. }) => FilterLook::Blocked(chain(&error)),
        // A host agent that runs keeps it as it wants it.
        Err(NftError::Held { .. }) if wanted.is_some() => FilterLook::AsWanted,
        Err(NftError::Held { .. }) => FilterLook::Differs,
        Err(_) => chains(tag, wanted).await,
    })
}

/// Tables that a dead agent owned are taken over as they are.
fn tables(there: nft::Tables, wanted: Option<&Filter>) -> FilterLook {
    let steady = |mut table: nft::Table| {
        if !matches!(table.standing, Standing::Dormant | Standing::Unknown(_)) {
            table.standing = Standing::AsWanted;
        }
        table
    };
    let there: nft::Tables = there.into_iter().map(steady).collect();
    let Some(filter) = wanted else {
        return match there.is_empty() {
            true => FilterLook::AsWanted,
            false => FilterLook::Differs,
        };
    };
    let mut differs = FilterLook::Differs;
    for marks in [true, false] {
        // what is not there may be what this kernel lacks
        match by_tables::tables(filter, marks) {
            Ok(meant) if meant == there => return FilterLook::AsWanted,
            Ok(_) => {}
            Err(error) => differs = FilterLook::Blocked(chain(&error)),
        }
    }
    differs
}

/// Where programs make them, those of each variant that answers.
async fn chains(tag: &str, wanted: Option<&Filter>) -> FilterLook {
    let mut differs = wanted.is_some();
    for programs in iptables::installed() {
        for family in xtables::Family::ALL {
            let Ok(save) = programs.save(family).await else {
                continue; // not installed, or not working here
            };
            let there = xtables::parse(tag, &save);
            if xtables::remove(&there).is_none() {
                continue;
            }
            let has = |table: &xtables::Table| save.lines().any(|line| line == format!("*{}", table.name()));
            let known = xtables::Able {
                tables: xtables::Table::ALL.into_iter().filter(has).collect(),
                // What is not there of ours may be what this kernel lacks.
                marks: save
                    .lines()
                    .any(|line| line.contains(tag) && line.contains("CONNMARK")),
            };
            let meant = match wanted {
                Some(filter) => xtables::wanted(filter, family, &known),
                None => xtables::Wanted::nothing(tag),
            };
            match meant {
                Ok(meant) if xtables::plan(&meant, &there).is_none() => differs = false,
                Ok(_) => return FilterLook::Differs,
                Err(error) => return FilterLook::Blocked(chain(&error)),
            }
        }
    }
    match differs {
        true => FilterLook::Differs,
        false => FilterLook::AsWanted,
    }
}
