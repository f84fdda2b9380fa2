//! Who has a port: for the message when a forward cannot have it, or shares it. Changes nothing.

use std::net::SocketAddr;

use sovereign_protocol::port::Transport;

use crate::listeners::{Listener, holder, listeners};

/// The program that waits on what a socket of `wanted`'s family alone would need: no forward of ours takes both.
///
/// Other users' processes can be seen by root only; then the user's id is all there is.
#[must_use]
pub fn describe(transport: Transport, wanted: SocketAddr) -> String {
    match in_the_way(transport, wanted, listeners().unwrap_or_default()) {
        Some(listener) => format!("{} has it", owner(&listener)),
        None => "bound by a socket that waits for nobody".to_owned(),
    }
}

fn in_the_way(transport: Transport, wanted: SocketAddr, found: Vec<Listener>) -> Option<Listener> {
    let blocks = |listener: &Listener| {
        listener.transport == transport
            && listener.local.port() == wanted.port()
            && listener.takes(wanted.ip(), true)
    };
    found.into_iter().find(blocks)
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
        let six = SocketAddr::from(([0u16; 8], address.port()));
        assert!(!describe(six).starts_with(&ours), "that is another port");
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

    /// Of several programs at the same port only one is in the way.
    #[test]
    fn who_has_the_port_of_one_family_is_not_named_for_that_of_the_other() {
        let at = |local: &str, only_v6| Listener {
            transport: Transport::Tcp,
            local: local.parse().unwrap(),
            only_v6,
            uid: 0,
            inode: 1,
        };
        let four = at("0.0.0.0:80", None);
        let (one, six) = (at("[::1]:80", Some(true)), at("[::]:80", Some(true)));
        let (both, unseen) = (at("[::]:80", Some(false)), at("[::]:80", None));
        let named = |wanted: &str, found: &[&Listener]| {
            let found = found.iter().copied().cloned().collect();
            in_the_way(Transport::Tcp, wanted.parse().unwrap(), found)
        };
        for wanted in ["[::]:80", "[::1]:80"] {
            assert_eq!(named(wanted, &[&four]), None, "{wanted}");
            for other in [&one, &six, &both, &unseen] {
                assert_eq!(named(wanted, &[&four, other]).as_ref(), Some(other), "{wanted}");
            }
        }
        assert_eq!(named("[fd00::1]:80", &[&four, &one]), None);
        for wanted in ["0.0.0.0:80", "127.0.0.1:80"] {
            assert_eq!(named(wanted, &[&one, &six]), None, "{wanted}");
            for other in [&four, &both, &unseen] {
                assert_eq!(
                    named(wanted, &[&one, &six, other]).as_ref(),
                    Some(other),
                    "{wanted}"
                );
            }
        }
    }
}
