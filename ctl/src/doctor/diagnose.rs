//! The verdict: which observations are findings, and what explains the others.

use sovereign_protocol::condition::{Layer, Status, Verdict};
use sovereign_protocol::finding::{CounterTest, Finding};
use sovereign_protocol::layers::{Explanation, Level, Standing, TailscaleMode, ancestors, explain};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::Phase;

use super::evidence;
use super::facts::Facts;
use super::network;
use super::observed::{self, Guest, HOST_AGENT, Observation};
use super::report::{self, Diagnosis};
use super::table::{self, Kind};
use super::words::fill;

/// Decides what is broken, what that explains, and what is to be done.
pub(crate) fn diagnose(facts: &Facts) -> Diagnosis {
    let mut findings = Vec::new();
    let configuration = observed::configuration(facts);
    findings.extend(configuration.iter().map(|about| finding(facts, None, about)));
    let host = observed::host(facts);
    // Nothing runs because nothing can: that is one finding, not two.
    let explained = host.reason == "NothingRuns" && configuration.is_some();
    if host.status != Status::True && !explained {
        findings.push(finding(facts, None, &host));
    }
    findings.extend(network::findings(facts));
    let mut guests = Vec::new();
    let mut roots: Vec<Elsewhere> = Vec::new();
    for mut guest in needed_first(observed::guests(facts)) {
        let mut elsewhere = roots.clone();
        elsewhere.retain(|root| guest.requires.iter().any(|(_, needed)| *needed == root.guest));
        let explanations = judge(facts, &host, &mut guest, &elsewhere);
        for (about, explanation) in guest.observations.iter().zip(&explanations) {
            if *explanation == Explanation::Root {
                findings.push(finding(facts, Some(&guest.name), about));
                roots.extend(Elsewhere::of(&guest, about));
            }
        }
        guests.push(report::guest(&guest, &host, &elsewhere, &explanations));
    }
    guests.sort_by(|a, b| a.name.cmp(&b.name));
    report::diagnosis(facts, &host, guests, findings)
}

/// What is broken in a guest that others need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Elsewhere {
    pub(super) guest: Name,
    pub(super) level: Level,
    pub(super) subject: String,
}

impl Elsewhere {
    /// A root that keeps a guest's services from others; a forward or Tailscale of its own does not.
    fn of(guest: &Guest, about: &Observation) -> Option<Self> {
        let service = Level::Layer(Layer::Service);
        let carries =
            about.level == service || ancestors(service, TailscaleMode::Userspace).contains(&about.level);
        carries.then(|| Self {
            guest: guest.name.clone(),
            level: about.level,
            subject: about.subject.clone(),
        })
    }
}

/// The guests with each after all that it needs; nobody needs itself (the contract refuses that).
fn needed_first(mut guests: Vec<Guest>) -> Vec<Guest> {
    let mut sorted: Vec<Guest> = Vec::new();
    while !guests.is_empty() {
        let free = |guest: &Guest| {
            let waits = |needed: &Name| guests.iter().any(|other| other.name == *needed);
            !guest.requires.iter().any(|(_, needed)| waits(needed))
        };
        let next = guests.iter().position(free).unwrap_or(0);
        sorted.push(guests.remove(next));
    }
    sorted
}

/// Where in a guest's graph an observation is: the host agent, one of the guest's own by its place in the list, or one
/// of another guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    Host,
    Own(usize),
    /// By its place among what is broken in the guests that this one needs.
    Elsewhere(usize),
}

/// Explains each observation of a guest. One that is not ready never goes without a finding.
fn judge(
    facts: &Facts,
    host: &Observation,
    guest: &mut Guest,
    elsewhere: &[Elsewhere],
) -> Vec<Explanation<Node>> {
    let mut explanations = explained(host, guest, elsewhere);
    let together = || guest.observations.iter().zip(&explanations);
    let is_explained = together().any(|(about, explanation)| {
        matches!(explanation, Explanation::Root | Explanation::Blocked(_)) && !advisory(about)
    });
    if is_explained {
        return explanations;
    }
    let unready = guest.ready.is_some_and(|ready| ready != Status::True);
    let lowest = together().position(|(about, explanation)| {
        let says = kind(about) == Kind::Consequence || (unready && !advisory(about));
        *explanation == Explanation::Unexplained && says
    });
    match lowest {
        Some(lowest) => explanations[lowest] = Explanation::Root,
        None if unready => {
            let unsaid = unsaid(facts, guest);
            guest.observations.push(unsaid); // last: the others are named by their places
            explanations.push(Explanation::Root);
        }
        None => {}
    }
    explanations
}

fn advisory(about: &Observation) -> bool {
    matches!(about.level, Level::Layer(layer) if layer.advisory())
}

