//! What supports a finding: the observation itself, and what else was seen near it.

use sovereign_protocol::condition::Layer;
use sovereign_protocol::finding::Evidence;
use sovereign_protocol::inspection::{AgentSeen, DiskSeen, GuestSeen};
use sovereign_protocol::layers::Level;
use sovereign_protocol::name::Name;

use super::facts::Facts;
use super::observed::{EXIT_RECORD, FRESH_DIAL, Observation, SHIM};

/// The evidence of a finding, most telling first; never empty.
pub(super) fn of(facts: &Facts, guest: Option<&Name>, about: &Observation) -> Vec<Evidence> {
    let own = if about.evidence.is_empty() {
        about.reason.clone()
    } else {
        about.evidence.clone()
    };
    let mut found = vec![evidence(about.source, about.age_ms, own)];
    match (about.level, guest.and_then(|guest| facts.seen(guest))) {
        (Level::Host, _) => {
            if let Ok(inspection) = &facts.inspection {
                found.extend(host(&inspection.agent));
                found.extend(inspection.guests.iter().flat_map(left));
            }
        }
        (Level::Layer(Layer::Vmm), Some(seen)) => {
            found.extend(vmm(about, seen));
            found.extend(ends(facts, about, &seen.name));
            found.extend(console(seen));
        }
        (Level::Layer(Layer::Session), Some(seen)) => {
            found.extend(session(about, seen));
            found.extend(ends(facts, about, &seen.name));
            found.extend(console(seen));
        }
        (Level::Layer(Layer::Disk), Some(seen)) => found.push(disk(&seen.disk)),
        (Level::Layer(_), Some(seen)) => found.extend(ends(facts, about, &seen.name)),
        (Level::Configuration | Level::Layer(_), _) => {}
    }
    found
}

fn evidence(source: &str, age_ms: u64, text: impl Into<String>) -> Evidence {
    Evidence {
        source: source.to_owned(),
        age_ms,
        text: text.into(),
    }
}

fn host(agent: &AgentSeen) -> Option<Evidence> {
    let last = agent.log.last()?;
    Some(evidence(
        "host agent's log",
        agent.log_age_ms.unwrap_or(0),
        format!("ends with: {last}"),
    ))
}

/// A guest beside a host agent that is not there.
fn left(seen: &GuestSeen) -> Option<Evidence> {
    match (&seen.vmm, &seen.exit) {
        (Some(vmm), _) => {
            let text = format!(
                "guest {}: {} pid {}, {}; its agent: {}",
                seen.name, vmm.kind, vmm.pid, seen.running.reason, seen.session.reason
            );
            Some(evidence(SHIM, 0, text))
        }
        (None, Some(exit)) => {
            let text = format!("guest {} ended: {}, {}", seen.name, exit.reason, exit.evidence);
            Some(evidence(EXIT_RECORD, exit.age_ms, text))
        }
        (None, None) => None,
    }
}

fn vmm(about: &Observation, seen: &GuestSeen) -> Vec<Evidence> {
    let mut found = Vec::new();
    if seen.running.evidence != about.evidence {
        let text = format!("{}: {}", seen.running.reason, seen.running.evidence);
        found.push(evidence(SHIM, 0, text));
    }
    if let Some(process) = seen.process {
        let text = format!("its process, pid {}, is in state {}", process.pid, process.state);
        found.push(evidence("/proc", 0, text));
    }
    if let Some(exit) = seen.exit.as_ref().filter(|_| about.source != EXIT_RECORD) {
        let text = format!("the last boot ended with {}: {}", exit.reason, exit.evidence);
        found.push(evidence(EXIT_RECORD, exit.age_ms, text));
    }
    found
}

fn session(about: &Observation, seen: &GuestSeen) -> Vec<Evidence> {
    let mut found = vec![evidence(
        SHIM,
        0,
        format!("vmm {}: {}", seen.running.reason, seen.running.evidence),
    )];
    if about.source != FRESH_DIAL {
        let text = format!("{}: {}", seen.session.reason, seen.session.evidence);
        found.push(evidence(FRESH_DIAL, 0, text));
    }
    found
}

/// Why the guest boots again, if it does.
fn ends(facts: &Facts, about: &Observation, guest: &Name) -> Option<Evidence> {
    let mut ends = facts.ends.iter().rev();
    let (record, age_ms) = ends.find(|(record, _)| record.guest == guest.as_str())?;
    if record.evidence == about.evidence {
        return None; // it is this end
    }
    let text = format!(
        "an earlier boot ended with {}: {}",
        record.reason, record.evidence
    );
    Some(evidence("journal", *age_ms, text))
}

fn console(seen: &GuestSeen) -> Option<Evidence> {
    let console = seen.console.as_ref()?;
    let text = match (&console.panic, console.last.last()) {
        (Some(panic), _) => format!("says: {panic}"),
        (None, Some(last)) => format!("ends with: {last}"),
        (None, None) => "is empty".to_owned(),
    };
    Some(evidence("console", console.age_ms, text))
}

fn disk(disk: &DiskSeen) -> Evidence {
    let text = match disk {
        DiskSeen::Absent => "the host has no file for it".to_owned(),
        DiskSeen::Present { bytes, used_bytes } => {
            format!(
                "the host's file has {} MiB, of which {} MiB are used",
                bytes >> 20,
                used_bytes >> 20
            )
        }
        DiskSeen::Unreadable(error) => format!("the host cannot look at its file: {error}"),
    };
    evidence("data disk", 0, text)
}
