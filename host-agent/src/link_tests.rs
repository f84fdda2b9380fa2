//! A whole session with a guest that is played here: what goes over the wire to agents of different ages.

use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use sovereign_protocol::handshake::{BootKey, accept_knowing};
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::service::Guest;
use sovereign_protocol::spec::GuestSpec;
use sovereign_protocol::v1::{Applied, ClockCorrection, Ping, Pong, Refusal};
use sovereign_protocol::ways::{self, Ways};
use tarpc::server::{BaseChannel, Channel as _};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use super::*;

/// Longer than anything here takes on a machine that is busy.
const SOON: Duration = Duration::from_secs(30);

/// A guest agent that says yes to everything and keeps the documents that it was told, as they came.
#[derive(Clone, Default)]
struct Played(Arc<Mutex<Vec<Vec<u8>>>>);

impl Guest for Played {
    async fn apply(self, _: context::Context, spec: Document) -> Result<Applied, Refusal> {
        let document = spec.into_vec();
        let revision = GuestSpec::parse(&document).map_err(|error| Refusal::Invalid(error.to_string()))?;
        self.0.lock().unwrap().push(document);
        Ok(Applied {
            revision: revision.revision,
        })
    }

    async fn watch(self, _: context::Context, cursor: Option<v1::Cursor>, hold_ms: u32) -> v1::Changes {
        if cursor.is_some() && hold_ms > 0 {
            std::future::pending::<()>().await; // nothing ever changes
        }
        v1::Changes {
            cursor: v1::Cursor {
                incarnation: 1,
                revision: 1,
            },
            reset: cursor.is_none(),
            conditions: Vec::new(),
            removed: Vec::new(),
        }
    }

    async fn events(self, _: context::Context, _: v1::Start, _: u32) -> v1::Events {
        std::future::pending().await
    }

    async fn correct_clock(self, _: context::Context, _: ClockCorrection) -> Result<(), Refusal> {
        Ok(())
    }

    async fn ping(self, _: context::Context, ping: Ping) -> Pong {
        Pong {
            guest_received_ns: ping.host_sent_ns,
            guest_sent_ns: ping.host_sent_ns,
        }
    }

    async fn shutdown(self, _: context::Context) -> Result<(), Refusal> {
        Ok(())
    }
}

/// Takes sessions as an agent that understands `knows`, for as long as it is polled.
async fn serve_as(played: Played, listener: UnixListener, identity: Identity, knows: &[&str]) {
    let mut sessions = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        accept_knowing(&mut stream, &identity, knows).await.unwrap();
        let requests = BaseChannel::with_defaults(codec::transport(stream)).execute(played.clone().serve());
        sessions.spawn(requests.for_each_concurrent(None, |response| response));
    }
}

/// A document with all that an older agent refuses.
fn document() -> GuestSpec {
    let text = r#"{"version":1,"revision":3,"hostname":"sql","services":[],"secrets":{},
        "interface":{"addresses":["10.0.0.2/24","fd00::2/64"],"gateway":["10.0.0.1","fd00::1"],
        "search":["home.arpa"],"ways":{"v4":7,"v6":8}}}"#;
    GuestSpec::parse(text.as_bytes()).unwrap()
}

/// The bytes that a guest is told whose agent announced `knows`, in a session from the first dial on.
async fn told(directory: &Path, knows: &[&str]) -> Vec<u8> {
    let path = directory.join(format!("guest{}.sock", knows.len()));
    let listener = UnixListener::bind(&path).unwrap();
    let identity = Identity {
        boot_id: "b1".into(),
        key: BootKey::generate().unwrap(),
    };
    let edition = Edition {
        revision: 3,
        judged: 0,
    };
    let (_wanted, wanted) = watch::channel(Wanted {
        document: serde_json::to_vec(&document()).unwrap(),
        edition,
        mtu: Some(1400),
        shutdown: false,
        kill: false,
    });
    let (sender, mut events) = mpsc::channel(16);
    let (name, played) = (Name::parse("sql").unwrap(), Played::default());
    let target = Target {
        address: Address::Unix { path },
        identity: identity.clone(),
    };
    let applied = async {
        let mut seen = Vec::new();
        loop {
            match events.recv().await {
                Some(Event::SpecApplied(_, applied, mtu)) => return (applied, mtu),
                Some(Event::SpecRefused(_, why) | Event::SessionLost(_, why)) => panic!("{why}: {seen:?}"),
                other => seen.push(other),
            }
        }
    };
    let applied = tokio::select! {
        applied = tokio::time::timeout(SOON, applied) => applied.unwrap(),
        () = serve_as(played.clone(), listener, identity, knows) => unreachable!("it serves for ever"),
        () = keep(name, target, wanted, sender) => unreachable!("somebody hears it"),
    };
    assert_eq!(applied, (edition, Some(1400)));
    let documents = played.0.lock().unwrap().clone();
    assert_eq!(documents.len(), 1, "told once");
    documents.into_iter().next().unwrap()
}

#[tokio::test]
async fn a_guest_agent_of_before_is_sent_no_key_that_it_refuses() {
    let directory = tempfile::tempdir().unwrap();
    let now = told(directory.path(), &[ways::CAPABILITY]).await;
    assert_eq!(GuestSpec::parse(&now).unwrap(), document(), "all of it");
    for knows in [&[][..], &["other", "another"]] {
        let older = told(directory.path(), knows).await;
        let text = String::from_utf8_lossy(&older).into_owned();
        let strange = ["\"ways\"", "\"search\"", "[\"10.0.0.1\""].map(|key| text.contains(key));
        assert_eq!(strange, [false; 3], "{text}");
        let mut expected = document();
        let interface: &mut InterfaceSpec = expected.interface.as_mut().unwrap();
        interface.ways = Ways::default();
        interface.search.clear();
        interface.gateways = vec![IpAddr::from([10, 0, 0, 1])];
        assert_eq!(GuestSpec::parse(&older).unwrap(), expected, "all else is there");
    }
}
