//! What `sovereign doctor --json` says: schema `sovereign.doctor/1` (docs/doctor.schema.json).

use serde::Serialize;
use sovereign_protocol::condition::Status;
use sovereign_protocol::finding::Finding;
use sovereign_protocol::layers::{Explanation, Level};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::Phase;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::probe::Way;

use super::diagnose::{Elsewhere, Node};
use super::facts::{Configuration, Facts};
use super::observed::{Guest, Observation};

/// The schema's name.
pub(crate) const SCHEMA: &str = "sovereign.doctor/1";

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Diagnosis {
    pub(crate) schema: &'static str,
    pub(crate) instance: Name,
    /// RFC 3339 UTC: ages count back from here.
    pub(crate) at: String,
    /// True without a finding.
    pub(crate) ok: bool,
    /// Whom the diagnosis stands on.
    pub(crate) sources: Vec<Source>,
    pub(crate) guests: Vec<GuestPicture>,
    /// Lowest level first, then by guest.
    pub(crate) findings: Vec<Finding>,
    pub(crate) network: Network,
}

/// What was seen of the host's network for this diagnosis.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Network {
    /// Where the kernel would send packets of guests and for them, and which rule decides that.
    pub(crate) probes: Vec<ProbePicture>,
    /// What `doctor --fix=NAME` would remove.
    pub(crate) leftovers: Vec<LeftoverPicture>,
    /// What could not be looked at, and why.
    pub(crate) unseen: Vec<String>,
}

/// One question to the kernel, with its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ProbePicture {
    pub(crate) family: Family,
    pub(crate) way: Way,
    pub(crate) text: String,
}

/// A leftover of a script.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LeftoverPicture {
    pub(crate) name: String,
    pub(crate) items: Vec<String>,
}

impl Network {
    fn of(facts: &Facts) -> Self {
        let view = match &facts.network {
            Ok(view) => view,
            Err(failure) => {
                return Self {
                    unseen: vec![format!("{}: {}", failure.reason, failure.evidence)],
                    ..Self::default()
                };
            }
        };
        let probes = view.probes.iter().map(|probe| ProbePicture {
            family: probe.question.family,
            way: probe.question.way,
            text: probe.text.clone(),
        });
        let leftovers = view.leftovers.iter().map(|leftover| LeftoverPicture {
            name: leftover.name.to_string(),
            items: leftover.items.iter().map(|(_, text)| text.clone()).collect(),
        });
        Self {
            probes: probes.collect(),
            leftovers: leftovers.collect(),
            unseen: view.unseen.clone(),
        }
    }
}

/// Somebody who was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) answered: bool,
    pub(crate) evidence: String,
}

/// One guest by layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct GuestPicture {
    pub(crate) name: Name,
    /// Unknown without a host agent.
    pub(crate) phase: Option<Phase>,
    pub(crate) ready: Status,
    pub(crate) layers: Vec<LayerPicture>,
}

/// One subject of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct LayerPicture {
    pub(crate) layer: Level,
    pub(crate) subject: String,
    pub(crate) status: Status,
    pub(crate) reason: String,
    pub(crate) evidence: String,
    pub(crate) source: &'static str,
    pub(crate) age_ms: u64,
    pub(crate) verdict: Judgement,
    /// The findings that explain it.
    pub(crate) blocked_by: Vec<Place>,
}

/// What the diagnosis makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Judgement {
    /// It answered.
    Holds,
    /// It is broken, and nothing below it is.
    Finding,
    /// A finding below it explains it.
    Blocked,
    /// It was not observed, and nothing explains that.
    Unknown,
}

/// A subject of a level.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Place {
    /// Another guest that it is of; nothing for one of the same guest.
    pub(crate) guest: Option<Name>,
    pub(crate) layer: Level,
    pub(crate) subject: String,
}

pub(super) fn diagnosis(
    facts: &Facts,
    host: &Observation,
    guests: Vec<GuestPicture>,
    mut findings: Vec<Finding>,
) -> Diagnosis {
    findings.sort_by(|a, b| (a.layer, &a.guest, &a.subject).cmp(&(b.layer, &b.guest, &b.subject)));
    Diagnosis {
        schema: SCHEMA,
        instance: facts.layout.instance.clone(),
        at: facts.at.clone(),
        ok: findings.is_empty(),
        sources: sources(facts, host),
        guests,
        network: Network::of(facts),
        findings,
    }
}

fn sources(facts: &Facts, host: &Observation) -> Vec<Source> {
    let (valid, configuration) = match &facts.configuration {
        Configuration::Valid { path, guests } => {
            let names: Vec<&str> = guests.iter().map(Name::as_str).collect();
            (true, format!("{} wants {}", path.display(), list(&names)))
        }
        Configuration::Unusable { failure, .. } => (false, failure.evidence.clone()),
    };
    let inspection = match &facts.inspection {
        Ok(inspection) => {
            let names: Vec<&str> = inspection
                .guests
                .iter()
                .map(|guest| guest.name.as_str())
                .collect();
            (true, format!("looked past the host agent at: {}", list(&names)))
        }
        Err(failure) => (false, format!("{}: {}", failure.reason, failure.evidence)),
    };
    let source = |name, answered, evidence| Source {
        name,
        answered,
        evidence,
    };
    vec![
        source("configuration", valid, configuration),
        source(
            "host agent",
            host.status == Status::True,
            format!("{}: {}", host.reason, host.evidence),
        ),
        source("inspect", inspection.0, inspection.1),
    ]
}

fn list(names: &[&str]) -> String {
    if names.is_empty() {
        "no guest".to_owned()
    } else {
        names.join(", ")
    }
}

pub(super) fn guest(
    guest: &Guest,
    host: &Observation,
    elsewhere: &[Elsewhere],
    explanations: &[Explanation<Node>],
) -> GuestPicture {
    let place = |node: &Node| {
        let about = match node {
            Node::Host => host,
            Node::Own(index) => &guest.observations[*index],
            Node::Elsewhere(index) => {
                let Elsewhere {
                    guest,
                    level,
                    subject,
                } = &elsewhere[*index];
                return Place {
                    guest: Some(guest.clone()),
                    layer: *level,
                    subject: subject.clone(),
                };
            }
        };
        Place {
            guest: None,
            layer: about.level,
            subject: about.subject.clone(),
        }
    };
    let layers = guest
        .observations
        .iter()
        .zip(explanations)
        .map(|(about, explanation)| {
            let (verdict, blocked_by) = match explanation {
                Explanation::Holds => (Judgement::Holds, Vec::new()),
                Explanation::Root => (Judgement::Finding, Vec::new()),
                Explanation::Blocked(by) => (Judgement::Blocked, by.iter().map(place).collect()),
                Explanation::Unexplained => (Judgement::Unknown, Vec::new()),
            };
            LayerPicture {
                layer: about.level,
                subject: about.subject.clone(),
                status: about.status,
                reason: about.reason.clone(),
                evidence: about.evidence.clone(),
                source: about.source,
                age_ms: about.age_ms,
                verdict,
                blocked_by,
            }
        });
    GuestPicture {
        name: guest.name.clone(),
        phase: guest.phase,
        ready: guest.ready.unwrap_or(Status::Unknown),
        layers: layers.collect(),
    }
}
