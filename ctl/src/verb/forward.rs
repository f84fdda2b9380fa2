//! `forward`: adds, lists and removes forwards, in the file and in the running host agent.
//!
//! The agent goes first: a port that somebody else has is known only there, and then the file stays as it is.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::json;
use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::name::Name;
use sovereign_protocol::port::Transport;
use sovereign_protocol::spec::{Forward, HostSpec, Namespace, SpecError};
use sovereign_protocol::status::{ConditionStatus, StatusReport};

use crate::cli::{AddForward, ForwardVerb, RemoveForward};
use crate::config::{self, Settings, edit};
use crate::context::{Context, data, data_json, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::forward::{Asked, Known, Via, decide, is_meant, target};
use crate::link::Link;

/// A port that is free listens at once; so long is waited for the host agent to say which it is.
const VERDICT: Duration = Duration::from_secs(5);
/// A status of a forward is also no condition of its own: look again soon even if nothing changes.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

pub(super) async fn run(context: &Context, verb: Option<ForwardVerb>) -> Result<(), CommandError> {
    match verb {
        None => list(context, None).await,
        Some(ForwardVerb::List { name }) => list(context, name.as_ref()).await,
        Some(ForwardVerb::Add(args)) => add(context, &args).await,
        Some(ForwardVerb::Remove(args)) => remove(context, &args).await,
    }
}

async fn add(context: &Context, args: &AddForward) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    super::up::wanted(&settings, Some(&args.guest))?;
    let live = Live::find(context).await?;
    let known: Vec<Known> = written(&settings).into_iter().chain(live.forwards()).collect();
    let services = &settings.guests[&args.guest].services;
    let asked = Asked {
        guest: &args.guest,
        mapping: args.mapping,
        name: args.name.as_ref(),
        via: args.via,
        udp: args.udp,
    };
    let wanted = Known {
        guest: args.guest.clone(),
        forward: decide(&asked, services, &known)?,
    };
    check(&settings, &wanted)?;
    let in_file = written(&settings).contains(&wanted);
    let to_write = !args.temporary && !in_file;
    let edited = to_write.then(|| edited(&settings, &wanted)).transpose()?;

    let state = live.open(context, &wanted, args.temporary).await?;
    if let Some(edited) = &edited {
        edited.write()?;
    }
    let reason = match (&edited, &state) {
        (None, State::There) => "Exists",
        _ => "Added",
    };
    let mut evidence = format!("{wanted}; {}", state.words(context));
    if args.temporary && !in_file {
        evidence += "; temporary: not in the file, so the next `sovereign up` takes it back";
    } else if let Some(edited) = &edited {
        evidence += &format!("; written to {}", edited.path.display());
    }
    said(context, reason, &evidence, "sovereign forward list", &wanted)
}

async fn remove(context: &Context, args: &RemoveForward) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    let live = Live::find(context).await?;
    let meant = |known: &Known| known.guest == args.guest && is_meant(&known.forward, &args.which);
    let in_agent: Vec<Known> = live.forwards().filter(meant).collect();
    let in_file: Vec<Known> = match args.temporary {
        true => Vec::new(), // it stays there, whatever it holds
        false => written(&settings).into_iter().filter(meant).collect(),
    };
    let Some(first) = in_agent.first().or(in_file.first()).cloned() else {
        let evidence = format!("guest {} has no forward {}", args.guest, escaped(&args.which));
        talk(&evidence);
        return context.done("NothingThere", &evidence, "sovereign forward list");
    };
    let gone = |name: &str| in_file.iter().any(|known| known.forward.name.as_str() == name);
    let edited = (!in_file.is_empty()).then(|| {
        let text = config::read(&settings.path)?;
        let new = edit::remove_forward(&text, &args.guest, gone);
        Edited::checked(
            &settings,
            text,
            new,
            &format!("remove its forward {}", first.forward.name),
        )
    });
    let edited = edited.transpose()?;
    live.close(&in_agent).await?;
    if let Some(edited) = &edited {
        edited.write()?;
    }
    let place = match (&edited, in_agent.is_empty()) {
        (Some(_), true) => "taken out of the file",
        (Some(_), false) => "closed, and taken out of the file",
        (None, _) if args.temporary => {
            "closed; temporary: the next `sovereign up` opens it again if the file has it"
        }
        (None, _) => "closed; the file did not have it",
    };
    let names: BTreeSet<&Name> = in_agent
        .iter()
        .chain(&in_file)
        .map(|known| &known.forward.name)
        .collect();
    let names: Vec<&str> = names.into_iter().map(Name::as_str).collect();
    let evidence = format!("forward {} of {}: {place}", names.join(", "), args.guest);
    said(context, "Removed", &evidence, "sovereign forward list", &first)
}

