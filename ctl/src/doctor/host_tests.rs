//! Diagnoses without a host agent that answers, and of the configuration.

use sovereign_protocol::condition::{Condition, Key, Layer, Status, Verdict};
use sovereign_protocol::inspection::{AgentSeen, ExitSeen, Process, SocketSeen};
use sovereign_protocol::layers::Level;

use super::diagnose;
use super::examples::{codes, healthy, inspection, killed, picture, seen};
use super::facts::{Agent, Configuration, Facts, Failure};
use super::report::Judgement;

use Layer::{Forward, Kernel, Service, Session};
use Status::{False, True};

fn condition(layer: Layer, status: Status, reason: &str) -> Condition {
    Condition {
        key: Key::new(layer, "it"),
        verdict: Verdict::new(status, reason, "seen"),
        age_ms: 5,
        valid_ms: 1_000,
        since_ms: 5,
    }
}

#[test]
fn without_the_host_agent_guests_are_asked_past_it() {
    let mut guest = seen();
    guest.conditions = vec![condition(Kernel, True, "Met"), condition(Service, True, "Ready")];
    let diagnosis = diagnose(&killed(vec![guest.clone()]));
    assert_eq!(codes(&diagnosis), [("host", "HostAgentDown")]);
    let finding = &diagnosis.findings[0];
    assert_eq!(
        (finding.guest.as_ref(), finding.fix.as_str()),
        (None, "sovereign --instance default up")
    );
    assert!(
        finding
            .evidence
            .iter()
            .any(|e| e.text == "guest sql: qemu pid 7, Running; its agent: Answered"),
        "{:?}",
        finding.evidence
    );
    assert_eq!(picture(&diagnosis, Service).verdict, Judgement::Holds);
    let forward = picture(&diagnosis, Forward);
    assert_eq!(forward.blocked_by[0].layer, Level::Host);

    guest.conditions[1] = condition(Service, False, "CrashLoop");
    let diagnosis = diagnose(&killed(vec![guest.clone()]));
    assert_eq!(
        codes(&diagnosis),
        [("host", "HostAgentDown"), ("service", "CrashLoop")]
    );
    guest.conditions.clear();
    guest.session = Verdict::no("NotListening", "nobody listens");
    let diagnosis = diagnose(&killed(vec![guest]));
    assert_eq!(
        codes(&diagnosis),
        [("host", "HostAgentDown"), ("session", "NotListening")]
    );
}

#[test]
fn a_shim_that_died_without_a_host_agent_is_named_beside_it() {
    let mut guest = seen();
    guest.shim = SocketSeen::Refused;
    guest.vmm = None;
    guest.process = None;
    guest.boot_id = None;
    guest.running = Verdict::no("ShimDied", "shim.sock is there, nobody listens");
    guest.session = Verdict::unknown("NotDialled", "no shim tells the key of a boot");
    let diagnosis = diagnose(&killed(vec![guest]));
    assert_eq!(
        codes(&diagnosis),
        [("host", "HostAgentDown"), ("vmm", "ShimDied")]
    );
    assert_eq!(picture(&diagnosis, Session).verdict, Judgement::Blocked);
    assert!(
        diagnosis.findings[1]
            .evidence
            .iter()
            .any(|e| e.source == "console")
    );
}

#[test]
fn a_guest_that_panicked_unseen_is_named_with_the_consoles_words() {
    let mut guest = seen();
    guest.shim = SocketSeen::Absent;
    guest.vmm = None;
    guest.process = None;
    guest.running = Verdict::no("GuestPanicked", "exit status: 0; Kernel panic - not syncing: x");
    guest.session = Verdict::unknown("NotDialled", "");
    guest.exit = Some(ExitSeen {
        reason: "GuestPanicked".into(),
        evidence: "exit status: 0; Kernel panic - not syncing: x".into(),
        age_ms: 3_000,
    });
    guest.console.as_mut().unwrap().panic = Some("Kernel panic - not syncing: x".into());
    let facts = killed(vec![guest.clone()]);
    let diagnosis = diagnose(&facts);
    assert_eq!(
        codes(&diagnosis),
        [("host", "HostAgentDown"), ("vmm", "GuestPanicked")]
    );
    let evidence = &diagnosis.findings[1].evidence;
    assert!(
        evidence
            .iter()
            .any(|e| e.source == "console" && e.text.ends_with("not syncing: x")),
        "{evidence:?}"
    );

    // After an orderly `down` only the age tells whether the agent saw that end.
    let mut stopped = facts.clone();
    let Ok(inspection) = &mut stopped.inspection else {
        unreachable!()
    };
    inspection.agent.control = SocketSeen::Absent;
    assert_eq!(
        codes(&diagnose(&stopped)),
        [("host", "NothingRuns"), ("vmm", "GuestPanicked")]
    );
    let Ok(inspection) = &mut stopped.inspection else {
        unreachable!()
    };
    inspection.agent.log_age_ms = Some(1_000);
    assert_eq!(codes(&diagnose(&stopped)), [("host", "NothingRuns")]);
    let Ok(inspection) = &mut stopped.inspection else {
        unreachable!()
    };
    inspection.agent.log_age_ms = None;
    inspection.guests[0].exit.as_mut().unwrap().reason = "PoweredOff".into();
    assert_eq!(
        codes(&diagnose(&stopped)),
        [("host", "NothingRuns")],
        "it was meant"
    );
}

