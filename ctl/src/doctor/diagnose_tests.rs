use sovereign_protocol::record::Record;
use sovereign_protocol::status::{GuestStatus, RequiredStatus};

use super::super::examples::{
    WELL, codes, healthy, inspection, killed, name, picture, report, seen, set, status, with_status,
};
use super::super::facts::{Agent, Configuration, Facts};
use super::super::observed::contradicts;
use super::super::report::Judgement;
use super::*;

use Layer::{Clock, Disk, Forward, Interface, Kernel, Loopback, Service, Session, Tailscale, Tap, Vmm};
use Status::{False, True, Unknown};

/// What a guest that lost its session says of everything in it.
fn session_lost(guest: &mut GuestStatus) {
    for layer in [Kernel, Disk, Loopback, Interface, Service, Tailscale] {
        set(guest, layer, Unknown, "SessionLost", "session lost; before: Met");
    }
}

/// An injected fault, and what a diagnosis of it must say.
struct Fault {
    layer: Layer,
    status: Status,
    reason: &'static str,
    evidence: &'static str,
    /// What else is then not well.
    follows: fn(&mut GuestStatus),
    what: &'static str,
    counter_test: &'static str,
    fix: &'static str,
    /// The layers that it explains.
    blocked: &'static [Layer],
}

const INSIDE: &[Layer] = &[
    Session, Kernel, Disk, Loopback, Interface, Service, Tailscale, Forward,
];

fn not_serving(guest: &mut GuestStatus) {
    set(
        guest,
        Forward,
        False,
        "NotListening",
        "127.0.0.1:15432 refuses: the guest is not ready",
    );
}

fn nothing(_: &mut GuestStatus) {}

fn faults() -> Vec<Fault> {
    let fault = |layer, status, reason, evidence| Fault {
        layer,
        status,
        reason,
        evidence,
        follows: not_serving,
        what: "",
        counter_test: "",
        fix: "",
        blocked: &[Forward],
    };
    vec![
        Fault {
            follows: |guest| {
                session_lost(guest);
                set(guest, Session, Unknown, "Lost", "3 pings without an answer");
                not_serving(guest);
            },
            what: "The process of sql's virtual machine is stopped (SIGSTOP): nothing in it can answer, and nothing is lost.",
            counter_test: "ps -o pid,stat,args -p 7",
            fix: "kill -CONT 7",
            blocked: INSIDE,
            ..fault(
                Vmm,
                Unknown,
                "Stopped",
                "its process is stopped (SIGSTOP): send it SIGCONT",
            )
        },
        Fault {
            follows: nothing,
            what: "The host's end of sql's network (tap) is not as it should be (Detached); the link to its agent needs none of it.",
            counter_test: "sovereign --instance default status",
            fix: "sovereign --instance default down && sovereign --instance default up",
            blocked: &[],
            ..fault(Tap, False, "Detached", "no process holds sv-sql")
        },
        Fault {
            follows: |guest| {
                session_lost(guest);
                not_serving(guest);
            },
            what: "The machine of sql runs, but its agent no longer answers; what it said last is not known to hold any more.",
            counter_test: "timeout 10 sovereign --instance default exec sql -- uname -r",
            fix: "sovereign --instance default logs sql",
            blocked: &INSIDE[1..],
            ..fault(Session, Unknown, "Lost", "3 pings without an answer")
        },
        Fault {
            follows: |guest| {
                set(
                    guest,
                    Service,
                    False,
                    "LaunchFailed",
                    "shmget: Function not implemented",
                );
                not_serving(guest);
            },
            what: "The kernel of sql lacks something that a service needs.",
            counter_test: "sovereign --instance default exec sql -- uname -r",
            fix: "sovereign --instance default build && sovereign --instance default down && sovereign --instance default up",
            blocked: &[Service, Forward],
            ..fault(
                Kernel,
                False,
                "Lacks",
                "SYSVIPC (no /proc/sysvipc) breaks postgresql",
            )
        },
        Fault {
            follows: |guest| {
                set(
                    guest,
                    Service,
                    False,
                    "DiskMissing",
                    "not started: the data disk is not good",
                );
                not_serving(guest);
            },
            what: "The data disk of sql holds something that is not ours; it is never formatted, and nothing is started on it.",
            counter_test: "blkid -p /var/lib/sovereign/default/guests/sql/data.img",
            fix: "sovereign --instance default down && mv /var/lib/sovereign/default/guests/sql/data.img \
                  /var/lib/sovereign/default/guests/sql/data.img.aside && sovereign --instance default up",
            blocked: &[Service, Forward],
            ..fault(
                Disk,
                False,
                "Foreign",
                "the data disk is neither blank nor ext4: never formatted",
            )
        },
        Fault {
            what: "The loopback of sql does not answer, and raising it does not help: everything that reaches a service through 127.0.0.1 \
                   or the guest's own address times out, Tailscale's serve too.",
            counter_test: "sovereign --instance default exec sql -- busybox ping -c 1 -W 2 127.0.0.1",
            fix: "sovereign --instance default exec sql -- sh -c 'busybox ip addr replace 127.0.0.1/8 dev lo; busybox ip link set lo down; busybox ip link set lo up'",
            ..fault(Loopback, False, "Down", "127.0.0.1: no answer within 1 s")
        },
        Fault {
            what: "Guest sql has no default route and does not get it back.",
            counter_test: "sovereign --instance default exec sql -- sh -c 'busybox ip addr; busybox ip route'",
            fix: "sovereign --instance default logs sql",
            ..fault(Interface, False, "RouteMissing", "eth0: no default route")
        },
        Fault {
            follows: nothing,
            what: "The clock of sql is off by more than is steered away; its agent steps it, but never back while services run.",
            counter_test: "sovereign --instance default exec sql -- date -u +%s && date -u +%s",
            fix: "sovereign --instance default down && sovereign --instance default up",
            blocked: &[],
            ..fault(Clock, False, "Off", "+3600000.0 ms ±0.3 ms")
        },
        Fault {
            what: "Service postgres of sql takes connections and does not answer them: it is stopped, stuck or overloaded.",
            counter_test: "timeout 10 sovereign --instance default psql sql -c 'select 1'",
            fix: "sovereign --instance default exec sql -- busybox killall -CONT postgres",
            ..fault(Service, False, "Silent", "3 probes: no answer within 1 s")
        },
        Fault {
            follows: nothing,
            what: "Tailscale in sql is not logged in.",
            counter_test: "sovereign --instance default exec sql -- tailscale status",
            fix: "sovereign --instance default exec sql -- tailscale login",
            blocked: &[],
            ..fault(
                Tailscale,
                False,
                "NeedsLogin",
                "tailscaled 1.102.3 needs a log-in",
            )
        },
    ]
}

