//! Taking over a specification: all of it, or the old state with the reason.
//!
//! ```text
//! first document:  everything at once, answered at once: there is no old state to keep
//! later ones:      interface -> services that run -> committed, answered with the revision
//!                      |            |
//!                      +--failed----+--> everything as it was, answered with the reason
//! ```

use std::collections::BTreeSet;

use sovereign_protocol::condition::{Key, Layer, Verdict};
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_protocol::mesh::Requirement;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Exposed, GuestSpec, ServiceKind};
use sovereign_protocol::ways::Ways;

use super::brief::Brief;
use super::net::{Order, Wanted};
use super::service::{self, Progress, State};
use super::world::{Effect, Kept, LOOK_VALID_MS, World, client_key, config_key};

/// Who applied is answered within this time; what fails later is told by a condition alone.
/// Below the deadline of the host's call (5 s).
pub const ANSWER_MS: u64 = 4_000;
/// Settings that the agent itself must know, or that would read other files.
const RESERVED: &[&str] = &[
    "config_file",
    "data_directory",
    "external_pid_file",
    "hba_file",
    "ident_file",
    "include",
    "include_dir",
    "include_if_exists",
    "port",
    "unix_socket_directories",
];

/// What is wanted, what was reached, and the way from one to the other.
#[derive(Debug, Default)]
pub(super) struct Application {
    wanted: Option<GuestSpec>,
    /// The last specification that was reached whole; the state to go back to.
    reached: Option<GuestSpec>,
    /// What the network was last told.
    ordered: Option<Option<InterfaceSpec>>,
    attempts: u64,
    /// What was last told of the host's way out, with our addresses.
    ways: Option<(Ways, Vec<Prefix>)>,
    change: Option<Change>,
    /// Why the last specification was not taken; until the next one.
    refused: Option<(Key, String)>,
}

#[derive(Debug)]
struct Change {
    /// Gone once it was answered.
    ticket: Option<u64>,
    begun_ms: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The network was told and has not answered this attempt.
    Interface(u64),
    /// These services ran and were told; some are not there yet.
    Services(BTreeSet<Name>),
}

impl Application {
    pub(super) fn wanted(&self) -> Option<&GuestSpec> {
        self.wanted.as_ref()
    }

    pub(super) fn is_changing(&self) -> bool {
        self.change.is_some()
    }

    /// Tells on what the host says of its way out, if that is news. It is no wish: nothing of it is taken back with a
    /// document that cannot be reached, and the interface is the same.
    fn ways(&mut self, spec: &GuestSpec) -> Option<Effect> {
        let interface = spec
            .interface
            .as_ref()
            .filter(|interface| !interface.ways.is_empty())?;
        let told = Some((interface.ways, interface.addresses.clone()));
        (self.ways != told).then(|| {
            self.ways = told;
            Effect::Ways(Box::new(interface.clone()))
        })
    }

    /// Why this part is not as the host last wanted it.
    pub(super) fn refusal(&self, key: &Key) -> Option<&str> {
        let (refused, why) = self.refused.as_ref()?;
        (refused == key).then_some(why)
    }
}

/// What of the interface is asked for: which way its packets take beyond it is none of that.
fn asked(spec: &GuestSpec) -> Option<InterfaceSpec> {
    let interface = spec.interface.clone()?;
    let ways = Ways::default();
    Some(InterfaceSpec { ways, ..interface })
}

/// Why a valid spec is not taken: path and problem.
///
/// # Errors
/// The first conflict in words.
pub fn admit(spec: &GuestSpec) -> Result<(), String> {
    if spec.services.len() > 1 {
        return Err("services: one service per guest is what this agent can run".to_owned());
    }
    let printable = |secret: &Exposed| secret.0.reveal().bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if let Some((name, _)) = spec.secrets.iter().find(|(_, secret)| !printable(secret)) {
        return Err(format!("secrets.{name}: only printable ASCII is accepted"));
    }
    for (index, service) in spec.services.iter().enumerate() {
        if service.kind.port() == 0 {
            return Err(format!("services[{index}].port: 0 is no port"));
        }
        let settings = match &service.kind {
            ServiceKind::Postgres { settings, .. } => settings,
            ServiceKind::Miniflux { .. } => {
                let key = Requirement::secret(&service.name);
                if !spec.requirements.contains_key(&service.name) || !spec.secrets.contains_key(&key) {
                    return Err(format!(
                        "services[{index}]: its database or the password is missing"
                    ));
                }
                continue;
            }
        };
        let reserved = |key: &&String| RESERVED.contains(&key.to_ascii_lowercase().as_str());
        if let Some(key) = settings.keys().find(reserved) {
            return Err(format!(
                "services[{index}].settings.{key}: this setting belongs to the agent"
            ));
        }
    }
    Ok(())
}

