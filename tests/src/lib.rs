//! The harness of the system tests: instances of their own, under a guard.
//!
//! Every instance has a random name, its own directories and its own processes; it shares
//! only the image cache. It ends what it started, by pid, and nothing else.

pub mod android;
pub mod client;
pub mod guard;
pub mod instance;
pub mod lan;
pub mod machine;
pub mod net;
pub mod seat;
pub mod space;
pub mod storm;

pub use instance::Instance;
pub use seat::Who;
