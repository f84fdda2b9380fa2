//! The readers of the kernel's messages as plain functions for the fuzz workspace.

use sovereign_reconcile::nft::differences;

use super::Tables;
use super::attributes::messages;
use super::monitor::Folded;
use super::wire::{Ownership, Reading, Script};
use crate::net::conntrack;

/// Of what the corpus is about.
const TAG: &str = "svgold";

/// A dump as tables, which are read again as they are written; and the same as news.
pub fn tables(data: &[u8]) {
    let there = read(data);
    let _ = differences(&there, &Tables::new());
    let mut script = Script::default();
    for table in &there {
        script.make(1, table, Ownership::Plain);
    }
    if let Some(written) = script.writer.finish() {
        let again = read(&written);
        assert_eq!(again.len(), there.len());
        for (mut again, table) in again.into_iter().zip(&there) {
            for (name, chain) in &mut again.chains {
                // What others set of a chain is told and never written.
                chain.oddities.clone_from(&table.chains[name].oddities);
            }
            assert_eq!(again.chains, table.chains);
        }
    }
    let mut folded = Folded::new(TAG, 7);
    let _ = folded.fold(data);
    let changes = folded.take_changes();
    assert!(changes.by.is_none() || changes.ours);
}

/// A dump of connections.
pub fn connections(data: &[u8]) {
    conntrack::fuzz(data);
}

fn read(data: &[u8]) -> Tables {
    let mut reading = Reading::new(TAG, Ownership::Plain, 7);
    for message in messages(data) {
        let Ok(message) = message else { break };
        let _ = reading.take(&message);
    }
    reading.finish()
}
