//! A peer that lies, over each Unix transport: every case is a typed error within its deadline, without a panic.

#![allow(clippy::unwrap_used)] // all of this file is a test

use std::io;
use std::time::{Duration, Instant};

use futures::StreamExt;
use sovereign_protocol::codec;
use sovereign_protocol::handshake::{self, BootKey, Channel, HandshakeError, Identity};
use sovereign_protocol::limits::{CALL_GRACE, FRAME_BYTES};
use sovereign_protocol::service::{Guest, GuestClient, GuestRequest, GuestResponse};
use sovereign_protocol::transport::{self, Address, BoxStream, bind_unix};
use sovereign_protocol::v1::{
    Applied, Changes, ClockCorrection, Cursor, Document, Events, Ping, Pong, Refusal, Start,
};
use tarpc::client::RpcError;
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// The deadline of a call in this suite.
const DEADLINE: Duration = Duration::from_millis(300);
/// A verdict that needs no deadline comes sooner than one.
const PROMPT: Duration = Duration::from_millis(250);

struct Scene {
    _dir: tempfile::TempDir,
    listener: UnixListener,
    hybrid: bool,
    address: Address,
    identity: Identity,
}

fn scenes() -> [Scene; 2] {
    [true, false].map(|hybrid| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = bind_unix(&path).unwrap();
        let address = match hybrid {
            true => Address::Hybrid { path, port: 1024 },
            false => Address::Unix { path },
        };
        let identity = identity();
        Scene {
            _dir: dir,
            listener,
            hybrid,
            address,
            identity,
        }
    })
}

fn identity() -> Identity {
    Identity {
        boot_id: "b1".into(),
        key: BootKey::generate().unwrap(),
    }
}

impl Scene {
    async fn accept(&self) -> UnixStream {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        if self.hybrid {
            stream.read_exact(&mut [0; 13]).await.unwrap();
            stream.write_all(b"OK 7\n").await.unwrap();
        }
        stream
    }

    /// A peer that shakes hands honestly.
    async fn shaken(&self) -> UnixStream {
        let mut stream = self.accept().await;
        handshake::accept(&mut stream, &self.identity).await.unwrap();
        stream
    }

    async fn dial(&self) -> Result<BoxStream, HandshakeError> {
        let mut stream = transport::dial(&self.address).await.unwrap();
        handshake::dial(&mut stream, &self.identity, Channel::Guest).await?;
        Ok(stream)
    }

    async fn client(&self) -> GuestClient {
        let stream = self.dial().await.unwrap();
        GuestClient::new(tarpc::client::Config::default(), codec::transport(stream)).spawn()
    }
}

async fn ping(client: &GuestClient) -> Result<Pong, RpcError> {
    let mut context = tarpc::context::current();
    context.deadline = Instant::now() + DEADLINE;
    let call = client.ping(context, Ping { host_sent_ns: 1 });
    let answered = tokio::time::timeout(DEADLINE + CALL_GRACE, call).await;
    answered.expect("the call outlived its deadline and the grace")
}

/// What a peer sends after an honest handshake, whether it closes then, and how soon the caller must know.
fn lies() -> Vec<(&'static str, Vec<u8>, bool, Duration)> {
    let framed = |payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap();
        [&length.to_be_bytes()[..], payload].concat()
    };
    let unasked = tarpc::Response {
        request_id: 999,
        message: Ok(GuestResponse::Shutdown(Ok(()))),
    };
    let half = [&64u32.to_be_bytes()[..], &[1; 10]].concat();
    let long = u32::try_from(FRAME_BYTES + 1).unwrap().to_be_bytes().to_vec();
    let variant = [&999u64.to_le_bytes()[..], &[0; 4], &[77, 0, 0, 0]].concat();
    let late = DEADLINE + CALL_GRACE;
    vec![
        ("silence", vec![], false, late),
        ("an early end", vec![], true, PROMPT),
        ("half a header", vec![0, 0], true, PROMPT),
        ("an end in mid-frame", half.clone(), true, PROMPT),
        ("silence in mid-frame", half, false, late),
        (
            "a header of 4 GiB",
            u32::MAX.to_be_bytes().to_vec(),
            false,
            PROMPT,
        ),
        ("a frame over the limit", long, false, PROMPT),
        ("an empty frame", framed(&[]), false, PROMPT),
        ("nonsense", framed(&[0xff; 64]), false, PROMPT),
        ("an unknown variant", framed(&variant), false, PROMPT),
        (
            "an answer nobody asked for",
            framed(&codec::encode(&unasked).unwrap()),
            false,
            late,
        ),
    ]
}

