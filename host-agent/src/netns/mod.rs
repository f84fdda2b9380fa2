//! A private network namespace, made by a helper process and used from outside.
//!
//! `sovereign-host netns NAME` unshares (user namespace first where it is not root), sets `lo`
//! up and from then on only *opens* things in its namespace: netlink sockets, unattached tun
//! descriptors, `/proc/sys/net`. Each visit to its socket brings one fresh set, so a new agent
//! never meets half-read answers of the old one; there is no request protocol beside "a set"
//! and "end". The helper outlives the agent; should it die, the agent starts another in the
//! same namespace. It never changes anything on the machine, and nothing but `lo` inside.

mod contract;
#[cfg(test)]
pub(crate) mod fake;
mod helper;
mod make;
mod pass;
pub mod probe;
mod serve;

pub use contract::{Stage, StageFailure};
pub use helper::{Helper, HelperConfig, Namespaces, Set, VERB};
pub(crate) use helper::{remove_socket, take};
pub(crate) use make::{netfilter_socket, route_socket};
pub use probe::probe;
pub use serve::{Origin, run};
