//! ttrpc's asynchronous stack with its defaults over a Unix socket.

use std::path::PathBuf;
use std::sync::Arc;

use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::context;

use crate::clock::wall_ns;

#[allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    unused,
    clippy::all,
    clippy::unwrap_used
)] // generated
mod generated {
    include!(concat!(env!("OUT_DIR"), "/peers.rs"));
}

use generated::guest::{Ping, Pong};
use generated::guest_ttrpc::{Guest, GuestClient, create_guest};

struct Service;

#[async_trait::async_trait]
impl Guest for Service {
    async fn ping(&self, _: &TtrpcContext, _: Ping) -> ttrpc::Result<Pong> {
        Ok(Pong {
            guest_received_ns: wall_ns(),
            guest_sent_ns: wall_ns(),
            ..Pong::default()
        })
    }
}

pub(super) async fn serve(socket: PathBuf) -> anyhow::Result<()> {
    let mut server = Server::new()
        .bind(&format!("unix://{}", socket.display()))?
        .register_service(create_guest(Arc::new(Service)));
    server.start().await?;
    std::future::pending().await
}

pub(super) async fn connect(socket: PathBuf) -> anyhow::Result<Client> {
    let client = ttrpc::r#async::Client::connect(&format!("unix://{}", socket.display())).await?;
    Ok(Client(GuestClient::new(client)))
}

#[derive(Clone)]
pub(super) struct Client(GuestClient);

impl super::Client for Client {
    async fn ping(&self, sent_ns: i64) -> anyhow::Result<(i64, i64)> {
        let ping = Ping {
            host_sent_ns: sent_ns,
            ..Ping::default()
        };
        let pong = self.0.ping(context::with_timeout(5_000_000_000), &ping).await?;
        Ok((pong.guest_received_ns, pong.guest_sent_ns))
    }
}