#[tokio::test]
async fn after_the_handshake_every_lie_ends_the_call_in_time() {
    for (name, bytes, closes, within) in lies() {
        for scene in scenes() {
            let (client, mut peer) = tokio::join!(scene.client(), scene.shaken());
            let begun = Instant::now();
            let (answer, _held) = tokio::join!(ping(&client), async {
                peer.write_all(&bytes).await.unwrap();
                (!closes).then_some(peer)
            });
            assert!(answer.is_err(), "{name}: {answer:?}");
            assert!(begun.elapsed() < within, "{name}: {:?}", begun.elapsed());
        }
    }
}

/// Carries bytes between two streams until one ends; what each said. Towards `b` they go in pieces.
async fn relay<A, B>(mut a: A, mut b: B, pieces: usize) -> (Vec<u8>, Vec<u8>)
where
    A: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    B: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (mut from_a, mut from_b) = (Vec::new(), Vec::new());
    let (mut one, mut two) = (vec![0; 4096], vec![0; 4096]);
    loop {
        tokio::select! {
            n = a.read(&mut one) => {
                let Ok(n @ 1..) = n else { return (from_a, from_b) };
                from_a.extend(&one[..n]);
                for piece in one[..n].chunks(pieces) {
                    b.write_all(piece).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
            n = b.read(&mut two) => {
                let Ok(n @ 1..) = n else { return (from_a, from_b) };
                from_b.extend(&two[..n]);
                a.write_all(&two[..n]).await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn handshakes_in_pieces_and_in_one_piece_pass_and_nothing_behind_them_is_lost() {
    for pieces in [1, 7, usize::MAX] {
        for scene in scenes() {
            let (inside, mut far) = tokio::io::duplex(1 << 16);
            let carried = async { relay(inside, scene.accept().await, pieces).await };
            let honest = async {
                handshake::accept(&mut far, &scene.identity).await.unwrap();
                far.write_all(b"early").await.unwrap();
                far
            };
            let dialled = async {
                let mut stream = scene.dial().await.unwrap();
                let mut early = [0; 5];
                stream.read_exact(&mut early).await.unwrap();
                assert_eq!(&early, b"early");
            };
            tokio::join!(carried, honest, dialled);
        }
    }
}

/// What dialer and listener say in one honest handshake.
async fn record(identity: &Identity) -> (Vec<u8>, Vec<u8>) {
    let (mut dialer, near) = tokio::io::duplex(1 << 16);
    let (far, mut listener) = tokio::io::duplex(1 << 16);
    let carried = tokio::spawn(relay(near, far, usize::MAX));
    let (dialled, accepted) = tokio::join!(
        handshake::dial(&mut dialer, identity, Channel::Guest),
        handshake::accept(&mut listener, identity)
    );
    dialled.unwrap();
    accepted.unwrap();
    drop((dialer, listener));
    carried.await.unwrap()
}

#[tokio::test]
async fn an_end_at_any_byte_of_the_handshake_is_named() {
    let (_, recorded) = record(&identity()).await;
    for cut in 0..recorded.len() {
        let [_, scene] = scenes();
        let (dialled, ()) = tokio::join!(scene.dial(), async {
            let mut peer = scene.accept().await;
            peer.write_all(&recorded[..cut]).await.unwrap();
        });
        let error = dialled.err().unwrap();
        assert!(matches!(error, HandshakeError::Stream(_)), "{cut}: {error}");
    }
}

#[tokio::test]
async fn replayed_and_reflected_handshakes_prove_nothing() {
    for scene in scenes() {
        let (dialer_said, listener_said) = record(&scene.identity).await;
        let (dialled, _held) = tokio::join!(scene.dial(), async {
            let mut peer = scene.accept().await;
            peer.write_all(&listener_said).await.unwrap();
            peer
        });
        assert!(
            matches!(dialled, Err(HandshakeError::WrongKey)),
            "replayed to a dialer"
        );

        let (mut near, mut far) = tokio::io::duplex(1 << 16);
        near.write_all(&dialer_said).await.unwrap();
        let accepted = handshake::accept(&mut far, &scene.identity).await;
        assert!(
            matches!(accepted, Err(HandshakeError::WrongKey)),
            "replayed to a listener"
        );

        let mirror = async {
            let (mut read, mut write) = scene.accept().await.into_split();
            let _ = tokio::io::copy(&mut read, &mut write).await; // all that it hears, as it came
        };
        let (dialled, ()) = tokio::join!(scene.dial(), mirror);
        assert!(matches!(dialled, Err(HandshakeError::Malformed(_))), "reflected");
    }
}

#[derive(Clone)]
struct Honest;

impl Guest for Honest {
    async fn apply(self, _: Context, _: Document) -> Result<Applied, Refusal> {
        Ok(Applied { revision: 1 })
    }
    async fn watch(self, _: Context, _: Option<Cursor>, _: u32) -> Changes {
        std::future::pending().await
    }
    async fn events(self, _: Context, _: Start, _: u32) -> Events {
        std::future::pending().await
    }
    async fn correct_clock(self, _: Context, _: ClockCorrection) -> Result<(), Refusal> {
        Ok(())
    }
    async fn ping(self, _: Context, _: Ping) -> Pong {
        Pong {
            guest_received_ns: 1,
            guest_sent_ns: 2,
        }
    }
    async fn shutdown(self, _: Context) -> Result<(), Refusal> {
        Ok(())
    }
}

/// Serves one connection; its end is the end of the future.
async fn serve(stream: UnixStream) {
    let channel = BaseChannel::with_defaults(codec::transport(stream)).max_concurrent_requests(4);
    channel
        .execute(Honest.serve())
        .for_each(|response| async {
            tokio::spawn(response);
        })
        .await;
}

fn request(deadline_s: u64) -> Vec<u8> {
    let message = tarpc::ClientMessage::Request(tarpc::Request {
        context: tarpc::context::current(),
        id: 1,
        message: GuestRequest::Ping {
            ping: Ping { host_sent_ns: 1 },
        },
    });
    let mut bytes = codec::encode(&message).unwrap();
    bytes[4..12].copy_from_slice(&deadline_s.to_le_bytes());
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()
}

#[tokio::test]
async fn a_lying_client_loses_its_connection_and_nothing_else() {
    for (name, bytes) in [
        ("a deadline of u64::MAX", request(u64::MAX)),
        ("a deadline over the limit", request(3_601)),
        ("a header of 4 GiB", u32::MAX.to_be_bytes().to_vec()),
        ("nonsense", [&8u32.to_be_bytes()[..], &[0xff; 8]].concat()),
    ] {
        for scene in scenes() {
            let served = async {
                let stream = scene.shaken().await;
                tokio::time::timeout(PROMPT, serve(stream)).await
            };
            let dialled = async {
                let mut stream = scene.dial().await.unwrap();
                stream.write_all(&bytes).await.unwrap();
                stream.read(&mut [0; 64]).await
            };
            let (served, ended) = tokio::join!(served, dialled);
            assert!(served.is_ok(), "{name}: the connection stays open");
            let reset = |e: &io::Error| e.kind() == io::ErrorKind::ConnectionReset;
            assert!(
                matches!(ended, Ok(0)) || ended.as_ref().is_err_and(reset),
                "{name}: {ended:?}"
            );
        }
    }
    let [scene, _] = scenes();
    let served = async { serve(scene.shaken().await).await };
    let dialled = async {
        let client = scene.client().await;
        ping(&client).await.unwrap();
    };
    tokio::join!(served, dialled);
}
