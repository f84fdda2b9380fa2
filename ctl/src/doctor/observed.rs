//! From facts to observations: one for each subject of each level, with its source and its age.

use sovereign_protocol::condition::{Layer, Status, Verdict};
use sovereign_protocol::inspection::{AgentSeen, GuestSeen, SocketSeen};
use sovereign_protocol::layers::Level;
use sovereign_protocol::mesh::ServiceRef;
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{GuestStatus, Phase, RequiredStatus};

use super::facts::{Agent, Configuration, Facts};

/// One thing that was observed, or that should have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Observation {
    pub(crate) level: Level,
    pub(crate) subject: String,
    pub(crate) status: Status,
    pub(crate) reason: String,
    pub(crate) evidence: String,
    /// Who saw it.
    pub(crate) source: &'static str,
    pub(crate) age_ms: u64,
}

impl Observation {
    pub(super) fn new(
        level: impl Into<Level>,
        subject: &str,
        verdict: Verdict,
        source: &'static str,
    ) -> Self {
        Self {
            level: level.into(),
            subject: subject.to_owned(),
            status: verdict.status,
            reason: verdict.reason,
            evidence: verdict.evidence,
            source,
            age_ms: 0,
        }
    }
}

/// A guest and what is known of it, in the order of the levels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Guest {
    pub(super) name: Name,
    pub(super) phase: Option<Phase>,
    pub(super) ready: Option<Status>,
    pub(super) observations: Vec<Observation>,
    /// What its services need of other guests: service, guest.
    pub(super) requires: Vec<(String, Name)>,
}

pub(super) const HOST_AGENT: &str = "host agent";
const GUEST_AGENT: &str = "guest agent";
pub(super) const SHIM: &str = "shim";
pub(super) const EXIT_RECORD: &str = "exit record";
pub(super) const FRESH_DIAL: &str = "fresh dial";
const SELF: &str = "doctor";

/// The configuration, when something is wrong with it.
pub(super) fn configuration(facts: &Facts) -> Option<Observation> {
    let Configuration::Unusable { failure, .. } = &facts.configuration else {
        return None;
    };
    // Without a file nothing says that one is needed while everything runs.
    if failure.reason == "NoConfiguration" && facts.status().is_some() {
        return None;
    }
    let verdict = Verdict::no(failure.reason.as_str(), &failure.evidence);
    Some(Observation::new(Level::Configuration, "", verdict, SELF))
}

/// The host agent.
pub(super) fn host(facts: &Facts) -> Observation {
    let verdict = match &facts.agent {
        Agent::Answered(report) => Verdict::yes("Answered", format!("it is at revision {}", report.revision)),
        Agent::NotRunning => not_running(facts),
        Agent::Failed(failure) => failed(facts, &failure.reason, &failure.evidence),
    };
    Observation::new(Level::Host, "", verdict, SELF)
}

fn not_running(facts: &Facts) -> Verdict {
    let inspection = match &facts.inspection {
        Ok(inspection) => inspection,
        Err(failure) if failure.reason == "MissingBinary" => {
            return Verdict::no("MissingBinary", &failure.evidence);
        }
        Err(failure) => {
            let text = format!("nobody listens, and a look past it failed: {}", failure.evidence);
            return Verdict::no("NothingRuns", text);
        }
    };
    if let Some(holder) = inspection.agent.holder {
        let text = format!("pid {} holds the lock, in state {}", holder.pid, holder.state);
        return Verdict::no("HostAgentNotListening", text);
    }
    let left: Vec<String> = inspection
        .guests
        .iter()
        .filter_map(|guest| match guest.shim {
            SocketSeen::Absent => None,
            SocketSeen::Refused => Some(format!("the shim of {} is dead", guest.name)),
            SocketSeen::Accepted => Some(format!("the shim of {} runs", guest.name)),
        })
        .collect();
    let died = inspection.agent.control == SocketSeen::Refused;
    match (left.is_empty(), died) {
        (true, false) => Verdict::no("NothingRuns", "no lock, no control socket, no shim"),
        (false, _) => {
            let text = format!("nobody holds the lock; {}", left.join(", "));
            Verdict::no("HostAgentDown", text)
        }
        (true, true) => Verdict::no(
            "HostAgentDown",
            "nobody holds the lock, and the control socket is left: it was killed",
        ),
    }
}

fn failed(facts: &Facts, reason: &str, evidence: &str) -> Verdict {
    let holder = facts.inspection.as_ref().ok().and_then(|i| i.agent.holder);
    let silent = matches!(reason, "HandshakeTimeout" | "DialTimeout" | "CallTimeout");
    match holder {
        Some(holder) if matches!(holder.state, 'T' | 't') => {
            let text = format!("pid {} is in state {}; {evidence}", holder.pid, holder.state);
            Verdict::no("HostAgentStopped", text)
        }
        Some(holder) if silent => {
            let text = format!("pid {} is in state {}; {evidence}", holder.pid, holder.state);
            Verdict::no("HostAgentSilent", text)
        }
        _ if silent => Verdict::no("HostAgentSilent", evidence),
        _ => Verdict::no(reason, evidence),
    }
}

