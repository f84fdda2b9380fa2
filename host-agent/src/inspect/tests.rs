use super::*;
use sovereign_protocol::boot::AGENT_PORT;
use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::feed::{Cursor, Feed};
use sovereign_protocol::handshake::{self, BootKey, Identity};
use sovereign_protocol::inspection::{DiskSeen, GuestSeen, SocketSeen};
use sovereign_protocol::status::VmmStatus;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use crate::shim::contract::{ExitReason, ExitRecord, Message, VmmState};

struct Place {
    _directory: tempfile::TempDir,
    layout: Layout,
    paths: Paths,
}

/// An instance with the directories of one guest.
fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout {
        instance: name("t"),
        run: directory.path().join("run"),
        state: directory.path().join("state"),
    };
    let paths = Paths::of(&layout, &name("sql"));
    fs::create_dir_all(&paths.run).unwrap();
    fs::create_dir_all(layout.guest_state(&name("sql"))).unwrap();
    Place {
        _directory: directory,
        layout,
        paths,
    }
}

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

async fn seen(place: &Place) -> GuestSeen {
    let mut inspection = inspect(&place.layout).await;
    assert_eq!(inspection.guests.len(), 1);
    inspection.guests.remove(0)
}

fn vmm() -> VmmStatus {
    VmmStatus {
        kind: "qemu".into(),
        accel: "tcg".into(),
        why: "test".into(),
        pid: std::process::id(),
    }
}

/// A shim that answers one agent after the other; its VMM is in this state.
fn shim(paths: &Paths, identity: &Identity, state: VmmState) -> tokio::task::JoinHandle<()> {
    let listener = UnixListener::bind(paths.shim()).unwrap();
    let messages = [
        Message::State(VmmState::Starting), // may come before the identity
        Message::Identity {
            boot_id: identity.boot_id.clone(),
            key: identity.key.clone(),
            vmm: vmm(),
        },
        Message::State(state),
    ];
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let asked = BufReader::new(read).lines().next_line().await.unwrap();
            assert_eq!(asked.as_deref(), Some("\"identify\""));
            for message in &messages {
                let line = format!("{}\n", serde_json::to_string(message).unwrap());
                write.write_all(line.as_bytes()).await.unwrap();
            }
        }
    })
}

/// The front of the vsock device; what it does after `OK` is up to the guest.
async fn accepted(listener: &UnixListener) -> tokio::net::UnixStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let wanted = format!("CONNECT {AGENT_PORT}\n");
    let mut line = vec![0; wanted.len()];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut line)
        .await
        .unwrap();
    assert_eq!(line, wanted.as_bytes());
    stream.write_all(b"OK 1\n").await.unwrap();
    stream
}

fn identity() -> Identity {
    Identity {
        boot_id: "boot-1".into(),
        key: BootKey::generate().unwrap(),
    }
}

#[tokio::test]
async fn an_instance_that_never_was_is_an_empty_one() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout {
        instance: name("t"),
        run: directory.path().join("run"),
        state: directory.path().join("state"),
    };
    let inspection = inspect(&layout).await;
    assert_eq!(
        (inspection.guests.len(), inspection.agent.control),
        (0, SocketSeen::Absent)
    );
    assert!(inspection.agent.holder.is_none() && inspection.agent.log_age_ms.is_none());
    assert!(
        !layout.state.exists() && !layout.run.exists(),
        "a look makes nothing"
    );
}

