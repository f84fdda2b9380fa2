//! The network of an instance: a bridge with a TAP for each guest, kept as wanted.
//!
//! `wanted` is computed from a spec, `observed` is folded from dumps and notifications, `plan`
//! is the sorted difference; all three are values, and `plan` prints as `sovereign plan` shows
//! it. `apply` is thin, `reconcile` is the loop around them. What is made carries a mark (name
//! prefix and device group, address label), and only what carries it is ever changed.
//!
//! ```text
//!  NetworkSpec ──> Wanted ─┐
//!                          ├─> Plan ──> apply ──> the kernel ─┐
//!  dump, notifications ──> Observed <─────────────────────────┘ (looked at again: verify)
//! ```

mod apply;
pub mod card;
pub mod kernel;
pub mod names;
mod network;
mod notify;
pub mod observed;
mod pace;
pub mod plan;
mod reconcile;
mod report;
mod session;
#[cfg(test)]
mod simulated;
mod taps;
pub(crate) mod tun;
pub mod wanted;

pub use network::{Network, NetworkConfig};
pub use observed::Observed;
pub use plan::{Plan, Step, plan};
pub use report::NetworkEvent;
pub use taps::TapError;
pub use wanted::{NetworkSpec, Wanted};
