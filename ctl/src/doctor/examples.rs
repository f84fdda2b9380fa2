//! Facts for tests: one healthy guest, to be broken.

use sovereign_protocol::condition::{Layer, Status, Verdict};
use sovereign_protocol::inspection::{
    AgentSeen, ConsoleSeen, DiskSeen, GuestSeen, Inspection, Process, SCHEMA, SocketSeen,
};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{ConditionStatus, GuestStatus, StatusReport};

use sovereign_reconcile::finding::FindingsView;

use super::facts::{Agent, Configuration, Facts};
use super::report::{Diagnosis, LayerPicture};
use crate::picture::examples as pictures;

pub(super) fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// Every layer that a guest can have, and all is well.
pub(super) const WELL: [(Layer, &str, &str); 12] = [
    (Layer::Vmm, "vmm", "Running"),
    (Layer::Session, "agent", "Answered"),
    (Layer::Kernel, "contract", "Met"),
    (Layer::Clock, "offset", "Measured"),
    (Layer::Clock, "realtime", "Steered"),
    (Layer::Disk, "data", "Mounted"),
    (Layer::Loopback, "lo", "Answers"),
    (Layer::Interface, "eth0", "Configured"),
    (Layer::Tap, "tap", "Attached"),
    (Layer::Service, "postgres", "Ready"),
    (Layer::Tailscale, "backend", "Running"),
    (Layer::Forward, "postgres", "Listening"),
];

pub(super) fn status() -> GuestStatus {
    let conditions = WELL.map(|(layer, subject, reason)| ConditionStatus {
        subject: subject.into(),
        evidence: format!("{layer} was seen"),
        age_ms: 1_000,
        ..pictures::condition(layer, Status::True, reason)
    });
    GuestStatus {
        conditions: conditions.to_vec(),
        ..pictures::guest()
    }
}

pub(super) fn seen() -> GuestSeen {
    GuestSeen {
        name: name("sql"),
        shim: SocketSeen::Accepted,
        boot_id: Some("b1".into()),
        vmm: status().vmm,
        process: Some(Process { pid: 7, state: 'S' }),
        running: Verdict::yes("Running", "qemu pid 7 by tcg"),
        session: Verdict::yes("Answered", "agent 0.1.0 answered a fresh dial within 3 ms"),
        conditions: Vec::new(),
        exit: None,
        console: Some(ConsoleSeen {
            age_ms: 60_000,
            last: vec!["sovereign-guest: listening".into()],
            panic: None,
        }),
        disk: DiskSeen::Present {
            bytes: 512 << 20,
            used_bytes: 40 << 20,
        },
        took_ms: 4,
    }
}

pub(super) fn inspection(guests: Vec<GuestSeen>) -> Inspection {
    Inspection {
        schema: SCHEMA.into(),
        agent: AgentSeen {
            holder: Some(Process { pid: 6, state: 'S' }),
            control: SocketSeen::Accepted,
            log_age_ms: Some(90_000),
            log: vec!["host agent runs".into()],
        },
        guests,
    }
}

pub(super) fn report(guests: Vec<GuestStatus>) -> StatusReport {
    pictures::report(guests)
}

pub(super) fn healthy() -> Facts {
    Facts {
        layout: Layout {
            instance: name("default"),
            run: "/run/sovereign/default".into(),
            state: "/var/lib/sovereign/default".into(),
        },
        sovereign: "sovereign --instance default".into(),
        at: "2026-01-02T03:04:05.000Z".into(),
        configuration: Configuration::Valid {
            path: "/etc/sovereign.toml".into(),
            guests: [name("sql")].into(),
        },
        agent: Agent::Answered(report(vec![status()])),
        inspection: Ok(inspection(vec![seen()])),
        network: Ok(FindingsView::default()),
        ends: Vec::new(),
    }
}

/// Changes the guest in the host agent's report.
pub(super) fn with_status(change: impl FnOnce(&mut GuestStatus)) -> Facts {
    let mut guest = status();
    change(&mut guest);
    Facts {
        agent: Agent::Answered(report(vec![guest])),
        ..healthy()
    }
}

/// Sets one condition of a guest; it is then not ready.
pub(super) fn set(guest: &mut GuestStatus, layer: Layer, status: Status, reason: &str, evidence: &str) {
    let mut conditions = guest.conditions.iter_mut();
    let condition = conditions
        .find(|c| c.layer == layer)
        .expect("WELL has every layer");
    condition.status = status;
    condition.reason = reason.into();
    condition.evidence = evidence.into();
    if !layer.advisory() {
        guest.ready = guest.ready.and(status);
    }
}

/// A host agent that was killed: its control socket is left, nobody holds the lock.
pub(super) fn killed(guests: Vec<GuestSeen>) -> Facts {
    let mut inspection = inspection(guests);
    inspection.agent.holder = None;
    inspection.agent.control = SocketSeen::Refused;
    Facts {
        agent: Agent::NotRunning,
        inspection: Ok(inspection),
        ..healthy()
    }
}

/// The findings' layers and codes.
pub(super) fn codes(diagnosis: &Diagnosis) -> Vec<(&'static str, &str)> {
    let findings = diagnosis.findings.iter();
    findings
        .map(|finding| (finding.layer.as_str(), finding.code.as_str()))
        .collect()
}

/// The first subject of a layer of the first guest.
pub(super) fn picture(diagnosis: &Diagnosis, layer: Layer) -> &LayerPicture {
    let mut layers = diagnosis.guests[0].layers.iter();
    layers.find(|picture| picture.layer == layer.into()).unwrap()
}
