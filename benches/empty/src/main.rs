//! The least that tarpc on tokio costs: one service with one method that does nothing, idle until it is ended.
//!
//! It answers one call in memory, so that client, server and codec are linked, and then waits as an agent would.

#![allow(missing_docs)] // tarpc's macro generates undocumented items

use futures::StreamExt;
use tarpc::server::{BaseChannel, Channel};
use tarpc::{client, context};

#[tarpc::service]
trait Nothing {
    async fn nothing();
}

#[derive(Clone)]
struct Service;

impl Nothing for Service {
    async fn nothing(self, _: context::Context) {}
}

fn main() -> std::io::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(idle())
}

async fn idle() -> std::io::Result<()> {
    let (near, far) = tarpc::transport::channel::bounded(1);
    let server = BaseChannel::with_defaults(far).execute(Service.serve());
    tokio::spawn(server.for_each_concurrent(None, |response| response));
    let client = NothingClient::new(client::Config::default(), near).spawn();
    client
        .nothing(context::current())
        .await
        .map_err(std::io::Error::other)?;
    println!("idle");
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?
        .recv()
        .await;
    Ok(())
}
