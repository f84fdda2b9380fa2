//! The network of an instance.
pub mod kernel;
pub mod names;
pub mod observed;
pub mod plan;
#[cfg(test)]
mod simulated;
pub(crate) mod tun;
pub mod wanted;