fn failure(reason: &str) -> Failure {
    Failure {
        reason: reason.into(),
        evidence: format!("{reason} was seen"),
    }
}

#[test]
fn a_host_agent_that_does_not_answer_is_told_apart_by_its_process() {
    let silent = |state| {
        let mut inspection = inspection(Vec::new());
        inspection.agent.holder = Some(Process { pid: 6, state });
        Facts {
            agent: Agent::Failed(failure("HandshakeTimeout")),
            inspection: Ok(inspection),
            ..healthy()
        }
    };
    let stopped = diagnose(&silent('T'));
    assert_eq!(codes(&stopped), [("host", "HostAgentStopped")]);
    assert_eq!(stopped.findings[0].fix, "kill -CONT 6");
    let stuck = diagnose(&silent('R'));
    assert_eq!(codes(&stuck), [("host", "HostAgentSilent")]);
    assert_eq!(stuck.findings[0].fix, "kill 6 && sovereign --instance default up");
    let other = Facts {
        agent: Agent::Failed(failure("VersionMismatch")),
        ..healthy()
    };
    assert_eq!(codes(&diagnose(&other)), [("host", "VersionMismatch")]);
    let starting = Facts {
        agent: Agent::NotRunning,
        ..healthy()
    };
    assert_eq!(codes(&diagnose(&starting)), [("host", "HostAgentNotListening")]);
}

#[test]
fn nothing_running_no_configuration_and_a_wrong_one_are_the_finding() {
    let mut inspection = inspection(Vec::new());
    inspection.agent = AgentSeen::default();
    let nothing = Facts {
        agent: Agent::NotRunning,
        inspection: Ok(inspection),
        ..healthy()
    };
    let diagnosis = diagnose(&nothing);
    assert_eq!(codes(&diagnosis), [("host", "NothingRuns")]);
    assert_eq!(diagnosis.findings[0].fix, "sovereign --instance default up");

    let unusable = |reason: &str| Configuration::Unusable {
        path: Some("/etc/sovereign.toml".into()),
        failure: failure(reason),
        next: "edit /etc/sovereign.toml line 3, then: sovereign up".into(),
    };
    let no_file = Facts {
        configuration: unusable("NoConfiguration"),
        ..nothing.clone()
    };
    let diagnosis = diagnose(&no_file);
    assert_eq!(codes(&diagnosis), [("configuration", "NoConfiguration")]);
    assert!(
        diagnosis.findings[0]
            .fix
            .starts_with("sovereign --instance default init")
    );

    let wrong = Facts {
        configuration: unusable("UnknownKey"),
        ..nothing
    };
    let diagnosis = diagnose(&wrong);
    assert_eq!(codes(&diagnosis), [("configuration", "UnknownKey")]);
    assert_eq!(
        diagnosis.findings[0].fix,
        "edit /etc/sovereign.toml line 3, then: sovereign up"
    );
    assert_eq!(
        diagnosis.findings[0].counter_test.run,
        "cat -A /etc/sovereign.toml"
    );

    let running = Facts {
        configuration: unusable("UnknownKey"),
        ..healthy()
    };
    assert_eq!(codes(&diagnose(&running)), [("configuration", "UnknownKey")]);
    let elsewhere = Facts {
        configuration: unusable("NoConfiguration"),
        ..healthy()
    };
    assert_eq!(
        codes(&diagnose(&elsewhere)),
        [],
        "it runs, and its file may be in another directory"
    );
}

#[test]
fn without_the_binary_that_looks_the_diagnosis_says_so() {
    let facts = Facts {
        agent: Agent::NotRunning,
        inspection: Err(failure("MissingBinary")),
        ..healthy()
    };
    let diagnosis = diagnose(&facts);
    assert_eq!(codes(&diagnosis), [("host", "MissingBinary")]);
    assert!(!diagnosis.sources[2].answered);
    let blind = Facts {
        inspection: Err(failure("InspectFailed")),
        ..healthy()
    };
    assert_eq!(codes(&diagnose(&blind)), [], "the host agent's word is enough");
}
