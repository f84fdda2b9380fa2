//! Wire structs of protocol version 1: frozen, and converted to the domain types with `From`.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::condition;
use crate::event;
use crate::feed;

/// A layer on the wire: its number is its place in this list, for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // as in the domain
pub enum Layer {
    Vmm,
    Session,
    Kernel,
    Clock,
    Disk,
    Loopback,
    Interface,
    Tap,
    Routing,
    Nat,
    Service,
    Tailscale,
    Forward,
}

/// Whether something holds, on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // as in the domain
pub enum Status {
    True,
    False,
    Unknown,
}

/// Both ways at once, so that a variant that one side lacks does not compile.
macro_rules! mirrored {
    ($name:ident: $($variant:ident),+) => {
        impl From<condition::$name> for $name {
            fn from(domain: condition::$name) -> Self {
                match domain { $(condition::$name::$variant => Self::$variant),+ }
            }
        }
        impl From<$name> for condition::$name {
            fn from(wire: $name) -> Self {
                match wire { $($name::$variant => Self::$variant),+ }
            }
        }
    };
}

mirrored!(Layer: Vmm, Session, Kernel, Clock, Disk, Loopback, Interface, Tap, Routing, Nat, Service, Tailscale, Forward);
mirrored!(Status: True, False, Unknown);

/// A place in a feed's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Of the feed.
    pub incarnation: u64,
    /// Last change seen.
    pub revision: u64,
}

/// A condition on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Index into the layers of version 1.
    pub layer: Layer,
    /// The subject in the layer.
    pub subject: String,
    /// Whether it holds.
    pub status: Status,
    /// Code for programs.
    pub reason: String,
    /// What was seen.
    pub evidence: String,
    /// Milliseconds since the observation.
    pub age_ms: u64,
    /// Milliseconds of validity.
    pub valid_ms: u64,
    /// Milliseconds since the status changed.
    pub since_ms: u64,
}

/// The answer to `watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changes {
    /// Where to go on.
    pub cursor: Cursor,
    /// Everything is listed.
    pub reset: bool,
    /// Changed conditions.
    pub conditions: Vec<Condition>,
    /// Removed subjects.
    pub removed: Vec<(Layer, String)>,
}

/// A document of versioned JSON, such as a GuestSpec: grows without a new wire version.
pub type Document = ByteBuf;

/// The answer to `apply`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The revision that is now wanted.
    pub revision: u64,
}

/// A refused request: the state is as before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The document is not valid.
    #[error("invalid: {0}")]
    Invalid(String),
    /// It conflicts with something else.
    #[error("conflict: {0}")]
    Conflict(String),
    /// It could not be kept or done.
    #[error("failed: {0}")]
    Failed(String),
}

/// A ping of the four-timestamp exchange, in nanoseconds of the sender's realtime clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// When the host sent it.
    pub host_sent_ns: i64,
}

/// The answer to a [`Ping`], in nanoseconds of the guest's realtime clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// When the guest had it.
    pub guest_received_ns: i64,
    /// When the guest answered.
    pub guest_sent_ns: i64,
}

/// A transition on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts the journal's events, from 1.
    pub seq: u64,
    /// Index into the layers of version 1.
    pub layer: Layer,
    /// The subject in the layer.
    pub subject: String,
    /// The status before.
    pub from: Option<Status>,
    /// Status, reason and evidence; `None` when the subject went away.
    pub to: Option<(Status, String, String)>,
    /// Milliseconds since it happened.
    pub age_ms: u64,
}

/// Where a reader of events begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// With the oldest event that is kept.
    Oldest,
    /// With the last so many.
    Last(u64),
    /// After what was read before.
    After(Cursor),
}

/// The answer to `events`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Where to go on.
    pub cursor: Cursor,
    /// The sender's wall clock when it counted the ages, in milliseconds since 1970.
    pub wall_ms: u64,
    /// Events that are no longer kept.
    pub lost: u64,
    /// In order.
    pub events: Vec<Event>,
}