/// The guests that something is to be said about.
pub(super) fn guests(facts: &Facts) -> Vec<Guest> {
    match (facts.status(), &facts.inspection) {
        (Some(report), _) => report
            .guests
            .iter()
            .filter_map(|status| reported(facts, status))
            .collect(),
        (None, Ok(inspection)) => {
            let wanted = |seen: &&GuestSeen| was_left(seen, &inspection.agent);
            inspection.guests.iter().filter(wanted).map(inspected).collect()
        }
        (None, Err(_)) => Vec::new(),
    }
}

/// A guest by the host agent's report; `None` for one that is stopped and that nobody wants any more.
fn reported(facts: &Facts, status: &GuestStatus) -> Option<Guest> {
    if status.phase == Phase::Stopped && !facts.may_be_wanted(&status.name) {
        return None;
    }
    let mut observations: Vec<Observation> = status
        .conditions
        .iter()
        .map(|condition| Observation {
            level: condition.layer.into(),
            subject: condition.subject.clone(),
            status: condition.status,
            reason: condition.reason.clone(),
            evidence: condition.evidence.clone(),
            source: source(condition.layer, &condition.subject),
            age_ms: condition.age_ms,
        })
        .collect();
    if let Some(seen) = facts.seen(&status.name) {
        for fresh in contradictions(status, seen) {
            observations.retain(|old| old.level != fresh.level);
            observations.push(fresh);
        }
    }
    Some(sorted(Guest {
        name: status.name.clone(),
        phase: Some(status.phase),
        ready: Some(status.ready),
        observations,
        requires: status.requires.iter().filter_map(required).collect(),
    }))
}

fn required(required: &RequiredStatus) -> Option<(String, Name)> {
    let of: ServiceRef = required.of.parse().ok()?;
    Some((required.service.to_string(), of.guest))
}

/// The host measures clocks and sees its own side itself; the rest it has from the guest agent.
fn source(layer: Layer, subject: &str) -> &'static str {
    match layer {
        Layer::Vmm | Layer::Session | Layer::Tap | Layer::Routing | Layer::Nat | Layer::Forward => HOST_AGENT,
        Layer::Clock if subject == "offset" => HOST_AGENT,
        Layer::Service if subject.ends_with(".requires") => HOST_AGENT,
        _ => GUEST_AGENT,
    }
}

/// What a fresh look denies although the report still says that it holds.
fn contradictions(status: &GuestStatus, seen: &GuestSeen) -> Vec<Observation> {
    let holds = |layer: Layer| {
        let mut conditions = status.conditions.iter();
        conditions.any(|c| c.layer == layer && c.status == Status::True)
    };
    let mut found = Vec::new();
    if holds(Layer::Vmm) && seen.running.status != Status::True {
        found.push(Observation::new(Layer::Vmm, "vmm", seen.running.clone(), SHIM));
    }
    if holds(Layer::Session) && seen.session.status != Status::True {
        found.push(Observation::new(
            Layer::Session,
            "agent",
            seen.session.clone(),
            FRESH_DIAL,
        ));
    }
    found
}

/// True when report and fresh look do not agree: one of them is older, so look again.
pub(crate) fn contradicts(facts: &Facts) -> bool {
    let report = facts.status().map_or(&[][..], |report| &report.guests);
    report.iter().any(|status| {
        let seen = facts.seen(&status.name);
        seen.is_some_and(|seen| !contradictions(status, seen).is_empty() || seen.boot_id != status.boot_id)
    })
}

/// Without a host agent: a guest with a shim, or one whose end the agent did not see or did not want.
fn was_left(seen: &GuestSeen, agent: &AgentSeen) -> bool {
    if seen.shim != SocketSeen::Absent {
        return true;
    }
    let Some(exit) = &seen.exit else { return false };
    let orderly = matches!(exit.reason.as_str(), "PoweredOff" | "Killed");
    let unseen = agent.log_age_ms.is_none_or(|log_age_ms| exit.age_ms < log_age_ms);
    let died = agent.control == SocketSeen::Refused;
    !orderly && (unseen || died)
}

/// A guest as it was seen past a host agent that is not there.
fn inspected(seen: &GuestSeen) -> Guest {
    let (source, age_ms) = seen
        .exit
        .as_ref()
        .map_or((SHIM, 0), |exit| (EXIT_RECORD, exit.age_ms));
    let mut observations = vec![
        Observation {
            age_ms,
            ..Observation::new(Layer::Vmm, "vmm", seen.running.clone(), source)
        },
        Observation::new(Layer::Session, "agent", seen.session.clone(), FRESH_DIAL),
    ];
    observations.extend(seen.conditions.iter().map(|condition| Observation {
        age_ms: condition.age_ms,
        ..Observation::new(
            condition.key.layer,
            &condition.key.subject,
            condition.verdict.clone(),
            GUEST_AGENT,
        )
    }));
    let unserved = Verdict::unknown("NotServed", "forwards are served by the host agent");
    observations.push(Observation::new(Layer::Forward, "all", unserved, SELF));
    sorted(Guest {
        name: seen.name.clone(),
        phase: None,
        ready: None,
        observations,
        requires: Vec::new(),
    })
}

fn sorted(mut guest: Guest) -> Guest {
    guest
        .observations
        .sort_by(|a, b| (a.level, &a.subject).cmp(&(b.level, &b.subject)));
    guest
}