fn said(
    context: &Context,
    reason: &str,
    evidence: &str,
    next: &str,
    what: &Known,
) -> Result<(), CommandError> {
    if !context.json {
        talk(evidence);
        return Ok(());
    }
    let Known { guest, forward } = what;
    let forward = json!({
        "guest": guest, "name": forward.name, "listen": forward.listens(), "target": target(guest, forward),
        "via": Via::of(forward), "protocol": forward.transport(),
    });
    context.done_with(reason, evidence, next, &[("forward", forward)])
}

/// The contract's own checks, before anything is changed: the file and the host agent would refuse it.
fn check(settings: &Settings, wanted: &Known) -> Result<(), CommandError> {
    let mut settings = settings.clone();
    if let Some(guest) = settings.guests.get_mut(&wanted.guest) {
        guest.forwards.retain(|other| other.name != wanted.forward.name);
        guest.forwards.push(wanted.forward.clone());
    }
    let Err(error) = config::contract(&settings) else {
        return Ok(());
    };
    let (problem, path) = match error {
        SpecError::Value { problem, .. } => (problem, settings.path.display()),
        other => (other.to_string(), settings.path.display()),
    };
    let namespace = settings.network.as_ref().map(|network| network.namespace);
    let next = match (Via::of(&wanted.forward), namespace) {
        (Via::Kernel, Some(Namespace::Host)) | (Via::Vsock, _) => format!("less {path}"),
        (Via::Kernel, _) => {
            format!(
                "set namespace = \"host\" under [network] in {path}, then: sovereign down && sovereign up"
            )
        }
    };
    let message = format!("{wanted}: {problem}");
    Err(CommandError::new(Kind::Configuration, "NotPossible", message).next(next))
}

/// The file's forwards.
fn written(settings: &Settings) -> Vec<Known> {
    let guests = settings.guests.iter();
    let forwards = guests.flat_map(|(guest, own)| of(guest, &own.forwards));
    forwards.collect()
}

fn of(guest: &Name, forwards: &[Forward]) -> impl Iterator<Item = Known> {
    forwards.iter().map(|forward| Known {
        guest: guest.clone(),
        forward: forward.clone(),
    })
}

/// A text that will replace the file, seen to mean what it should.
struct Edited {
    path: std::path::PathBuf,
    old: String,
    new: String,
}

impl Edited {
    fn checked(
        settings: &Settings,
        old: String,
        new: Option<String>,
        by_hand: &str,
    ) -> Result<Self, CommandError> {
        let path = settings.path.clone();
        match new.filter(|new| config::parse(Path::new(&path), new).is_ok()) {
            Some(new) => Ok(Self { path, old, new }),
            None => {
                let message = format!("{} has a form that cannot be edited here", path.display());
                Err(CommandError::new(Kind::Configuration, "NotEditable", message)
                    .next(format!("{by_hand} by hand, then: sovereign up")))
            }
        }
    }

    fn write(&self) -> Result<(), CommandError> {
        edit::replace(&self.path, &self.old, &self.new).map_err(|error| {
            let message = format!(
                "cannot write {}; what runs is changed already",
                self.path.display()
            );
            CommandError::new(Kind::Configuration, "ConfigurationUnwritable", message)
                .because(error)
                .next("make the file writable, then run the command again")
        })
    }
}

fn edited(settings: &Settings, wanted: &Known) -> Result<Edited, CommandError> {
    let old = config::read(&settings.path)?;
    let new = edit::add_forward(&old, &wanted.guest, &wanted.forward);
    let lines = edit::lines(&wanted.guest, &wanted.forward);
    Edited::checked(settings, old, new, &format!("add\n{lines}"))
}

