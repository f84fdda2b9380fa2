//! The life of a shim: prepare, start the VMM, answer the agent, record the end.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::fd::AsFd;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use sovereign_protocol::boot::BootRecord;
use sovereign_protocol::status::VmmStatus;
use sovereign_protocol::transport::bind_unix;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::accel;
use super::console::{Console, panic_line};
use super::contract::{ExitReason, ExitRecord, Message, Request, ShimConfig, VmmState};
use super::qmp::{self, Qmp, QmpEvent};
use super::{boot_segment, qemu, vmm};
use crate::clock::wall_ns;
use crate::vsock;
use crate::{files, process};

/// The context id inside our own device: nobody else sees it.
const GUEST_CID: u64 = 3;
/// QMP is asked this often whether it is alive, and counts as silent when it has not answered by the next time.
const PULSE: Duration = Duration::from_secs(2);
/// A machine that waits for room goes on when the host's disk has this much.
const ROOM_BYTES: u64 = 16 << 20;
/// Messages that a slow agent may have open.
const MESSAGES: usize = 64;
/// The agent has this long to take the last message.
const FAREWELL: Duration = Duration::from_millis(500);
/// Bytes of QEMU's own complaints that an exit record keeps.
const COMPLAINT_BYTES: u64 = 4 << 10;

/// Runs one boot from its configuration file to the exit record.
///
/// # Errors
/// When the VMM could not be started; the exit record says the same.
pub async fn run(config: &Path) -> anyhow::Result<()> {
    let bytes = std::fs::read(config).with_context(|| format!("cannot read {}", config.display()))?;
    let config: ShimConfig = serde_json::from_slice(&bytes).context("the shim's configuration is damaged")?;
    let record = boot_segment::fresh_record(wall_ns())?;
    let outcome = boot(&config, &record).await;
    remove_sockets(&config);
    if let Err(error) = &outcome {
        let evidence = format!("{error:#}");
        keep(&config, &exit(&record, ExitReason::StartFailed, evidence))?;
    }
    outcome
}

async fn boot(config: &ShimConfig, record: &BootRecord) -> anyhow::Result<()> {
    let listener = bind_unix(&config.paths.shim()).context("another shim runs this guest")?;
    remove_stale(config);
    let tap = config.card.as_ref().map(|_| take_stdin()).transpose()?;
    let choice = accel::choose(config).await;
    prepare_data_disk(config)?;
    let initramfs = boot_segment::initramfs(&config.image.initramfs, record)?;
    let device = vsock::Device::start(&config.paths.vhost(), GUEST_CID, vsock::Limits::default())
        .context("cannot start the vsock device")?;
    let front = bind_unix(&config.paths.vsock())?;
    let mut tasks = JoinSet::new();
    let ended = CancellationToken::new();
    tasks.spawn(vsock::serve_front(device, front, ended.clone()));

    // The child inherits the numbers; nothing else is spawned before they are closed again.
    fcntl_setfd(initramfs.as_fd(), FdFlags::empty())?;
    if let Some(tap) = &tap {
        fcntl_setfd(tap, FdFlags::empty())?;
    }
    let tap_number = tap.as_ref().map(AsRawFd::as_raw_fd);
    let arguments = qemu::arguments(config, choice.accel, initramfs.as_raw_fd(), tap_number);
    let mut child = vmm::command(qemu::PROGRAM, arguments)
        .spawn()
        .context("cannot start the VMM")?;
    drop(initramfs);
    drop(tap); // else the TAP had carrier without a VMM

    let identity = Message::Identity {
        boot_id: record.boot_id.clone(),
        key: record.key.clone(),
        vmm: VmmStatus {
            kind: "qemu".to_owned(),
            accel: choice.accel.to_string(),
            why: choice.why,
            pid: child.id().unwrap_or_default(),
        },
    };
    let (requests, mut asked) = mpsc::channel(MESSAGES);
    let (messages, _) = broadcast::channel(MESSAGES);
    let (state, states) = watch::channel(VmmState::Starting);
    tasks.spawn(serve(
        listener,
        Arc::new(identity),
        requests,
        messages.clone(),
        states,
    ));
    let record = watch_vmm(config, record, &mut child, &mut asked, &state).await;
    keep(config, &record)?;
    remove_sockets(config); // who hears the last message finds nothing left
    let _ = messages.send(Message::Exited(record)); // nobody may be there to hear it
    ended.cancel();
    let farewell = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(FAREWELL, farewell).await; // an agent that does not read loses only this message
    Ok(())
}

