//! `host`: the host agent itself, apart from what it runs.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::json;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::status::Phase;
use sovereign_reconcile::view::NetworkMode;

use crate::agent::{Binaries, Process};
use crate::cli::HostVerb;
use crate::clock::rfc3339;
use crate::context::{Context, data, escaped, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;
use crate::{systemd, unit};

pub(super) async fn run(context: &Context, verb: &HostVerb) -> Result<(), CommandError> {
    match verb {
        HostVerb::Install { print: true } => print(context),
        HostVerb::Install { print: false } => install(context).await,
        HostVerb::Status => status(context).await,
        HostVerb::Stop => stop(context).await,
    }
}

fn unit_path(context: &Context) -> Result<PathBuf, CommandError> {
    unit::path(&context.environment, &context.layout).ok_or_else(|| {
        let message = "no directory for units: neither XDG_CONFIG_HOME nor HOME is set to an absolute path";
        CommandError::new(Kind::Configuration, "NoDirectory", message)
            .next("set HOME, then: sovereign host install")
    })
}

fn print(context: &Context) -> Result<(), CommandError> {
    let text = unit::text(&context.environment, &context.layout, &Binaries::find()?.host);
    if context.json {
        let more = [("unit", json!(text)), ("path", json!(unit_path(context)?))];
        return context.done_with("Printed", "nothing is changed", "sovereign host install", &more);
    }
    data(text.trim_end())
}

async fn install(context: &Context) -> Result<(), CommandError> {
    let (environment, layout) = (&context.environment, &context.layout);
    let host = Binaries::find()?.host;
    may_install(context)?;
    let path = unit_path(context)?;
    context.when_interrupted("interrupted; run it again", "sovereign host install");
    let written = write(&path, &unit::text(environment, layout, &host), layout);
    let changed = written.map_err(|error| {
        let message = format!("cannot write {}", path.display());
        CommandError::new(Kind::Refused, "UnitUnwritable", message)
            .because(error)
            .next("sovereign host install --print")
    })?;
    let name = unit::name(layout);
    systemd::tell(environment, &["daemon-reload"])?;
    systemd::tell(environment, &["enable", &name])?;
    // One that `up` started is not systemd's: it makes room, and its guests run on.
    let active = systemd::tell(environment, &["is-active", "--quiet", &name]).is_ok();
    if !active {
        if let Some(process) = Process::listening(layout).await {
            talk(&format!(
                "host agent (pid {}) is replaced; guests run on",
                process.pid
            ));
            process.end(layout).await?;
        }
        systemd::tell(environment, &["start", &name])?;
    }
    let evidence = format!(
        "{} is {} and starts the host agent at boot",
        path.display(),
        if changed { "written" } else { "as before" }
    );
    talk(&evidence);
    let reason = if changed { "Installed" } else { "Exists" };
    context.done_with(reason, &evidence, "sovereign up", &[("unit", json!(path))])
}

/// Only where systemd would start it, and keep it.
fn may_install(context: &Context) -> Result<(), CommandError> {
    let environment = &context.environment;
    if !environment.systemd {
        let message =
            "systemd does not manage this machine (no /run/systemd/system), and no other init is supported";
        return Err(CommandError::new(Kind::Refused, "NoSystemd", message)
            .next("sovereign host install --print   # and have your init run its ExecStart"));
    }
    if !environment.root && !environment.lingers {
        let message = "without lingering your services end with your last session";
        return Err(CommandError::new(Kind::Refused, "NoLingering", message)
            .next("loginctl enable-linger && sovereign host install"));
    }
    Ok(())
}

/// Writes the unit, and what systemd opens before the agent can make it; true when the unit changed.
fn write(path: &Path, text: &str, layout: &Layout) -> io::Result<bool> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&layout.state)?;
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(false);
    }
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).create(parent)?;
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    Ok(true)
}

/// What `host status` says.
#[derive(Debug, Serialize)]
struct Report {
    running: bool,
    pid: Option<i32>,
    version: Option<String>,
    /// RFC 3339 UTC.
    since: Option<String>,
    /// `private`, `none`, `undecided`; nothing when nobody told.
    network: Option<&'static str>,
    /// Why there is no network.
    network_why: Option<String>,
    /// Guests whose VMM runs or is about to.
    guests: Vec<String>,
    control: PathBuf,
    run: PathBuf,
    state: PathBuf,
    store: PathBuf,
    log: PathBuf,
    /// The unit that starts it at boot.
    unit: Option<PathBuf>,
}

