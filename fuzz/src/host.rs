//! What the host reads of VMMs, shims and guests' memory.

use sovereign_host_agent::net::nft::fuzz as nft;
use sovereign_host_agent::shim::contract::{ExitRecord, Message, Request, ShimConfig};
use sovereign_host_agent::shim::qmp as protocol;
use sovereign_host_agent::vsock::fuzz;

pub(crate) fn qmp(data: &[u8]) {
    for line in String::from_utf8_lossy(data).lines() {
        let _ = protocol::parse(line);
    }
}

pub(crate) fn shim_lines(data: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<Message>(data) {
        let written = serde_json::to_string(&message).expect("a message is JSON");
        let again: Message = serde_json::from_str(&written).expect("it was just written");
        assert_eq!(serde_json::to_string(&again).expect("a message is JSON"), written);
    }
    let _ = serde_json::from_slice::<Request>(data);
    let _ = serde_json::from_slice::<ExitRecord>(data);
    if let Ok(config) = serde_json::from_slice::<ShimConfig>(data) {
        let _ = (config.machine(), config.bare_guest());
    }
}

pub(crate) fn vsock_header(data: &[u8]) {
    fuzz::header(data);
}

pub(crate) fn vsock_connection(data: &[u8]) {
    fuzz::connection(data);
}

pub(crate) fn vsock_ring(data: &[u8]) {
    fuzz::ring(data);
}

pub(crate) fn nft_tables(data: &[u8]) {
    nft::tables(data);
}

pub(crate) fn connections(data: &[u8]) {
    nft::connections(data);
}
