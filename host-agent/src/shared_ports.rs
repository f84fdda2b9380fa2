//! Which programs wait on ports that the kernel leads to guests: what comes for them goes to the guest. Pure.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::port::{Ports, Taken, Transport};

use crate::listeners::Listener;

/// What was seen at the last look.
#[derive(Debug, Default)]
pub struct SharedPorts {
    before: BTreeSet<u64>,
    doubtful: bool,
}

impl SharedPorts {
    /// The first listener, by port, that each forward takes a port of. The loopback's are left out, because its packets
    /// are not translated, and so are our own sockets.
    ///
    /// A socket of UDP counts at the second look that sees it: programs that ask others have one for a moment, on
    /// whatever port is free.
    pub fn judge<K: Ord + Clone>(
        &mut self,
        forwards: &BTreeMap<K, Taken>,
        listeners: &[Listener],
        ours: &BTreeSet<u64>,
    ) -> BTreeMap<K, Listener> {
        let others = listeners
            .iter()
            .filter(|listener| !listener.local.ip().is_loopback() && !ours.contains(&listener.inode));
        let others: Vec<&Listener> = others.collect();
        let is_met = |taken: &Taken, listener: &Listener| {
            let port = Ports::one(listener.local.port());
            listener.transport == taken.transport
                && port.is_some_and(|port| port.overlaps(taken.ports))
                && listener.takes(taken.address, false)
        };
        let stays = |listener: &Listener| {
            listener.transport == Transport::Tcp || self.before.contains(&listener.inode)
        };
        let mut shared = BTreeMap::new();
        self.doubtful = false;
        for (key, taken) in forwards {
            let met = others.iter().filter(|listener| is_met(taken, listener));
            let (met, doubtful): (Vec<&&Listener>, Vec<_>) = met.partition(|listener| stays(listener));
            self.doubtful |= !doubtful.is_empty();
            let first = met
                .into_iter()
                .min_by_key(|listener| (listener.local.port(), listener.local.ip()));
            shared.extend(first.map(|listener| (key.clone(), (*listener).clone())));
        }
        self.before = others.iter().map(|listener| listener.inode).collect();
        shared
    }

    /// Whether a socket was seen that counts if it is there at the next look.
    #[must_use]
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::port::Transport::{Tcp, Udp};

    fn listener(transport: Transport, local: &str, only_v6: Option<bool>, inode: u64) -> Listener {
        Listener {
            transport,
            local: local.parse().unwrap(),
            only_v6,
            uid: 0,
            inode,
        }
    }

    fn taken(transport: Transport, address: &str, ports: &str) -> Taken {
        Taken {
            transport,
            address: address.parse().unwrap(),
            ports: Ports::parse(ports).unwrap(),
        }
    }

    /// The inode that is named for one forward, after two looks.
    fn met(forward: Taken, listeners: &[Listener], ours: &[u64]) -> Option<u64> {
        let forwards = BTreeMap::from([("f", forward)]);
        let ours = ours.iter().copied().collect();
        let mut shared = SharedPorts::default();
        shared.judge(&forwards, listeners, &ours);
        let found = shared.judge(&forwards, listeners, &ours);
        found.get("f").map(|listener| listener.inode)
    }

    #[test]
    fn a_listener_is_met_where_a_packet_could_mean_both() {
        let all = taken(Tcp, "0.0.0.0", "8000-8010");
        for (listener, is_met) in [
            (listener(Tcp, "0.0.0.0:8005", None, 1), true),
            (listener(Tcp, "10.0.0.5:8010", None, 1), true),
            (listener(Tcp, "10.0.0.5:8011", None, 1), false),
            (listener(Udp, "0.0.0.0:8005", None, 1), false),
            (listener(Tcp, "127.0.0.1:8005", None, 1), false),
            (listener(Tcp, "[::1]:8005", None, 1), false),
            (listener(Tcp, "[::]:8005", Some(false), 1), true),
            (listener(Tcp, "[::]:8005", Some(true), 1), false),
            (listener(Tcp, "[::]:8005", None, 1), false), // not seen is not told
            (listener(Tcp, "[fd00::1]:8005", Some(false), 1), false),
        ] {
            assert_eq!(
                met(all, std::slice::from_ref(&listener), &[]).is_some(),
                is_met,
                "{listener:?}"
            );
        }
        let one = taken(Tcp, "10.0.0.5", "80");
        assert!(met(one, &[listener(Tcp, "0.0.0.0:80", None, 1)], &[]).is_some());
        assert!(met(one, &[listener(Tcp, "10.0.0.6:80", None, 1)], &[]).is_none());
        let six = taken(Tcp, "::", "80");
        assert!(met(six, &[listener(Tcp, "[::]:80", Some(true), 1)], &[]).is_some());
        assert!(met(six, &[listener(Tcp, "0.0.0.0:80", None, 1)], &[]).is_none());
    }

    #[test]
    fn our_own_sockets_are_nobody_and_the_lowest_port_is_named() {
        let all = taken(Tcp, "::", "80-90");
        let listeners = [
            listener(Tcp, "[::]:90", Some(true), 3),
            listener(Tcp, "[::]:80", Some(true), 1),
            listener(Tcp, "[::]:85", Some(false), 2),
        ];
        assert_eq!(met(all, &listeners, &[]), Some(1));
        assert_eq!(met(all, &listeners, &[1]), Some(2));
        assert_eq!(met(all, &listeners, &[1, 2, 3]), None);
    }

    #[test]
    fn a_socket_of_udp_that_was_there_for_a_moment_is_nobody() {
        let forwards = BTreeMap::from([("f", taken(Udp, "0.0.0.0", "40000-50000"))]);
        let (one, two) = (
            listener(Udp, "0.0.0.0:41000", None, 1),
            listener(Udp, "0.0.0.0:41000", None, 2),
        );
        let mut shared = SharedPorts::default();
        let mut look = |seen: &[Listener]| {
            let count = shared.judge(&forwards, seen, &BTreeSet::new()).len();
            (count, shared.is_doubtful())
        };
        assert_eq!(look(std::slice::from_ref(&one)), (0, true));
        assert_eq!(look(std::slice::from_ref(&two)), (0, true));
        assert_eq!(look(&[two]), (1, false));
        assert_eq!(look(&[]), (0, false));
        assert_eq!(look(&[one]), (0, true));
    }
}
