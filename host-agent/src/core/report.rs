//! The world as `sovereign status` shows it.

use sovereign_protocol::condition::{Condition, Layer, Status};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{ConditionStatus, ForwardStatus, GuestStatus, SCHEMA, StatusReport};

use super::World;
use super::observe::own;
use super::world::Guest;

impl World {
    /// Everything at `now_ms`; `when` turns a time of the same clock into RFC 3339.
    #[must_use]
    pub fn report(&self, instance: &Name, now_ms: u64, when: impl Fn(u64) -> String) -> StatusReport {
        StatusReport {
            schema: SCHEMA.to_owned(),
            instance: instance.clone(),
            revision: self.revision,
            guests: self
                .guests
                .iter()
                .map(|(name, guest)| self.guest_report(name, guest, now_ms, &when))
                .collect(),
        }
    }

    fn guest_report(
        &self,
        name: &Name,
        guest: &Guest,
        now_ms: u64,
        when: &impl Fn(u64) -> String,
    ) -> GuestStatus {
        let conditions: Vec<Condition> = self.guest_conditions(name, now_ms).collect();
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
            ready: self.ready(name, now_ms),
            since: when(guest.ready_since_ms),
            boot_id: guest.boot.as_ref().map(|(boot_id, _)| boot_id.clone()),
            spec_revision: guest.spec_revision,
            applied_revision: guest.applied_revision,
            vmm: guest.boot.as_ref().map(|(_, vmm)| vmm.clone()),
            forwards: guest
                .config
                .forwards
                .iter()
                .map(|forward| ForwardStatus {
                    name: forward.name.to_string(),
                    listen: forward.listen.to_string(),
                    target: format!("{name}:{}", forward.port),
                    status: forward_status(forward.name.as_str()),
                })
                .collect(),
            conditions: conditions
                .iter()
                .map(|c| condition_report(name, c, now_ms, when))
                .collect(),
        }
    }

    /// A guest's conditions, lowest layer first.
    pub(super) fn guest_conditions(&self, name: &Name, now_ms: u64) -> impl Iterator<Item = Condition> + '_ {
        let prefix = format!("{name}/");
        self.feed
            .snapshot(now_ms)
            .filter(move |condition| condition.key.subject.starts_with(&prefix))
    }

    /// True when VMM, session and every layer that is not advisory hold, every declared
    /// service among them, under the spec that is wanted.
    pub(super) fn ready(&self, name: &Name, now_ms: u64) -> Status {
        let Some(guest) = self.guests.get(name) else {
            return Status::Unknown;
        };
        let conditions: Vec<Condition> = self.guest_conditions(name, now_ms).collect();
        let status_of = |layer: Layer, subject: &str| {
            let subject = format!("{name}/{subject}");
            conditions
                .iter()
                .find(|c| c.key.layer == layer && c.key.subject == subject)
                .map_or(Status::Unknown, |c| c.verdict.status)
        };
        let required = [(Layer::Vmm, "vmm"), (Layer::Session, "agent")]
            .into_iter()
            .chain(
                guest
                    .config
                    .services
                    .iter()
                    .map(|s| (Layer::Service, s.name.as_str())),
            )
            .map(|(layer, subject)| status_of(layer, subject));
        let present = conditions
            .iter()
            .filter(|c| !c.key.layer.advisory_for(own(&c.key.subject)))
            .map(|c| c.verdict.status);
        let observed = required.chain(present).fold(Status::True, Status::and);
        if observed == Status::True && guest.applied_revision != guest.spec_revision {
            return Status::Unknown;
        }
        observed
    }
}

fn condition_report(
    guest: &Name,
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
