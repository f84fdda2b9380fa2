//! The tarpc service `Guest` over the engine.

use std::time::Duration;

use futures::StreamExt;
use sovereign_protocol::codec;
use sovereign_protocol::limits::{IN_FLIGHT, WATCH_HOLD};
use sovereign_protocol::service::Guest;
use sovereign_protocol::transport::BoxStream;
use sovereign_protocol::v1::{
    Applied, Changes, ClockCorrection, Cursor, Document, Events, Ping, Pong, Refusal, Start,
};
use tarpc::context::Context;
use tarpc::server::{BaseChannel, Channel};

use crate::clock;
use crate::core::world::Event;
use crate::engine::Handle;

#[derive(Clone)]
struct Service(Handle);

/// Serves one connection to its end; requests still running then are dropped with it.
pub(super) async fn serve(stream: BoxStream, engine: Handle) {
    BaseChannel::with_defaults(codec::transport(stream))
        .max_concurrent_requests(IN_FLIGHT)
        .execute(Service(engine).serve())
        .for_each_concurrent(None, |response| response)
        .await;
}

impl Guest for Service {
    async fn apply(self, _: Context, spec: Document) -> Result<Applied, Refusal> {
        let applied = self.0.apply(spec.into_vec()).await;
        applied.map(|revision| Applied { revision })
    }

    async fn watch(self, _: Context, cursor: Option<Cursor>, hold_ms: u32) -> Changes {
        let hold = Duration::from_millis(hold_ms.into()).min(WATCH_HOLD);
        match self.0.watch(cursor.map(Into::into), hold).await {
            Ok(changes) => changes.into(),
            // The engine is gone and this process with it: there is nothing true to answer.
            Err(_) => std::future::pending().await,
        }
    }

    async fn events(self, _: Context, start: Start, hold_ms: u32) -> Events {
        let hold = Duration::from_millis(hold_ms.into()).min(WATCH_HOLD);
        match self.0.events(start.into(), hold).await {
            Ok(events) => events.into(),
            Err(_) => std::future::pending().await, // as in watch
        }
    }

    async fn correct_clock(self, _: Context, correction: ClockCorrection) -> Result<(), Refusal> {
        self.0
            .event(Event::Correction(correction))
            .await
            .map_err(|ended| Refusal::Failed(ended.to_string()))
    }

    async fn ping(self, _: Context, _: Ping) -> Pong {
        let received_ns = clock::wall_ns();
        Pong {
            guest_received_ns: received_ns,
            guest_sent_ns: clock::wall_ns(),
        }
    }

    async fn shutdown(self, _: Context) -> Result<(), Refusal> {
        self.0
            .event(Event::Shutdown)
            .await
            .map_err(|ended| Refusal::Failed(ended.to_string()))
    }
}
