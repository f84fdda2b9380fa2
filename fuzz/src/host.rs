//! What the host reads of VMMs, shims, other programs and guests' memory.

use sovereign_host_agent::net::nft::fuzz as nft;
use sovereign_host_agent::shim::contract::{ExitRecord, Message, Request, ShimConfig};
use sovereign_host_agent::shim::qmp as protocol;
use sovereign_host_agent::vsock::fuzz;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_reconcile::iptables::{parse, remove, tags};
use sovereign_reconcile::resolver::{HostResolver, ResolvConf, Way, advise, complete};

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

/// Whatever stands there, what would be removed names nothing but ours.
pub(crate) fn iptables_save(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = tags(&text);
    let change = remove(&parse("sv5pkj", &text)).map(|change| change.to_string());
    for line in change.unwrap_or_default().lines() {
        assert!(
            line.starts_with('*') || line == "COMMIT" || line.contains("sv5pkj"),
            "{line:?}"
        );
    }
}

/// Whatever stands there, what a guest is told is a valid document.
pub(crate) fn resolv_conf(data: &[u8]) {
    let own = Some(ResolvConf::parse(data));
    let interface = r#"{"addresses":["10.9.0.2/24","fd00:9::2/64"]}"#;
    let interface: InterfaceSpec = serde_json::from_str(interface).expect("it is one");
    for way in [Way::None, Way::Host, Way::Pasta] {
        let host = HostResolver {
            own: own.clone(),
            upstream: own.clone(),
        };
        if let Ok(advice) = advise(&host, way) {
            let told = complete(&interface, &advice, 1500);
            assert_eq!(told.check(), Ok(()), "{told:?}");
            let written = serde_json::to_vec(&told).expect("an interface is JSON");
            assert_eq!(
                serde_json::from_slice::<InterfaceSpec>(&written).expect("it was just written"),
                told
            );
        }
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
