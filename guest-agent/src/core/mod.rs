//! The pure core: no clock, no I/O, no spawn. `now_ms` is milliseconds since boot.

pub mod apply;
pub mod brief;
pub mod clock;
pub mod former;
pub mod judge;
pub mod net;
pub mod outcome;
pub mod pace;
pub mod service;
pub mod world;
