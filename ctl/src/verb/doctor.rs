//! `doctor` and `test`: gathers facts from everybody who can be asked, and tells what is broken.

use std::process::Stdio;
use std::time::{Duration, SystemTime};

use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::event::Start;
use sovereign_protocol::inspection::Inspection;
use sovereign_protocol::record::Record;
use sovereign_reconcile::finding::FindingsView;

use crate::agent::Binaries;
use crate::clock::rfc3339;
use crate::config;
use crate::context::{Context, data, data_json, escaped, talk};
use crate::doctor::{self, Agent, Configuration, Diagnosis, Facts, Failure};
use crate::error::{CommandError, Kind};
use crate::link::{Link, NOT_RUNNING};

/// A look past the host agent bounds itself; beyond this it counts as failed.
const INSPECT: Duration = Duration::from_secs(30);
/// Looks until report and fresh look agree: a boot, a stop or a loss may lie between them.
const LOOKS: u32 = 3;
/// Events of the journal that are looked through for ends of virtual machines.
const EVENTS: u64 = 128;
/// An end explains what is seen now for this long.
const RECENT_MS: u64 = 120_000;

/// What the exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// 0, whatever is found.
    Tell,
    /// 1 with a finding.
    Test,
}

pub(super) async fn run(context: &Context, mode: Mode) -> Result<u8, CommandError> {
    let diagnosis = diagnosis(context).await;
    tell(context, &diagnosis)?;
    Ok(match mode {
        Mode::Test if !diagnosis.ok => Kind::NotReached.exit_code(),
        Mode::Test | Mode::Tell => 0,
    })
}

/// Applies the fixes that are automatic and change something, which is `up`; then looks again and tells what is left.
pub(super) async fn fix(context: &Context, dry_run: bool) -> Result<u8, CommandError> {
    let found = diagnosis(context).await;
    let up = context.spell("sovereign up");
    let is_fixed = found
        .findings
        .iter()
        .any(|finding| finding.automatic && finding.fix == up);
    match (is_fixed, dry_run) {
        (false, _) => talk("no finding has an automatic fix"),
        (true, true) => talk(&format!("would run: {up}")),
        (true, false) => {
            talk(&format!("running: {up}"));
            bring_up(context).await?;
        }
    }
    let left = match is_fixed && !dry_run {
        true => diagnosis(context).await,
        false => found,
    };
    tell(context, &left)?;
    Ok(0)
}

/// A process of its own: stdout is the diagnosis'.
async fn bring_up(context: &Context) -> Result<(), CommandError> {
    let failed = |error| {
        let message = "the automatic fix cannot be run";
        CommandError::new(Kind::Internal, "NotRun", message).because(error)
    };
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = tokio::process::Command::new(program);
    command.args(["--instance", context.layout.instance.as_str()]);
    if let Some(config) = &context.config {
        command.arg("--config").arg(config);
    }
    let command = command.arg("up").stdin(Stdio::null()).stdout(Stdio::null());
    let status = command.kill_on_drop(true).status().await.map_err(failed)?;
    if !status.success() {
        talk(&format!("{status}: what is left is told below"));
    }
    Ok(())
}

fn tell(context: &Context, diagnosis: &Diagnosis) -> Result<(), CommandError> {
    if context.wants_data() {
        data_json(diagnosis)
    } else {
        data(&doctor::picture(diagnosis))
    }
}

async fn diagnosis(context: &Context) -> Diagnosis {
    let mut facts = gather(context).await;
    for _ in 1..LOOKS {
        if !doctor::contradicts(&facts) {
            break;
        }
        facts = gather(context).await;
    }
    doctor::diagnose(&facts)
}

/// Asks everybody; whoever does not answer is a fact, too.
async fn gather(context: &Context) -> Facts {
    let ((agent, ends), inspection, network) =
        tokio::join!(ask_agent(context), inspect(context), ask_for_findings(context));
    Facts {
        layout: context.layout.clone(),
        sovereign: context.spell("sovereign ").trim_end().to_owned(),
        at: rfc3339(SystemTime::now()),
        configuration: configuration(context),
        agent,
        inspection,
        network,
        ends,
    }
}

/// Over a link of its own: an agent of another build ends the one over which it hears a question that it does not know.
async fn ask_for_findings(context: &Context) -> Result<FindingsView, Failure> {
    let asked = async { Link::connect(&context.layout).await?.findings().await };
    match asked.await {
        Err(error) if error.reason == NOT_RUNNING => Ok(FindingsView::default()), // nobody keeps a network
        other => other.map_err(|error| failure(&error)),
    }
}

async fn ask_agent(context: &Context) -> (Agent, Vec<(Record, u64)>) {
    let answered = async {
        let link = Link::connect(&context.layout).await?;
        let report = link.status().await?;
        Ok::<_, CommandError>((report, recent_ends(&link).await))
    };
    match answered.await {
        Ok((report, ends)) => (Agent::Answered(report), ends),
        Err(error) if error.reason == NOT_RUNNING => (Agent::NotRunning, Vec::new()),
        Err(error) => (Agent::Failed(failure(&error)), Vec::new()),
    }
}

/// Without the journal a diagnosis only knows less about the past.
async fn recent_ends(link: &Link) -> Vec<(Record, u64)> {
    let Ok(events) = link.events(Start::Last(EVENTS), Duration::ZERO).await else {
        return Vec::new();
    };
    let is_end = |event: &sovereign_protocol::event::Event| {
        event.key.layer == Layer::Vmm
            && event.age_ms <= RECENT_MS
            && event.to.as_ref().is_some_and(|to| to.status == Status::False)
    };
    let ends = events.events.into_iter().filter(is_end);
    ends.map(|event| {
        let age_ms = event.age_ms;
        (Record::new(event, String::new()), age_ms)
    })
    .collect()
}

fn configuration(context: &Context) -> Configuration {
    match config::load(context) {
        Ok(settings) => Configuration::Valid {
            path: settings.path,
            guests: settings.guests.into_keys().collect(),
        },
        Err(error) => Configuration::Unusable {
            path: config::find(context),
            next: context.spell(&object(&error, "next")),
            failure: failure(&error),
        },
    }
}

fn failure(error: &CommandError) -> Failure {
    Failure {
        reason: error.reason.clone(),
        evidence: object(error, "evidence"),
    }
}

/// A field of what the error says to programs.
fn object(error: &CommandError, field: &str) -> String {
    let object: serde_json::Value = serde_json::from_str(&error.json()).unwrap_or_default();
    object[field].as_str().unwrap_or_default().to_owned()
}

/// Sockets, shims and guests belong to the host agent's program; it looks for us.
async fn inspect(context: &Context) -> Result<Inspection, Failure> {
    let failed = |evidence: String| Failure {
        reason: "InspectFailed".to_owned(),
        evidence,
    };
    let host = Binaries::find().map_err(|error| failure(&error))?.host;
    let layout = &context.layout;
    let child = tokio::process::Command::new(&host)
        .args(["inspect", "--instance", layout.instance.as_str()])
        .arg("--run-dir")
        .arg(&layout.run)
        .arg("--state-dir")
        .arg(&layout.state)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(INSPECT, child).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failed(format!("{}: {error}", host.display()))),
        Err(_) => return Err(failed(format!("no answer within {} s", INSPECT.as_secs()))),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(failed(format!("{}: {}", output.status, escaped(said.trim()))));
    }
    serde_json::from_slice(&output.stdout)
        .map_err(|error| failed(format!("its answer cannot be read: {error}")))
}