impl World {
    /// The host wants this.
    pub(super) fn apply(&mut self, spec: GuestSpec, ticket: u64, now_ms: u64) -> Vec<Effect> {
        if self.shutdown_ms.is_some() {
            return vec![Effect::Answer(
                ticket,
                Err("the guest is shutting down".to_owned()),
            )];
        }
        let mut effects = Vec::new();
        if let Some(old) = self.application.change.take().and_then(|change| change.ticket) {
            let why = format!("revision {} came before it was reached", spec.revision);
            effects.push(Effect::Answer(old, Err(why)));
        }
        if let Some((key, _)) = self.application.refused.take() {
            self.feed.remove(&key);
        }
        let is_first = self.application.reached.is_none();
        effects.extend(self.application.ways(&spec));
        self.application.wanted = Some(spec.clone());
        self.judge_kernel(now_ms);
        let order = self.order(&spec, !is_first);
        if is_first {
            effects.extend(order);
            effects.extend(self.tell_services(&spec, now_ms));
            self.application.change = Some(Change {
                ticket: Some(ticket),
                begun_ms: now_ms,
                stage: Stage::Services(BTreeSet::new()),
            });
            return effects;
        }
        let stage = Stage::Interface(self.application.attempts);
        self.application.change = Some(Change {
            ticket: Some(ticket),
            begun_ms: now_ms,
            stage,
        });
        match order {
            Some(order) => effects.push(order),
            None => effects.extend(self.begin_services(now_ms)),
        }
        effects
    }

    /// The network did, or went back.
    pub(super) fn network_taken(
        &mut self,
        attempt: u64,
        outcome: Result<(), String>,
        now_ms: u64,
    ) -> Vec<Effect> {
        let expected = self.application.change.as_ref().map(|change| &change.stage);
        if !matches!(expected, Some(Stage::Interface(expected)) if *expected == attempt) {
            return Vec::new(); // of a change that is over
        }
        match outcome {
            Ok(()) => self.begin_services(now_ms),
            Err(why) => {
                // It went back by itself.
                self.application.ordered = self.application.reached.as_ref().map(asked);
                self.go_back(
                    Key::new(Layer::Interface, "net.config"),
                    &format!("interface: {why}"),
                    now_ms,
                )
            }
        }
    }

    /// Looks how far the change is.
    pub(super) fn go_on(&mut self, now_ms: u64) -> Vec<Effect> {
        self.renew_refusal(now_ms);
        let Some(change) = &mut self.application.change else {
            return Vec::new();
        };
        let late = now_ms.saturating_sub(change.begun_ms) >= ANSWER_MS;
        match &change.stage {
            Stage::Interface(_) if late => {
                let why = "interface: the network does not answer";
                self.go_back(Key::new(Layer::Interface, "net.config"), why, now_ms)
            }
            Stage::Interface(_) => Vec::new(),
            Stage::Services(waiting) => {
                let progress = |name: &Name| self.services.get(name).map(|kept| kept.machine.progress());
                let failed = waiting.iter().find_map(|name| match progress(name) {
                    Some(Progress::Failed(why)) => Some((name.clone(), why)),
                    _ => None,
                });
                if let Some((name, why)) = failed {
                    return self.go_back(config_key(&name), &format!("{name}: {why}"), now_ms);
                }
                if !waiting
                    .iter()
                    .any(|name| progress(name) == Some(Progress::Pending))
                {
                    return self.commit();
                }
                let ticket = change.ticket.take_if(|_| late);
                let revision = self.application.wanted.as_ref().map_or(0, |spec| spec.revision);
                ticket
                    .map(|ticket| Effect::Answer(ticket, Ok(revision)))
                    .into_iter()
                    .collect()
            }
        }
    }

