//! tonic with its defaults over a Unix socket.

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

use crate::clock::wall_ns;

#[allow(missing_docs, unreachable_pub, clippy::all, unused_qualifications)] // generated
mod generated {
    tonic::include_proto!("bench.Guest");
}

use generated::guest_client::GuestClient;
use generated::guest_server::{Guest, GuestServer};

/// As in proto/guest.proto.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Ping {
    /// When the host sent it.
    #[prost(sfixed64, tag = "1")]
    pub(crate) host_sent_ns: i64,
}

/// As in proto/guest.proto.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Pong {
    /// When the guest had it.
    #[prost(sfixed64, tag = "1")]
    pub(crate) guest_received_ns: i64,
    /// When the guest answered.
    #[prost(sfixed64, tag = "2")]
    pub(crate) guest_sent_ns: i64,
}

struct Service;

#[tonic::async_trait]
impl Guest for Service {
    async fn ping(&self, _: Request<Ping>) -> Result<Response<Pong>, Status> {
        Ok(Response::new(Pong {
            guest_received_ns: wall_ns(),
            guest_sent_ns: wall_ns(),
        }))
    }
}

pub(super) async fn serve(socket: PathBuf) -> anyhow::Result<()> {
    let incoming = UnixListenerStream::new(UnixListener::bind(socket)?);
    Server::builder()
        .add_service(GuestServer::new(Service))
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

pub(super) async fn connect(socket: PathBuf) -> anyhow::Result<Client> {
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    // The name is never looked up: the connector above opens the stream.
    let endpoint = Endpoint::from_static("http://bench.invalid");
    let channel = endpoint.connect_with_connector(connector).await?;
    Ok(Client(GuestClient::new(channel)))
}

#[derive(Clone)]
pub(super) struct Client(GuestClient<Channel>);

impl super::Client for Client {
    async fn ping(&self, sent_ns: i64) -> anyhow::Result<(i64, i64)> {
        let mut client = self.0.clone(); // a handle; tonic's calls want it exclusively
        let pong = client
            .ping(Ping {
                host_sent_ns: sent_ns,
            })
            .await?
            .into_inner();
        Ok((pong.guest_received_ns, pong.guest_sent_ns))
    }
}
