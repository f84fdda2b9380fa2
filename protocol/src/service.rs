//! The tarpc traits: specs go down, conditions come up.

#![allow(missing_docs)] // tarpc's macro generates undocumented items

use crate::v1::{Applied, Changes, Cursor, Document, Ping, Pong, Refusal};

/// What the guest agent serves to the host agent.
#[tarpc::service]
pub trait Guest {
    /// Replaces the wanted state with a [`crate::spec::GuestSpec`]; returns after validation, not after convergence.
    async fn apply(spec: Document) -> Result<Applied, Refusal>;
    /// What changed after the cursor, at once or when it happens, at the latest after `hold_ms`.
    async fn watch(cursor: Option<Cursor>, hold_ms: u32) -> Changes;
    /// One exchange for liveness and clock.
    async fn ping(ping: Ping) -> Pong;
    /// Stops services in order, syncs and powers off; returns when that has begun.
    async fn shutdown() -> Result<(), Refusal>;
}

/// What the host agent serves to ctl.
#[tarpc::service]
pub trait Host {
    /// Replaces the wanted state with a [`crate::spec::HostSpec`].
    async fn apply(spec: Document) -> Result<Applied, Refusal>;
    /// What changed after the cursor in guests' conditions; the subject is `guest/subject`.
    async fn watch(cursor: Option<Cursor>, hold_ms: u32) -> Changes;
    /// A [`crate::status::StatusReport`].
    async fn status() -> Document;
    /// Stops all guests in order, then the agent; returns when that has begun.
    async fn stop() -> Result<(), Refusal>;
}
