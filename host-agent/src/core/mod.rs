//! What the agent decides, without a clock, a file or a task.
//!
//! [`World::step`] takes an event and the time and says what to do; [`World::report`] says
//! what is true. Nothing here waits, sleeps or fails.

mod allowance;
mod backoff;
mod event;
mod mesh;
mod network;
mod observe;
mod report;
mod surroundings;
mod translations;
mod wedge;
mod world;

pub use allowance::Allowance;
pub use backoff::{Backoff, Next};
pub use event::{Edition, Effect, Event};
pub use mesh::Ties;
pub(crate) use observe::vmm_verdict;
pub use world::World;
#[cfg(test)]
pub(crate) use world::tests::config as test_config;