#[tokio::test]
async fn a_guest_that_ended_is_told_by_its_record_its_console_and_its_disk() {
    let place = place();
    let record = ExitRecord {
        boot_id: "b".into(),
        reason: ExitReason::GuestPanicked,
        evidence: "exit status: 0; Kernel panic - not syncing: x".into(),
        wall_ns: crate::clock::wall_ns() - 5_000_000_000,
    };
    fs::write(&place.paths.exit_record, serde_json::to_vec(&record).unwrap()).unwrap();
    let console = "boots\n\n[ 1.0] Kernel panic - not syncing: sysrq\x1b[m triggered crash\n";
    fs::write(&place.paths.console, console).unwrap();
    fs::File::create(&place.paths.data_disk)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    fs::write(place.layout.log(), "one\ntwo\n").unwrap();

    let seen = seen(&place).await;
    assert_eq!(seen.shim, SocketSeen::Absent);
    assert_eq!(
        (seen.running.status, seen.running.reason.as_str()),
        (Status::False, "GuestPanicked")
    );
    assert!(seen.running.evidence.contains("not syncing: x"));
    assert_eq!(seen.session.reason, "NotDialled");
    let exit = seen.exit.unwrap();
    assert!((5_000..60_000).contains(&exit.age_ms), "{}", exit.age_ms);
    let console = seen.console.unwrap();
    let panic = "[ 1.0] Kernel panic - not syncing: sysrq [m triggered crash";
    assert_eq!(console.panic.as_deref(), Some(panic));
    assert_eq!(console.last, ["boots", panic]);
    assert!(
        matches!(seen.disk, DiskSeen::Present { bytes, used_bytes } if bytes == 64 << 20 && used_bytes < bytes)
    );
    assert_eq!(inspect(&place.layout).await.agent.log, ["one", "two"]);
}

#[tokio::test]
async fn a_killed_shim_is_told_from_one_that_never_was() {
    let place = place();
    assert_eq!(seen(&place).await.running.reason, "NotRunning");
    drop(UnixListener::bind(place.paths.shim()).unwrap()); // as SIGKILL leaves it
    drop(UnixListener::bind(place.layout.control()).unwrap());
    let seen = seen(&place).await;
    assert_eq!(
        (seen.shim, seen.running.reason.as_str()),
        (SocketSeen::Refused, "ShimDied")
    );
    assert_eq!(inspect(&place.layout).await.agent.control, SocketSeen::Refused);
    assert_eq!(seen.disk, DiskSeen::Absent);
}

#[tokio::test]
async fn a_guest_agent_is_dialled_asked_and_its_key_is_told_to_nobody() {
    let place = place();
    let identity = identity();
    let serving = shim(&place.paths, &identity, VmmState::Says("running".into()));
    let front = UnixListener::bind(place.paths.vsock()).unwrap();
    let mut feed = Feed::new(1, 8);
    let key = Key::new(Layer::Service, "postgres");
    feed.observe(key, Verdict::no("CrashLoop", "5 times"), 10_000, 0);
    let guest = async {
        let mut stream = accepted(&front).await;
        handshake::accept(&mut stream, &identity).await.unwrap();
        let changes = feed.since(None::<Cursor>, 3);
        fake::serve(stream, changes).await;
    };
    let seen = tokio::select! {
        seen = seen(&place) => seen,
        () = guest => panic!("the guest ended"),
    };
    serving.abort();
    assert_eq!(
        (seen.running.status, seen.session.status),
        (Status::True, Status::True)
    );
    assert!(seen.session.evidence.contains("answered a fresh dial within"));
    let [condition] = &seen.conditions[..] else {
        panic!("{:?}", seen.conditions)
    };
    assert_eq!(
        (condition.verdict.reason.as_str(), condition.age_ms),
        ("CrashLoop", 3)
    );
    assert_eq!(seen.process.unwrap().pid, std::process::id());
    let key = serde_json::to_string(&identity.key).unwrap();
    let text = serde_json::to_string(&seen).unwrap() + &format!("{seen:?}");
    assert!(key.len() > 60 && !text.contains(key.trim_matches('"')), "{text}");
    assert_eq!(
        serde_json::from_str::<GuestSeen>(&serde_json::to_string(&seen).unwrap()).unwrap(),
        seen
    );
}

