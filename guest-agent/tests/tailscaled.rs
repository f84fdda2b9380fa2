//! The Tailscale condition against the real daemon, in namespaces without a way out.
//!
//! The daemon is `$SOVEREIGN_TAILNET_BIN/tailscaled`, else it is built once into `target/tmp/tailnet` with Go
//! (1.26.6 or newer, or one that may fetch it: `GOTOOLCHAIN=auto`). Without either the test says SKIPPED, and with
//! `SOVEREIGN_REQUIRE_TAILSCALED=1` that is a failure. The directory may also hold `tailscale` and `control` (the
//! control server of Tailscale's own tests); only with both is the way to Running walked.

#![allow(clippy::unwrap_used)] // all of this is a test

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sovereign_guest_agent::core::world::Event;
use sovereign_guest_agent::engine::Request;
use sovereign_guest_agent::net::loopback;
use sovereign_guest_agent::tailscale::{self, Places, backend_key};
use sovereign_protocol::condition::{Status, Verdict};
use tokio::process::{Child, Command as Spawn};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const PACKAGE: &str = "tailscale.com/cmd/tailscaled@v1.102.3";
/// The daemon needs a second or two, on a busy machine more.
const LIMIT: Duration = Duration::from_secs(60);
const AUTH_KEY: &str = "tskey-test";

/// The directory of the daemon, or why there is none.
fn binaries() -> Result<PathBuf, String> {
    if let Some(directory) = std::env::var_os("SOVEREIGN_TAILNET_BIN").map(PathBuf::from) {
        let there = directory.join("tailscaled").is_file();
        return there
            .then_some(directory)
            .ok_or("SOVEREIGN_TAILNET_BIN holds no tailscaled".to_owned());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("tailnet");
    if directory.join("tailscaled").is_file() {
        return Ok(directory);
    }
    let new = directory.with_extension(format!("new-{}", std::process::id()));
    eprintln!("building {PACKAGE}, once; this takes minutes");
    let built = Command::new("go")
        .args(["install", PACKAGE])
        .env("GOBIN", &new)
        .env("CGO_ENABLED", "0")
        .output();
    match built {
        Err(error) => Err(format!("go: {error}")),
        Ok(output) if !output.status.success() => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!(
                "go install {PACKAGE}: {}",
                said.lines().last().unwrap_or_default()
            ))
        }
        Ok(_) => {
            // Another test may have been quicker.
            let _ = std::fs::rename(&new, &directory);
            Ok(directory)
        }
    }
}

fn skipped(why: &str) {
    assert!(
        std::env::var_os("SOVEREIGN_REQUIRE_TAILSCALED").is_none(),
        "tailscaled is required here: {why}"
    );
    eprintln!("SKIPPED: the Tailscale condition against a real tailscaled: {why}");
}

/// A tailscaled that can reach nobody, and somebody who watches it.
struct Tailnet {
    binaries: PathBuf,
    directory: tempfile::TempDir,
    requests: mpsc::Receiver<Request>,
    _wanted: watch::Sender<bool>,
    told: Vec<Verdict>,
}

impl Tailnet {
    fn new(binaries: PathBuf) -> Self {
        loopback::raise().unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let places = Places {
            socket: directory.path().join("tailscaled.sock"),
            programs: vec![binaries.join("tailscaled")],
        };
        let (wanted, watched) = watch::channel(true);
        let (sender, requests) = mpsc::channel(64);
        tokio::spawn(tailscale::run(places, watched, sender));
        Self {
            binaries,
            directory,
            requests,
            _wanted: wanted,
            told: Vec::new(),
        }
    }

