//! Connections of a former way out end on a real kernel, and no others, in a network namespace of the test's own.

#![allow(clippy::unwrap_used)] // all of this is a test

mod common;

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use std::os::fd::{AsRawFd, OwnedFd};

use sovereign_guest_agent::core::former::{Ended, Moved};
use sovereign_guest_agent::core::world::Event;
use sovereign_guest_agent::engine::Request;
use sovereign_guest_agent::net::diag::Diag;
use sovereign_guest_agent::net::former;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::ways::Ways;
use tokio::sync::{mpsc, watch};

/// No wait in this test is longer.
const SOON: Duration = Duration::from_secs(20);
const OWN: &str = "192.168.100.2";
const OWN6: &str = "fd00:64::2";
const TAILNET: &str = "100.101.102.103";
/// Beyond our networks: the kernel takes their packets for its own, though no interface has the addresses.
const FAR: &str = "203.0.113.9";
const FAR6: &str = "2001:db8::9";
const SIBLING: &str = "192.168.100.3";
/// A neighbour that never answers.
const SILENT: &str = "198.51.100.1";

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}: {status}");
}

fn network() {
    ip("link set lo up");
    for (link, addresses) in [("card", [OWN, OWN6].as_slice()), ("tunnel", &[TAILNET])] {
        ip(&format!("link add {link} type veth peer name {link}-end"));
        ip(&format!("link set {link}-end up"));
        ip(&format!("link set {link} up"));
        for address in addresses {
            let length = if address.contains(':') { 64 } else { 24 };
            let dad = if address.contains(':') { " nodad" } else { "" };
            ip(&format!("addr add {address}/{length} dev {link}{dad}"));
        }
    }
    ip(&format!("route add local {FAR} dev lo src {OWN}"));
    ip(&format!("route add local {SIBLING} dev lo src {OWN}"));
    ip(&format!("-6 route add local {FAR6} dev lo src {OWN6}"));
    ip(&format!("route add {SILENT} dev card"));
    ip(&format!(
        "neigh add {SILENT} lladdr 02:00:00:00:00:09 dev card nud permanent"
    ));
}

/// Answers each byte with the same, on as many threads as there are connections.
fn echo(listen: &str) -> u16 {
    let listener = TcpListener::bind(listen).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut byte = [0];
                while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
            });
        }
    });
    port
}

/// A connection that was used.
fn opened(to: &str, port: u16) -> TcpStream {
    let host: std::net::IpAddr = to.parse().unwrap();
    let stream = TcpStream::connect_timeout(&SocketAddr::new(host, port), SOON).unwrap();
    used(stream)
}

/// One that was opened under an address of the caller's choice.
fn opened_from(from: &str, to: &str, port: u16) -> TcpStream {
    let fd = inet();
    let address = |ip: &str, port| SockaddrIn::from(std::net::SocketAddrV4::new(ip.parse().unwrap(), port));
    bind(fd.as_raw_fd(), &address(from, 0)).unwrap();
    connect(fd.as_raw_fd(), &address(to, port)).unwrap();
    used(TcpStream::from(fd))
}

fn inet() -> OwnedFd {
    socket(
        AddressFamily::Inet,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .unwrap()
}

fn used(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(SOON)).unwrap();
    lives(&stream).unwrap();
    stream
}

fn lives(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])
}

/// Its holder hears of the end without asking.
fn has_ended(mut stream: &TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::ConnectionAborted)
}

/// An agent's task, which ends when it is dropped; the record stays.
struct Agent {
    told: watch::Sender<Option<InterfaceSpec>>,
    requests: mpsc::Receiver<Request>,
}

impl Agent {
    fn start(record: &Path) -> Self {
        let (told, hears) = watch::channel(None);
        let (sender, requests) = mpsc::channel(8);
        tokio::spawn(former::run(record.to_owned(), hears, sender));
        Self { told, requests }
    }

    fn tell(&self, v4: u64, v6: u64) {
        let interface = InterfaceSpec {
            addresses: vec![
                format!("{OWN}/24").parse().unwrap(),
                format!("{OWN6}/64").parse().unwrap(),
            ],
            ways: Ways {
                v4: Some(v4),
                v6: Some(v6),
            },
            ..InterfaceSpec::default()
        };
        self.told.send_replace(Some(interface));
    }