/// The TAP that the agent gave us as standard input.
fn take_stdin() -> anyhow::Result<OwnedFd> {
    let tap = fcntl_dupfd_cloexec(std::io::stdin(), FIRST_FREE).context("cannot keep the TAP")?;
    let nothing = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(nothing).context("cannot let go of standard input")?;
    Ok(tap)
}

/// The first descriptor beyond the standard ones.
const FIRST_FREE: i32 = 3;

/// Follows the VMM until it has ended.
async fn watch_vmm(
    config: &ShimConfig,
    record: &BootRecord,
    child: &mut Child,
    asked: &mut mpsc::Receiver<Request>,
    state: &watch::Sender<VmmState>,
) -> ExitRecord {
    let console = tokio::spawn(copy_console(config.paths.console.clone(), child.stdout.take()));
    let complaints = tokio::spawn(read_complaints(child.stderr.take()));
    let mut reason = None;
    let socket = config.paths.qmp();
    let mut qmp = tokio::select! {
        connected = Qmp::connect(&socket) => connected.ok(),
        _ = child.wait() => None, // it could not even start; its status is asked for again below
    };
    let pid = child.id().unwrap_or_default();
    let mut pulse = tokio::time::interval(PULSE);
    let mut answered = true;
    let status = loop {
        // Each arm is cancel safe; what an arm does is short.
        tokio::select! {
            ended = child.wait() => break ended,
            event = next_event(&mut qmp) => match event {
                Some(QmpEvent::Shutdown(why)) => reason = reason.or(Some(why)),
                Some(QmpEvent::State(word)) => {
                    answered = true;
                    tell(state, VmmState::Says(word));
                }
                Some(QmpEvent::Other) => {}
                None => qmp = None,
            },
            _ = pulse.tick() => if let Some(qmp) = &mut qmp {
                if !answered {
                    tell(state, silent(pid));
                }
                if waits_for_room(&state.borrow()) && has_room(&config.paths.data_disk) {
                    let _ = qmp.execute("cont").await; // the write is made again
                }
                answered = false;
                let _ = qmp.execute("query-status").await; // a full socket is silence
            },
            Some(request) = asked.recv() => match (request, &mut qmp) {
                (Request::PowerDown, Some(qmp)) => { let _ = qmp.execute("system_powerdown").await; }
                (Request::PowerDown, None) | (Request::Kill, _) => {
                    reason = Some(ExitReason::Killed);
                    let _ = child.start_kill();
                }
                (Request::Identify, _) => {}
            },
        }
    };
    let tail = console.await.unwrap_or_default();
    let complaints = complaints.await.unwrap_or_default();
    judge(record, status.ok(), reason, &tail, &complaints)
}

fn tell(state: &watch::Sender<VmmState>, now: VmmState) {
    state.send_if_modified(|before| {
        *before != now && {
            before.clone_from(&now);
            true
        }
    });
}

/// The host's disk is full, and the machine stands still until there is room.
fn waits_for_room(state: &VmmState) -> bool {
    matches!(state, VmmState::Says(word) if word == qmp::IO_ERROR)
}

/// Enough for more than the write that failed: a machine that stops again at once would only fill the journal.
fn has_room(path: &std::path::Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|seen| seen.f_bavail.saturating_mul(seen.f_frsize) >= ROOM_BYTES)
}

