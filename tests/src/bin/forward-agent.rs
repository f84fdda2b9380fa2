//! A host agent whose guests cannot boot, for the tests of what its forwards are without them.
//!
//! Its first line of input is a HostSpec; it prints what is true of forwards, one line each time that changes, and ends
//! as by `down` at the end of its input.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sovereign_host_agent::engine::{Engine, QUEUE, Request};
use sovereign_protocol::condition::Layer;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::status::StatusReport;
use sovereign_tests::guard;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

/// Between two looks at the status.
const PAUSE: Duration = Duration::from_millis(50);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ["run", directory, instance, _] = words[..] else {
        bail!("unknown words: {words:?}"); // as a shim, too
    };
    guard::refuse_vsock();
    let log = std::io::stderr;
    tracing_subscriber::fmt().with_writer(log).with_ansi(false).init();
    let layout = Layout {
        instance: Name::parse(instance)?,
        run: PathBuf::from(directory).join("run"),
        state: PathBuf::from(directory),
    };
    std::fs::create_dir_all(&layout.run)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime?.block_on(run(layout))
}

async fn run(layout: Layout) -> Result<()> {
    let input = rustix::io::dup(rustix::stdio::stdin())?;
    let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(input)?).lines();
    let document = lines.next_line().await?.context("no document")?;
    let (event_sender, events) = mpsc::channel(QUEUE);
    let (requests, received) = mpsc::channel(QUEUE);
    let (engine, _news) = Engine::new(layout, 1, event_sender)?;
    let engine = engine.run(events, received);
    tokio::pin!(engine);
    let asked = async {
        let (reply, applied) = oneshot::channel();
        requests
            .send(Request::Apply(document.into_bytes(), reply))
            .await?;
        let applied = applied.await?;
        applied.map_err(|refusal| anyhow::anyhow!("{refusal:?}"))?;
        let mut told = BTreeMap::new();
        loop {
            let (reply, status) = oneshot::channel();
            requests.send(Request::Status(reply)).await?;
            told = tell(told, &status.await?)?;
            let line = tokio::time::timeout(PAUSE, lines.next_line()).await;
            if line.is_ok_and(|line| !matches!(line, Ok(Some(_)))) {
                break;
            }
        }
        anyhow::Ok(requests.send(Request::Stop).await?)
    };
    // The engine ends only when it was told to.
    tokio::select! {
        asked = asked => asked?,
        ended = &mut engine => return ended.and_then(|()| bail!("it ended by itself")),
    }
    engine.await
}

/// Prints what is other than was told.
fn tell(told: BTreeMap<String, String>, report: &StatusReport) -> Result<BTreeMap<String, String>> {
    let conditions = report.guests.iter().flat_map(|guest| &guest.conditions);
    let forwards = conditions.filter(|condition| condition.layer == Layer::Forward);
    let now: BTreeMap<String, String> = forwards
        .map(|c| {
            let text = format!("{:?} {} {}", c.status, c.reason, c.evidence);
            (c.subject.clone(), text)
        })
        .collect();
    let mut out = std::io::stdout().lock();
    for (subject, text) in now
        .iter()
        .filter(|(subject, text)| told.get(*subject) != Some(text))
    {
        writeln!(out, "{subject} {text}")?;
    }
    for subject in told.keys().filter(|subject| !now.contains_key(*subject)) {
        writeln!(out, "{subject} gone")?;
    }
    out.flush()?;
    Ok(now)
}
