//! The verdict: which observations are findings, and what explains the others.

use sovereign_protocol::condition::{Layer, Status, Verdict};
use sovereign_protocol::finding::{CounterTest, Finding};
use sovereign_protocol::layers::{Explanation, Level, Standing, TailscaleMode, ancestors, explain};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::Phase;

use super::evidence;
use super::facts::Facts;
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
    let mut guests = Vec::new();
    for mut guest in observed::guests(facts) {
        let explanations = judge(facts, &host, &mut guest);
        for (about, explanation) in guest.observations.iter().zip(&explanations) {
            if *explanation == Explanation::Root {
                findings.push(finding(facts, Some(&guest.name), about));
            }
        }
        guests.push(report::guest(&guest, &host, &explanations));
    }
    report::diagnosis(facts, &host, guests, findings)
}

/// Where in a guest's graph an observation is: the host agent, or one of the guest's own by its place in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Node {
    Host,
    Own(usize),
}

/// Explains each observation of a guest. One that is not ready never goes without a finding.
fn judge(facts: &Facts, host: &Observation, guest: &mut Guest) -> Vec<Explanation<Node>> {
    let mut explanations = explained(host, &guest.observations);
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

fn explained(host: &Observation, observations: &[Observation]) -> Vec<Explanation<Node>> {
    let own = observations.iter().enumerate();
    let nodes: Vec<(Node, Standing)> = std::iter::once((Node::Host, standing(host)))
        .chain(own.map(|(index, about)| (Node::Own(index), standing(about))))
        .collect();
    let level = |node: &Node| match node {
        Node::Host => host.level,
        Node::Own(index) => observations[*index].level,
    };
    // No status tells the mode yet; a guest without Tailscale has no node for it.
    let mode = TailscaleMode::Userspace;
    let is_below = |low: &Node, high: &Node| {
        ancestors(level(high), mode).contains(&level(low)) || acts(low, high, observations)
    };
    explain(&nodes, is_below).split_off(1)
}

/// Within the clock: the guest says why it does not follow, the host measures that it did not.
fn acts(low: &Node, high: &Node, observations: &[Observation]) -> bool {
    let is = |node: &Node, subject: &str| match node {
        Node::Host => false,
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

fn finding(facts: &Facts, guest: Option<&Name>, about: &Observation) -> Finding {
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
    }
}

#[cfg(test)]
#[path = "diagnose_tests.rs"]
mod tests;
