//! The helper process: it makes the namespace, opens things in it, and hands them out.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use sovereign_protocol::transport::bind_unix;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::contract::{ASK_END, ASK_SET, At, Report, Stage, StageFailure};
use super::make::{self, Owner};
use super::pass;

/// An agent has this long to ask and to take.
const CLIENT: Duration = Duration::from_secs(2);
/// Agents that may ask at once.
const CLIENTS: usize = 8;
/// The pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where the helper's namespace comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A new one.
    Fresh,
    /// That of a helper which died: its descriptors come over standard input, a Unix socket.
    Passed,
}

/// Runs the helper until an agent ends it or SIGTERM comes. The process must have one thread only.
///
/// The first line on standard output is the report: ready, or the step that failed.
///
/// # Errors
/// When it could not begin; the report says the same.
pub fn run(socket: &Path, origin: Origin) -> anyhow::Result<()> {
    let begun = begin(socket, origin);
    let report = Report::from(begun.as_ref().map(|_| Vec::new()).map_err(Clone::clone));
    let told = io::stdout().write_all(&report.line()); // a parent that is gone: the next agent finds the socket
    tracing::debug!(?told, "reported");
    let (runtime, listener, owner) = begun?;
    let outcome = runtime.block_on(serve(&listener, owner));
    let _ = std::fs::remove_file(socket); // gone already is just as well
    outcome
}

type Begun = (tokio::runtime::Runtime, UnixListener, Owner);

fn begin(socket: &Path, origin: Origin) -> Result<Begun, StageFailure> {
    let socket: PathBuf = std::path::absolute(socket).at(Stage::Listen)?;
    std::env::set_current_dir("/").at(Stage::Listen)?; // holds no file system
    let owner = match origin {
        Origin::Fresh => make::unshare_network()?,
        Origin::Passed => make::join_network(&passed()?)?,
    };
    let runtime = runtime()?;
    let listener = runtime.block_on(async {
        make::loopback_up().await?;
        drop(make::open_set(owner)?); // what cannot be opened is said now, not to the first who asks
        bind_unix(&socket).at(Stage::Listen)
    })?;
    Ok((runtime, listener, owner))
}

/// A runtime that starts no thread.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime, StageFailure> {
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.at(Stage::Start)
}

/// The namespaces that the agent kept open. The runtime is gone again before we enter them.
fn passed() -> Result<make::Set, StageFailure> {
    let stdin = rustix::io::dup(rustix::stdio::stdin()).at(Stage::Join)?;
    let socket = std::os::unix::net::UnixStream::from(stdin);
    let received = runtime()?.block_on(async {
        socket.set_nonblocking(true)?;
        pass::receive(&UnixStream::from_std(socket)?).await
    });
    let (line, descriptors) = received.at(Stage::Join)?;
    Ok(Report::parse(&line)?.into_iter().zip(descriptors).collect())
}

async fn serve(listener: &UnixListener, owner: Owner) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let (end, mut ended) = mpsc::channel(1);
    let mut clients = JoinSet::new();
    loop {
        // All arms are cancel safe.
        tokio::select! {
            _ = ended.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            Some(_) = clients.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if clients.len() < CLIENTS && is_ours(&stream) => {
                    clients.spawn(tokio::time::timeout(CLIENT, answer(stream, owner, end.clone())));
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            },
        }
    }
}

/// In a user namespace of our own both sides read as root, everybody else as nobody.
fn is_ours(stream: &UnixStream) -> bool {
    let ours = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == ours)
}

async fn answer(mut stream: UnixStream, owner: Owner, end: mpsc::Sender<()>) -> io::Result<()> {
    match stream.read_u8().await? {
        ASK_SET => {
            let (report, descriptors) = match make::open_set(owner) {
                Ok(set) => {
                    let (kinds, descriptors): (Vec<_>, Vec<_>) = set.into_iter().unzip();
                    (Report::Ready(kinds), descriptors)
                }
                Err(failure) => (Report::Failed(failure), Vec::new()),
            };
            pass::send(&stream, &report.line(), &descriptors).await
        }
        ASK_END => {
            let _ = end.send(()).await; // the loop ends either way
            Ok(())
        }
        _ => Ok(()),
    }
}
