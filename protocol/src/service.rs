//! The tarpc traits: specs go down, conditions come up.

#![allow(missing_docs)] // tarpc's macro generates undocumented items

use crate::v1::{Applied, Changes, ClockCorrection, Cursor, Document, Events, Ping, Pong, Refusal, Start};

/// What the guest agent serves to the host agent.
#[tarpc::service]
pub trait Guest {
    /// Replaces the wanted state with a [`crate::spec::GuestSpec`]: all of it, or a refusal and the old state.
    /// Returns when what runs has been changed, at the latest after 4 s; a change that fails later is told by a
    /// condition `NotApplied`. The first document has no old state and is answered at once.
    async fn apply(spec: Document) -> Result<Applied, Refusal>;
    /// What changed after the cursor, at once or when it happens, at the latest after `hold_ms`.
    async fn watch(cursor: Option<Cursor>, hold_ms: u32) -> Changes;
    /// What happened from `start` on, at once or when it happens, at the latest after `hold_ms`.
    async fn events(start: Start, hold_ms: u32) -> Events;
    /// Corrects the guest's clock by a measured offset.
    async fn correct_clock(correction: ClockCorrection) -> Result<(), Refusal>;
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
    /// The [`crate::spec::HostSpec`] that is wanted now; empty when nothing is.
    async fn wanted() -> Document;
    /// What changed after the cursor in guests' conditions; the subject is `guest/subject`.
    async fn watch(cursor: Option<Cursor>, hold_ms: u32) -> Changes;
    /// What happened in all guests, as [`Guest::events`]; the subject is `guest/subject`.
    async fn events(start: Start, hold_ms: u32) -> Events;
    /// A [`crate::status::StatusReport`].
    async fn status() -> Document;
    /// Stops all guests in order, then the agent; returns when that has begun.
    async fn stop() -> Result<(), Refusal>;
    /// What was last seen of the instance's network, as JSON: `sovereign_reconcile::view::NetworkView`.
    async fn network() -> Document;
    /// What others did to the network that harms guests, and where the kernel would send packets, looked at anew for this
    /// question, as JSON: `sovereign_reconcile::finding::FindingsView`.
    async fn findings() -> Result<Document, Refusal>;
    /// Removes leftovers of scripts by their names (a list, as JSON), or with `dry` says what that would be, as JSON:
    /// `sovereign_reconcile::finding::leftover::Removal`. All names must be there, or nothing is done.
    async fn remove_leftovers(names: Document, dry: bool) -> Result<Document, Refusal>;
}