/// Why QMP does not answer, as far as the process's own state tells it.
fn silent(pid: u32) -> VmmState {
    match process::state(pid) {
        'T' | 't' => VmmState::Stopped,
        other => VmmState::Silent(other),
    }
}

async fn next_event(qmp: &mut Option<Qmp>) -> Option<QmpEvent> {
    match qmp {
        Some(qmp) => qmp.next().await,
        None => std::future::pending().await,
    }
}

/// Why the VMM ended, from what it told, how it ended and what was printed.
fn judge(
    record: &BootRecord,
    status: Option<ExitStatus>,
    told: Option<ExitReason>,
    tail: &str,
    complaints: &str,
) -> ExitRecord {
    let panic = panic_line(tail);
    let reason = match (told, panic, tail.is_empty()) {
        (Some(ExitReason::GuestRebooted) | None, Some(_), _) => ExitReason::GuestPanicked,
        (Some(told), ..) => told,
        (None, None, true) => ExitReason::StartFailed,
        (None, None, false) => ExitReason::Crashed,
    };
    let status = status.map_or_else(|| "unknown status".to_owned(), |s| s.to_string());
    let said = panic.unwrap_or(complaints.trim());
    exit(record, reason, format!("{status}; {said}"))
}

fn exit(record: &BootRecord, reason: ExitReason, evidence: String) -> ExitRecord {
    ExitRecord {
        boot_id: record.boot_id.clone(),
        reason,
        evidence,
        wall_ns: wall_ns(),
    }
}

fn keep(config: &ShimConfig, record: &ExitRecord) -> anyhow::Result<()> {
    files::replace(&config.paths.exit_record, &serde_json::to_vec(record)?)
}

async fn copy_console(path: std::path::PathBuf, stdout: Option<tokio::process::ChildStdout>) -> String {
    let (Some(mut stdout), Ok(mut console)) = (stdout, Console::begin(&path)) else {
        return String::new();
    };
    let mut chunk = vec![0; 16 << 10];
    while let Ok(n @ 1..) = stdout.read(&mut chunk).await {
        if let Err(error) = console.append(&chunk[..n]) {
            tracing::warn!(%error, path = %path.display(), "the console cannot be kept");
        }
    }
    console.tail()
}

async fn read_complaints(stderr: Option<tokio::process::ChildStderr>) -> String {
    let Some(mut stderr) = stderr else {
        return String::new();
    };
    let mut first = Vec::new();
    let _ = (&mut stderr).take(COMPLAINT_BYTES).read_to_end(&mut first).await;
    let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await; // never let QEMU block on it
    String::from_utf8_lossy(&first).into_owned()
}

/// A sparse file of the wanted size; it only ever grows.
fn prepare_data_disk(config: &ShimConfig) -> anyhow::Result<()> {
    let path = &config.paths.data_disk;
    let size = u64::from(config.data_mib) << 20;
    let grow = || -> std::io::Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        if file.metadata()?.len() < size {
            file.set_len(size)?;
            file.sync_all()?;
        }
        Ok(())
    };
    grow().with_context(|| format!("cannot prepare the data disk {}", path.display()))
}

/// Sockets of a shim that was killed; ours is bound, so no other is alive.
fn remove_stale(config: &ShimConfig) {
    for path in [config.paths.vhost(), config.paths.qmp(), config.paths.vsock()] {
        let _ = std::fs::remove_file(path); // absent is the usual case
    }
}

fn remove_sockets(config: &ShimConfig) {
    remove_stale(config);
    for path in [config.paths.shim(), config.paths.config()] {
        let _ = std::fs::remove_file(path);
    }
    let _ = std::fs::remove_dir(&config.paths.run); // stays if somebody else put a file there
}

