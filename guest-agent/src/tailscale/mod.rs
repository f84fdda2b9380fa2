//! Watches tailscaled by asking its LocalAPI, while the specification wants Tailscale. Changes nothing in it.
//!
//! `status` judges the answer.

pub mod status;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sovereign_protocol::condition::{Key, Layer};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::core::world::Event;
use crate::engine::Request;
use crate::{http, log};
use status::Answer;

/// An answer must be there within this time.
pub const ASK: Duration = Duration::from_secs(2);
/// Between questions while nothing is expected to change.
const STEADY: Duration = Duration::from_secs(5);
/// Between questions otherwise.
const SOON: Duration = Duration::from_secs(1);
/// What LocalAPI insists on as `Host`.
const HOST: &str = "local-tailscaled.sock";
/// Without the peers: a large tailnet has a large status.
const TARGET: &str = "/localapi/v0/status?peers=false";

/// Where the daemon is. Tests have their own.
#[derive(Debug, Clone)]
pub struct Places {
    /// Its socket.
    pub socket: PathBuf,
    /// Where its program may be; with none of them there is none to run.
    pub programs: Vec<PathBuf>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            socket: "/run/tailscale/tailscaled.sock".into(),
            programs: [
                "/usr/sbin/tailscaled",
                "/usr/bin/tailscaled",
                "/usr/local/bin/tailscaled",
            ]
            .map(PathBuf::from)
            .into(),
        }
    }
}

/// The condition of the daemon and its state.
#[must_use]
pub fn backend_key() -> Key {
    Key::new(Layer::Tailscale, "backend")
}

/// The condition of what the daemon warns of.
#[must_use]
pub fn health_key() -> Key {
    Key::new(Layer::Tailscale, "health")
}

/// Watches while `wanted`; ends when nobody listens or wants any more.
pub async fn run(places: Places, mut wanted: watch::Receiver<bool>, requests: mpsc::Sender<Request>) {
    loop {
        if !*wanted.borrow_and_update() {
            if wanted.changed().await.is_err() {
                return;
            }
            continue;
        }
        let (backend, health) = status::judge(&ask(&places).await);
        // An image does not get a daemon while it runs.
        let is_steady = ["Running", "NotConfigured"].contains(&backend.reason.as_str());
        let pause = if is_steady { STEADY } else { SOON };
        let verdicts = vec![(backend_key(), Some(backend)), (health_key(), health)];
        if requests
            .send(Request::Event(Event::Seen(verdicts)))
            .await
            .is_err()
        {
            return;
        }
        // Losing either arm is safe: a change is kept by the channel, a lost pause is an early question.
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(pause) => {}
        }
        if !*wanted.borrow() {
            let gone = vec![(backend_key(), None), (health_key(), None)];
            if requests.send(Request::Event(Event::Seen(gone))).await.is_err() {
                return;
            }
        }
    }
}

/// Asks once. Cancel safe.
pub async fn ask(places: &Places) -> Answer {
    let asked = async {
        let stream = match UnixStream::connect(&places.socket).await {
            Ok(stream) => stream,
            Err(error) => return unreachable_daemon(places, &error),
        };
        match http::get(stream, HOST, TARGET).await {
            Ok(http::Reply { status: 200, body }) => status::parse(&body),
            Ok(refused) => Answer::Refused(refused.status),
            Err(error) => Answer::Garbled(log::chain(&error)),
        }
    };
    match timeout(ASK, asked).await {
        Ok(answer) => answer,
        Err(_) => Answer::Silent(format!("tailscaled does not answer within {} s", ASK.as_secs())),
    }
}

fn unreachable_daemon(places: &Places, error: &io::Error) -> Answer {
    let socket = places.socket.display();
    let missing = error.kind() == io::ErrorKind::NotFound;
    if missing && !places.programs.iter().any(|program| program.exists()) {
        return Answer::NoProgram("tailscale is wanted and this image has no tailscaled".to_owned());
    }
    Answer::NobodyListens(format!("{socket}: {error}"))
}
