//! Clients of the services in guests, over any stream: what another machine of the LAN would be.

pub mod base64;
pub mod http;
mod postgres;
mod scram;

pub use postgres::{Session, answers};
