//! Leftovers of scripts, removed by name: each is looked at again right before, and nothing else is touched.

use std::fmt::Write;

use netlink_packet_route::RouteNetlinkMessage;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::Cards;
pub use sovereign_reconcile::finding::leftover::Removal;
use sovereign_reconcile::finding::leftover::{Copies, Item, Leftover, leftovers};
use sovereign_reconcile::iptables::Family as Programs;

use super::super::apply::{rule_message, seen_route};
use super::super::chain;
use super::super::iptables;
use super::super::kernel::Kernel;
use super::super::network::NetworkConfig;
use super::super::wanted::NetworkSpec;
use super::ExamineError;
use super::eyes::{Eyes, look_with};

/// Whether something is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is only told what would be.
    Dry,
    /// It is.
    Remove,
}

/// Removes all leftovers of some names, or nothing when one of them is not there.
pub(super) async fn remove(
    config: &NetworkConfig,
    spec: &NetworkSpec,
    names: &[String],
    mode: Mode,
) -> Result<Removal, ExamineError> {
    let mut eyes = Eyes::open(&config.ground).await.map_err(ExamineError::Look)?;
    let seen = look_with(&mut eyes, config, spec, Cards::default()).await?;
    let there = leftovers(&seen.look);
    let mut wanted: Vec<&Leftover> = Vec::new();
    for name in names {
        let found = there.iter().find(|leftover| leftover.name.as_str() == name);
        let not_there = || ExamineError::NotThere {
            name: name.clone(),
            there: there.iter().map(|leftover| leftover.name.to_string()).collect(),
        };
        let found = found.ok_or_else(not_there)?;
        if !wanted.contains(&found) {
            wanted.push(found);
        }
    }
    let mut removal = Removal::default();
    for (item, text) in wanted.into_iter().flat_map(|leftover| &leftover.items) {
        let outcome = match mode {
            Mode::Dry => Ok(()),
            Mode::Remove => one(&mut eyes.kernel, item).await,
        };
        match outcome {
            Ok(()) => removal.removed.push(text.clone()),
            Err(why) => removal.failed.push(format!("{text}: {why}")),
        }
    }
    Ok(removal)
}

async fn one(kernel: &mut Kernel, item: &Item) -> Result<(), String> {
    let message = match item {
        Item::Rule(rule) => RouteNetlinkMessage::DelRule(rule_message(rule)),
        Item::Route(route) => RouteNetlinkMessage::DelRoute(seen_route(route)),
        Item::Copies(copies) => return fewer(copies).await,
    };
    kernel.change(message, 0).await.map_err(|error| chain(&error))
}

/// All go and one comes back to the place of the first, in one change of the table: a rule is named by what it says, so
/// that no other can go in its place.
async fn fewer(copies: &Copies) -> Result<(), String> {
    let family = match copies.family {
        Family::V4 => Programs::V4,
        Family::V6 => Programs::V6,
    };
    let programs = iptables::installed();
    let by = programs
        .iter()
        .find(|programs| programs.saves_by(family) == copies.program);
    let by = by.ok_or_else(|| format!("{} is gone", copies.program))?;
    let mut text = format!("*{}\n", copies.table);
    for _ in 0..copies.count {
        let _ = writeln!(text, "-D {} {}", copies.chain, copies.rule); // a String takes all
    }
    let _ = writeln!(text, "-I {} {} {}", copies.chain, copies.first, copies.rule);
    text += "COMMIT\n";
    by.change(family, &text).await.map_err(|error| chain(&error))
}
