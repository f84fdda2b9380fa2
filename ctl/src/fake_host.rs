//! For tests: a host agent that keeps what it is asked for, and says of each forward what the test wants.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::StreamExt;
use sovereign_protocol::codec;
use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::handshake;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::service::Host;
use sovereign_protocol::spec::HostSpec;
use sovereign_protocol::status::StatusReport;
use sovereign_protocol::transport::bind_unix;
use sovereign_protocol::v1::{Applied, Changes, Cursor, Document, Events, Refusal, Start};
use sovereign_reconcile::finding::FindingsView;
use sovereign_reconcile::finding::leftover::Removal;
use sovereign_reconcile::view::{NetworkMode, NetworkView};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};

use crate::picture::examples;

/// What it knows.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// What is wanted.
    pub(crate) spec: Option<HostSpec>,
    /// How often something was applied.
    pub(crate) applied: u64,
    /// A port that somebody else has.
    pub(crate) foreign: Option<u16>,
    /// The kernel makes no forward.
    pub(crate) untranslated: bool,
    /// It was told to stop all guests and end.
    pub(crate) stopped: bool,
    /// What scripts left.
    pub(crate) leftovers: BTreeSet<String>,
    /// Why there is no network.
    pub(crate) no_network: Option<String>,
}

/// The agent; its task ends with the test's runtime.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeHost {
    state: Arc<Mutex<State>>,
}

impl FakeHost {
    /// Listens at the control socket of a layout.
    pub(crate) fn start(layout: &Layout, spec: HostSpec) -> Self {
        let host = Self::start_empty(layout);
        host.state().spec = Some(spec);
        host
    }

    /// The same with nothing wanted.
    pub(crate) fn start_empty(layout: &Layout) -> Self {
        let host = Self::default();
        let listener = bind_unix(&layout.control()).expect("a socket in the test's directory");
        let (server, identity) = (host.clone(), layout.control_identity());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                if handshake::accept(&mut stream, &identity).await.is_err() {
                    continue;
                }
                let channel = BaseChannel::with_defaults(codec::transport(stream));
                let served = channel.execute(server.clone().serve());
                tokio::spawn(served.for_each(|response| async {
                    tokio::spawn(response);
                }));
            }
        });
        host
    }

    /// Its knowledge, to look at and to change.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }
}

impl Host for FakeHost {
    async fn apply(self, _: Context, spec: Document) -> Result<Applied, Refusal> {
        let spec = HostSpec::parse(&spec).map_err(|error| Refusal::Invalid(error.to_string()))?;
        let mut state = self.state();
        state.spec = Some(spec);
        state.applied += 1;
        Ok(Applied {
            revision: state.applied,
        })
    }

    async fn wanted(self, _: Context) -> Document {
        let spec = self.state().spec.as_ref().map(serde_json::to_vec);
        Document::from(spec.and_then(Result::ok).unwrap_or_default())
    }

    async fn watch(self, _: Context, _: Option<Cursor>, _: u32) -> Changes {
        Changes {
            cursor: Cursor {
                incarnation: 1,
                revision: 1,
            },
            reset: false,
            conditions: Vec::new(),
            removed: Vec::new(),
        }
    }

    async fn events(self, _: Context, _: Start, _: u32) -> Events {
        Events {
            cursor: Cursor {
                incarnation: 1,
                revision: 1,
            },
            wall_ms: 0,
            lost: 0,
            events: Vec::new(),
        }
    }

    async fn status(self, _: Context) -> Document {
        Document::from(serde_json::to_vec(&report(&self.state())).unwrap_or_default())
    }

    async fn stop(self, _: Context) -> Result<(), Refusal> {
        self.state().stopped = true;
        Ok(())
    }

    async fn findings(self, _: Context) -> Result<Document, Refusal> {
        let view = FindingsView::default();
        Ok(Document::from(serde_json::to_vec(&view).unwrap_or_default()))
    }

    async fn remove_leftovers(self, _: Context, names: Document, dry: bool) -> Result<Document, Refusal> {
        let names: Vec<String> = serde_json::from_slice(&names).unwrap_or_default();
        let mut state = self.state();
        if let Some(name) = names.iter().find(|name| !state.leftovers.contains(*name)) {
            let there = &state.leftovers;
            let said = format!("there is no leftover {name:?} here; there is {there:?}");
            return Err(Refusal::Conflict(said));
        }
        if !dry {
            state.leftovers.retain(|name| !names.contains(name));
        }
        let removal = Removal {
            removed: names,
            failed: Vec::new(),
        };
        Ok(Document::from(serde_json::to_vec(&removal).unwrap_or_default()))
    }

    async fn network(self, _: Context) -> Document {
        let state = self.state();
        let view = NetworkView {
            mode: match &state.no_network {
                Some(why) => NetworkMode::Off(why.clone()),
                None => NetworkMode::Private,
            },
            observed: Default::default(),
            cards: Default::default(),
        };
        Document::from(serde_json::to_vec(&view).unwrap_or_default())
    }
}

fn report(state: &State) -> StatusReport {
    let guests = state.spec.iter().flat_map(|spec| &spec.guests);
    let guests = guests.map(|(name, config)| {
        let mut guest = examples::guest();
        guest.name = name.clone();
        let forwards = config.forwards.iter();
        guest.conditions = forwards
            .map(|forward| {
                let translated = forward.translated.is_some();
                let (status, reason) = match state.foreign == Some(forward.listen.port()) {
                    true => (Status::False, "PortUnavailable"),
                    false if translated && state.untranslated => (Status::False, "NotTranslated"),
                    false if translated => (Status::True, "Translated"),
                    false => (Status::True, "Listening"),
                };
                let mut condition = examples::condition(Layer::Forward, status, reason);
                condition.subject = forward.name.to_string();
                condition
            })
            .collect();
        guest
    });
    examples::report(guests.collect())
}
