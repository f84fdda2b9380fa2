use sovereign_protocol::condition::{Layer, Status};
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::probe::{Probe, Question, Refused, Reply, Way};
use sovereign_reconcile::finding::{Code, FindingsView, Leftover, LeftoverName};

use super::diagnose::diagnose;
use super::examples::{codes, healthy, report, status};
use super::facts::{Agent, Facts, Failure};
use super::picture::picture;
use crate::picture::examples::condition;

fn found(code: Code, layer: Layer) -> sovereign_reconcile::finding::Finding {
    sovereign_reconcile::finding::Finding {
        layer,
        code,
        family: Some(Family::V4),
        subject: "IPv4 rule".into(),
        what: "IPv4: a rule is in the way.".into(),
        evidence: vec!["ip rule: 1: from all lookup main".into()],
        check: "ip rule show".into(),
        wrong_if: "it is not there".into(),
        fix: "sovereign doctor --fix=rule-lookup-main".into(),
        leftover: Some(LeftoverName::RuleLookupMain),
        risk: "old scripts".into(),
        stops: true,
    }
}

fn view() -> FindingsView {
    let question = Question {
        family: Family::V4,
        way: Way::Host,
        from: None,
        to: "192.168.100.2".parse().unwrap(),
        iif: None,
    };
    FindingsView {
        findings: vec![found(Code::LookupMain, Layer::Routing)],
        probes: vec![Probe::of(
            question,
            Reply::Refused(Refused::Unreachable),
            &[],
            &[],
            0,
        )],
        leftovers: vec![Leftover {
            name: LeftoverName::RuleLookupMain,
            items: vec![],
        }],
        ..FindingsView::default()
    }
}

/// A host agent with these conditions of the network that guests share.
fn with_conditions(network: Result<FindingsView, Failure>, conditions: &[(Layer, &str)]) -> Facts {
    let mut report = report(vec![status()]);
    let conditions = conditions.iter();
    report.network = conditions
        .map(|(layer, reason)| condition(*layer, Status::False, reason))
        .collect();
    Facts {
        agent: Agent::Answered(report),
        network,
        ..healthy()
    }
}

#[test]
fn a_finding_of_the_host_agent_is_told_with_its_probes_and_the_name_of_the_leftover() {
    let diagnosis = diagnose(&with_conditions(Ok(view()), &[(Layer::Routing, "LookupMain")]));
    assert_eq!(
        codes(&diagnosis),
        [("routing", "LookupMain")],
        "and not its condition again"
    );
    let finding = &diagnosis.findings[0];
    assert_eq!(
        finding.fix,
        "sovereign --instance default doctor --fix=rule-lookup-main"
    );
    assert_eq!(finding.leftover.as_deref(), Some("rule-lookup-main"));
    assert!(!finding.automatic && finding.guest.is_none());
    assert_eq!(
        diagnosis.network.probes[0].text,
        "ip route get 192.168.100.2: unreachable"
    );
    assert_eq!(diagnosis.network.leftovers[0].name, "rule-lookup-main");
    let text = picture(&diagnosis);
    assert!(text.contains("counter-test  ip rule show"), "{text}");
    let schema = serde_json::from_str(include_str!("../../../docs/doctor.schema.json")).unwrap();
    crate::schema::compare(&schema, &schema, &serde_json::to_value(&diagnosis).unwrap(), "$");
}

#[test]
fn a_condition_that_a_newer_look_does_not_find_is_no_finding_any_more() {
    let gone = with_conditions(Ok(FindingsView::default()), &[(Layer::Nat, "ForwardDrop")]);
    assert_eq!(codes(&diagnose(&gone)), []);
    let other = with_conditions(Ok(FindingsView::default()), &[(Layer::Nat, "FilterFailed")]);
    assert_eq!(codes(&diagnose(&other)), [("nat", "FilterFailed")]);
    let failure = Failure {
        reason: "Failed".into(),
        evidence: "no socket".into(),
    };
    let blind = diagnose(&with_conditions(Err(failure), &[(Layer::Nat, "ForwardDrop")]));
    assert_eq!(
        codes(&blind),
        [("nat", "ForwardDrop")],
        "without a look its word is all there is"
    );
    assert!(picture(&blind).contains("of the network not looked at: Failed: no socket"));
}

#[test]
fn without_a_host_agent_nobody_keeps_a_network() {
    let facts = Facts {
        agent: Agent::NotRunning,
        network: Ok(view()),
        ..healthy()
    };
    assert!(
        diagnose(&facts)
            .findings
            .iter()
            .all(|finding| finding.code != "LookupMain")
    );
}
