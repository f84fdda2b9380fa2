//! One guest: its shim, its VMM, a fresh dial of its agent, and what the last boot left.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use sovereign_protocol::boot::AGENT_PORT;
use sovereign_protocol::codec;
use sovereign_protocol::condition::{Condition, Verdict};
use sovereign_protocol::feed::Changes;
use sovereign_protocol::handshake::{Channel, HandshakeError, Identity};
use sovereign_protocol::inspection::{ConsoleSeen, DiskSeen, ExitSeen, GuestSeen, SocketSeen};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::GUEST_CONDITIONS;
use sovereign_protocol::name::Name;
use sovereign_protocol::service::GuestClient;
use sovereign_protocol::status::VmmStatus;
use sovereign_protocol::transport::{Address, BoxStream, DialError};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::{age_ms, last_lines, process, tail};
use crate::clock::wall_ns;
use crate::core::vmm_verdict;
use crate::files;
use crate::link::{self, Target};
use crate::shim::console::panic_line;
use crate::shim::contract::{ExitRecord, Message, Paths, Request, VmmState};

/// A shim answers within this time: it has nothing else to do.
const SHIM: Duration = Duration::from_secs(2);
/// All that is read from a shim.
const SHIM_BYTES: u64 = 64 << 10;
/// The guest agent answers one call within this time.
const ASK: Duration = Duration::from_secs(2);
/// Bytes and lines of a console's end; a panic's trace is within it.
const CONSOLE_BYTES: u64 = 16 << 10;
const CONSOLE_LINES: usize = 8;

/// What a shim told.
struct Told {
    identity: Identity,
    vmm: VmmStatus,
    state: Option<VmmState>,
}

/// What a shim's socket came to.
enum Shim {
    Absent,
    Dead,
    /// It accepted and did not answer; its process, if the kernel named it.
    Silent(Option<u32>),
    Told(Told),
}

