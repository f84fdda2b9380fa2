//! PID 1: reads boot.json, mounts, loads modules, then keeps the agent alive until power-off.
//!
//! Synchronous and single-threaded; parses nothing from outside but boot.json and the
//! headers of disks. Whatever fails after the agent disk is mounted is a fact for the agent,
//! not an end: a guest that cannot speak explains nothing.

mod boot;
pub mod data;
pub mod disks;
mod mounts;
mod supervise;
pub mod watchdog;

use sovereign_protocol::boot::BootRecord;

use crate::facts::{BootFacts, Step};
use crate::handover::Handover;
use crate::log;
use crate::{clock, places};

/// Boots the guest and supervises the agent; never returns.
pub fn run() -> ! {
    let mut tried = Tried::default();
    let record = match boot::root(&mut tried) {
        Ok(record) => record,
        Err(reason) => fatal(&reason),
    };
    boot::rest(&mut tried, &record);
    if let Err(error) = tried.facts.write(places::FACTS.as_ref()) {
        log::line("cannot write the boot facts", &[("error", &error)]);
    }
    supervise::run(&handover(record))
}

fn handover(record: BootRecord) -> Handover {
    Handover {
        boot_id: record.boot_id,
        key: record.key,
        port: record.port,
    }
}

/// The end of PID 1 is a kernel panic; with panic=-1 the machine resets and the VMM ends.
fn fatal(reason: &str) -> ! {
    log::line("this guest cannot boot", &[("reason", &reason)]);
    std::process::exit(1)
}

/// Keeps account of what was tried.
#[derive(Debug, Default)]
struct Tried {
    facts: BootFacts,
}

impl Tried {
    /// Notes how a step came out; failures also go to the console.
    fn note<T, E: std::fmt::Display>(&mut self, name: impl Into<String>, outcome: Result<T, E>) -> Option<T> {
        let name = name.into();
        let (value, error) = match outcome {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error.to_string())),
        };
        if let Some(error) = &error {
            log::line("a step of the boot failed", &[("step", &name), ("error", error)]);
        }
        self.facts.steps.push(Step {
            name,
            error,
            at_ms: clock::boot_ms(),
        });
        value
    }

    /// As [`Tried::note`] for a step without which there is no guest.
    fn must<T, E: std::fmt::Display>(&mut self, name: &str, outcome: Result<T, E>) -> Result<T, String> {
        let text = outcome.as_ref().err().map(ToString::to_string);
        self.note(name, outcome)
            .ok_or_else(|| format!("{name}: {}", text.unwrap_or_default()))
    }
}