async fn status(context: &Context) -> Result<(), CommandError> {
    let report = look(context).await?;
    let (reason, evidence, next) = match (&report.pid, &report.version) {
        (Some(pid), Some(version)) => (
            "Running",
            format!("host agent {version} runs as pid {pid}"),
            "sovereign status",
        ),
        _ => ("NotRunning", "no host agent runs".to_owned(), "sovereign up"),
    };
    if context.wants_data() {
        let object = json!({
            "ok": true, "layer": null, "reason": reason, "evidence": evidence, "next": context.spell(next), "host": report,
        });
        return crate::context::data_json(&object);
    }
    data(&picture(&report, &evidence))
}

async fn look(context: &Context) -> Result<Report, CommandError> {
    let layout = &context.layout;
    let installed = unit::is_installed(&context.environment, layout);
    let mut report = Report {
        running: false,
        pid: None,
        version: None,
        since: None,
        network: None,
        network_why: None,
        guests: Vec::new(),
        control: layout.control(),
        run: layout.run.clone(),
        state: layout.state.clone(),
        store: layout.store(),
        log: layout.log(),
        unit: unit::path(&context.environment, layout).filter(|_| installed),
    };
    let Some(link) = Link::connect_if_running(layout).await? else {
        return Ok(report);
    };
    let process = Process::listening(layout).await;
    report.running = true;
    report.version = Some(escaped(&link.peer_agent));
    report.pid = process.as_ref().map(|process| process.pid);
    let began = process.and_then(|process| SystemTime::now().checked_sub(process.age()?));
    report.since = began.map(rfc3339);
    let guests = link.status().await?.guests.into_iter();
    let live = guests.filter(|guest| guest.phase != Phase::Stopped);
    report.guests = live.map(|guest| guest.name.to_string()).collect();
    let asked = link.wanted().await?.is_some_and(|spec| spec.network.is_some());
    // The last call: an agent of another build may not know it, and cuts the connection.
    if let Ok(Some(view)) = link.network().await {
        let (mode, why) = match view.mode {
            NetworkMode::Undecided if !asked => ("none", Some("nobody asked for one".to_owned())),
            NetworkMode::Undecided => ("undecided", None),
            NetworkMode::Off(why) => ("none", Some(escaped(&why))),
            NetworkMode::Private => ("private", None),
            NetworkMode::Host => ("host", None),
        };
        (report.network, report.network_why) = (Some(mode), why);
    }
    Ok(report)
}

fn picture(report: &Report, evidence: &str) -> String {
    let since = report
        .since
        .as_ref()
        .map_or_else(String::new, |since| format!(", since {since}"));
    let network = match (report.network, &report.network_why) {
        (Some(mode), Some(why)) => format!("{mode} ({why})"),
        (Some(mode), None) => mode.to_owned(),
        (None, _) => "not known".to_owned(),
    };
    let guests = if report.guests.is_empty() {
        "none".to_owned()
    } else {
        report.guests.join(", ")
    };
    let unit = report.unit.as_ref().map_or_else(
        || "not installed (`sovereign host install`)".to_owned(),
        |path| path.display().to_string(),
    );
    let mut lines = vec![format!("{evidence}{since}")];
    if report.running {
        lines.push(format!("  guests   {guests}"));
        lines.push(format!("  network  {network}"));
    }
    for (what, path) in [
        ("control", &report.control),
        ("store", &report.store),
        ("log", &report.log),
    ] {
        lines.push(format!("  {what:<8} {}", path.display()));
    }
    lines.push(format!("  at boot  {unit}"));
    lines.join("\n")
}

async fn stop(context: &Context) -> Result<(), CommandError> {
    let layout = &context.layout;
    let Some(process) = Process::listening(layout).await else {
        talk("no host agent runs");
        return context.done("NotRunning", "no host agent runs", "sovereign up");
    };
    let guests = look(context)
        .await
        .map(|report| report.guests)
        .unwrap_or_default(); // a silent one can still be ended
    process.end(layout).await?;
    let left = match guests.as_slice() {
        [] => "no guest runs".to_owned(),
        names => format!("{} run on and are adopted by the next one", names.join(", ")),
    };
    let evidence = format!("host agent (pid {}) ended; {left}", process.pid);
    talk(&evidence);
    context.done_with("Stopped", &evidence, "sovereign up", &[("guests", json!(guests))])
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
