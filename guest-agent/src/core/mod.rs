//! The pure core: no clock, no I/O, no spawn. `now_ms` is milliseconds since boot.

pub mod clock;
pub mod judge;
pub mod service;
pub mod world;
