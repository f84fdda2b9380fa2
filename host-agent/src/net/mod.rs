//! The network of an instance.
pub mod kernel;
pub mod names;
pub(crate) mod tun;
