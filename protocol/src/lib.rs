//! The contract between `sovereign`, the host agent and the guest agent.
//!
//! Owns: names, specs, conditions, the change feed, boot records, errors, limits,
//! the handshake, the codec and the tarpc traits. Never reads a clock, the
//! environment or a file; with feature `transport` it opens streams, and only
//! `transport/vsock.rs` can open an AF_VSOCK socket.

pub mod boot;
pub mod bulk;
pub mod codec;
pub mod condition;
pub mod domain;
pub mod event;
pub mod feed;
pub mod finding;
pub mod handshake;
pub mod inspection;
pub mod interface;
pub mod layers;
pub mod layout;
pub mod limits;
pub mod link_name;
pub mod mesh;
pub mod name;
pub mod one_or_more;
pub mod operation;
pub mod port;
pub mod record;
pub mod secret;
pub mod service;
pub mod spec;
pub mod status;
pub mod subnet;
#[cfg(feature = "transport")]
pub mod transport;
pub mod v1;
pub mod ways;
