//! The guest agent's own server behind its own handshake; the client as the host agent's link makes it.

use std::path::PathBuf;
use std::time::Duration;

use sovereign_guest_agent::core::world::World;
use sovereign_guest_agent::facts::BootFacts;
use sovereign_guest_agent::server::Server;
use sovereign_protocol::codec;
use sovereign_protocol::feed::Feed;
use sovereign_protocol::handshake::{self, BootKey, Channel, Identity};
use sovereign_protocol::limits::{CALL, CALL_GRACE, GUEST_EVENTS};
use sovereign_protocol::service::GuestClient;
use sovereign_protocol::transport::{self, Address, BoxStream, bind_unix};
use sovereign_protocol::v1::Ping;
use tarpc::{client, context};

/// The identity that both ends of a measured link share; the probe in a guest has the same.
pub(crate) fn identity() -> Identity {
    Identity {
        boot_id: "bench".to_owned(),
        key: BootKey::none(),
    }
}

/// The guest agent's server on a Unix socket.
pub(super) async fn serve(socket: PathBuf) -> anyhow::Result<()> {
    let (_engine, handle) =
        sovereign_guest_agent::engine::new(World::new(Feed::new(1, GUEST_EVENTS), BootFacts::default()));
    Server::new(identity(), handle).run(bind_unix(&socket)?).await;
    Ok(())
}

/// A client of that server.
pub(super) async fn connect(socket: PathBuf) -> anyhow::Result<Ours> {
    Ours::over(transport::dial(&Address::Unix { path: socket }).await?).await
}

/// The link of the host agent.
#[derive(Debug, Clone)]
pub(crate) struct Ours(GuestClient);

impl Ours {
    /// Runs the handshake on an open stream.
    pub(crate) async fn over(mut stream: BoxStream) -> anyhow::Result<Self> {
        handshake::dial(&mut stream, &identity(), Channel::Guest).await?;
        let transport = codec::transport(stream);
        Ok(Self(
            GuestClient::new(client::Config::default(), transport).spawn(),
        ))
    }
}

impl super::Client for Ours {
    /// With the deadline and the outer timeout that every call of the product has.
    async fn ping(&self, sent_ns: i64) -> anyhow::Result<(i64, i64)> {
        let mut context = context::current();
        context.deadline = std::time::Instant::now() + CALL;
        let limit: Duration = CALL + CALL_GRACE;
        let call = self.0.ping(
            context,
            Ping {
                host_sent_ns: sent_ns,
            },
        );
        let pong = tokio::time::timeout(limit, call).await??;
        Ok((pong.guest_received_ns, pong.guest_sent_ns))
    }
}
