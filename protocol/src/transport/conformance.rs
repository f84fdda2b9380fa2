//! One suite for every transport that exists on this machine, and hostile peers behind it.

use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::{Address, DialError, bind_unix, dial};

struct Scene {
    _dir: tempfile::TempDir,
    listener: UnixListener,
    hybrid: bool,
    address: Address,
}

fn scenes() -> Vec<Scene> {
    [true, false]
        .into_iter()
        .map(|hybrid| {
            let dir = tempfile::tempdir().unwrap();
            let path: PathBuf = dir.path().join("s");
            let listener = bind_unix(&path).unwrap();
            let address = if hybrid {
                Address::Hybrid { path, port: 1024 }
            } else {
                Address::Unix { path }
            };
            Scene {
                _dir: dir,
                listener,
                hybrid,
                address,
            }
        })
        .collect()
}

impl Scene {
    /// Accepts as the device would, `extra` following the answer in the same write.
    async fn accept(&self, extra: &[u8]) -> UnixStream {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        let mut answer = Vec::new();
        if self.hybrid {
            let mut line = [0; 13];
            stream.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            answer.extend(b"OK 7\n");
        }
        answer.extend(extra);
        stream.write_all(&answer).await.unwrap();
        stream
    }
}

#[tokio::test]
async fn bytes_go_both_ways_and_none_is_lost_behind_the_answer() {
    for scene in scenes() {
        let (mut near, mut far) = tokio::join!(
            async { dial(&scene.address).await.unwrap() },
            scene.accept(b"early")
        );
        let mut early = [0; 5];
        near.read_exact(&mut early).await.unwrap();
        assert_eq!(&early, b"early");
        near.write_all(b"ping").await.unwrap();
        let mut ping = [0; 4];
        far.read_exact(&mut ping).await.unwrap();
        assert_eq!(&ping, b"ping");
        drop(far);
        assert_eq!(near.read(&mut ping).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_dead_listener_is_gone() {
    for scene in scenes() {
        drop(scene.listener);
        assert!(matches!(dial(&scene.address).await, Err(DialError::Gone(_))));
    }
}

#[tokio::test]
async fn an_end_before_ok_means_nobody_listens_yet() {
    let scene = scenes().remove(0);
    let (dialed, ()) = tokio::join!(dial(&scene.address), async {
        drop(scene.listener.accept().await.unwrap());
    });
    assert!(matches!(dialed, Err(DialError::NotListening(_))));
}

#[tokio::test]
async fn nonsense_instead_of_ok_is_named() {
    for nonsense in [&b"NO\n"[..], b"OK \n", b"OK x\n", &[b'O'; 64]] {
        let scene = scenes().remove(0);
        let (dialed, _held) = tokio::join!(dial(&scene.address), async {
            let (mut stream, _) = scene.listener.accept().await.unwrap();
            stream.write_all(nonsense).await.unwrap();
            stream
        });
        assert!(matches!(dialed, Err(DialError::Protocol(..))));
    }
}

#[tokio::test(start_paused = true)]
async fn silence_ends_after_the_limit() {
    let scene = scenes().remove(0);
    let begun = tokio::time::Instant::now();
    let (dialed, _held) = tokio::join!(dial(&scene.address), scene.listener.accept());
    assert!(matches!(dialed, Err(DialError::Timeout(_))));
    assert_eq!(begun.elapsed().as_secs(), Duration::from_secs(2).as_secs());
}

#[tokio::test]
async fn a_live_socket_is_not_taken_over_and_a_dead_one_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let listener = bind_unix(&path).unwrap();
    assert_eq!(
        bind_unix(&path).unwrap_err().kind(),
        std::io::ErrorKind::AddrInUse
    );
    drop(listener);
    bind_unix(&path).unwrap();
    let long = dir.path().join("x".repeat(108));
    assert_eq!(
        bind_unix(&long).unwrap_err().kind(),
        std::io::ErrorKind::InvalidInput
    );
}
