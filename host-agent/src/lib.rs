//! The host agent: the only code that changes the host.
//!
//! `sovereign-host run` is the agent of one instance; `sovereign-host shim NAME` is the
//! parent of one guest's VMM and outlives the agent. Neither opens AF_VSOCK: the shim's
//! own vsock device is reached through a hybrid Unix socket.

pub mod clock;
pub mod control;
pub mod core;
mod document;
pub mod engine;
pub mod files;
pub mod forward;
pub mod guest;
pub mod inspect;
pub mod link;
pub mod listeners;
pub mod net;
pub mod netns;
pub mod offset;
pub mod port_owner;
pub mod process;
pub mod program;
pub mod resolver;
pub mod secrets;
pub mod shared_ports;
pub mod shim;
mod splice;
pub mod store;
pub mod timekeeper;
pub mod vsock;