/// The running host agent, if there is one.
struct Live {
    link: Option<Link>,
    spec: Option<HostSpec>,
}

/// Where a forward stands after it was asked for.
enum State {
    /// No host agent runs, or not this guest.
    NotRunning,
    /// It was open already.
    There,
    /// It listens.
    Listens,
    /// It has its port and waits for the guest.
    Reserved,
}

impl State {
    fn words(&self, context: &Context) -> String {
        match self {
            Self::NotRunning => context.spell("in force after `sovereign up`"),
            Self::There => "it was there already".to_owned(),
            Self::Listens => "it listens".to_owned(),
            Self::Reserved => "it listens when the guest is ready".to_owned(),
        }
    }
}

impl Live {
    async fn find(context: &Context) -> Result<Self, CommandError> {
        let link = Link::connect_if_running(&context.layout).await?;
        let spec = match &link {
            Some(link) => link.wanted().await?,
            None => None,
        };
        Ok(Self { link, spec })
    }

    fn forwards(&self) -> impl Iterator<Item = Known> {
        let guests = self.spec.iter().flat_map(|spec| &spec.guests);
        guests.flat_map(|(guest, config)| of(guest, &config.forwards))
    }

    /// Opens a forward; one that cannot have its port is taken back.
    async fn open(&self, context: &Context, wanted: &Known, must_run: bool) -> Result<State, CommandError> {
        let running = self
            .spec
            .as_ref()
            .filter(|spec| spec.guests.contains_key(&wanted.guest));
        let (Some(link), Some(before)) = (&self.link, running) else {
            if must_run {
                let message = format!("guest {} is not wanted by a running host agent", wanted.guest);
                return Err(CommandError::new(Kind::Unreachable, "NotRunning", message).next("sovereign up"));
            }
            return Ok(State::NotRunning);
        };
        if before.guests[&wanted.guest].forwards.contains(&wanted.forward) {
            return Ok(State::There);
        }
        let mut spec = before.clone();
        if let Some(guest) = spec.guests.get_mut(&wanted.guest) {
            guest.forwards.retain(|other| other.name != wanted.forward.name); // the file moved it
            guest.forwards.push(wanted.forward.clone());
        }
        context.when_interrupted("interrupted; the forward may be open", "sovereign forward list");
        link.apply(&spec).await?;
        let verdict = verdict(link, wanted).await;
        if verdict.is_err() {
            link.apply(before).await?;
        }
        verdict
    }

    async fn close(&self, gone: &[Known]) -> Result<(), CommandError> {
        let (Some(link), Some(before), [_, ..]) = (&self.link, &self.spec, gone) else {
            return Ok(());
        };
        let mut spec = before.clone();
        for (name, guest) in &mut spec.guests {
            let stays = |forward: &Forward| !gone.iter().any(|g| g.guest == *name && g.forward == *forward);
            guest.forwards.retain(stays);
        }
        link.apply(&spec).await.map(drop)
    }
}

/// What the host agent says about a forward that it was just asked for.
async fn verdict(link: &Link, wanted: &Known) -> Result<State, CommandError> {
    let begun = Instant::now();
    let mut cursor = None;
    loop {
        let report = link.status().await?;
        match judge(&report, wanted)? {
            Some(state) => return Ok(state),
            None if begun.elapsed() >= VERDICT => {
                let message = format!(
                    "{wanted}: the host agent has not said within {} s whether it listens",
                    VERDICT.as_secs()
                );
                return Err(CommandError::new(Kind::TimedOut, "NoVerdict", message).in_layer(Layer::Forward));
            }
            None => cursor = Some(link.watch(cursor, LOOK_AGAIN).await?.cursor),
        }
    }
}

/// Whether a condition says where a forward stands.
fn says_it(condition: &ConditionStatus, forward: &Forward) -> bool {
    condition.layer == Layer::Forward && condition.subject == forward.name.as_str()
}

