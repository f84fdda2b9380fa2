//! `up`: one call from a configuration to ready guests, or to the first broken layer.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::json;
use sovereign_protocol::condition::Layer;
use sovereign_protocol::limits::WATCH_HOLD;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::HostSpec;
use sovereign_protocol::status::{Phase, StatusReport};
use sovereign_protocol::v1::Cursor;

use crate::agent::{self, Binaries};
use crate::cli::Up;
use crate::clock::seconds;
use crate::config::{self, Settings};
use crate::context::{Context, data, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::picture::ready_line;
use crate::progress::{self, Broken, Outcome, Progress};
use crate::{image, place};

pub(super) async fn run(context: &Context, args: Up) -> Result<(), CommandError> {
    if args.dry_run {
        return super::plan::show(context, args.name.as_ref()).await;
    }
    let settings = config::load(context)?;
    let wanted = wanted(&settings, args.name.as_ref())?;
    for name in &wanted {
        place::check_guest_sockets(&context.layout, name)?;
    }
    let binaries = Binaries::find()?;
    context.when_interrupted(
        "interrupted before anything was started; what was fetched stays in the cache",
        "sovereign up",
    );
    let built = image::make(context, &settings, &binaries, args.locked.lock_use()).await?;
    let images = image::images(&built);

    context.when_interrupted(
        "interrupted; the host agent may run, `sovereign down` stops it",
        "sovereign down",
    );
    let (link, started) = agent::ensure_current(context, &binaries).await?;
    if started {
        talk("host agent started");
    }
    let before = link.status().await?;
    let only = args.name.is_some().then(|| {
        let stays = beside_running(&before, &wanted);
        settings.with_required(&stays)
    });
    let spec = settings.host_spec(&images, only.as_ref());
    tell_leaving(&before, &spec);

    // Subscribed before asked: no change after the apply can be missed.
    let events = Link::connect(&context.layout).await?;
    let cursor = events.watch(None, Duration::ZERO).await?.cursor;
    let asked = Instant::now();
    let revision = link.apply(&spec).await?;
    context.when_interrupted(
        "interrupted; the guests continue, `sovereign down` stops them",
        "sovereign down",
    );
    let goal = Goal {
        wanted,
        revision,
        asked,
        limit: Duration::from_secs(args.timeout),
    };
    let report = goal.reach(&link, &events, cursor).await?;
    announce(context, &goal, &before, &report)
}

pub(super) fn wanted(settings: &Settings, name: Option<&Name>) -> Result<BTreeSet<Name>, CommandError> {
    let Some(name) = name else {
        return Ok(settings.guests.keys().cloned().collect());
    };
    if settings.guests.contains_key(name) {
        // And what it requires: it would not become ready alone.
        return Ok(settings.with_required(&BTreeSet::from([name.clone()])));
    }
    let known: Vec<&str> = settings.guests.keys().map(Name::as_str).collect();
    let message = format!(
        "{} has no guest {name}; it has {}",
        settings.path.display(),
        known.join(", ")
    );
    let next = format!("sovereign up {}", known.first().unwrap_or(&""));
    Err(CommandError::new(Kind::Configuration, "NoSuchGuest", message).next(next))
}

/// `up NAME` leaves the other guests of the file as they are: those that run stay wanted.
fn beside_running(before: &StatusReport, wanted: &BTreeSet<Name>) -> BTreeSet<Name> {
    let running = before
        .guests
        .iter()
        .filter(|guest| !matches!(guest.phase, Phase::Stopped | Phase::Stopping));
    running
        .map(|guest| guest.name.clone())
        .chain(wanted.iter().cloned())
        .collect()
}

fn tell_leaving(before: &StatusReport, spec: &HostSpec) {
    for guest in &before.guests {
        if guest.phase != Phase::Stopped && !spec.guests.contains_key(&guest.name) {
            talk(&format!(
                "{}: not in the configuration any more, stops; its data stays",
                guest.name
            ));
        }
    }
}

/// What `up` waits for.
struct Goal {
    wanted: BTreeSet<Name>,
    revision: u64,
    asked: Instant,
    limit: Duration,
}

impl Goal {
    /// Looks at each change until the goal is reached or cannot be.
    async fn reach(
        &self,
        link: &Link,
        events: &Link,
        mut cursor: Cursor,
    ) -> Result<StatusReport, CommandError> {
        let mut progress = Progress::default();
        loop {
            let report = link.status().await?;
            for line in progress.lines(&report, &self.wanted, self.asked.elapsed()) {
                talk(&line);
            }
            match progress::decide(&report, &self.wanted, self.revision) {
                Outcome::Ready => return Ok(report),
                Outcome::Broken(broken) => return Err(not_reached(&broken)),
                Outcome::Waiting => {}
            }
            let left = self.limit.saturating_sub(self.asked.elapsed());
            if left.is_zero() {
                return Err(self.timed_out(&report));
            }
            // The revision that a guest applied is no condition: look again soon even if nothing changes.
            let hold = left.min(WATCH_HOLD).min(LOOK_AGAIN);
            cursor = events.watch(Some(cursor), hold).await?.cursor;
        }
    }

    fn timed_out(&self, report: &StatusReport) -> CommandError {
        let limit = self.limit.as_secs();
        match progress::first_broken(report, &self.wanted) {
            Some(broken) => {
                let message = format!("not ready within {limit} s: {}", sentence(&broken));
                CommandError::new(Kind::TimedOut, broken.reason.clone(), message)
                    .in_layer(broken.layer)
                    .next(next(&broken))
            }
            None => CommandError::new(
                Kind::TimedOut,
                "NotApplied",
                format!("revision {} was not taken over within {limit} s", self.revision),
            ),
        }
    }
}

/// The longest pause between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

fn not_reached(broken: &Broken) -> CommandError {
    let message = format!("it will not become ready: {}", sentence(broken));
    CommandError::new(Kind::NotReached, broken.reason.clone(), message)
        .in_layer(broken.layer)
        .next(next(broken))
}

fn sentence(broken: &Broken) -> String {
    let Broken {
        guest,
        layer,
        subject,
        status,
        reason,
        evidence,
    } = broken;
    let subject = if subject.is_empty() {
        String::new()
    } else {
        format!(" ({subject})")
    };
    escaped(&format!(
        "guest {guest}, layer {layer}{subject} is {status:?}: {reason}, {evidence}"
    ))
    .replace('\n', " ")
}

/// Where the layer's own account is to be read.
fn next(broken: &Broken) -> String {
    match broken.layer {
        Layer::Vmm | Layer::Session | Layer::Kernel | Layer::Disk | Layer::Service => {
            format!("sovereign logs {}", broken.guest)
        }
        _ => "sovereign status".to_owned(),
    }
}

fn announce(
    context: &Context,
    goal: &Goal,
    before: &StatusReport,
    report: &StatusReport,
) -> Result<(), CommandError> {
    let took = seconds(goal.asked.elapsed());
    let guests: Vec<_> = report
        .guests
        .iter()
        .filter(|guest| goal.wanted.contains(&guest.name))
        .collect();
    if context.json {
        let evidence = format!("{} guests are ready after {took}", guests.len());
        return context.done_with(
            "Ready",
            &evidence,
            "sovereign status",
            &[("guests", json!(guests))],
        );
    }
    let width = guests
        .iter()
        .map(|guest| guest.name.as_str().len())
        .max()
        .unwrap_or(0);
    for guest in guests {
        let same = before.guests.iter().any(|old| {
            old.name == guest.name
                && progress::is_ready(old)
                && old.boot_id == guest.boot_id
                && old.spec_revision == guest.spec_revision
        });
        let psql = context.spell(&format!("sovereign psql {}", guest.name));
        data(&ready_line(guest, width, (!same).then_some(took.as_str()), &psql))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::examples::{condition, guest, report};
    use sovereign_protocol::condition::Status;

    fn settings() -> Settings {
        config::parse(std::path::Path::new("s.toml"), &config::template()).unwrap()
    }

    #[test]
    fn an_unknown_guest_is_a_configuration_error_that_names_the_known_ones() {
        let error = wanted(&settings(), Some(&Name::parse("sqll").unwrap())).unwrap_err();
        assert_eq!(error.kind, Kind::Configuration);
        assert!(error.human().contains("it has sql") && error.human().contains("next: sovereign up sql"));
        assert_eq!(wanted(&settings(), None).unwrap().len(), 1);
    }

    #[test]
    fn up_name_keeps_the_running_guests_wanted() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|name| Name::parse(name).unwrap())
                .collect::<BTreeSet<_>>()
        };
        let mut other = guest();
        other.name = Name::parse("other").unwrap();
        let mut stopped = guest();
        stopped.name = Name::parse("stopped").unwrap();
        stopped.phase = Phase::Stopped;
        assert_eq!(
            beside_running(&report(vec![other, stopped]), &names(&["sql"])),
            names(&["other", "sql"])
        );
    }

    #[test]
    fn a_timeout_names_the_first_broken_layer_and_the_next_command() {
        let mut broken = guest();
        broken.ready = Status::False;
        broken.conditions = vec![
            condition(Layer::Service, Status::False, "Refused"),
            condition(Layer::Disk, Status::True, "Mounted"),
        ];
        let goal = Goal {
            wanted: BTreeSet::from([broken.name.clone()]),
            revision: 3,
            asked: Instant::now(),
            limit: Duration::from_secs(9),
        };
        let error = goal.timed_out(&report(vec![broken]));
        assert_eq!(
            (
                error.kind.exit_code(),
                error.layer.as_deref(),
                error.reason.as_str()
            ),
            (5, Some("service"), "Refused")
        );
        assert_eq!(
            error.human(),
            "error: not ready within 9 s: guest sql, layer service (it) is False: Refused, seen\nnext: sovereign logs sql\n"
        );
    }
}
