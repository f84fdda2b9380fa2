//! The control socket: tarpc for ctl, and bulk streams through to guests.

use std::io;

use futures::StreamExt;
use sovereign_protocol::bulk::{self, Answer, Open};
use sovereign_protocol::codec;
use sovereign_protocol::feed::Cursor;
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

use crate::engine::Request;
use crate::forward;

/// Serves ctl until it is dropped.
pub async fn serve(
    listener: UnixListener,
    layout: Layout,
    requests: mpsc::Sender<Request>,
    cursor: watch::Receiver<Cursor>,
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
                        clients.spawn(client(stream, layout.clone(), requests.clone(), cursor.clone()));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the control socket cannot accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
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
    cursor: watch::Receiver<Cursor>,
) {
    let Ok(session) = handshake::accept(&mut stream, &layout.control_identity()).await else {
        return;
    };
    match session.channel {
        Channel::Control => rpc(stream, Server { requests, cursor }).await,
        Channel::Bulk => {
            let _ = splice(stream, &requests).await; // ctl sees the end of its stream
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
async fn splice(mut stream: UnixStream, requests: &mpsc::Sender<Request>) -> io::Result<()> {
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
        Ok(mut guest) => {
            bulk::write_message(&mut stream, &Answer::Opened).await?;
            tokio::io::copy_bidirectional(&mut stream, &mut guest)
                .await
                .map(drop)
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
    cursor: watch::Receiver<Cursor>,
}

impl Host for Server {
    async fn apply(self, _: Context, spec: Document) -> Result<Applied, Refusal> {
        ask(&self.requests, |reply| Request::Apply(spec.into_vec(), reply))
            .await
            .unwrap_or_else(|| Err(stopping()))
    }

    async fn watch(mut self, _: Context, cursor: Option<v1::Cursor>, hold_ms: u32) -> v1::Changes {
        let hold = std::time::Duration::from_millis(hold_ms.into()).min(WATCH_HOLD);
        let after = cursor.map(Cursor::from);
        self.cursor.mark_unchanged();
        let changed = ask(&self.requests, |reply| Request::Changes(after, reply)).await;
        let changes = match changed {
            Some(changes) if changes.is_empty() => {
                let _ = tokio::time::timeout(hold, self.cursor.changed()).await; // at the latest after hold
                ask(&self.requests, |reply| Request::Changes(after, reply)).await
            }
            other => other,
        };
        changes.unwrap_or_else(|| self.nothing()).into()
    }

    async fn status(self, _: Context) -> Document {
        let report = ask(&self.requests, Request::Status).await;
        let bytes = report.and_then(|report| serde_json::to_vec(&report).ok());
        Document::from(bytes.unwrap_or_default())
    }

    async fn stop(self, _: Context) -> Result<(), Refusal> {
        self.requests.send(Request::Stop).await.map_err(|_| stopping())
    }
}

impl Server {
    fn nothing(&self) -> sovereign_protocol::feed::Changes {
        sovereign_protocol::feed::Changes {
            cursor: *self.cursor.borrow(),
            reset: false,
            conditions: Vec::new(),
            removed: Vec::new(),
        }
    }
}

fn stopping() -> Refusal {
    Refusal::Conflict("the host agent is stopping".to_owned())
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
