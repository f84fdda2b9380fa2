//! The server over a Unix socket and memory streams, with the protocol's own client.

use super::*;
use crate::core::world::{Effect, Event, World};
use crate::engine::{self, Hands};
use crate::facts::BootFacts;
use sovereign_protocol::bulk::{self, Answer, Frame, Open};
use sovereign_protocol::codec;
use sovereign_protocol::condition::{Key, Layer, Verdict};
use sovereign_protocol::feed::Feed;
use sovereign_protocol::handshake::{BootKey, dial};
use sovereign_protocol::operation::OperationId;
use sovereign_protocol::service::GuestClient;
use sovereign_protocol::transport::bind_unix;
use sovereign_protocol::v1::{Document, Ping, Refusal};
use tarpc::context::{self, Context};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

struct Recorder(mpsc::UnboundedSender<Effect>);

impl Hands for Recorder {
    fn begin(&mut self, effect: Effect) {
        let _ = self.0.send(effect);
    }
    fn alive(&mut self) {}
}

struct Fixture {
    server: Server,
    identity: Identity,
    engine: Handle,
    effects: mpsc::UnboundedReceiver<Effect>,
}

fn fixture() -> Fixture {
    let identity = Identity {
        boot_id: "b1".into(),
        key: BootKey::generate().unwrap(),
    };
    let (engine, handle) = engine::new(World::new(Feed::new(7, 16), BootFacts::default()));
    let (sender, effects) = mpsc::unbounded_channel();
    tokio::spawn(engine.run(Recorder(sender)));
    let server = Server::new(identity.clone(), handle.clone());
    Fixture {
        server,
        identity,
        engine: handle,
        effects,
    }
}

impl Fixture {
    async fn open(&self, channel: Channel) -> DuplexStream {
        let (mut near, far) = duplex(1 << 20);
        tokio::spawn(self.server.clone().serve(Box::new(far)));
        dial(&mut near, &self.identity, channel).await.unwrap();
        near
    }

    async fn client(&self) -> GuestClient {
        let stream = self.open(Channel::Guest).await;
        GuestClient::new(tarpc::client::Config::default(), codec::transport(stream)).spawn()
    }

    async fn bulk(&self, open: &Open) -> (DuplexStream, Answer) {
        let mut stream = self.open(Channel::Bulk).await;
        bulk::write_message(&mut stream, open).await.unwrap();
        let answer = bulk::read_message(&mut stream).await.unwrap();
        (stream, answer)
    }
}

fn document(port: u16) -> Document {
    let text = format!(
        r#"{{"version":1,"revision":3,"hostname":"sql","services":[{{"name":"postgres","kind":{{"postgres":{{"settings":{{}},"port":{port}}}}}}}],"secrets":{{}}}}"#
    );
    Document::from(text.into_bytes())
}

#[tokio::test]
async fn apply_watch_ping_and_shutdown_over_a_unix_socket() {
    let mut fixture = fixture();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.sock");
    let listener = bind_unix(&path).unwrap();
    tokio::spawn(fixture.server.clone().run(listener));
    let mut stream = UnixStream::connect(&path).await.unwrap();
    dial(&mut stream, &fixture.identity, Channel::Guest)
        .await
        .unwrap();
    let client = GuestClient::new(tarpc::client::Config::default(), codec::transport(stream)).spawn();

    let applied = client
        .apply(context::current(), document(5432))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(applied.revision, 3);
    assert!(matches!(fixture.effects.recv().await, Some(Effect::Network(_))));
    assert!(matches!(fixture.effects.recv().await, Some(Effect::Hostname(name)) if name.as_str() == "sql"));
    let refused = client
        .apply(context::current(), document(0))
        .await
        .unwrap()
        .unwrap_err();
    assert!(matches!(refused, Refusal::Invalid(text) if text.contains("services[0].port")));

    let changes = client.watch(context::current(), None, 0).await.unwrap();
    assert!(changes.reset);
    assert!(changes.conditions.iter().any(|c| c.subject == "postgres"));

    let pong = client
        .ping(
            context::current(),
            Ping {
                host_sent_ns: clock_now(),
            },
        )
        .await
        .unwrap();
    assert!(pong.guest_sent_ns >= pong.guest_received_ns);
    client.shutdown(context::current()).await.unwrap().unwrap();
    while fixture.effects.recv().await.unwrap() != Effect::PowerOff {}
}

fn clock_now() -> i64 {
    crate::clock::wall_ns()
}

