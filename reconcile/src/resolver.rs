//! Placeholder.
use std::net::{Ipv4Addr, Ipv6Addr};
/// x
pub const FORWARDER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 3);
/// x
pub const FORWARDER_V6: Ipv6Addr = Ipv6Addr::new(0xfdc0, 0x5d1e, 0x7a93, 0, 0, 0, 0, 3);