#[tokio::test]
/// In real time: sockets do not go with a paused clock.
async fn a_silent_a_deaf_and_a_closed_guest_are_told_apart() {
    let place = place();
    let identity = identity();
    let serving = shim(&place.paths, &identity, VmmState::Stopped);
    let front = UnixListener::bind(place.paths.vsock()).unwrap();

    let (deaf, _held) = tokio::join!(seen(&place), async { front.accept().await.unwrap() });
    assert_eq!(deaf.session.reason, "NotAccepted", "{:?}", deaf.session);
    assert_eq!(
        (deaf.running.status, deaf.running.reason.as_str()),
        (Status::Unknown, "Stopped")
    );

    let (silent, _held) = tokio::join!(seen(&place), accepted(&front));
    assert_eq!(
        (silent.session.status, silent.session.reason.as_str()),
        (Status::Unknown, "Silent")
    );

    let (closed, ()) = tokio::join!(seen(&place), async { drop(accepted(&front).await) });
    assert_eq!(
        (closed.session.status, closed.session.reason.as_str()),
        (Status::False, "NotListening")
    );

    let (refused, ()) = tokio::join!(seen(&place), async { drop(front.accept().await.unwrap()) });
    assert_eq!(refused.session.reason, "NotListening");

    let (stranger, ()) = tokio::join!(seen(&place), async {
        let mut stream = accepted(&front).await;
        let other = Identity {
            key: BootKey::generate().unwrap(),
            ..identity.clone()
        };
        let _ = handshake::accept(&mut stream, &other).await;
    });
    assert_eq!(
        (stranger.session.status, stranger.session.reason.as_str()),
        (Status::False, "Refused")
    );
    drop(front);
    let gone = seen(&place).await;
    assert_eq!(gone.session.reason, "NoDevice");
    serving.abort();
}

#[tokio::test]
async fn a_shim_that_does_not_answer_is_named_with_its_process() {
    let place = place();
    let listener = UnixListener::bind(place.paths.shim()).unwrap();
    let seen = seen(&place).await;
    drop(listener);
    assert_eq!(
        (seen.running.status, seen.running.reason.as_str()),
        (Status::Unknown, "ShimSilent")
    );
    assert!(
        seen.running
            .evidence
            .contains(&format!("pid {}", std::process::id()))
    );
    assert_eq!(seen.session.reason, "NotDialled");
}

/// A guest agent that answers `watch` and nothing else.
mod fake {
    use futures::StreamExt;
    use sovereign_protocol::codec;
    use sovereign_protocol::feed;
    use sovereign_protocol::service::Guest;
    use sovereign_protocol::v1::{
        Applied, Changes, ClockCorrection, Cursor, Document, Events, Ping, Pong, Refusal, Start,
    };
    use tarpc::context::Context;
    use tarpc::server::{BaseChannel, Channel};

    #[derive(Clone)]
    struct Fake(feed::Changes);

    pub(super) async fn serve(stream: tokio::net::UnixStream, changes: feed::Changes) {
        BaseChannel::with_defaults(codec::transport(stream))
            .execute(Fake(changes).serve())
            .for_each_concurrent(None, |response| response)
            .await;
        std::future::pending().await
    }

    impl Guest for Fake {
        async fn watch(self, _: Context, cursor: Option<Cursor>, hold_ms: u32) -> Changes {
            assert!(cursor.is_none() && hold_ms == 0);
            self.0.into()
        }
        async fn apply(self, _: Context, _: Document) -> Result<Applied, Refusal> {
            unreachable!()
        }
        async fn events(self, _: Context, _: Start, _: u32) -> Events {
            unreachable!()
        }
        async fn correct_clock(self, _: Context, _: ClockCorrection) -> Result<(), Refusal> {
            unreachable!()
        }
        async fn ping(self, _: Context, _: Ping) -> Pong {
            unreachable!()
        }
        async fn shutdown(self, _: Context) -> Result<(), Refusal> {
            unreachable!()
        }
    }
}
