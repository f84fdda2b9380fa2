//! The inside of a guest: PID 1 and the agent that keeps its services true.
//!
//! `init` is PID 1 (synchronous, one thread, parses only `boot.json`); `server`, `engine`
//! and the adapters are the agent; `core` decides and touches nothing. The two binaries
//! meet in `handover` (one socket) and `facts` (one file). The only code that changes a guest.

pub mod cgroup;
pub mod clock;
pub mod contract;
pub mod core;
pub mod engine;
pub mod exits;
pub mod facts;
pub mod handover;
pub mod http;
pub mod init;
pub mod log;
pub mod miniflux;
pub mod net;
pub mod observe;
pub mod places;
pub mod postgres;
pub mod process;
pub mod server;
pub mod spawn;
pub mod tailscale;
pub mod users;