async fn serve(
    listener: tokio::net::UnixListener,
    identity: Arc<Message>,
    requests: mpsc::Sender<Request>,
    messages: broadcast::Sender<Message>,
    states: watch::Receiver<VmmState>,
) {
    let ours = rustix::process::geteuid().as_raw();
    let mut agents = JoinSet::new();
    let mut ended = messages.subscribe();
    drop(messages);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                if stream.peer_cred().is_ok_and(|peer| peer.uid() == ours) {
                    agents.spawn(converse(stream, identity.clone(), requests.clone(), ended.resubscribe(), states.clone()));
                }
            }
            message = ended.recv() => match message {
                Ok(Message::Exited(_)) | Err(broadcast::error::RecvError::Closed) => break,
                _ => {}
            },
        }
    }
    while agents.join_next().await.is_some() {}
}

async fn converse(
    stream: UnixStream,
    identity: Arc<Message>,
    requests: mpsc::Sender<Request>,
    mut messages: broadcast::Receiver<Message>,
    mut states: watch::Receiver<VmmState>,
) {
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    let mut introduced = false;
    loop {
        let answer = tokio::select! {
            line = lines.next_line() => {
                let Ok(Some(line)) = line else { return };
                match serde_json::from_str(&line) {
                    Ok(Request::Identify) => {
                        introduced = true;
                        states.mark_changed(); // who asks does not know it yet
                        Message::clone(&identity)
                    }
                    Ok(request) => {
                        let _ = requests.send(request).await;
                        continue;
                    }
                    Err(_) => return,
                }
            }
            Ok(()) = states.changed(), if introduced => Message::State(states.borrow_and_update().clone()),
            message = messages.recv() => match message {
                Ok(message) => message,
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            },
        };
        let last = matches!(answer, Message::Exited(_));
        let Ok(mut line) = serde_json::to_vec(&answer) else {
            return;
        };
        line.push(b'\n');
        if write.write_all(&line).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(told: Option<ExitReason>, tail: &str) -> ExitReason {
        let record = boot_segment::fresh_record(0).unwrap();
        judge(&record, None, told, tail, "complaint").reason
    }

    /// It is random which of two ready arms runs: each of several agents must hear the identity first.
    #[tokio::test]
    async fn an_agent_that_comes_late_hears_the_identity_before_the_state() {
        let identity = Arc::new(Message::Identity {
            boot_id: "b".to_owned(),
            key: boot_segment::fresh_record(0).unwrap().key,
            vmm: VmmStatus {
                kind: "qemu".to_owned(),
                accel: "tcg".to_owned(),
                why: String::new(),
                pid: 1,
            },
        });
        let (requests, _asked) = mpsc::channel(1);
        let (messages, _) = broadcast::channel(1);
        let (state, states) = watch::channel(VmmState::Starting);
        state.send_replace(VmmState::Says("running".to_owned()));
        for _ in 0..32 {
            let (mut agent, shim) = UnixStream::pair().unwrap();
            agent.write_all(b"\"identify\"\n").await.unwrap();
            tokio::spawn(converse(
                shim,
                identity.clone(),
                requests.clone(),
                messages.subscribe(),
                states.clone(),
            ));
            let mut lines = BufReader::new(agent).lines();
            let mut next = async || -> Message {
                serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap()
            };
            assert!(matches!(next().await, Message::Identity { .. }));
            assert_eq!(next().await, Message::State(VmmState::Says("running".to_owned())));
        }
    }

    #[test]
    fn the_end_of_a_vmm_is_named() {
        let panic = "Kernel panic - not syncing: x";
        assert_eq!(
            reason(Some(ExitReason::GuestRebooted), panic),
            ExitReason::GuestPanicked
        );
        assert_eq!(reason(None, panic), ExitReason::GuestPanicked);
        assert_eq!(
            reason(Some(ExitReason::GuestRebooted), "x"),
            ExitReason::GuestRebooted
        );
        assert_eq!(reason(Some(ExitReason::Killed), panic), ExitReason::Killed);
        assert_eq!(reason(None, ""), ExitReason::StartFailed);
        assert_eq!(reason(None, "booting"), ExitReason::Crashed);
    }
}
