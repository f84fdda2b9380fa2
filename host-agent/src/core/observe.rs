//! What the adapters saw, taken into the world.

use std::collections::BTreeSet;

use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::event::{self, Events};
use sovereign_protocol::feed::{Changes, Feed};
use sovereign_protocol::limits::GUEST_CONDITIONS;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::GuestConfig;
use sovereign_protocol::status::{Phase, VmmStatus};

use crate::shim::contract::VmmState;
use crate::shim::qmp::IO_ERROR;

use super::event::Event;
use super::translations::port_subject;
use super::world::{CLOCK_VALID_MS, LASTING_MS, OFFSET, World, host_key, host_owned};

/// A forward that is not wanted any more is no condition.
pub(super) fn forget_forwards(feed: &mut Feed, guest: &Name, old: &GuestConfig, new: &GuestConfig) {
    let stays = |name: &Name| new.forwards.iter().any(|forward| forward.name == *name);
    for forward in old.forwards.iter().filter(|old| !stays(&old.name)) {
        feed.remove(&host_key(Layer::Forward, guest, forward.name.as_str()));
        feed.remove(&host_key(Layer::Forward, guest, &port_subject(&forward.name)));
    }
}

impl World {
    pub(super) fn observe(&mut self, event: Event, now_ms: u64) {
        match event {
            Event::Booted {
                guest: name,
                boot_id,
                vmm,
                machine,
            } => {
                let Some(guest) = self.guests.get_mut(&name) else {
                    return;
                };
                if guest.phase != Phase::Stopping {
                    guest.phase = Phase::Starting;
                }
                let verdict = running(&vmm);
                guest.boot = Some((boot_id, vmm));
                guest.machine = Some(machine);
                self.set(Layer::Vmm, &name, "vmm", verdict, now_ms);
                self.set(
                    Layer::Session,
                    &name,
                    "agent",
                    Verdict::unknown("Dialling", "the guest boots"),
                    now_ms,
                );
            }
            Event::VmmState(name, state) => {
                if let Some(guest) = self.guests.get_mut(&name) {
                    guest.wedge.vmm(matches!(state, VmmState::Silent(_)), now_ms);
                }
                let vmm = self.guests.get(&name).and_then(|guest| guest.boot.as_ref());
                if let Some(verdict) = vmm.and_then(|(_, vmm)| vmm_verdict(&state, vmm)) {
                    self.set(Layer::Vmm, &name, "vmm", verdict, now_ms);
                }
            }
            Event::SessionSilent(name, why) => {
                if let Some(guest) = self.guests.get_mut(&name) {
                    guest.wedge.dial(true, now_ms);
                }
                self.set(
                    Layer::Session,
                    &name,
                    "agent",
                    Verdict::unknown("Silent", why),
                    now_ms,
                );
            }
            Event::SessionUp(name, evidence) => {
                if let Some(guest) = self.guests.get_mut(&name) {
                    guest.wedge.dial(false, now_ms);
                }
                if let Some(guest) = self.guests.get_mut(&name)
                    && guest.phase == Phase::Starting
                {
                    guest.phase = Phase::Running;
                }
                self.set(
                    Layer::Session,
                    &name,
                    "agent",
                    Verdict::yes("Answered", evidence),
                    now_ms,
                );
            }
            Event::SessionLost(name, why) => self.session_lost(&name, &why, now_ms),
            Event::SpecApplied(name, edition) => {
                if let Some(guest) = self.guests.get_mut(&name) {
                    guest.applied = edition;
                }
                let agent = self.feed.verdict(&host_key(Layer::Session, &name, "agent"));
                if agent.is_some_and(|verdict| verdict.reason == "SpecRefused") {
                    let verdict = Verdict::yes("Answered", format!("revision {} is taken", edition.revision));
                    self.set(Layer::Session, &name, "agent", verdict, now_ms);
                }
            }
            Event::SpecRefused(name, why) => {
                self.set(
                    Layer::Session,
                    &name,
                    "agent",
                    Verdict::no("SpecRefused", why),
                    now_ms,
                );
            }
            Event::Conditions(name, changes) => self.merge(&name, changes, now_ms),
            Event::Happened(name, events) => self.record(&name, events, now_ms),
            Event::Clock(name, verdict) => {
                let key = host_key(Layer::Clock, &name, OFFSET);
                self.feed.observe(key, verdict, CLOCK_VALID_MS, now_ms);
            }
            Event::Forward(name, forward, verdict) => {
                let known = self.translated(&name, &forward);
                let verdict = known
                    .filter(|_| verdict.status == Status::Unknown)
                    .unwrap_or(verdict);
                self.set(Layer::Forward, &name, &forward, verdict, now_ms)
            }
            Event::Started(evidence) => {
                let key = Key::new(Layer::Session, "agent");
                let started = Verdict::yes("Started", evidence);
                self.feed.journal_mut().append(key, None, Some(started), now_ms);
            }
            Event::Applied(_)
            | Event::Found(..)
            | Event::Running(_)
            | Event::NoCard(..)
            | Event::NetworkMode(_)
            | Event::Network(_)
            | Event::Resolver(_)
            | Event::SharedPorts(_)
            | Event::Ended(..)
            | Event::Tick
            | Event::StopAll => {}
        }
    }