    async fn ended(&mut self) -> Ended {
        match tokio::time::timeout(SOON, self.requests.recv()).await {
            Ok(Some(Request::Event(Event::FormerEnded(ended)))) => ended,
            other => panic!("no end was told: {other:?}"),
        }
    }

    /// Waits until the record says this.
    async fn kept(record: &Path, v4: u64, v6: u64) {
        let wanted = format!(r#""ways":{{"v4":{v4},"v6":{v6}}}"#);
        let begun = Instant::now();
        loop {
            let text = std::fs::read_to_string(record).unwrap_or_default();
            if text.contains(&wanted) {
                return;
            }
            assert!(begun.elapsed() < SOON, "{wanted} is not kept: {text}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn of(v4: bool, v6: bool, ended: usize) -> Ended {
    Ended {
        moved: Moved { v4, v6 },
        ended,
        refused: Vec::new(),
    }
}

/// Whether this kernel can end sockets at all; said aloud where it cannot.
fn kernel_can() -> bool {
    let port = echo("127.0.0.1:0");
    let stream = opened("127.0.0.1", port);
    let mut diag = Diag::open().unwrap();
    let own = stream.local_addr().unwrap();
    let listed = diag.sockets().unwrap();
    let listed = listed.iter().find(|listed| listed.socket.local == own).unwrap();
    match diag.destroy(listed) {
        Ok(there) => there && has_ended(&stream),
        Err(error) => {
            eprintln!("SKIPPED: this kernel ends no sockets (INET_DIAG_DESTROY): {error}");
            false
        }
    }
}

#[test]
fn only_connections_of_the_former_way_end() {
    if !common::inside("only_connections_of_the_former_way_end") {
        return;
    }
    network();
    if !kernel_can() {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(story());
}

async fn story() {
    let directory = tempfile::tempdir().unwrap();
    let record = directory.path().join("ways.json");
    let service = echo("[::]:0");
    let out = opened(FAR, service);
    let mapped = opened(&format!("::ffff:{FAR}"), service);
    let out6 = opened(FAR6, service);
    let begun = inet();
    let begun = TcpStream::from(begun);
    begun.set_nonblocking(true).unwrap();
    let silent = SockaddrIn::from(std::net::SocketAddrV4::new(SILENT.parse().unwrap(), 443));
    connect(begun.as_raw_fd(), &silent).unwrap_err(); // in progress
    begun.set_nonblocking(false).unwrap();
    begun.set_read_timeout(Some(SOON)).unwrap();
    let stay = [
        ("a sibling", opened(SIBLING, service)),
        ("the loopback", opened("127.0.0.1", service)),
        ("ourselves", opened(OWN, service)),
        ("the tunnel", opened_from(TAILNET, FAR, service)),
        ("others to us", opened_from(FAR, OWN, service)),
    ];
    let udp = UdpSocket::bind((OWN, 0)).unwrap();
    udp.connect((FAR, 9)).unwrap();
    let live = |more: &[(&str, &TcpStream)]| {
        for (what, stream) in stay
            .iter()
            .map(|(what, stream)| (*what, stream))
            .chain(more.iter().copied())
        {
            lives(stream).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    };

    // The first numbers are no move; the next of IPv4 ends what left by IPv4.
    let mut agent = Agent::start(&record);
    agent.tell(7, 7);
    Agent::kept(&record, 7, 7).await;
    live(&[("out", &out), ("out by IPv6", &out6)]);
    agent.tell(8, 7);
    assert_eq!(agent.ended().await, of(true, false, 3));
    for (what, stream) in [
        ("out", &out),
        ("of both families", &mapped),
        ("not answered", &begun),
    ] {
        assert!(has_ended(stream), "{what} goes on");
    }
    live(&[("out by IPv6", &out6)]);
    udp.send(b"x").unwrap();
    opened(FAR, service); // and everybody listens
    Agent::kept(&record, 8, 7).await;
    drop(agent);

    // Another agent goes on with what the last one heard: what moved meanwhile is seen, and nothing else.
    let again = opened(FAR, service);
    let mut agent = Agent::start(&record);
    agent.tell(8, 9);
    assert_eq!(agent.ended().await, of(false, true, 1));
    assert!(has_ended(&out6));
    live(&[("opened since", &again)]);
    Agent::kept(&record, 8, 9).await;
    drop(agent);
    let mut agent = Agent::start(&record);
    agent.tell(10, 10);
    assert_eq!(agent.ended().await, of(true, true, 1));
    assert!(has_ended(&again));
    live(&[]);
}
