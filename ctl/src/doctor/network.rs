//! The network that guests share: what the host agent found that others did to it, and its own conditions.
//!
//! A finding of the host agent is told as it came: it was looked at anew for this question, and knows links, rules and
//! chains by name. A condition with one of the same codes is older than that look, and says nothing beside it.

use sovereign_protocol::condition::Status;
use sovereign_protocol::finding::{CounterTest, Evidence, Finding};
use sovereign_protocol::status::ConditionStatus;
use sovereign_reconcile::finding::{self, Code};

use super::diagnose;
use super::facts::Facts;
use super::observed::{HOST_AGENT, Observation};

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let Some(report) = facts.status() else {
        return Vec::new(); // nobody keeps a network
    };
    let seen = facts.network.as_ref().ok();
    let told = seen
        .into_iter()
        .flat_map(|view| &view.findings)
        .map(|found| of(facts, found));
    let is_newer = |condition: &&ConditionStatus| seen.is_none() || !is_code(&condition.reason);
    let broken = report
        .network
        .iter()
        .filter(|condition| condition.status == Status::False);
    let conditions = broken.filter(is_newer).map(|condition| {
        let about = Observation {
            level: condition.layer.into(),
            subject: condition.subject.clone(),
            status: condition.status,
            reason: condition.reason.clone(),
            evidence: condition.evidence.clone(),
            source: HOST_AGENT,
            age_ms: condition.age_ms,
        };
        diagnose::finding(facts, None, &about)
    });
    told.chain(conditions).collect()
}

fn is_code(reason: &str) -> bool {
    Code::ALL.iter().any(|code| code.as_str() == reason)
}

fn of(facts: &Facts, found: &finding::Finding) -> Finding {
    // Its commands are for an instance of the default name.
    let spelled = |text: &str| text.replace("sovereign ", &format!("{} ", facts.sovereign));
    Finding {
        layer: found.layer.into(),
        guest: None,
        subject: found.subject.clone(),
        code: found.code.to_string(),
        what: found.what.clone(),
        evidence: found
            .evidence
            .iter()
            .map(|text| Evidence {
                source: HOST_AGENT.to_owned(),
                age_ms: 0,
                text: text.clone(),
            })
            .collect(),
        counter_test: CounterTest {
            run: spelled(&found.check),
            wrong_if: found.wrong_if.clone(),
        },
        fix: spelled(&found.fix),
        automatic: false, // what is foreign is changed only when somebody asks for it by name
        risk: found.risk.clone(),
        leftover: found.leftover.map(|name| name.to_string()),
    }
}
