//! The control socket: tarpc for ctl, and bulk streams through to guests.

use std::io;
use std::time::Duration;

use futures::StreamExt;
use serde::Serialize;
use sovereign_protocol::bulk::{self, Answer, Open};
use sovereign_protocol::codec;
use sovereign_protocol::event::{Events, Start};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::handshake::{self, Channel};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::{BULK_OPEN, IN_FLIGHT, UNAUTHENTICATED, WATCH_HOLD};
use sovereign_protocol::service::Host;
use sovereign_protocol::v1::{self, Applied, Document, Refusal};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::engine::{Request, stopping};
use crate::net::RemoveMode;
use crate::{forward, splice};

/// Where feed and journal stand.
type News = (Cursor, Cursor);

/// Serves ctl until it is dropped.
pub async fn serve(
    listener: UnixListener,
    layout: Layout,
    requests: mpsc::Sender<Request>,
    news: watch::Receiver<News>,
) {
    let ours = rustix::process::geteuid().as_raw();
    let mut clients = JoinSet::new();
    loop {
        // Both arms are cancel safe.
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let allowed = stream.peer_cred().is_ok_and(|peer| peer.uid() == ours || peer.uid() == 0);
                    if allowed && clients.len() < UNAUTHENTICATED {
                        clients.spawn(client(stream, layout.clone(), requests.clone(), news.clone()));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the control socket cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

async fn client(
    mut stream: UnixStream,
    layout: Layout,
    requests: mpsc::Sender<Request>,
    news: watch::Receiver<News>,
) {
    let Ok(session) = handshake::accept(&mut stream, &layout.control_identity()).await else {
        return;
    };
    match session.channel {
        Channel::Control => rpc(stream, Server { requests, news }).await,
        Channel::Bulk => {
            let _ = lead(stream, &requests).await; // ctl sees the end of its stream
        }
        Channel::Guest => {}
    }
}

async fn rpc(stream: UnixStream, server: Server) {
    let channel = BaseChannel::with_defaults(codec::transport(stream)).max_concurrent_requests(IN_FLIGHT);
    channel
        .execute(server.serve())
        .for_each(|response| async {
            tokio::spawn(response);
        })
        .await;
}

/// Leads a bulk stream of ctl to a guest, byte for byte.
async fn lead(mut stream: UnixStream, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let opened = match tokio::time::timeout(BULK_OPEN, bulk::read_message(&mut stream)).await?? {
        Open::Guest { guest, open } => {
            let target = ask(requests, |reply| Request::Target(guest.clone(), reply))
                .await
                .flatten();
            match target {
                Some(target) => tokio::time::timeout(BULK_OPEN, forward::open(&target, &open)).await?,
                None => Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("guest {guest} does not run"),
                )),
            }
        }
        Open::Tcp { .. } | Open::Exec { .. } => Err(io::ErrorKind::Unsupported.into()),
    };
    match opened {
        Ok(guest) => {
            bulk::write_message(&mut stream, &Answer::Opened).await?;
            splice::splice(stream, guest).await
        }
        Err(error) => {
            let reason = error.to_string();
            bulk::write_message(&mut stream, &Answer::Refused { reason }).await
        }
    }
}

#[derive(Clone)]
struct Server {
    requests: mpsc::Sender<Request>,
    news: watch::Receiver<News>,
}

impl Host for Server {
    async fn apply(self, _: Context, spec: Document) -> Result<Applied, Refusal> {
        ask(&self.requests, |reply| Request::Apply(spec.into_vec(), reply))
            .await
            .unwrap_or_else(|| Err(stopping()))
    }

    async fn wanted(self, _: Context) -> Document {
        Document::from(ask(&self.requests, Request::Wanted).await.unwrap_or_default())
    }

    async fn watch(mut self, _: Context, cursor: Option<v1::Cursor>, hold_ms: u32) -> v1::Changes {
        let after = cursor.map(Cursor::from);
        let changes = self
            .held(hold_ms, |reply| Request::Changes(after, reply), Changes::is_empty)
            .await;
        changes.unwrap_or_else(|| self.no_changes()).into()
    }

    async fn events(mut self, _: Context, start: v1::Start, hold_ms: u32) -> v1::Events {
        let start = Start::from(start);
        // Only who knows a place in the journal waits for what comes after it.
        let waits = matches!(start, Start::After(_));
        let events = self
            .held(
                hold_ms,
                |reply| Request::Events(start, reply),
                |e| waits && e.events.is_empty(),
            )
            .await;
        events.unwrap_or_else(|| self.no_events()).into()
    }

    async fn status(self, _: Context) -> Document {
        document(ask(&self.requests, Request::Status).await)
    }

    async fn network(self, _: Context) -> Document {
        document(ask(&self.requests, Request::Network).await)
    }

    async fn findings(self, _: Context) -> Result<Document, Refusal> {
        let view = ask(&self.requests, Request::Findings)
            .await
            .ok_or_else(stopping)??;
        Ok(document(Some(view)))
    }

    async fn remove_leftovers(self, _: Context, names: Document, dry: bool) -> Result<Document, Refusal> {
        let names: Vec<String> =
            serde_json::from_slice(&names).map_err(|error| Refusal::Invalid(error.to_string()))?;
        let mode = if dry { RemoveMode::Dry } else { RemoveMode::Remove };
        let removed = ask(&self.requests, |reply| {
            Request::RemoveLeftovers(names, mode, reply)
        })
        .await;
        Ok(document(Some(removed.ok_or_else(stopping)??)))
    }

    async fn stop(self, _: Context) -> Result<(), Refusal> {
        self.requests.send(Request::Stop).await.map_err(|_| stopping())
    }
}

impl Server {
    /// Asks until the answer says something or the hold is over; `None` when the engine has ended.
    async fn held<T>(
        &mut self,
        hold_ms: u32,
        request: impl Fn(oneshot::Sender<T>) -> Request,
        is_empty: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let deadline = Instant::now() + Duration::from_millis(hold_ms.into()).min(WATCH_HOLD);
        loop {
            self.news.mark_unchanged(); // before the look: what comes later wakes the wait
            let answer = ask(&self.requests, &request).await?;
            if !is_empty(&answer) {
                return Some(answer);
            }
            match tokio::time::timeout_at(deadline, self.news.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Some(answer),
            }
        }
    }

    fn no_changes(&self) -> Changes {
        Changes {
            cursor: self.news.borrow().0,
            reset: false,
            conditions: Vec::new(),
            removed: Vec::new(),
        }
    }

    fn no_events(&self) -> Events {
        Events {
            cursor: self.news.borrow().1,
            wall_ms: 0,
            lost: 0,
            events: Vec::new(),
        }
    }
}

/// An answer as a document; empty when the engine has ended.
fn document(answer: Option<impl Serialize>) -> Document {
    let bytes = answer.and_then(|answer| serde_json::to_vec(&answer).ok());
    Document::from(bytes.unwrap_or_default())
}

/// Asks the engine; `None` when it has ended.
async fn ask<T>(
    requests: &mpsc::Sender<Request>,
    request: impl FnOnce(oneshot::Sender<T>) -> Request,
) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    requests.send(request(reply)).await.ok()?;
    answer.await.ok()
}