#[tokio::test]
async fn a_held_watch_answers_when_something_changes() {
    let fixture = fixture();
    let client = fixture.client().await;
    let first = client.watch(context::current(), None, 0).await.unwrap();
    let waiting = tokio::spawn(async move {
        client
            .watch(context::current(), Some(first.cursor), 8_000)
            .await
            .unwrap()
    });
    tokio::task::yield_now().await;
    fixture
        .engine
        .event(Event::Seen(vec![(
            Key::new(Layer::Loopback, "lo"),
            Some(Verdict::yes("Answers", "")),
        )]))
        .await
        .unwrap();
    assert_eq!(waiting.await.unwrap().conditions[0].subject, "lo");
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_clamped() {
    let fixture = fixture();
    let client = fixture.client().await;
    let first = client.watch(context::current(), None, 0).await.unwrap();
    let begun = Instant::now();
    let mut patient: Context = context::current();
    patient.deadline = (Instant::now() + Duration::from_secs(3_000)).into_std();
    let changes = client.watch(patient, Some(first.cursor), u32::MAX).await.unwrap();
    assert!(changes.conditions.is_empty());
    assert_eq!(begun.elapsed().as_secs(), 8);
}

#[tokio::test]
async fn a_hostile_deadline_ends_its_connection_and_nothing_else() {
    let fixture = fixture();
    let mut stream = fixture.open(Channel::Guest).await;
    let mut frame = vec![0, 0, 0, 16];
    frame.extend(0u32.to_le_bytes());
    frame.extend(u64::MAX.to_le_bytes());
    frame.extend(u32::MAX.to_le_bytes());
    stream.write_all(&frame).await.unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
    assert!(
        fixture
            .client()
            .await
            .watch(context::current(), None, 0)
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn a_peer_without_the_key_gets_no_service() {
    let fixture = fixture();
    let (mut near, far) = duplex(4096);
    tokio::spawn(fixture.server.clone().serve(Box::new(far)));
    let stranger = Identity {
        key: BootKey::generate().unwrap(),
        ..fixture.identity.clone()
    };
    assert!(dial(&mut near, &stranger, Channel::Guest).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn strangers_over_the_limit_are_sent_away_and_leave_after_the_limit() {
    let fixture = fixture();
    let mut strangers = Vec::new();
    for _ in 0..UNAUTHENTICATED {
        let (near, far) = duplex(64);
        tokio::spawn(fixture.server.clone().serve(Box::new(far)));
        strangers.push(near);
    }
    tokio::task::yield_now().await;
    let (mut near, far) = duplex(4096);
    tokio::spawn(fixture.server.clone().serve(Box::new(far)));
    assert!(dial(&mut near, &fixture.identity, Channel::Guest).await.is_err());
    tokio::time::sleep(Duration::from_secs(3)).await;
    fixture.client().await;
}

#[tokio::test]
async fn a_tcp_stream_reaches_the_loopback_and_a_closed_port_is_named() {
    let fixture = fixture();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let service = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = String::new();
        stream.read_to_string(&mut asked).await.unwrap();
        stream.write_all(asked.to_uppercase().as_bytes()).await.unwrap();
    });
    let (stream, answer) = fixture.bulk(&Open::Tcp { port }).await;
    assert_eq!(answer, Answer::Opened);
    let (mut user, local) = duplex(64);
    let carried = tokio::spawn(bulk::carry(local, stream));
    user.write_all(b"hello").await.unwrap();
    user.shutdown().await.unwrap();
    let mut said = String::new();
    user.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "HELLO");
    carried.await.unwrap().unwrap();
    service.await.unwrap();
    let (_, answer) = fixture.bulk(&Open::Tcp { port }).await;
    assert!(matches!(answer, Answer::Refused { reason } if reason.contains("refused")));
}

#[tokio::test]
async fn a_cut_bulk_stream_resets_the_service() {
    let fixture = fixture();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (stream, _) = fixture.bulk(&Open::Tcp { port }).await;
    let (mut service, _) = listener.accept().await.unwrap();
    drop(stream);
    let error = service.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

async fn frames(mut stream: DuplexStream) -> Vec<Frame> {
    let mut frames = Vec::new();
    while let Ok(frame) = bulk::read_frame(&mut stream).await {
        frames.push(frame);
    }
    frames
}

fn exec(script: &str) -> Open {
    Open::Exec {
        operation: OperationId::generate().unwrap(),
        argv: vec!["sh".into(), "-c".into(), script.into()],
        user: None,
    }
}

#[tokio::test]
async fn a_command_gets_its_input_and_gives_outputs_and_status() {
    let fixture = fixture();
    let (mut stream, answer) = fixture.bulk(&exec("cat; echo bad >&2; exit 3")).await;
    assert_eq!(answer, Answer::Opened);
    bulk::write_frame(
        &mut stream,
        &Frame::Data {
            lane: 0,
            bytes: b"in".to_vec(),
        },
    )
    .await
    .unwrap();
    bulk::write_frame(&mut stream, &Frame::End { lane: 0 })
        .await
        .unwrap();
    let frames = frames(stream).await;
    assert_eq!(frames.last(), Some(&Frame::Exit { status: 3 }));
    for want in [
        Frame::Data {
            lane: 1,
            bytes: b"in".to_vec(),
        },
        Frame::Data {
            lane: 2,
            bytes: b"bad\n".to_vec(),
        },
        Frame::End { lane: 1 },
        Frame::End { lane: 2 },
    ] {
        assert!(frames.contains(&want), "{want:?} in {frames:?}");
    }
}

#[tokio::test]
async fn a_command_that_was_killed_or_left_heirs_still_ends() {
    let fixture = fixture();
    let (stream, _) = fixture.bulk(&exec("kill -9 $$")).await;
    assert_eq!(frames(stream).await.last(), Some(&Frame::Exit { status: 137 }));
    let (stream, _) = fixture.bulk(&exec("sleep 60 & exit 0")).await;
    assert_eq!(frames(stream).await.last(), Some(&Frame::Exit { status: 0 }));
}

#[tokio::test]
async fn a_command_ends_with_its_stream() {
    let fixture = fixture();
    let (mut stream, _) = fixture.bulk(&exec("echo $$; exec sleep 60")).await;
    let Frame::Data { bytes, .. } = bulk::read_frame(&mut stream).await.unwrap() else {
        panic!("no output")
    };
    let pid = String::from_utf8(bytes).unwrap();
    drop(stream);
    let process = std::path::PathBuf::from(format!("/proc/{}", pid.trim()));
    let ended = async {
        while process.join("exe").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap();
}

/// The exit code that a stream ends with, and whether anything came before it.
async fn end(stream: DuplexStream) -> (Option<u32>, bool) {
    let frames = frames(stream).await;
    let status = match frames.last() {
        Some(Frame::Exit { status }) => Some(*status),
        _ => None,
    };
    (status, frames.len() > 1)
}

#[tokio::test]
async fn a_command_that_is_asked_for_again_is_not_run_again() {
    let fixture = fixture();
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    let script = format!("echo once >> {}; read end; exit 3", count.display());
    let command = exec(&script);
    let (mut stream, _) = fixture.bulk(&command).await;
    let (_, answer) = fixture.bulk(&command).await;
    assert!(matches!(answer, Answer::Refused { reason } if reason.contains("still runs")));
    bulk::write_frame(&mut stream, &Frame::End { lane: 0 })
        .await
        .unwrap();
    assert_eq!(end(stream).await, (Some(3), true));
    let (stream, answer) = fixture.bulk(&command).await;
    assert_eq!(answer, Answer::Opened);
    assert_eq!(end(stream).await, (Some(3), false));
    assert_eq!(std::fs::read_to_string(count).unwrap(), "once\n");

    // Cut off in the middle: its end is what the cut made of it, and it does not run again either.
    let cut = exec("echo begun; exec sleep 60");
    let (mut stream, _) = fixture.bulk(&cut).await;
    bulk::read_frame(&mut stream).await.unwrap();
    drop(stream);
    let ended = async {
        loop {
            let (stream, answer) = fixture.bulk(&cut).await;
            if answer == Answer::Opened {
                return end(stream).await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(5), ended).await.unwrap();
    assert_eq!(ended, (Some(137), false));

    // What never ran may be asked for again.
    let Open::Exec { operation, .. } = exec("") else {
        unreachable!()
    };
    for _ in 0..2 {
        let (operation, argv) = (operation.clone(), Vec::new());
        let user = None;
        let (_, answer) = fixture
            .bulk(&Open::Exec {
                operation,
                argv,
                user,
            })
            .await;
        assert!(matches!(answer, Answer::Refused { reason } if reason == "argv is empty"));
    }
}

#[tokio::test]
async fn what_cannot_be_opened_is_refused_with_its_reason() {
    let fixture = fixture();
    let guest = Open::Guest {
        guest: sovereign_protocol::name::Name::parse("a").unwrap(),
        open: Box::new(exec("")),
    };
    for (open, want) in [
        (
            Open::Exec {
                operation: OperationId::generate().unwrap(),
                argv: vec![],
                user: None,
            },
            "argv is empty",
        ),
        (
            Open::Exec {
                operation: OperationId::generate().unwrap(),
                argv: vec!["/nonexistent".into()],
                user: None,
            },
            "/nonexistent: No such file",
        ),
        (
            Open::Exec {
                operation: OperationId::generate().unwrap(),
                argv: vec!["true".into()],
                user: Some("no-such-user".into()),
            },
            "no-such-user",
        ),
        (guest, "has no guests"),
    ] {
        let (_, answer) = fixture.bulk(&open).await;
        assert!(
            matches!(&answer, Answer::Refused { reason } if reason.contains(want)),
            "{answer:?}"
        );
    }
}