    fn commit(&mut self) -> Vec<Effect> {
        let Some(spec) = self.application.wanted.clone() else {
            return Vec::new();
        };
        let mut effects = Vec::new();
        let before = self.application.reached.replace(spec.clone());
        if before
            .as_ref()
            .is_none_or(|before| before.hostname != spec.hostname)
        {
            effects.push(Effect::Hostname(spec.hostname));
        }
        let watched = before.is_some_and(|before| before.tailscale.is_some());
        if watched != spec.tailscale.is_some() {
            effects.push(Effect::Tailscale(!watched));
        }
        if let Some(ticket) = self.application.change.take().and_then(|change| change.ticket) {
            effects.push(Effect::Answer(ticket, Ok(spec.revision)));
        }
        effects
    }

    /// Everything as it was before the change.
    fn go_back(&mut self, key: Key, why: &str, now_ms: u64) -> Vec<Effect> {
        let change = self.application.change.take();
        let (Some(refused), Some(old)) = (self.application.wanted.take(), self.application.reached.clone())
        else {
            return Vec::new();
        };
        let text = format!(
            "revision {} was not taken, revision {} goes on: {why}",
            refused.revision, old.revision
        );
        self.application.wanted = Some(old.clone());
        self.application.refused = Some((key, text.clone()));
        let mut effects: Vec<Effect> = self.order(&old, false).into_iter().collect();
        effects.extend(self.tell_services(&old, now_ms));
        self.judge_kernel(now_ms);
        self.renew_refusal(now_ms);
        if let Some(ticket) = change.and_then(|change| change.ticket) {
            effects.push(Effect::Answer(ticket, Err(text)));
        }
        effects
    }

    fn renew_refusal(&mut self, now_ms: u64) {
        if let Some((key, why)) = &self.application.refused {
            let verdict = Verdict::no("NotApplied", why);
            self.feed.observe(key.clone(), verdict, LOOK_VALID_MS, now_ms);
        }
    }

    /// Tells the network, if that is news to it.
    fn order(&mut self, spec: &GuestSpec, strict: bool) -> Option<Effect> {
        let interface = asked(spec);
        if self.application.ordered.as_ref() == Some(&interface) {
            return None;
        }
        self.application.ordered = Some(interface.clone());
        self.application.attempts += 1;
        Some(Effect::Network(Order {
            attempt: self.application.attempts,
            wanted: interface.map_or(Wanted::Nothing, Wanted::Spec),
            strict,
        }))
    }

    /// Only services that run now can be asked whether they run as they should.
    fn begin_services(&mut self, now_ms: u64) -> Vec<Effect> {
        let Some(spec) = self.application.wanted.clone() else {
            return Vec::new();
        };
        let runs = |name: &&Name| {
            self.services
                .get(*name)
                .is_some_and(|kept| *kept.machine.state() == State::Up)
        };
        let waiting = spec
            .services
            .iter()
            .map(|service| &service.name)
            .filter(runs)
            .cloned()
            .collect();
        if let Some(change) = &mut self.application.change {
            change.stage = Stage::Services(waiting);
        }
        self.tell_services(&spec, now_ms)
    }

    /// Tells each service what is news to it.
    fn tell_services(&mut self, spec: &GuestSpec, now_ms: u64) -> Vec<Effect> {
        let mut told: Vec<(Name, service::Event)> = Vec::new();
        for service in &spec.services {
            let (name, brief) = (&service.name, Brief::of(spec, service));
            let required = brief.required();
            match self.services.get_mut(name) {
                Some(kept) => {
                    let leaving = matches!(kept.machine.state(), State::Stopping { .. } | State::Stopped);
                    let news = kept.brief.required() != required;
                    let changed = !kept.brief.is_same_order(&brief) || leaving;
                    let gone = kept.replace(brief);
                    for role in gone {
                        self.feed.remove(&client_key(name, &role));
                    }
                    // First: what cannot be used is no reason for a restart.
                    told.extend(news.then(|| (name.clone(), service::Event::Required(required))));
                    told.extend(changed.then(|| (name.clone(), service::Event::Changed)));
                }
                None => {
                    self.services.insert(name.clone(), Kept::new(brief));
                    told.push((name.clone(), service::Event::Required(required)));
                    told.push((name.clone(), service::Event::Disk(self.disk)));
                }
            }
        }
        let gone = self
            .services
            .keys()
            .filter(|name| !spec.services.iter().any(|s| s.name == **name));
        told.extend(gone.map(|name| (name.clone(), service::Event::Stop)));
        told.into_iter()
            .filter_map(|(name, event)| self.service(&name, event, now_ms))
            .collect()
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
