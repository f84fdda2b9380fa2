//! A network as values: what is wanted, what is there, and the sorted difference. Pure.
//!
//! The host agent observes, applies and verifies; ctl only prints the plan. Both make it here, of
//! the same two values, so what `sovereign plan` shows is what `sovereign up` does.

pub mod answers;
pub mod conflict;
pub mod family;
pub mod filter;
pub mod finding;
pub mod gain;
pub mod interface;
pub mod iptables;
pub mod leftovers;
pub mod names;
mod near;
pub mod nft;
pub mod observed;
pub mod plan;
pub mod resolver;
pub mod route;
pub mod rule;
#[cfg(any(test, feature = "simulated"))]
pub mod simulated;
pub mod sysctl;
pub mod uplink;
pub mod view;
pub mod wanted;
pub mod way;