/// `None` while it is not decided.
fn judge(report: &StatusReport, wanted: &Known) -> Result<Option<State>, CommandError> {
    let guest = report.guests.iter().find(|guest| guest.name == wanted.guest);
    let is_it = |c: &&ConditionStatus| says_it(c, &wanted.forward);
    let Some((guest, condition)) = guest.and_then(|g| Some((g, g.conditions.iter().find(is_it)?))) else {
        return Ok(None);
    };
    match (condition.status, condition.reason.as_str()) {
        (Status::True, _) => Ok(Some(State::Listens)),
        (Status::False, "NotListening") => Ok(Some(State::Reserved)),
        (Status::False, reason) => {
            let message = format!("the forward cannot be opened: {}", escaped(&condition.evidence));
            let next = match reason {
                "PortUnavailable" => format!(
                    "sovereign forward add {} OTHER_PORT:{}",
                    wanted.guest, wanted.forward.port
                ),
                _ => "sovereign doctor".to_owned(),
            };
            Err(CommandError::new(Kind::Refused, reason, message)
                .in_layer(Layer::Forward)
                .next(next))
        }
        (Status::Unknown, _) => Ok((guest.ready != Status::True).then_some(State::Reserved)),
    }
}

/// One line of the list.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Line {
    guest: Name,
    name: Name,
    listen: String,
    target: String,
    via: Via,
    protocol: Transport,
    /// Whether it listens now.
    status: Status,
    /// The reason of that, where the host agent says it.
    reason: Option<String>,
    /// `file`, `temporary` for one that only the host agent has, `unapplied` for one that it has not.
    origin: &'static str,
}

async fn list(context: &Context, only: Option<&Name>) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    let live = Live::find(context).await?;
    let report = match &live.link {
        Some(link) => Some(link.status().await?),
        None => None,
    };
    let running: Vec<Known> = live.forwards().collect();
    let lines: Vec<Line> = lines(&written(&settings), &running, report.as_ref())
        .into_iter()
        .filter(|line| only.is_none_or(|only| line.guest == *only))
        .collect();
    if context.wants_data() {
        return data_json(&json!({
            "ok": true, "layer": null, "reason": "Listed", "evidence": format!("{} forwards", lines.len()),
            "next": context.spell("sovereign status"), "forwards": lines,
        }));
    }
    if lines.is_empty() {
        talk("no forward; next: sovereign forward add --help");
    }
    lines.iter().try_for_each(|line| data(&shown(line)))
}

fn shown(line: &Line) -> String {
    let mut state = match (line.status, line.origin) {
        (_, "unapplied") => "in force after `sovereign up`".to_owned(),
        (Status::True, _) => "listens".to_owned(),
        _ => {
            let why = line
                .reason
                .as_ref()
                .map(|reason| format!(": {}", escaped(reason)));
            format!("does not listen{}", why.unwrap_or_default())
        }
    };
    if line.origin == "temporary" {
        state += " (temporary)";
    }
    let Line {
        guest,
        name,
        listen,
        target,
        via,
        protocol,
        ..
    } = line;
    let by = format!("{via}/{protocol}");
    format!("{guest:<12} {name:<16} {listen:<24} {target:<16} {by:<10} {state}")
}

fn lines(written: &[Known], running: &[Known], report: Option<&StatusReport>) -> Vec<Line> {
    let condition = |known: &Known| {
        let guest = report?.guests.iter().find(|guest| guest.name == known.guest)?;
        guest.conditions.iter().find(|c| says_it(c, &known.forward))
    };
    let line = |known: &Known, origin| {
        let condition = condition(known).filter(|_| origin != "unapplied");
        Line {
            guest: known.guest.clone(),
            name: known.forward.name.clone(),
            listen: known.forward.listens(),
            target: target(&known.guest, &known.forward),
            via: Via::of(&known.forward),
            protocol: known.forward.transport(),
            status: condition.map_or(Status::Unknown, |condition| condition.status),
            reason: condition.map(|condition| condition.reason.clone()),
            origin,
        }
    };
    let in_file = written.iter().map(|known| {
        let origin = if running.contains(known) {
            "file"
        } else {
            "unapplied"
        };
        line(known, origin)
    });
    let only_running = running.iter().filter(|known| !written.contains(known));
    in_file
        .chain(only_running.map(|known| line(known, "temporary")))
        .collect()
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