fn explained(host: &Observation, guest: &Guest, elsewhere: &[Elsewhere]) -> Vec<Explanation<Node>> {
    let observations = &guest.observations;
    let own = observations.iter().enumerate();
    let others = (0..elsewhere.len()).map(|index| (Node::Elsewhere(index), Standing::Broken));
    let nodes: Vec<(Node, Standing)> = std::iter::once((Node::Host, standing(host)))
        .chain(others)
        .chain(own.map(|(index, about)| (Node::Own(index), standing(about))))
        .collect();
    let level = |node: &Node| match node {
        Node::Host => host.level,
        Node::Own(index) => observations[*index].level,
        Node::Elsewhere(index) => elsewhere[*index].level,
    };
    // No status tells the mode yet; a guest without Tailscale has no node for it.
    let mode = TailscaleMode::Userspace;
    let is_below = |low: &Node, high: &Node| {
        if let (Node::Elsewhere(index), Node::Own(own)) = (low, high) {
            return stands_on(&observations[*own], guest, &elsewhere[*index]);
        }
        let both_here = !matches!((low, high), (Node::Elsewhere(_), _) | (_, Node::Elsewhere(_)));
        let stands = both_here && ancestors(level(high), mode).contains(&level(low));
        stands || acts(low, high, observations)
    };
    explain(&nodes, is_below).split_off(1 + elsewhere.len())
}

/// A service that needs another guest's stands on what is broken there, and its forwards do.
fn stands_on(about: &Observation, guest: &Guest, broken: &Elsewhere) -> bool {
    let mut needs = guest.requires.iter();
    match about.level {
        Level::Layer(Layer::Service) => needs.any(|(service, needed)| {
            let whole = about.subject.strip_prefix(service.as_str());
            *needed == broken.guest && whole.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        }),
        Level::Layer(Layer::Forward) => needs.any(|(_, needed)| *needed == broken.guest),
        _ => false,
    }
}

/// Within the clock: the guest says why it does not follow, the host measures that it did not.
fn acts(low: &Node, high: &Node, observations: &[Observation]) -> bool {
    let is = |node: &Node, subject: &str| match node {
        Node::Host | Node::Elsewhere(_) => false,
        Node::Own(index) => {
            let about = &observations[*index];
            about.level == Layer::Clock.into() && about.subject == subject
        }
    };
    is(low, "realtime") && is(high, "offset")
}

fn kind(about: &Observation) -> Kind {
    table::of(about.level, &about.reason).kind
}

fn standing(about: &Observation) -> Standing {
    match (about.status, kind(about)) {
        (Status::True, _) => Standing::Holds,
        (Status::False | Status::Unknown, Kind::Consequence) => Standing::Unobserved,
        (Status::False, _) => Standing::Broken,
        (Status::Unknown, Kind::Passing) => Standing::Unobserved,
        (Status::Unknown, Kind::Fault) => Standing::Broken,
    }
}

/// A guest that is not ready although nothing that it says is amiss.
fn unsaid(facts: &Facts, guest: &Guest) -> Observation {
    let applied = facts
        .reported(&guest.name)
        .filter(|status| status.applied_revision != status.spec_revision);
    let (layer, subject, reason, text) = match (guest.phase, applied) {
        (Some(Phase::Starting), _) => (
            Layer::Vmm,
            "vmm",
            "Starting",
            "no shim has answered yet".to_owned(),
        ),
        (Some(Phase::Stopping), _) => (Layer::Vmm, "vmm", "Stopping", "a stop was asked for".to_owned()),
        (Some(Phase::Running), Some(status)) => {
            let text = format!(
                "revision {} is wanted, {} is applied",
                status.spec_revision, status.applied_revision
            );
            (Layer::Session, "agent", "NotApplied", text)
        }
        (Some(Phase::Running), None) => {
            let text = "a service that is wanted was not reported yet".to_owned();
            (Layer::Session, "agent", "NotApplied", text)
        }
        (phase, _) => {
            let text = phase.map_or_else(String::new, |phase| format!("its phase is {phase:?}"));
            (Layer::Vmm, "vmm", "NotRunning", text)
        }
    };
    Observation::new(layer, subject, Verdict::unknown(reason, text), HOST_AGENT)
}

pub(super) fn finding(facts: &Facts, guest: Option<&Name>, about: &Observation) -> Finding {
    let entry = table::of(about.level, &about.reason);
    let fill = |text: &str| fill(text, facts, guest, about);
    Finding {
        layer: about.level,
        guest: guest.cloned(),
        subject: about.subject.clone(),
        code: about.reason.clone(),
        what: fill(entry.what),
        evidence: evidence::of(facts, guest, about),
        counter_test: CounterTest {
            run: fill(entry.check.run),
            wrong_if: fill(entry.check.wrong_if),
        },
        fix: fill(entry.fix.run),
        automatic: entry.fix.automatic,
        risk: fill(entry.fix.risk),
        leftover: None,
    }
}

#[cfg(test)]
#[path = "diagnose_tests.rs"]
mod tests;
