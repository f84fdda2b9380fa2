//! The network of an instance: a bridge with a TAP for each guest, kept as wanted.
//!
//! `wanted` is computed from a spec, `observed` is folded from dumps and notifications, `plan`
//! is the sorted difference; all three are values of the crate `reconcile`, with which ctl makes
//! the same plan for `sovereign plan`. `apply` is thin, `reconcile` is the loop around them. What is made carries a mark (name
//! prefix and device group, address label), and only what carries it is ever changed.
//!
//! ```text
//!  NetworkSpec ──> Wanted ─┐
//!                          ├─> Plan ──> apply ──> the kernel ─┐
//!  dump, notifications ──> Observed <─────────────────────────┘ (looked at again: verify)
//! ```

mod apply;
pub mod card;
pub mod conntrack;
mod examine;
mod families;
mod filter;
mod forget;
pub mod former;
pub mod gap;
pub mod gc;
mod ground;
pub mod iptables;
pub mod kernel;
pub mod look;
mod network;
pub mod nft;
mod notify;
pub mod observed;
mod outside;
mod pace;
pub mod pasta;
mod reconcile;
mod report;
mod session;
mod switches;
mod taps;
pub(crate) mod tun;
mod wake;
mod ways;
mod work;

pub use examine::{ExamineError, Mode as RemoveMode, Removal, Stop};
pub use filter::{Choice as FilterChoice, UNFILTERED};
pub use ground::Ground;
pub use network::{Network, NetworkConfig};
pub use observed::Observed;
pub use report::NetworkEvent;
pub use sovereign_reconcile::plan::{Conflict, Part, Plan, Step, plan};
#[cfg(test)]
use sovereign_reconcile::simulated;
pub use sovereign_reconcile::wanted::{NetworkSpec, Place, Wanted};
pub use sovereign_reconcile::{names, plan, wanted};
pub use taps::TapError;

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