#[test]
fn each_injected_fault_is_the_one_finding_and_explains_the_rest() {
    for fault in faults() {
        let facts = with_status(|guest| {
            (fault.follows)(guest);
            set(guest, fault.layer, fault.status, fault.reason, fault.evidence);
        });
        let diagnosis = diagnose(&facts);
        let name = format!("{} {}", fault.layer, fault.reason);
        assert_eq!(codes(&diagnosis), [(fault.layer.as_str(), fault.reason)]);
        let finding = &diagnosis.findings[0];
        assert_eq!(finding.guest.as_ref().map(Name::as_str), Some("sql"), "{name}");
        assert_eq!(finding.what, fault.what, "{name}");
        assert_eq!(
            (finding.evidence[0].text.as_str(), finding.evidence[0].age_ms),
            (fault.evidence, 1_000),
            "{name}"
        );
        assert_eq!(finding.counter_test.run, fault.counter_test, "{name}");
        assert_eq!(finding.fix, fault.fix, "{name}");
        assert!(
            !finding.risk.is_empty() && !finding.counter_test.wrong_if.is_empty(),
            "{name}"
        );
        for layer in &diagnosis.guests[0].layers {
            let blocked = fault.blocked.iter().any(|l| layer.layer == (*l).into());
            let expected = match layer.status {
                True => Judgement::Holds,
                _ if layer.layer == fault.layer.into() => Judgement::Finding,
                _ => Judgement::Blocked,
            };
            assert_eq!(layer.verdict, expected, "{name}: {}", layer.layer);
            assert_eq!(blocked, !layer.blocked_by.is_empty(), "{name}: {}", layer.layer);
            assert!(
                layer.blocked_by.iter().all(|by| by.layer == fault.layer.into()),
                "{name}"
            );
        }
        assert!(!diagnosis.ok);
    }
}

