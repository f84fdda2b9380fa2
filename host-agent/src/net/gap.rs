//! Connections that began while our rules were gone.
//!
//! The kernel decides on a translation with a connection's first packet. What began while somebody had taken our tables
//! away goes on untranslated for as long as anybody sends, although the rules are back: so it is forgotten, and the next
//! packet is a first one again. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sovereign_protocol::subnet::Subnet;
use sovereign_reconcile::filter::{Filter, PortForward, WayOut};

use super::conntrack::Entry;

/// What a filter would have translated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gap {
    forwards: BTreeSet<PortForward>,
    /// The guests' subnets, where what leaves them leaves under this host's address.
    masqueraded: BTreeSet<Subnet>,
    /// This host's own addresses.
    own: BTreeSet<IpAddr>,
}

impl Gap {
    /// The gap in a filter that was gone for a while, on a host with these addresses.
    #[must_use]
    pub fn of(filter: &Filter, own: BTreeSet<IpAddr>) -> Self {
        let leaves = filter.way_out == WayOut::Masquerade;
        Self {
            forwards: filter.forwards.clone(),
            masqueraded: filter.subnets.iter().copied().filter(|_| leaves).collect(),
            own,
        }
    }

    /// Whether a connection should have been translated and was not.
    #[must_use]
    pub fn has(&self, entry: &Entry) -> bool {
        if entry.is_translated() {
            return false;
        }
        if self.own.contains(&entry.destination) {
            return self.forwards.iter().any(|forward| leads(forward, entry));
        }
        let within = |subnet: &Subnet, address| subnet.contains(address);
        self.masqueraded
            .iter()
            .any(|subnet| within(subnet, entry.source) && !within(subnet, entry.destination))
    }

    /// Takes another gap in.
    pub(super) fn add(&mut self, more: Self) {
        self.forwards.extend(more.forwards);
        self.masqueraded.extend(more.masqueraded);
        self.own.extend(more.own);
    }

    /// True when there is nothing that could be missing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.forwards.is_empty() && self.masqueraded.is_empty()
    }
}

/// Whether a forward was meant by who opened a connection to this host.
fn leads(forward: &PortForward, entry: &Entry) -> bool {
    forward.transport.number() == entry.transport
        && (forward.ports.first()..=forward.ports.last()).contains(&entry.port)
        && forward.to.is_ipv4() == entry.destination.is_ipv4()
        && forward.listen.is_none_or(|listen| listen == entry.destination)
}
