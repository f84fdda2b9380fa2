//! A server that answered and is stopped: its readiness becomes Unknown, then False, and True again.
//!
//! The server is a process of its own that speaks as much of PostgreSQL's protocol as the probe asks for;
//! the one under test is the probe with the life of a service around it.

#![allow(clippy::unwrap_used)] // all of this is a test

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sovereign_guest_agent::core::service::{Adjusted, Event, Machine};
use sovereign_guest_agent::postgres::session::{Target, probe};
use sovereign_protocol::condition::Status;

/// Names the socket in the process that is the server.
const SOCKET: &str = "SOVEREIGN_TEST_SOCKET";

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
    [&[kind], length.as_slice(), body].concat()
}

/// One message of a client: kind and body. The first has no kind.
fn receive(stream: &mut impl Read, has_kind: bool) -> Option<(u8, Vec<u8>)> {
    let mut kind = [0];
    if has_kind {
        stream.read_exact(&mut kind).ok()?;
    }
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut body = vec![0; usize::try_from(u32::from_be_bytes(length)).unwrap() - 4];
    stream.read_exact(&mut body).ok()?;
    Some((kind[0], body))
}

/// `1, f, 17.0` for every query.
fn serve(mut stream: impl Read + Write) -> Option<()> {
    receive(&mut stream, false)?;
    let ready = message(b'Z', b"I");
    stream
        .write_all(&[message(b'R', &[0; 4]), ready.clone()].concat())
        .ok()?;
    while receive(&mut stream, true)?.0 == b'Q' {
        let mut row = 3i16.to_be_bytes().to_vec();
        for value in ["1", "f", "17.0"] {
            row.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            row.extend(value.bytes());
        }
        let answer = [message(b'D', &row), message(b'C', b"SELECT 1\0"), ready.clone()];
        stream.write_all(&answer.concat()).ok()?;
    }
    Some(())
}

/// Not a test but the server, when it is told its socket.
#[test]
fn the_server() {
    let Some(path) = std::env::var_os(SOCKET) else {
        return;
    };
    let listener = UnixListener::bind(&path).unwrap();
    println!("listening");
    for stream in listener.incoming() {
        let stream = stream.unwrap();
        std::thread::spawn(move || serve(stream));
    }
}

struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_server", "--nocapture"])
            .env(SOCKET, directory.path().join(".s.PGSQL.5432"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = Vec::new();
        let mut stdout = child.stdout.take().unwrap();
        while !said.ends_with(b"listening\n") {
            let mut byte = [0];
            stdout.read_exact(&mut byte).unwrap();
            said.push(byte[0]);
        }
        Self { child, directory }
    }

    fn target(&self) -> Target {
        Target {
            sockets: PathBuf::from(self.directory.path()),
            port: 5432,
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The life of a service that has been started.
fn started() -> Machine {
    let mut machine = Machine::default();
    machine.step(Event::Disk(Status::True), 0);
    machine.step(Event::Launched(Ok(())), 0);
    machine
}

async fn probed(machine: &mut Machine, server: &Server) -> (Status, String) {
    machine.step(Event::Probed(probe(&server.target()).await), 0);
    machine.step(Event::Adjusted(Adjusted::Done), 0);
    (machine.verdict().status, machine.verdict().reason.clone())
}

#[tokio::test]
async fn a_stopped_server_is_unknown_then_false_and_ready_again_when_it_goes_on() {
    let mut server = Server::start();
    let mut machine = started();
    let is = |status, reason: &str| (status, reason.to_owned());
    assert_eq!(probed(&mut machine, &server).await, is(Status::True, "Ready"));
    assert!(machine.verdict().evidence.starts_with("PostgreSQL 17.0"));
    // The kernel still accepts connections for it.
    server.signal(Signal::SIGSTOP);
    for status in [Status::Unknown, Status::Unknown, Status::False, Status::False] {
        assert_eq!(probed(&mut machine, &server).await, is(status, "Silent"));
    }
    server.signal(Signal::SIGCONT);
    assert_eq!(probed(&mut machine, &server).await, is(Status::True, "Ready"));
    // A dead one is no silent one.
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    assert_eq!(
        probed(&mut machine, &server).await,
        is(Status::False, "NotListening")
    );
}