#[test]
fn a_healthy_guest_has_no_finding() {
    let diagnosis = diagnose(&healthy());
    assert_eq!(codes(&diagnosis), []);
    assert!(diagnosis.ok);
    assert_eq!(diagnosis.guests[0].layers.len(), WELL.len());
    assert!(!contradicts(&healthy()));
    let told: Vec<bool> = diagnosis.sources.iter().map(|source| source.answered).collect();
    assert_eq!(told, [true, true, true]);
}

#[test]
fn independent_faults_are_findings_beside_each_other() {
    let facts = with_status(|guest| {
        set(guest, Disk, False, "Full", "3 of 512 MiB free");
        set(guest, Loopback, False, "Down", "no answer");
        set(guest, Clock, False, "Off", "+400 ms");
        set(guest, Service, False, "NotListening", "no socket");
    });
    let diagnosis = diagnose(&facts);
    assert_eq!(
        codes(&diagnosis),
        [("clock", "Off"), ("disk", "Full"), ("loopback", "Down")]
    );
    let service = picture(&diagnosis, Service);
    assert_eq!(service.verdict, Judgement::Blocked);
    let by: Vec<&str> = service
        .blocked_by
        .iter()
        .map(|place| place.layer.as_str())
        .collect();
    assert_eq!(by, ["disk", "loopback"], "the clock is advisory");
}

#[test]
fn one_wrong_clock_is_one_finding_and_the_guest_says_why() {
    let facts = with_status(|guest| {
        set(guest, Clock, False, "Off", "+3600000.0 ms ±0.3 ms");
        let mut clocks = guest.conditions.iter_mut().filter(|c| c.layer == Clock);
        let realtime = clocks.find(|c| c.subject == "realtime").unwrap();
        (realtime.status, realtime.reason) = (False, "Ahead".into());
    });
    let diagnosis = diagnose(&facts);
    assert_eq!(codes(&diagnosis), [("clock", "Ahead")]);
    assert_eq!(picture(&diagnosis, Clock).blocked_by[0].subject, "realtime");
}

#[test]
fn a_port_in_use_is_looked_for_by_its_number() {
    let facts = with_status(|guest| {
        set(
            guest,
            Forward,
            False,
            "PortUnavailable",
            "127.0.0.1:15432: in use",
        )
    });
    let finding = &diagnose(&facts).findings[0];
    assert_eq!(finding.counter_test.run, "ss -ltnp 'sport = :15432'");
}

#[test]
fn a_code_that_nobody_knows_is_told_honestly() {
    let facts = with_status(|guest| set(guest, Disk, False, "Melted", "too hot"));
    let finding = &diagnose(&facts).findings[0];
    assert_eq!(
        finding.what,
        "The data disk of sql is not known to be good (Melted)."
    );
    assert_eq!(finding.evidence[0].text, "too hot");
    let unknown = with_status(|guest| set(guest, Kernel, Unknown, "Stale", "last seen 90 s ago"));
    assert_eq!(codes(&diagnose(&unknown)), [("kernel", "Stale")]);
}

#[test]
fn what_goes_on_by_itself_is_a_finding_only_of_a_guest_that_is_not_ready() {
    let clock = with_status(|guest| {
        set(
            guest,
            Clock,
            Unknown,
            "NotMeasured",
            "the host has not measured it yet",
        )
    });
    assert_eq!(codes(&diagnose(&clock)), []);
    let boots = with_status(|guest| {
        guest.phase = Phase::Starting;
        guest
            .conditions
            .retain(|c| [Vmm, Session, Forward].contains(&c.layer));
        not_serving(guest); // a consequence, never the reason
        set(guest, Session, Unknown, "Dialling", "the guest boots");
    });
    let diagnosis = diagnose(&boots);
    assert_eq!(codes(&diagnosis), [("session", "Dialling")]);
    assert_eq!(diagnosis.findings[0].fix, "sovereign --instance default up");
    assert!(diagnosis.findings[0].automatic);
}

