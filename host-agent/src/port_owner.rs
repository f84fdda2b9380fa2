//! Who has a port: for the message when a forward cannot have it, or shares it. Changes nothing.

use std::net::SocketAddr;

use sovereign_protocol::port::Transport;

use crate::listeners::{Listener, holder, listeners};

/// The program that waits on what `wanted` would need.
///
/// Other users' processes can be seen by root only; then the user's id is all there is.
#[must_use]
pub fn describe(transport: Transport, wanted: SocketAddr) -> String {
    let blocks = |listener: &Listener| {
        listener.transport == transport
            && listener.local.port() == wanted.port()
            && (listener.takes(wanted.ip(), true) || is_everywhere(wanted, listener))
    };
    match listeners().unwrap_or_default().into_iter().find(blocks) {
        Some(listener) => format!("{} has it", owner(&listener)),
        None => "bound by a socket that waits for nobody".to_owned(),
    }
}

/// `::` takes the port of IPv4, too, unless it was told otherwise.
fn is_everywhere(wanted: SocketAddr, listener: &Listener) -> bool {
    wanted.is_ipv6() && wanted.ip().is_unspecified() && listener.local.is_ipv4()
}

/// `pid 12 (chronyd)`, or what else is known of whose a socket is.
#[must_use]
pub fn owner(listener: &Listener) -> String {
    match holder(listener.inode) {
        _ if listener.inode == 0 => "the kernel itself".to_owned(),
        Some((pid, program)) => format!("pid {pid} ({program})"),
        None => format!("a process of user {}", listener.uid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_that_has_a_port_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let describe = |address| describe(Transport::Tcp, address);
        let ours = format!("pid {} (", std::process::id());
        assert!(describe(address).starts_with(&ours), "{}", describe(address));
        let any = SocketAddr::from(([0, 0, 0, 0], address.port()));
        assert!(describe(any).starts_with(&ours), "a wildcard needs it too");
        let dual = SocketAddr::from(([0u16; 8], address.port()));
        assert!(describe(dual).starts_with(&ours), "one of both families, too");
        drop(listener);
        assert!(!describe(address).starts_with(&ours));
    }

    #[test]
    fn a_program_that_has_a_port_of_udp_is_named() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let ours = format!("pid {} (", std::process::id());
        let said = describe(Transport::Udp, address);
        assert!(said.starts_with(&ours), "{said}");
        assert!(!describe(Transport::Tcp, address).starts_with(&ours));
    }
}
