//! The Tailscale condition against a LocalAPI that lies.

#![allow(clippy::unwrap_used)] // all of this is a test

use std::time::Duration;

use sovereign_guest_agent::core::world::Event;
use sovereign_guest_agent::engine::Request;
use sovereign_guest_agent::tailscale::status::{Answer, judge};
use sovereign_guest_agent::tailscale::{self, ASK, Places, ask, backend_key, health_key};
use sovereign_protocol::condition::Verdict;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

struct Fake {
    directory: tempfile::TempDir,
}

impl Fake {
    /// A LocalAPI that is not there.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { directory }
    }

    fn places(&self) -> Places {
        Places {
            socket: self.directory.path().join("tailscaled.sock"),
            programs: vec![self.directory.path().join("tailscaled")],
        }
    }

    fn install(&self) {
        std::fs::write(self.directory.path().join("tailscaled"), "").unwrap();
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.places().socket).unwrap()
    }
}

/// Reads a request to its empty line.
async fn request(stream: &mut UnixStream) -> String {
    let mut text = Vec::new();
    while !text.ends_with(b"\r\n\r\n") {
        text.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(text).unwrap()
}

/// Asks a server that answers with these bytes and keeps the connection open.
async fn answered(bytes: Vec<u8>) -> Answer {
    let fake = Fake::new();
    let listener = fake.listen();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let asked = request(&mut stream).await;
        let _ = stream.write_all(&bytes).await; // the reader may have given up
        (asked, stream)
    });
    let answer = ask(&fake.places()).await;
    let (asked, _stream) = server.await.unwrap();
    assert!(
        asked.starts_with("GET /localapi/v0/status?peers=false HTTP/1.1\r\n"),
        "{asked}"
    );
    assert!(asked.contains("\r\nHost: local-tailscaled.sock\r\n"), "{asked}");
    answer
}

fn sized(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn reason(answer: &Answer) -> String {
    judge(answer).0.reason
}

#[tokio::test]
async fn a_status_is_read_with_a_length_and_in_chunks() {
    let body = r#"{"Version":"1.102.3","BackendState":"NeedsLogin","Health":["not logged in"]}"#;
    let (first, second) = body.split_at(17);
    let chunks = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{first}\r\n{:X}\r\n{second}\r\n0\r\n\r\n",
        first.len(),
        second.len()
    );
    for bytes in [sized(body), chunks.into_bytes()] {
        let answer = answered(bytes).await;
        assert_eq!(reason(&answer), "NeedsLogin");
        assert_eq!(judge(&answer).1.unwrap().evidence, "not logged in");
    }
}

#[tokio::test]
async fn lies_are_told_apart() {
    let forbidden = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno".to_vec();
    assert_eq!(answered(forbidden).await, Answer::Refused(403));
    for garbage in [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno".to_vec(),
        b"\x15\x03\x01\x00\x02\x02\x28\r\n\r\n".to_vec(),
        b"HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n".to_vec(),
        [b"HTTP/1.1 200 OK\r\n".to_vec(), b"A: b\r\n".repeat(10_000)].concat(),
        [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), vec![b'x'; 1 << 20]].concat(),
    ] {
        assert_eq!(reason(&answered(garbage).await), "Garbled");
    }
}

#[tokio::test]
async fn a_daemon_that_closes_in_the_middle_is_no_status() {
    let fake = Fake::new();
    let listener = fake.listen();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
            .await
            .unwrap();
    });
    let answer = ask(&fake.places()).await;
    server.await.unwrap();
    assert!(
        matches!(&answer, Answer::Garbled(text) if text.contains("ends in the middle")),
        "{answer:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn silence_before_and_within_the_answer_ends_in_time() {
    for begin in ["", "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"] {
        let begun = Instant::now();
        let answer = answered(begin.into()).await;
        assert_eq!(reason(&answer), "Silent");
        assert_eq!(begun.elapsed(), ASK);
    }
    // A drop now and then does not make it longer.
    let fake = Fake::new();
    let listener = fake.listen();
    let dripping = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while stream.write_all(b"H").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    let begun = Instant::now();
    assert_eq!(reason(&ask(&fake.places()).await), "Silent");
    assert_eq!(begun.elapsed(), ASK);
    dripping.await.unwrap();
}

#[tokio::test]
async fn no_program_no_daemon_and_a_dead_socket_are_three_things() {
    let fake = Fake::new();
    assert_eq!(reason(&ask(&fake.places()).await), "NotConfigured");
    fake.install();
    assert_eq!(reason(&ask(&fake.places()).await), "DaemonDown");
    drop(fake.listen());
    assert!(fake.places().socket.exists());
    assert_eq!(reason(&ask(&fake.places()).await), "DaemonDown");
}

/// The next verdicts on backend and health.
async fn next(requests: &mut mpsc::Receiver<Request>) -> [Option<Verdict>; 2] {
    let request = timeout(Duration::from_secs(30), requests.recv()).await;
    let Ok(Some(Request::Event(Event::Seen(verdicts)))) = request else {
        panic!("{request:?}")
    };
    let [(backend, one), (health, other)] = verdicts.try_into().unwrap();
    assert_eq!((backend, health), (backend_key(), health_key()));
    [one, other]
}

#[tokio::test(start_paused = true)]
async fn it_is_watched_only_while_it_is_wanted_and_forgotten_after() {
    let fake = Fake::new();
    let listener = fake.listen();
    let server = tokio::spawn(async move {
        for state in ["Starting", "Running"].into_iter().cycle() {
            let (mut stream, _) = listener.accept().await.unwrap();
            request(&mut stream).await;
            let body = format!(r#"{{"BackendState":"{state}"}}"#);
            stream.write_all(&sized(&body)).await.unwrap();
        }
    });
    let (want, wanted) = watch::channel(false);
    let (sender, mut requests) = mpsc::channel(8);
    let watching = tokio::spawn(tailscale::run(fake.places(), wanted, sender));
    let quiet = timeout(Duration::from_secs(60), requests.recv()).await;
    assert!(quiet.is_err(), "nothing is said of what nobody wants");

    want.send(true).unwrap();
    let begun = Instant::now();
    for (state, after) in [("Starting", 0), ("Running", 1), ("Starting", 6), ("Running", 7)] {
        let [backend, health] = next(&mut requests).await;
        assert_eq!(backend.unwrap().reason, state);
        assert_eq!(health.unwrap().reason, "Healthy");
        assert_eq!(begun.elapsed().as_secs(), after, "the pause depends on the state");
    }
    want.send(false).unwrap();
    assert_eq!(next(&mut requests).await, [None, None]);
    drop(want);
    watching.await.unwrap();
    server.abort();
}
