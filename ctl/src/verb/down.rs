//! `down`: stops all guests in order, then the host agent unless it is installed, and sees them gone; `down NAME`
//! stops one guest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::WATCH_HOLD;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{HostSpec, VERSION};
use sovereign_protocol::status::{GuestStatus, Phase};

use super::gc;
use crate::agent::{self, Binaries, Process};
use crate::cli;
use crate::clock::seconds;
use crate::context::{Context, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::{shims, unit};

/// All guests, PostgreSQL's own stop included.
const STOP: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn run(context: &Context, args: &cli::Down) -> Result<(), CommandError> {
    if args.dry_run {
        return super::down_plan::show(context, args.name.as_ref()).await;
    }
    let layout = &context.layout;
    let link = match Link::connect_if_running(layout).await? {
        Some(link) => Some(link),
        // A host agent that was killed left its guests running: only an agent stops them in order.
        None if !shims::running(layout).is_empty() => {
            talk("guests run without a host agent; one is started to stop them in order");
            Some(agent::ensure(context, &Binaries::find()?).await?.0)
        }
        None => None,
    };
    match (link, &args.name) {
        (None, _) => {
            let left = gc::left_over(context).await.unwrap_or(0); // `gc` says why it cannot be looked for
            let (evidence, next) = at_rest(layout, left);
            talk(evidence);
            talk(&format!("next: {}", context.spell(next)));
            context.done("NotRunning", evidence, next)
        }
        (Some(link), None) if unit::is_installed(&context.environment, layout) => {
            guests_only(context, &link).await
        }
        (Some(link), None) => all(context, &link).await,
        (Some(link), Some(name)) => one(context, &link, name).await,
    }
}

/// What is there without a host agent and guests, and what to do then. One that was killed leaves its network, found by
/// its marks; only an agent of this instance ends a private one.
fn at_rest(layout: &Layout, left_over: usize) -> (&'static str, &'static str) {
    if left_over > 0 {
        let evidence = "nothing is running, but a host agent that was killed left its network";
        (evidence, "sovereign gc")
    } else if std::os::unix::net::UnixStream::connect(layout.netns()).is_ok() {
        let evidence = "nothing is running but the private network of a host agent that was killed: `up` takes it over, \
                        and `down` then ends it";
        (evidence, "sovereign up")
    } else {
        ("nothing is running", "sovereign up")
    }
}

async fn all(context: &Context, link: &Link) -> Result<(), CommandError> {
    let layout = &context.layout;
    let begun = Instant::now();
    let process = Process::listening(layout).await;
    link.stop().await?;
    context.when_interrupted("interrupted; the stop goes on", "sovereign down");
    let gone = async {
        if let Some(process) = &process {
            process.ended().await;
        }
        // A clean end removes the socket; one that refuses has nobody behind it either.
        while std::os::unix::net::UnixStream::connect(layout.control()).is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    if tokio::time::timeout(STOP, gone).await.is_err() {
        let pid = process.map_or_else(String::new, |process| format!(" (pid {})", process.pid));
        let message = format!("the host agent{pid} has not ended within {} s", STOP.as_secs());
        return Err(CommandError::new(Kind::TimedOut, "NotStopped", message)
            .next(format!("less {}", layout.log().display())));
    }
    finished(context, begun)
}

/// An installed host agent stays, and nothing is wanted of it.
async fn guests_only(context: &Context, link: &Link) -> Result<(), CommandError> {
    let begun = Instant::now();
    let nothing = HostSpec {
        version: VERSION,
        guests: BTreeMap::new(),
        network: None,
    };
    link.apply(&nothing).await?;
    context.when_interrupted("interrupted; the stop goes on", "sovereign down");
    let mut cursor = None;
    while begun.elapsed() < STOP {
        let guests = link.status().await?.guests;
        if guests.iter().all(|guest| guest.phase == Phase::Stopped) {
            talk("the host agent is installed and stays");
            return finished(context, begun);
        }
        cursor = Some(link.watch(cursor, LOOK_AGAIN).await?.cursor);
    }
    let message = format!("not all guests have stopped within {} s", STOP.as_secs());
    Err(CommandError::new(Kind::TimedOut, "NotStopped", message).next("sovereign status"))
}

async fn one(context: &Context, link: &Link, name: &Name) -> Result<(), CommandError> {
    let begun = Instant::now();
    let guest = find(link, name).await?;
    let wanted = link.wanted().await?;
    let Some(mut spec) = wanted.filter(|spec| spec.guests.contains_key(name)) else {
        return match guest {
            Some(guest) if guest.phase != Phase::Stopped => stopped(context, link, name, begun).await,
            Some(_) => {
                talk(&format!("{name} is not running"));
                context.done("NotRunning", &format!("{name} is not running"), "sovereign up")
            }
            None => Err(CommandError::new(
                Kind::Configuration,
                "NoSuchGuest",
                format!("there is no guest {name}"),
            )
            .next("sovereign status")),
        };
    };
    for other in needing(&spec, name) {
        talk(&format!("{other} requires {name} and stops first"));
        spec.guests.remove(&other);
    }
    spec.guests.remove(name);
    link.apply(&spec).await?;
    context.when_interrupted("interrupted; the stop goes on", "sovereign status");
    stopped(context, link, name, begun).await
}

/// The other guests that need this one, near or far.
pub(super) fn needing(spec: &HostSpec, name: &Name) -> BTreeSet<Name> {
    let needs = spec.needs();
    let mut found = BTreeSet::from([name.clone()]);
    loop {
        let more = needs.iter().filter(|(_, of)| !of.is_disjoint(&found));
        let before = found.len();
        found.extend(more.map(|(guest, _)| guest.clone()).collect::<Vec<_>>());
        if found.len() == before {
            found.remove(name);
            return found;
        }
    }
}

async fn stopped(context: &Context, link: &Link, name: &Name, begun: Instant) -> Result<(), CommandError> {
    let mut cursor = None;
    while begun.elapsed() < STOP {
        cursor = Some(link.watch(cursor, LOOK_AGAIN.min(WATCH_HOLD)).await?.cursor);
        if find(link, name)
            .await?
            .is_none_or(|guest| guest.phase == Phase::Stopped)
        {
            return finished(context, begun);
        }
    }
    let message = format!("guest {name} has not stopped within {} s", STOP.as_secs());
    Err(CommandError::new(Kind::TimedOut, "NotStopped", message).next(format!("sovereign logs {name}")))
}

/// The phase is no condition: look again soon even if nothing changes.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

async fn find(link: &Link, name: &Name) -> Result<Option<GuestStatus>, CommandError> {
    let report = link.status().await?;
    Ok(report.guests.into_iter().find(|guest| guest.name == *name))
}

fn finished(context: &Context, begun: Instant) -> Result<(), CommandError> {
    let evidence = format!("stopped in {}", seconds(begun.elapsed()));
    talk(&evidence);
    context.done("Stopped", &evidence, "sovereign up")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::fake_host::FakeHost;
    use sovereign_protocol::spec::Image;

    /// `web` needs `sql`, which has no network to others here.
    fn two() -> (tempfile::TempDir, Context, FakeHost) {
        let dir = tempfile::tempdir().unwrap();
        let context = Context::in_dir(dir.path());
        let text = "[guest.sql.service.postgres]\nkind = \"postgres\"\n[guest.other]\n\
            [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n";
        let settings = config::parse(std::path::Path::new("s.toml"), text).unwrap();
        let host = FakeHost::start(&context.layout, settings.host_spec(&image().into(), None));
        (dir, context, host)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_needs_a_guest_stops_with_it_and_nobody_else() {
        for (name, left) in [
            ("sql", &["other"][..]),
            ("web", &["other", "sql"]),
            ("other", &["sql", "web"]),
        ] {
            let (_dir, context, host) = two();
            let name = Some(Name::parse(name).unwrap());
            run(&context, &asked(name)).await.unwrap();
            let state = host.state();
            let guests = state.spec.as_ref().unwrap().guests.keys();
            assert_eq!(guests.map(Name::as_str).collect::<Vec<_>>(), left);
        }
    }

    fn asked(name: Option<Name>) -> cli::Down {
        cli::Down { name, dry_run: false }
    }

    #[test]
    fn what_a_killed_host_agent_left_is_told_with_what_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Context::in_dir(dir.path()).layout;
        for created in [&layout.run, &layout.state] {
            std::fs::create_dir_all(created).unwrap();
        }
        assert_eq!(at_rest(&layout, 0), ("nothing is running", "sovereign up"));
        let helper = std::os::unix::net::UnixListener::bind(layout.netns()).unwrap();
        let (told, next) = at_rest(&layout, 0);
        assert!(
            told.contains("private network") && next == "sovereign up",
            "{told}"
        );
        drop(helper); // it is gone, and its socket is there
        assert_eq!(at_rest(&layout, 0).0, "nothing is running");
        let (told, next) = at_rest(&layout, 2);
        assert!(
            told.contains("left its network") && next == "sovereign gc",
            "{told}"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_dry_run_stops_nobody() {
        let (_dir, context, host) = two();
        for name in [None, Some(Name::parse("sql").unwrap())] {
            let dry = cli::Down { name, dry_run: true };
            run(&context, &dry).await.unwrap();
        }
        let unknown = cli::Down {
            name: Some(Name::parse("nobody").unwrap()),
            dry_run: true,
        };
        let error = run(&context, &unknown).await.unwrap_err();
        assert_eq!(error.reason, "NoSuchGuest");
        assert!(host.state().applied == 0 && !host.state().stopped);
    }

    fn image() -> Image {
        Image {
            kernel: "k".into(),
            initramfs: "i".into(),
            root: "r".into(),
            agent: "a".into(),
            digest: "d".into(),
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_installed_agent_stays_and_nothing_is_wanted_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut context = Context::in_dir(dir.path());
        context.environment.systemd = true;
        context.environment.unit_home = Some(dir.path().to_owned());
        std::fs::write(dir.path().join("sovereign-t.service"), "").unwrap();
        let settings = config::parse(std::path::Path::new("s.toml"), &config::template()).unwrap();
        let host = FakeHost::start(&context.layout, settings.host_spec(&image().into(), None));
        run(&context, &asked(None)).await.unwrap();
        let state = host.state();
        assert!(state.spec.as_ref().unwrap().guests.is_empty());
        assert!(!state.stopped, "the agent was told to end");
    }
}