    fn start(&self, program: &str, args: &[&str]) -> Child {
        Spawn::new(self.binaries.join(program))
            .args(args)
            .current_dir(self.directory.path())
            .env_clear()
            .envs([
                ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
                ("TS_LOGS_DIR", "."),
                ("HOME", "."),
                ("TS_PANIC_IF_HIT_MAIN_CONTROL", "1"),
                ("TS_DISABLE_PORTMAPPER", "1"),
                ("TS_ASSUME_NETWORK_UP_FOR_TEST", "1"),
                ("TS_DEBUG_FIREWALL_MODE", "nftables"),
            ])
            .stdin(std::process::Stdio::null())
            .stdout(std::fs::File::create(self.directory.path().join(format!("{program}.log"))).unwrap())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    fn daemon(&self) -> Child {
        let args = [
            "--tun=userspace-networking",
            "--statedir=state",
            "--socket=tailscaled.sock",
        ];
        self.start(
            "tailscaled",
            &[args.as_slice(), &["--no-logs-no-support", "--port=0"]].concat(),
        )
    }

    /// Runs the command line of Tailscale to its end.
    async fn tailscale(&self, args: &[&str]) {
        let all = [&["--socket=tailscaled.sock"], args].concat();
        let status = timeout(LIMIT, self.start("tailscale", &all).wait())
            .await
            .unwrap()
            .unwrap();
        assert!(status.success(), "tailscale {args:?}: {status}");
    }

    async fn until(&mut self, reason: &str) -> Verdict {
        loop {
            let request = timeout(LIMIT, self.requests.recv()).await;
            let Ok(Some(Request::Event(Event::Seen(verdicts)))) = request else {
                panic!("{reason} was not seen: {:#?}", self.told)
            };
            let (key, backend) = verdicts.into_iter().next().unwrap();
            assert_eq!(key, backend_key());
            let backend = backend.unwrap();
            assert!(self.told.len() < 200, "{reason} was not seen: {:#?}", self.told);
            self.told.push(backend.clone());
            if backend.reason == reason {
                return backend;
            }
        }
    }
}

#[tokio::test]
async fn a_real_daemon_is_down_wants_a_log_in_and_is_down_again() {
    let binaries = match binaries() {
        Ok(binaries) => binaries,
        Err(why) => return skipped(&why),
    };
    if !common::inside("a_real_daemon_is_down_wants_a_log_in_and_is_down_again") {
        return;
    }
    let mut tailnet = Tailnet::new(binaries);
    assert_eq!(tailnet.until("DaemonDown").await.status, Status::False);
    let mut daemon = tailnet.daemon();
    let verdict = tailnet.until("NeedsLogin").await;
    assert_eq!(verdict.status, Status::False);
    assert!(verdict.evidence.contains("tailscaled 1."), "{verdict:?}");
    let known = ["DaemonDown", "NoState", "NeedsLogin"];
    assert!(
        tailnet.told.iter().all(|v| known.contains(&v.reason.as_str())),
        "{:#?}",
        tailnet.told
    );
    let pid = Pid::from_raw(i32::try_from(daemon.id().unwrap()).unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    daemon.wait().await.unwrap();
    assert_eq!(tailnet.until("DaemonDown").await.status, Status::False);
}

#[tokio::test]
async fn a_real_daemon_runs_after_a_log_in_and_is_stopped_and_silent() {
    let binaries = match binaries() {
        Ok(binaries) => binaries,
        Err(why) => return skipped(&why),
    };
    if !["tailscale", "control"]
        .iter()
        .all(|name| binaries.join(name).is_file())
    {
        let why = "no tailscale and control beside it";
        return eprintln!("SKIPPED: the Tailscale condition up to Running: {why}");
    }
    if !common::inside("a_real_daemon_runs_after_a_log_in_and_is_stopped_and_silent") {
        return;
    }
    let mut tailnet = Tailnet::new(binaries);
    let _control = tailnet.start("control", &["-ip", "127.0.0.1", "-authkey", AUTH_KEY]);
    let daemon = tailnet.daemon();
    tailnet.until("NeedsLogin").await;
    let server = "--login-server=http://127.0.0.1:9911";
    let key = format!("--authkey={AUTH_KEY}");
    tailnet
        .tailscale(&["up", server, &key, "--hostname=guest", "--accept-dns=false"])
        .await;
    let verdict = tailnet.until("Running").await;
    assert_eq!(verdict.status, Status::True);
    assert!(verdict.evidence.contains("runs as 100."), "{verdict:?}");

    tailnet.tailscale(&["down"]).await;
    assert_eq!(tailnet.until("Stopped").await.status, Status::False);

    let pid = Pid::from_raw(i32::try_from(daemon.id().unwrap()).unwrap());
    kill(pid, Signal::SIGSTOP).unwrap();
    assert_eq!(tailnet.until("Silent").await.status, Status::Unknown);
    kill(pid, Signal::SIGCONT).unwrap();
    tailnet.until("Stopped").await;
}
