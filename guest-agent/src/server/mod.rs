//! The agent's listener: handshake, then tarpc or a bulk stream. The transport does not matter here.

mod bulk;
mod rpc;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use sovereign_protocol::handshake::{self, Channel, Identity};
use sovereign_protocol::limits::{BULK_STREAMS, UNAUTHENTICATED};
use sovereign_protocol::transport::{BoxStream, vsock};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::engine::Handle;
use crate::log;

/// RPC connections at once; the host needs two.
const RPC_CONNECTIONS: usize = 32;
/// Between tries to bind or accept when the system refuses.
const PAUSE: Duration = Duration::from_secs(1);

/// A source of streams from the host.
pub trait Accept {
    /// The next stream. Cancel safe.
    fn next(&mut self) -> impl Future<Output = io::Result<BoxStream>> + Send;
}

impl Accept for vsock::Listener {
    async fn next(&mut self) -> io::Result<BoxStream> {
        Ok(Box::new(self.accept().await?))
    }
}

impl Accept for tokio::net::UnixListener {
    async fn next(&mut self) -> io::Result<BoxStream> {
        Ok(Box::new(self.accept().await?.0))
    }
}

/// What every connection shares.
#[derive(Debug, Clone)]
pub struct Server {
    identity: Arc<Identity>,
    engine: Handle,
    unauthenticated: Arc<Semaphore>,
    rpc: Arc<Semaphore>,
    bulk: Arc<Semaphore>,
    commands: Arc<bulk::Commands>,
}

impl Server {
    /// A server for peers that hold the identity's key.
    #[must_use]
    pub fn new(identity: Identity, engine: Handle) -> Self {
        Self {
            identity: Arc::new(identity),
            engine,
            unauthenticated: Arc::new(Semaphore::new(UNAUTHENTICATED)),
            rpc: Arc::new(Semaphore::new(RPC_CONNECTIONS)),
            bulk: Arc::new(Semaphore::new(BULK_STREAMS)),
            commands: Arc::default(),
        }
    }

    /// Binds the guest's vsock port, again and again until it works, and serves it.
    pub async fn run_vsock(self, port: u32) {
        let mut told = None;
        loop {
            match vsock::Listener::bind(port) {
                Ok(listener) => {
                    log::line("listening", &[("vsock", &port)]);
                    return self.run(listener).await;
                }
                Err(error) if told != Some(error.kind()) => {
                    told = Some(error.kind());
                    log::line(
                        "cannot listen, trying again",
                        &[("vsock", &port), ("error", &error)],
                    );
                }
                Err(_) => {}
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Serves a listener for ever; all its connections end with this future.
    pub async fn run(self, mut listener: impl Accept) {
        let mut connections = JoinSet::new();
        loop {
            // Losing either arm is safe: both are cancel safe and only return an event.
            tokio::select! {
                stream = listener.next() => match stream {
                    Ok(stream) => {
                        let server = self.clone();
                        connections.spawn(async move { server.serve(stream).await });
                    }
                    Err(error) => {
                        log::line("cannot accept", &[("error", &error)]);
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                Some(_) = connections.join_next() => {}
            }
        }
    }

    /// Serves one stream to its end.
    pub async fn serve(self, mut stream: BoxStream) {
        // Over the limit the newest stranger is sent away: the older ones have 2 s at most.
        let Ok(stranger) = self.unauthenticated.clone().try_acquire_owned() else {
            return;
        };
        let session = match handshake::accept(&mut stream, &self.identity).await {
            Ok(session) => session,
            Err(error) => return log::line("a handshake failed", &[("error", &log::chain(&error))]),
        };
        drop(stranger);
        match session.channel {
            Channel::Guest => {
                let Ok(_place) = self.rpc.clone().try_acquire_owned() else {
                    return log::line("too many RPC connections", &[("limit", &RPC_CONNECTIONS)]);
                };
                rpc::serve(stream, self.engine.clone()).await;
            }
            Channel::Bulk => bulk::serve(stream, &self.bulk, &self.commands).await,
            Channel::Control => log::line(
                "a peer asked for the control channel, which is the host agent's",
                &[],
            ),
        }
    }
}

#[cfg(test)]
mod tests;