/// Looks at one guest.
pub(super) async fn look(layout: &Layout, name: Name) -> GuestSeen {
    let begun = Instant::now();
    let paths = Paths::of(layout, &name);
    let shim = ask_shim(&paths).await;
    let exit = match shim {
        Shim::Absent | Shim::Dead => exit(&paths),
        Shim::Silent(_) | Shim::Told(_) => None, // the record is of another boot
    };
    let (session, conditions) = match &shim {
        Shim::Told(told) => dial(&paths, &told.identity).await,
        _ => (
            Verdict::unknown("NotDialled", "no shim tells the key of a boot"),
            Vec::new(),
        ),
    };
    let running = running(&shim, exit.as_ref());
    let socket = match shim {
        Shim::Absent => SocketSeen::Absent,
        Shim::Dead => SocketSeen::Refused,
        Shim::Silent(_) | Shim::Told(_) => SocketSeen::Accepted,
    };
    let (boot_id, vmm) = match shim {
        Shim::Told(told) => (Some(told.identity.boot_id), Some(told.vmm)),
        _ => (None, None),
    };
    GuestSeen {
        name,
        shim: socket,
        boot_id,
        process: vmm.as_ref().map(|vmm| process(vmm.pid)),
        vmm,
        running,
        session,
        conditions,
        exit,
        console: console(&paths),
        disk: disk(&paths),
        took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

async fn ask_shim(paths: &Paths) -> Shim {
    let stream = match UnixStream::connect(paths.shim()).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::NotFound => return Shim::Absent,
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Shim::Silent(None), // its backlog is full
        Err(_) => return Shim::Dead,
    };
    let peer = stream
        .peer_cred()
        .ok()
        .and_then(|peer| peer.pid()?.try_into().ok());
    let asked = tokio::time::timeout(SHIM, identify(stream)).await;
    asked.ok().flatten().map_or(Shim::Silent(peer), Shim::Told)
}

async fn identify(stream: UnixStream) -> Option<Told> {
    let (read, mut write) = stream.into_split();
    let mut line = serde_json::to_vec(&Request::Identify).ok()?;
    line.push(b'\n');
    write.write_all(&line).await.ok()?;
    let mut lines = BufReader::new(read.take(SHIM_BYTES)).lines();
    let mut told: Option<Told> = None;
    loop {
        match serde_json::from_str(&lines.next_line().await.ok()??).ok()? {
            Message::Identity { boot_id, key, vmm } => {
                told = Some(Told {
                    identity: Identity { boot_id, key },
                    vmm,
                    state: None,
                });
            }
            // A shim says the state right after the identity; a change of before says less.
            Message::State(state) => {
                if let Some(told) = told.take() {
                    let state = Some(state);
                    return Some(Told { state, ..told });
                }
            }
            Message::Exited(_) => return None,
        }
    }
}

/// Whether the VMM runs, in the words of the host agent's own conditions.
fn running(shim: &Shim, exit: Option<&ExitSeen>) -> Verdict {
    match shim {
        Shim::Told(told) => {
            let said = told
                .state
                .as_ref()
                .and_then(|state| vmm_verdict(state, &told.vmm));
            said.unwrap_or_else(|| {
                let text = format!("pid {} was started and has not answered QMP yet", told.vmm.pid);
                Verdict::unknown("Starting", text)
            })
        }
        Shim::Silent(pid) => {
            let who = pid.map_or_else(String::new, |pid| {
                format!(" (pid {pid}, state {})", process(pid).state)
            });
            let text = format!("the shim{who} does not answer within {} s", SHIM.as_secs());
            Verdict::unknown("ShimSilent", text)
        }
        Shim::Absent | Shim::Dead => match (exit, shim) {
            (Some(exit), _) => Verdict::no(exit.reason.as_str(), &exit.evidence),
            (None, Shim::Dead) => Verdict::no(
                "ShimDied",
                "shim.sock is there, nobody listens, and there is no exit record: the shim was killed, and its VMM with it",
            ),
            (None, _) => Verdict::no(
                "NotRunning",
                "neither a shim nor an exit record: it never ran here, or the machine lost power",
            ),
        },
    }
}

/// Dials the guest agent, proves both ends, and asks it for its conditions.
async fn dial(paths: &Paths, identity: &Identity) -> (Verdict, Vec<Condition>) {
    let target = Target {
        address: Address::Hybrid {
            path: paths.vsock(),
            port: AGENT_PORT,
        },
        identity: identity.clone(),
    };
    let begun = Instant::now();
    let (stream, session) = match link::open(&target, Channel::Guest).await {
        Ok(opened) => opened,
        Err(error) => return (unanswered(&error), Vec::new()),
    };
    let opened_ms = begun.elapsed().as_millis();
    match ask(stream).await {
        Ok(conditions) => {
            let text = format!(
                "agent {} answered a fresh dial within {opened_ms} ms",
                session.peer_agent
            );
            (Verdict::yes("Answered", text), conditions)
        }
        Err(error) => {
            let text = format!("a fresh dial shook hands within {opened_ms} ms, then: {error:#}");
            (Verdict::unknown("Silent", text), Vec::new())
        }
    }
}

async fn ask(stream: BoxStream) -> anyhow::Result<Vec<Condition>> {
    let client = GuestClient::new(tarpc::client::Config::default(), codec::transport(stream)).spawn();
    let changes = link::call(ASK, |context| client.watch(context, None, 0)).await?;
    let mut conditions = Changes::from(changes).conditions;
    conditions.truncate(GUEST_CONDITIONS);
    Ok(conditions)
}

/// What a dial that came to nothing says.
fn unanswered(error: &anyhow::Error) -> Verdict {
    let text = format!("{error:#}");
    match (
        error.downcast_ref::<DialError>(),
        error.downcast_ref::<HandshakeError>(),
    ) {
        (Some(DialError::NotListening(_)), _) => {
            let text = "the guest refuses a fresh dial: nobody listens at the agent's port";
            Verdict::no("NotListening", text)
        }
        (Some(DialError::Timeout(_)), _) => {
            let text = "a fresh dial was not accepted: the VMM does not move its vsock queues";
            Verdict::unknown("NotAccepted", text)
        }
        (Some(_), _) => Verdict::no("NoDevice", format!("no vsock device answers: {text}")),
        (None, Some(HandshakeError::Timeout)) => {
            Verdict::unknown("Silent", "a fresh dial was accepted and never answered")
        }
        // The guest's kernel accepted for an agent that ended meanwhile.
        (None, Some(HandshakeError::Stream(_))) => {
            Verdict::no("NotListening", "a fresh dial was accepted and closed again")
        }
        (None, _) => Verdict::no("Refused", format!("a fresh dial ended with: {text}")),
    }
}

fn exit(paths: &Paths) -> Option<ExitSeen> {
    let bytes = files::read_optional(&paths.exit_record).ok()??;
    let record: ExitRecord = serde_json::from_slice(&bytes).ok()?;
    let age_ns = wall_ns().saturating_sub(record.wall_ns).max(0);
    let reason = format!("{:?}", record.reason);
    let clean = Verdict::no(reason.as_str(), &record.evidence); // as short as a condition's
    Some(ExitSeen {
        reason: clean.reason,
        evidence: clean.evidence,
        age_ms: age_ns.unsigned_abs() / 1_000_000,
    })
}

fn console(paths: &Paths) -> Option<ConsoleSeen> {
    let age_ms = age_ms(&paths.console)?;
    let text = tail(&paths.console, CONSOLE_BYTES);
    Some(ConsoleSeen {
        age_ms,
        last: last_lines(&text, CONSOLE_LINES),
        panic: panic_line(&text).map(|line| line.chars().take(super::LINE_CHARS).collect()),
    })
}

fn disk(paths: &Paths) -> DiskSeen {
    match std::fs::metadata(&paths.data_disk) {
        Ok(file) => DiskSeen::Present {
            bytes: file.len(),
            used_bytes: file.blocks().saturating_mul(512), // st_blocks counts in 512 bytes, stat(2)
        },
        Err(error) if error.kind() == ErrorKind::NotFound => DiskSeen::Absent,
        Err(error) => DiskSeen::Unreadable(format!("{}: {error}", paths.data_disk.display())),
    }
}