#[test]
fn a_guest_that_is_not_ready_never_goes_without_a_finding() {
    for phase in [
        Phase::Starting,
        Phase::Running,
        Phase::Stopping,
        Phase::Failed,
        Phase::Stopped,
    ] {
        for keep in [0, 1, WELL.len()] {
            let facts = with_status(|guest| {
                guest.phase = phase;
                guest.ready = Unknown;
                guest.conditions.truncate(keep);
            });
            assert_eq!(
                diagnose(&facts).findings.len(),
                1,
                "{phase:?} with {keep} conditions"
            );
        }
    }
    let late = with_status(|guest| {
        guest.ready = Unknown;
        guest.applied_revision = 1;
    });
    let diagnosis = diagnose(&late);
    assert_eq!(codes(&diagnosis), [("session", "NotApplied")]);
    assert_eq!(
        diagnosis.findings[0].evidence[0].text,
        "revision 2 is wanted, 1 is applied"
    );
    let unmeasured = with_status(|guest| {
        guest.ready = Unknown;
        guest.applied_revision = 1;
        set(
            guest,
            Clock,
            Unknown,
            "NotMeasured",
            "the host has not measured it yet",
        );
    });
    assert_eq!(
        codes(&diagnose(&unmeasured)),
        [("session", "NotApplied")],
        "what keeps nobody from being ready is not the reason"
    );
    let advisory = with_status(|guest| {
        set(guest, Clock, False, "Off", "+400 ms");
        set(
            guest,
            Service,
            Unknown,
            "Waiting",
            "the data disk was not looked at yet",
        );
    });
    assert_eq!(
        codes(&diagnose(&advisory)),
        [("clock", "Off"), ("service", "Waiting")]
    );
}

#[test]
fn a_guest_that_nobody_wants_any_more_is_no_finding() {
    let stopped = |guest: &mut GuestStatus| {
        guest.phase = Phase::Stopped;
        guest.ready = False;
        guest.conditions.truncate(1);
        set(guest, Vmm, False, "PoweredOff", "exit status: 0");
    };
    let mut facts = with_status(stopped);
    assert_eq!(codes(&diagnose(&facts)), [("vmm", "PoweredOff")]);
    facts.configuration = Configuration::Valid {
        path: "s.toml".into(),
        guests: [name("other")].into(),
    };
    assert_eq!(codes(&diagnose(&facts)), []);
}

#[test]
fn a_fresh_look_that_denies_the_report_is_looked_at_again_and_then_believed() {
    let mut guest = seen();
    guest.session = Verdict::unknown("Silent", "a fresh dial was accepted and never answered");
    let facts = Facts {
        inspection: Ok(inspection(vec![guest])),
        ..healthy()
    };
    assert!(contradicts(&facts));
    let diagnosis = diagnose(&facts);
    assert_eq!(codes(&diagnosis), [("session", "Silent")]);
    let evidence = &diagnosis.findings[0].evidence;
    assert_eq!(evidence[0].source, "fresh dial");
    assert!(
        evidence
            .iter()
            .any(|e| e.source == "shim" && e.text.contains("Running")),
        "{evidence:?}"
    );

    let mut rebooted = seen();
    rebooted.boot_id = Some("b2".into());
    let facts = Facts {
        inspection: Ok(inspection(vec![rebooted])),
        ..healthy()
    };
    assert!(contradicts(&facts));
}

#[test]
fn a_lost_session_carries_what_shim_fresh_dial_and_console_say() {
    let mut guest = seen();
    guest.session = Verdict::no("NotListening", "nobody listens at the agent's port");
    let facts = Facts {
        inspection: Ok(inspection(vec![guest])),
        ends: vec![(end("GuestPanicked", "Kernel panic - not syncing: x"), 4_000)],
        ..with_status(|guest| {
            session_lost(guest);
            set(guest, Session, Unknown, "Lost", "3 pings without an answer");
        })
    };
    let diagnosis = diagnose(&facts);
    let sources: Vec<&str> = diagnosis.findings[0]
        .evidence
        .iter()
        .map(|e| e.source.as_str())
        .collect();
    assert_eq!(
        sources,
        ["host agent", "shim", "fresh dial", "journal", "console"]
    );
    let text = &diagnosis.findings[0].evidence[3].text;
    assert!(text.contains("Kernel panic - not syncing: x"), "{text}");
}

fn end(reason: &str, evidence: &str) -> Record {
    Record {
        seq: 1,
        time: String::new(),
        guest: "sql".into(),
        layer: Vmm,
        subject: "vmm".into(),
        from: Some(True),
        status: Some(False),
        reason: reason.into(),
        evidence: evidence.into(),
    }
}