/// What the guest's clock is to be corrected by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockCorrection {
    /// Guest minus host, in nanoseconds: the guest's clock is to go back by this.
    pub offset_ns: i64,
    /// The true offset is within this of `offset_ns`.
    pub bound_ns: i64,
    /// The host has just woken: a step back is expected.
    pub woke: bool,
}

impl From<event::Event> for Event {
    fn from(e: event::Event) -> Self {
        Self {
            seq: e.seq,
            layer: e.key.layer.into(),
            subject: e.key.subject,
            from: e.from.map(Into::into),
            to: e.to.map(|v| (v.status.into(), v.reason, v.evidence)),
            age_ms: e.age_ms,
        }
    }
}

impl From<Event> for event::Event {
    fn from(e: Event) -> Self {
        Self {
            seq: e.seq,
            key: condition::Key::new(e.layer.into(), e.subject),
            from: e.from.map(Into::into),
            to: e
                .to
                .map(|(status, reason, evidence)| condition::Verdict::new(status.into(), reason, evidence)),
            age_ms: e.age_ms,
        }
    }
}

impl From<event::Start> for Start {
    fn from(s: event::Start) -> Self {
        match s {
            event::Start::Oldest => Self::Oldest,
            event::Start::Last(count) => Self::Last(count),
            event::Start::After(cursor) => Self::After(cursor.into()),
        }
    }
}

impl From<Start> for event::Start {
    fn from(s: Start) -> Self {
        match s {
            Start::Oldest => Self::Oldest,
            Start::Last(count) => Self::Last(count),
            Start::After(cursor) => Self::After(cursor.into()),
        }
    }
}

impl From<event::Events> for Events {
    fn from(e: event::Events) -> Self {
        Self {
            cursor: e.cursor.into(),
            wall_ms: e.wall_ms,
            lost: e.lost,
            events: e.events.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Events> for event::Events {
    fn from(e: Events) -> Self {
        Self {
            cursor: e.cursor.into(),
            wall_ms: e.wall_ms,
            lost: e.lost,
            events: e.events.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<feed::Cursor> for Cursor {
    fn from(c: feed::Cursor) -> Self {
        Self {
            incarnation: c.incarnation,
            revision: c.revision,
        }
    }
}

impl From<Cursor> for feed::Cursor {
    fn from(c: Cursor) -> Self {
        Self {
            incarnation: c.incarnation,
            revision: c.revision,
        }
    }
}

impl From<condition::Condition> for Condition {
    fn from(c: condition::Condition) -> Self {
        Self {
            layer: c.key.layer.into(),
            subject: c.key.subject,
            status: c.verdict.status.into(),
            reason: c.verdict.reason,
            evidence: c.verdict.evidence,
            age_ms: c.age_ms,
            valid_ms: c.valid_ms,
            since_ms: c.since_ms,
        }
    }
}

impl From<Condition> for condition::Condition {
    fn from(c: Condition) -> Self {
        Self {
            key: condition::Key::new(c.layer.into(), c.subject),
            verdict: condition::Verdict::new(c.status.into(), c.reason, c.evidence),
            age_ms: c.age_ms,
            valid_ms: c.valid_ms,
            since_ms: c.since_ms,
        }
    }
}

impl From<feed::Changes> for Changes {
    fn from(c: feed::Changes) -> Self {
        Self {
            cursor: c.cursor.into(),
            reset: c.reset,
            conditions: c.conditions.into_iter().map(Into::into).collect(),
            removed: c
                .removed
                .into_iter()
                .map(|k| (k.layer.into(), k.subject))
                .collect(),
        }
    }
}

impl From<Changes> for feed::Changes {
    fn from(c: Changes) -> Self {
        Self {
            cursor: c.cursor.into(),
            reset: c.reset,
            conditions: c.conditions.into_iter().map(Into::into).collect(),
            removed: c
                .removed
                .into_iter()
                .map(|(l, s)| condition::Key::new(l.into(), s))
                .collect(),
        }
    }
}

#[cfg(test)]
mod golden;
