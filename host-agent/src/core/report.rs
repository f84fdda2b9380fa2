//! The world as `sovereign status` shows it.

use std::collections::BTreeMap;

use sovereign_protocol::condition::{Condition, Layer, Status};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{ConditionStatus, ForwardStatus, GuestStatus, SCHEMA, StatusReport};

use super::World;
use super::world::Guest;

impl World {
    /// Everything at `now_ms`; `when` turns a time of the same clock into RFC 3339.
    #[must_use]
    pub fn report(&self, instance: &Name, now_ms: u64, when: impl Fn(u64) -> String) -> StatusReport {
        let readiness = self.readiness(now_ms);
        let mut conditions: BTreeMap<String, Vec<Condition>> = BTreeMap::new();
        let mut network = Vec::new();
        for condition in self.feed.snapshot(now_ms) {
            if let Some((guest, _)) = condition.key.subject.split_once('/') {
                conditions.entry(guest.to_owned()).or_default().push(condition);
            } else {
                network.push(condition_report("", &condition, now_ms, &when));
            }
        }
        let guests = self.guests.iter().map(|(name, guest)| {
            let ready = readiness.get(name).copied().unwrap_or(Status::Unknown);
            let conditions = conditions.remove(name.as_str()).unwrap_or_default();
            let required = self.required(name, guest);
            let report = guest_report(name, guest, ready, &conditions, now_ms, &when);
            GuestStatus {
                requires: required,
                ..report
            }
        });
        StatusReport {
            schema: SCHEMA.to_owned(),
            instance: instance.clone(),
            revision: self.revision,
            guests: guests.collect(),
            network,
        }
    }

    /// A guest's conditions, lowest layer first.
    pub(super) fn guest_conditions(&self, name: &Name, now_ms: u64) -> impl Iterator<Item = Condition> + '_ {
        let prefix = format!("{name}/");
        self.feed
            .matching(now_ms, move |key| key.subject.starts_with(&prefix))
    }

    /// Whether each guest is ready, in one pass over the conditions of all: every event asks.
    pub(super) fn readiness(&self, now_ms: u64) -> BTreeMap<Name, Status> {
        let mut observed: BTreeMap<&str, Vec<Observed>> = BTreeMap::new();
        for (key, status) in self.feed.statuses(now_ms) {
            if let Some((guest, own)) = key.subject.split_once('/') {
                let list = observed.entry(guest).or_default();
                list.push((key.layer, own, status));
            }
        }
        let judged = self.guests.iter().map(|(name, guest)| {
            let observed = observed.get(name.as_str()).map_or(&[][..], Vec::as_slice);
            (name.clone(), guest.judge(observed))
        });
        judged.collect()
    }

    #[cfg(test)]
    pub(super) fn ready(&self, name: &Name, now_ms: u64) -> Status {
        self.readiness(now_ms).remove(name).unwrap_or(Status::Unknown)
    }
}

/// A condition of one guest: its layer, its subject in the guest, and its status.
type Observed<'a> = (Layer, &'a str, Status);

impl Guest {
    /// True when VMM, session and every layer that is not advisory hold, every declared
    /// service among them, under the last document that it was given.
    fn judge(&self, observed: &[Observed]) -> Status {
        let status_of = |layer: Layer, subject: &str| {
            let found = observed.iter().find(|(l, s, _)| (*l, *s) == (layer, subject));
            found.map_or(Status::Unknown, |(_, _, status)| *status)
        };
        let services = self.config.services.iter();
        let required = [(Layer::Vmm, "vmm"), (Layer::Session, "agent")]
            .into_iter()
            .chain(services.map(|service| (Layer::Service, service.name.as_str())))
            .map(|(layer, subject)| status_of(layer, subject));
        let present = observed
            .iter()
            .filter(|(layer, subject, _)| !layer.advisory_for(subject))
            .map(|(_, _, status)| *status);
        let holds = required.chain(present).fold(Status::True, Status::and);
        if holds == Status::True && self.applied != self.given {
            return Status::Unknown;
        }
        holds
    }
}

fn guest_report(
    name: &Name,
    guest: &Guest,
    ready: Status,
    conditions: &[Condition],
    now_ms: u64,
    when: &impl Fn(u64) -> String,
) -> GuestStatus {
    let forward_status = |forward: &str| {
        let subject = format!("{name}/{forward}");
        conditions
            .iter()
            .find(|c| c.key.layer == Layer::Forward && c.key.subject == subject)
            .map_or(Status::Unknown, |c| c.verdict.status)
    };
    GuestStatus {
        name: name.clone(),
        phase: guest.phase,
        ready,
        since: when(guest.ready_since_ms),
        boot_id: guest.boot.as_ref().map(|(boot_id, _)| boot_id.clone()),
        spec_revision: guest.given.revision,
        applied_revision: guest.applied.revision,
        vmm: guest.boot.as_ref().map(|(_, vmm)| vmm.clone()),
        forwards: guest
            .config
            .forwards
            .iter()
            .map(|forward| ForwardStatus {
                name: forward.name.to_string(),
                listen: forward.listens(),
                target: format!("{name}:{}", forward.port),
                status: forward_status(forward.name.as_str()),
            })
            .collect(),
        conditions: conditions
            .iter()
            .map(|c| condition_report(name.as_str(), c, now_ms, when))
            .collect(),
        requires: Vec::new(),
    }
}

fn condition_report(
    guest: &str,
    condition: &Condition,
    now_ms: u64,
    when: &impl Fn(u64) -> String,
) -> ConditionStatus {
    let subject = &condition.key.subject;
    ConditionStatus {
        layer: condition.key.layer,
        subject: subject
            .strip_prefix(&format!("{guest}/"))
            .unwrap_or(subject)
            .to_owned(),
        status: condition.verdict.status,
        reason: condition.verdict.reason.clone(),
        evidence: condition.verdict.evidence.clone(),
        since: when(now_ms.saturating_sub(condition.since_ms)),
        age_ms: condition.age_ms,
        valid_ms: condition.valid_ms,
    }
}