#[test]
fn the_json_and_its_schema_name_the_same_fields() {
    let schema: serde_json::Value =
        serde_json::from_str(include_str!("../../../docs/doctor.schema.json")).unwrap();
    assert_eq!(
        schema["properties"]["schema"]["const"],
        super::super::report::SCHEMA
    );
    let mut lost = status();
    session_lost(&mut lost);
    set(&mut lost, Session, Unknown, "Lost", "3 pings without an answer");
    let samples = [
        healthy(),
        killed(vec![seen()]),
        Facts {
            agent: Agent::Answered(report(vec![lost])),
            ..healthy()
        },
    ];
    for facts in samples {
        let value = serde_json::to_value(diagnose(&facts)).unwrap();
        crate::schema::compare(&schema, &schema, &value, "$");
    }
    let known = schema["$defs"]["layer"]["enum"].as_array().unwrap();
    assert_eq!(
        known,
        &Level::ALL.map(|level| serde_json::Value::from(level.as_str()))
    );
}

/// `web`, whose service needs that of `sql`.
fn web() -> GuestStatus {
    let mut web = status();
    web.name = name("web");
    web.requires = vec![RequiredStatus {
        service: name("miniflux"),
        of: "sql/postgres".into(),
        status: True,
    }];
    let at = web.conditions.iter().position(|c| c.layer == Service).unwrap();
    web.conditions[at].subject = "miniflux".into();
    let mut edge = web.conditions[at].clone();
    (edge.subject, edge.reason) = ("miniflux.requires".into(), "Met".into());
    web.conditions.push(edge);
    web
}

fn together(sql: GuestStatus, web: GuestStatus) -> Facts {
    Facts {
        agent: Agent::Answered(report(vec![sql, web])),
        inspection: Ok(inspection(vec![])),
        ..healthy()
    }
}

/// Sets one condition of the service or its edge.
fn says(guest: &mut GuestStatus, subject: &str, status: Status, reason: &str) {
    let found = guest.conditions.iter_mut().find(|c| c.subject == subject);
    let condition = found.unwrap();
    (condition.status, condition.reason) = (status, reason.into());
    guest.ready = guest.ready.and(status);
}

#[test]
fn a_broken_service_explains_who_needs_it() {
    let (mut sql, mut waits) = (status(), web());
    says(&mut sql, "postgres", False, "CrashLoop");
    says(&mut waits, "miniflux.requires", False, "WaitsFor");
    for own in ["WaitsFor", "Broken"] {
        says(&mut waits, "miniflux", False, own);
        set(&mut waits, Forward, False, "NotListening", "refuses");
        let diagnosis = diagnose(&together(sql.clone(), waits.clone()));
        assert_eq!(codes(&diagnosis), [("service", "CrashLoop")], "{own}");
        assert_eq!(diagnosis.findings[0].guest, Some(name("sql")));
        let layers = &diagnosis.guests[1].layers;
        for subject in ["miniflux", "miniflux.requires"] {
            let found = layers.iter().find(|layer| layer.subject == subject).unwrap();
            assert_eq!(found.verdict, Judgement::Blocked);
            let by = &found.blocked_by[0];
            assert_eq!(
                (by.guest.as_ref(), by.subject.as_str()),
                (Some(&name("sql")), "postgres")
            );
        }
        let text = super::super::picture::picture(&diagnosis);
        assert!(text.contains("(blocked by service postgres of sql)"), "{text}");
    }
}

#[test]
fn a_guest_that_another_needs_explains_it_from_its_lowest_layer_on() {
    let (mut sql, mut waits) = (status(), web());
    set(&mut sql, Vmm, False, "Panicked", "x");
    session_lost(&mut sql);
    says(&mut waits, "miniflux.requires", Unknown, "WaitsFor");
    let diagnosis = diagnose(&together(sql, waits));
    assert_eq!(codes(&diagnosis), [("vmm", "Panicked")]);
}

#[test]
fn what_is_broken_in_the_guest_itself_is_its_own_and_an_edge_alone_is_a_finding() {
    let mut own = web();
    says(&mut own, "miniflux", False, "CrashLoop");
    let diagnosis = diagnose(&together(status(), own));
    assert_eq!(diagnosis.findings[0].guest, Some(name("web")));
    let mut waits = web();
    says(&mut waits, "miniflux.requires", Unknown, "WaitsFor");
    assert_eq!(
        codes(&diagnose(&together(status(), waits))),
        [("service", "WaitsFor")]
    );
    // A broken forward of the other guest keeps nobody from its service.
    let (mut sql, mut own) = (status(), web());
    set(&mut sql, Forward, False, "PortUnavailable", "x");
    says(&mut own, "miniflux", False, "Broken");
    let diagnosis = diagnose(&together(sql, own));
    assert_eq!(
        codes(&diagnosis),
        [("service", "Broken"), ("forward", "PortUnavailable")]
    );
}
