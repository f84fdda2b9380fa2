//! Status for people: plain text, aligned, lowest layer first.

use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::status::{ConditionStatus, GuestStatus, StatusReport};

use crate::context::escaped;

/// A status at a glance.
pub(crate) fn mark(status: Status) -> char {
    match status {
        Status::True => '✓',
        Status::False => '✗',
        Status::Unknown => '?',
    }
}

/// One line per guest, then its conditions by layer and its forwards.
pub(crate) fn picture(report: &StatusReport) -> String {
    let mut lines = vec![format!(
        "instance {}  revision {}",
        report.instance, report.revision
    )];
    let width = report
        .guests
        .iter()
        .map(|guest| guest.name.as_str().len())
        .max()
        .unwrap_or(0);
    if !report.network.is_empty() {
        lines.push("network".to_owned());
        lines.extend(conditions(&report.network));
    }
    for guest in &report.guests {
        lines.push(head(guest, width));
        lines.extend(conditions(&guest.conditions));
        lines.extend(forwards(guest));
    }
    if report.guests.is_empty() {
        lines.push("no guests".to_owned());
    }
    lines.join("\n")
}

/// One line for a guest that `up` brought up; `took` says how long that was, if it did anything.
pub(crate) fn ready_line(guest: &GuestStatus, width: usize, took: Option<&str>, psql: &str) -> String {
    let evidence = |layer: Layer| {
        let conditions = guest
            .conditions
            .iter()
            .filter(move |c| c.layer == layer && c.status == Status::True && !c.subject.contains('.'));
        conditions
            .map(|c| headline(&line(&c.evidence)))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let ready = took.map_or_else(
        || format!("Ready since {}", guest.since),
        |took| format!("Ready in {took}"),
    );
    let mut clocks = guest
        .conditions
        .iter()
        .filter(|c| c.layer == Layer::Clock && c.subject == "offset");
    let clock = clocks.find(|c| c.status == Status::True);
    let clock = clock.map_or_else(
        || "clock unknown".to_owned(),
        |c| format!("clock {}", line(&c.evidence)),
    );
    let listens: Vec<String> = guest
        .forwards
        .iter()
        .map(|forward| match forward.status {
            Status::True => forward.listen.clone(),
            Status::False | Status::Unknown => {
                let mut all = guest.conditions.iter();
                let condition = all.find(|c| c.layer == Layer::Forward && c.subject == forward.name);
                let why = condition
                    .map(|c| format!(": {}", line(&c.reason)))
                    .unwrap_or_default();
                format!("{} does not listen{why}", forward.listen)
            }
        })
        .collect();
    let mut parts = vec![
        format!("{:<width$}", guest.name.as_str()),
        ready,
        evidence(Layer::Service),
        clock,
        listens.join(", "),
    ];
    let needs: Vec<&str> = guest
        .requires
        .iter()
        .map(|required| required.of.as_str())
        .collect();
    if !needs.is_empty() {
        parts.push(format!("needs {}", needs.join(", ")));
    } else if guest.conditions.iter().any(|c| c.layer == Layer::Service) {
        parts.push(format!("psql: {psql}"));
    }
    parts.retain(|part| !part.is_empty());
    parts.join("   ")
}

fn head(guest: &GuestStatus, width: usize) -> String {
    let ready = match guest.ready {
        Status::True => "ready",
        Status::False => "not ready",
        Status::Unknown => "readiness unknown",
    };
    let mut text = format!(
        "{} {:<width$}  {:?}, {ready} since {}",
        mark(guest.ready),
        guest.name.as_str(),
        guest.phase,
        guest.since
    );
    if guest.applied_revision != guest.spec_revision {
        text += &format!(
            "  (revision {} of {} applied)",
            guest.applied_revision, guest.spec_revision
        );
    }
    if let Some(vmm) = &guest.vmm {
        text += &format!(
            "  {} {} pid {} ({})",
            vmm.kind,
            vmm.accel,
            vmm.pid,
            line(&vmm.why)
        );
    }
    text
}

fn conditions(conditions: &[ConditionStatus]) -> Vec<String> {
    let mut sorted: Vec<_> = conditions.iter().collect();
    sorted.sort_by(|a, b| (a.layer, &a.subject).cmp(&(b.layer, &b.subject)));
    let layer_width = sorted.iter().map(|c| c.layer.as_str().len()).max().unwrap_or(0);
    let subject_width = sorted
        .iter()
        .map(|c| line(&c.subject).chars().count())
        .max()
        .unwrap_or(0);
    let render = |c: &&ConditionStatus| {
        let (subject, text) = (line(&c.subject), line(&format!("{}: {}", c.reason, c.evidence)));
        format!(
            "  {} {:<layer_width$}  {subject:<subject_width$}  {text}",
            mark(c.status),
            c.layer
        )
    };
    sorted.iter().map(render).collect()
}

fn forwards(guest: &GuestStatus) -> Vec<String> {
    let render = |f: &sovereign_protocol::status::ForwardStatus| {
        format!(
            "  {} {} -> {}  ({})",
            mark(f.status),
            line(&f.listen),
            line(&f.target),
            line(&f.name)
        )
    };
    guest.forwards.iter().map(render).collect()
}

/// Foreign text on one line.
fn line(text: &str) -> String {
    escaped(text).replace(['\n', '\t'], " ")
}

/// Reports for tests.
/// What an evidence says first, such as `PostgreSQL 17.6`.
fn headline(evidence: &str) -> String {
    evidence
        .split_once(": ")
        .map_or(evidence, |(head, _)| head)
        .to_owned()
}

#[cfg(test)]
pub(crate) mod examples {
    use sovereign_protocol::name::Name;
    use sovereign_protocol::status::{ConditionStatus, ForwardStatus, Phase, SCHEMA, VmmStatus};

    use super::*;

    pub(crate) fn condition(layer: Layer, status: Status, reason: &str) -> ConditionStatus {
        ConditionStatus {
            layer,
            subject: "it".into(),
            status,
            reason: reason.into(),
            evidence: "seen".into(),
            since: "2026-01-02T03:04:05Z".into(),
            age_ms: 10,
            valid_ms: 10_000,
        }
    }

    pub(crate) fn guest() -> GuestStatus {
        let mut service = condition(Layer::Service, Status::True, "Ready");
        service.subject = "postgres".into();
        service.evidence = "PostgreSQL 17.6".into();
        let mut clock = condition(Layer::Clock, Status::True, "Synchronised");
        clock.subject = "offset".into();
        clock.evidence = "+0.3 ms ±0.4 ms".into();
        GuestStatus {
            name: Name::parse("sql").unwrap(),
            phase: Phase::Running,
            ready: Status::True,
            since: "2026-01-02T03:04:05Z".into(),
            boot_id: Some("b1".into()),
            spec_revision: 2,
            applied_revision: 2,
            vmm: Some(VmmStatus {
                kind: "qemu".into(),
                accel: "tcg".into(),
                why: "no /dev/kvm".into(),
                pid: 7,
            }),
            conditions: vec![service, condition(Layer::Vmm, Status::True, "Running"), clock],
            forwards: vec![ForwardStatus {
                name: "postgres".into(),
                listen: "127.0.0.1:15432".into(),
                target: "sql:5432".into(),
                status: Status::True,
            }],
            requires: Vec::new(),
        }
    }

    /// The same with a network that has a way out.
    pub(crate) fn with_network(report: StatusReport) -> StatusReport {
        let network = vec![
            condition(Layer::Routing, Status::True, "WayOut"),
            condition(Layer::Nat, Status::False, "FilterFailed"),
        ];
        StatusReport { network, ..report }
    }

    pub(crate) fn report(guests: Vec<GuestStatus>) -> StatusReport {
        StatusReport {
            schema: SCHEMA.into(),
            instance: Name::parse("default").unwrap(),
            revision: 3,
            guests,
            network: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::examples::{condition, guest, report, with_network};
    use super::*;
    use sovereign_protocol::name::Name;
    use sovereign_protocol::status::{Phase, RequiredStatus};

    #[test]
    fn the_shared_network_comes_before_the_guests() {
        let text = picture(&with_network(report(vec![guest()])));
        let at = |part: &str| text.find(part).unwrap_or_else(|| panic!("{part}: {text}"));
        assert!(at("\nnetwork\n") < at("✓ routing"), "{text}");
        assert!(at("✗ nat") < at("sql"), "{text}");
        assert!(!picture(&report(vec![guest()])).contains("network"));
    }

    #[test]
    fn a_healthy_guest() {
        let expected = "\
instance default  revision 3
✓ sql  Running, ready since 2026-01-02T03:04:05Z  qemu tcg pid 7 (no /dev/kvm)
  ✓ vmm      it        Running: seen
  ✓ clock    offset    Synchronised: +0.3 ms ±0.4 ms
  ✓ service  postgres  Ready: PostgreSQL 17.6
  ✓ 127.0.0.1:15432 -> sql:5432  (postgres)";
        assert_eq!(picture(&report(vec![guest()])), expected);
    }

    #[test]
    fn a_broken_guest_beside_an_unknown_one_with_hostile_evidence() {
        let mut broken = guest();
        broken.phase = Phase::Failed;
        broken.ready = Status::False;
        broken.applied_revision = 1;
        broken.vmm = None;
        broken.forwards.clear();
        broken.conditions = vec![
            condition(Layer::Service, Status::Unknown, "Stale"),
            condition(Layer::Vmm, Status::False, "Ended"),
        ];
        broken.conditions[1].evidence = "\x1b[2J\nfake".into();
        let mut unknown = guest();
        unknown.name = Name::parse("forge").unwrap();
        unknown.ready = Status::Unknown;
        unknown.vmm = None;
        unknown.conditions.clear();
        unknown.forwards.clear();
        let expected = "\
instance default  revision 3
✗ sql    Failed, not ready since 2026-01-02T03:04:05Z  (revision 1 of 2 applied)
  ✗ vmm      it  Ended: \\x1b[2J fake
  ? service  it  Stale: seen
? forge  Running, readiness unknown since 2026-01-02T03:04:05Z";
        assert_eq!(picture(&report(vec![broken, unknown])), expected);
    }

    #[test]
    fn the_line_that_up_ends_with() {
        assert_eq!(
            ready_line(&guest(), 3, Some("6.4 s"), "sovereign psql sql"),
            "sql   Ready in 6.4 s   PostgreSQL 17.6   clock +0.3 ms ±0.4 ms   127.0.0.1:15432   psql: sovereign psql sql"
        );
        assert!(ready_line(&guest(), 3, None, "x").contains("Ready since 2026-01-02T03:04:05Z"));
        let mut web = guest();
        web.requires = vec![RequiredStatus {
            service: Name::parse("miniflux").unwrap(),
            of: "sql/postgres".into(),
            status: Status::True,
        }];
        web.conditions[0].evidence = "Miniflux 2.2.6: /healthcheck answered OK".into();
        let mut edge = condition(Layer::Service, Status::True, "Met");
        edge.subject = "miniflux.requires".into();
        web.conditions.push(edge);
        let line = ready_line(&web, 3, None, "x");
        assert!(
            line.contains("   Miniflux 2.2.6   ") && line.ends_with("   needs sql/postgres"),
            "{line}"
        );
    }
}
