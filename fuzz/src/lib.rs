//! Every parser of foreign bytes as a plain function: a value or a typed error, never a panic, bounded memory, and
//! where there is an encoder the same bytes or value again.
//!
//! `tests/replay.rs` runs the committed corpora and seeded mutations of them on the stable compiler; a libFuzzer
//! harness (feature `libfuzzer`) runs the same functions.

#[path = "mutate.rs"]
pub mod mutate;

mod guest;
mod host;
mod image;
mod protocol;

/// One parser.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, and its corpus' directory below `corpus/`.
    pub name: &'static str,
    /// Panics when the parser is wrong.
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// All of them.
pub const TARGETS: [Target; 36] = [
    target("codec-request", protocol::codec_request),
    target("codec-response", protocol::codec_response),
    target("handshake-accept", protocol::handshake_accept),
    target("handshake-dial", protocol::handshake_dial),
    target("bulk-frames", protocol::bulk_frames),
    target("bulk-message", protocol::bulk_message),
    target("host-spec", protocol::host_spec),
    target("guest-spec", protocol::guest_spec),
    target("boot-record", protocol::boot_record),
    target("event-record", protocol::event_record),
    target("addresses", protocol::addresses),
    target("qmp", host::qmp),
    target("shim-lines", host::shim_lines),
    target("iptables-save", host::iptables_save),
    target("resolv-conf", host::resolv_conf),
    target("vsock-header", host::vsock_header),
    target("vsock-connection", host::vsock_connection),
    target("vsock-ring", host::vsock_ring),
    target("nft-tables", host::nft_tables),
    target("connections", host::connections),
    target("localapi-http", guest::localapi_http),
    target("tailscale-status", guest::tailscale_status),
    target("postgres", guest::postgres),
    target("disk-signature", guest::disk_signature),
    target("exit-records", guest::exit_records),
    target("sock-diag", guest::sock_diag),
    target("compressed", image::compressed),
    target("kernel-image", image::kernel_image),
    target("module", image::module),
    target("kernel-config", image::kernel_config),
    target("deb", image::deb),
    target("tar", image::tar),
    target("inrelease", image::inrelease),
    target("packages", image::packages),
    target("lock", image::lock),
    target("elf-needed", image::elf_needed),
];