    fn session_lost(&mut self, name: &Name, why: &str, now_ms: u64) {
        self.set(
            Layer::Session,
            name,
            "agent",
            Verdict::unknown("Lost", why),
            now_ms,
        );
        let unseen: Vec<_> = self
            .guest_conditions(name, now_ms)
            .filter(|c| c.verdict.status != Status::Unknown)
            .filter(|c| !host_owned(c.key.layer, own(&c.key.subject)))
            .collect();
        for condition in unseen {
            let evidence = format!(
                "session lost; before: {} {}",
                condition.verdict.reason, condition.verdict.evidence
            );
            let verdict = Verdict::unknown("SessionLost", evidence);
            // The loss itself is in the journal; what the guest saw meanwhile comes from the guest's own.
            self.feed.mirror(condition.key, verdict, LASTING_MS, now_ms);
        }
    }

    fn merge(&mut self, name: &Name, changes: Changes, now_ms: u64) {
        let theirs = |key: &Key| !host_owned(key.layer, &key.subject);
        let mut known: BTreeSet<Key> = self
            .guest_conditions(name, now_ms)
            .map(|c| c.key)
            .filter(|key| !host_owned(key.layer, own(&key.subject)))
            .collect();
        let mut gone: BTreeSet<Key> = changes
            .removed
            .iter()
            .filter(|key| theirs(key))
            .map(|key| host_key(key.layer, name, &key.subject))
            .collect();
        let told: Vec<_> = changes
            .conditions
            .into_iter()
            .filter(|c| theirs(&c.key))
            .collect();
        if changes.reset {
            gone.extend(known.iter().cloned());
            for condition in &told {
                gone.remove(&host_key(condition.key.layer, name, &condition.key.subject));
            }
        }
        for key in &gone {
            self.feed.remove(key);
            known.remove(key);
        }
        let mut crowded = false;
        for condition in told {
            let key = host_key(condition.key.layer, name, &condition.key.subject);
            if !known.contains(&key) && known.len() >= GUEST_CONDITIONS {
                crowded = true;
                continue;
            }
            known.insert(key.clone());
            let observed_ms = now_ms.saturating_sub(condition.age_ms);
            self.feed
                .mirror(key, condition.verdict, condition.valid_ms, observed_ms);
        }
        if crowded {
            self.tell_crowded(name, now_ms);
        }
    }

    /// Once a boot: a guest that reports too much does so again and again.
    fn tell_crowded(&mut self, name: &Name, now_ms: u64) {
        let Some(guest) = self.guests.get_mut(name) else {
            return;
        };
        if !std::mem::replace(&mut guest.crowded, true) {
            let key = host_key(Layer::Session, name, "conditions");
            let text = format!("the guest reports more than {GUEST_CONDITIONS}; the rest is not taken");
            let verdict = Verdict::unknown("TooManyConditions", text);
            self.feed.journal_mut().append(key, None, Some(verdict), now_ms);
        }
    }

    /// Takes a guest's events into our journal, each once: a new session reads them again.
    fn record(&mut self, name: &Name, events: Events, now_ms: u64) {
        if !self.guests.contains_key(name) {
            return;
        }
        let before = self.read.insert(name.clone(), events.cursor);
        let seen = before
            .filter(|cursor| cursor.incarnation == events.cursor.incarnation)
            .map_or(0, |cursor| cursor.revision);
        let fresh: Vec<_> = events
            .events
            .into_iter()
            .filter(|event| event.seq > seen)
            .collect();
        let journal = self.feed.journal_mut();
        let lost = fresh.first().map_or(0, |first| first.seq - seen - 1);
        if lost > 0 {
            let key = host_key(Layer::Session, name, "events");
            let text = format!("{lost} events of the guest were no longer kept");
            journal.append(key, None, Some(Verdict::unknown("EventsLost", text)), now_ms);
        }
        let theirs = |event: &event::Event| !host_owned(event.key.layer, &event.key.subject);
        for event in fresh.into_iter().filter(theirs) {
            let key = host_key(event.key.layer, name, &event.key.subject);
            journal.append(key, event.from, event.to, now_ms.saturating_sub(event.age_ms));
        }
    }

    fn set(&mut self, layer: Layer, guest: &Name, subject: &str, verdict: Verdict, now_ms: u64) {
        self.feed
            .observe(host_key(layer, guest, subject), verdict, LASTING_MS, now_ms);
    }
}

/// The subject within its guest.
pub(super) fn own(subject: &str) -> &str {
    subject.split_once('/').map_or(subject, |(_, own)| own)
}

fn running(vmm: &VmmStatus) -> Verdict {
    let VmmStatus {
        kind,
        accel,
        why,
        pid,
    } = vmm;
    Verdict::yes("Running", format!("{kind} pid {pid} by {accel}: {why}"))
}

/// What a VMM's state means; `None` before it has said anything.
pub(crate) fn vmm_verdict(state: &VmmState, vmm: &VmmStatus) -> Option<Verdict> {
    let verdict = match state {
        VmmState::Starting => return None,
        VmmState::Says(word) if word == "running" => running(vmm),
        VmmState::Says(word) if word == "paused" => {
            Verdict::unknown("Paused", "QMP says paused: nothing in the guest can answer")
        }
        VmmState::Says(word) if word == IO_ERROR => Verdict::no(
            "HostDiskFull",
            "the host's disk is full: the guest stands still, loses nothing, and goes on by itself when there is room",
        ),
        VmmState::Says(word) => Verdict::no("Stuck", format!("QMP says {word}")),
        VmmState::Stopped => Verdict::unknown("Stopped", "its process is stopped (SIGSTOP): send it SIGCONT"),
        VmmState::Silent(letter) => Verdict::no(
            "Silent",
            format!("QMP does not answer; its process is in state {letter}"),
        ),
    };
    Some(verdict)
}
