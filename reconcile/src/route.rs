//! Routes: what is seen of them, and those that are wanted.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::names::LinkName;

/// The main table.
pub const MAIN: u32 = 254;
/// The protocol number of what the kernel makes by itself (linux/rtnetlink.h, RTPROT_KERNEL).
pub const KERNEL: u8 = 2;
/// The protocol number of our routes and rules: `S`. Nobody in iproute2's rt_protos has it.
pub const OURS: u8 = b'S';

/// What becomes of a packet that a route or rule takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouteKind {
    /// It is sent on.
    Unicast,
    /// Anything else: refused, dropped, taken for ours.
    Other,
}

/// A route as it is seen. Only some are kept: see [`Route::matters`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Route {
    /// Its table.
    pub table: u32,
    /// Where it leads.
    pub to: Prefix,
    /// Among those to the same place the lowest counts.
    pub metric: u32,
    /// The link; none of a route with several hops.
    pub link: Option<u32>,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// What becomes of packets.
    pub kind: RouteKind,
    /// Who made it (RTPROT_*).
    pub protocol: u8,
}

impl Route {
    /// Whether plans look at it: ours, default routes, and those of a link's own subnet. A machine may have a million
    /// others.
    #[must_use]
    pub fn matters(&self) -> bool {
        let connected = self.table == MAIN && self.gateway.is_none() && self.link.is_some();
        self.protocol == OURS || self.to.length() == 0 || (connected && self.kind == RouteKind::Unicast)
    }

    /// Whether it is a default route that sends packets on.
    #[must_use]
    pub fn is_default(&self, family: Family) -> bool {
        self.to.length() == 0 && Family::of(self.to.address()) == family && self.kind == RouteKind::Unicast
    }
}

/// A route that should be there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct WantedRoute {
    /// Its table.
    pub table: u32,
    /// Where it leads.
    pub to: Prefix,
    /// The link.
    pub link: LinkName,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// The address that this host speaks under.
    pub source: Option<IpAddr>,
    /// Whether it carries our mark; otherwise it is one that the kernel made and that somebody took away.
    pub ours: bool,
}

impl WantedRoute {
    /// The protocol number that says who made it.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        if self.ours { OURS } else { KERNEL }
    }

    /// Its metric, as the kernel gives one where none is asked for (net/ipv6/route.c: 256 of its own, else 1024). In the
    /// main table, where a guest's default route is, it wins over those of router advertisements (1024) instead of
    /// joining them.
    #[must_use]
    pub fn metric(&self) -> u32 {
        match (Family::of(self.to.address()), self.ours) {
            (Family::V4, _) => 0,
            (Family::V6, false) => 256,
            (Family::V6, true) if self.table == MAIN => 512,
            (Family::V6, true) => 1_024,
        }
    }

    /// Whether it takes the place of another with its destination and metric. In the main table that could be somebody
    /// else's.
    #[must_use]
    pub fn replaces(&self) -> bool {
        self.ours && self.table != MAIN
    }

    /// Whether a route is this one; `link` is the number of its link.
    #[must_use]
    pub fn is(&self, seen: &Route, link: Option<u32>) -> bool {
        link.is_some()
            && (seen.table, seen.to, seen.link, seen.gateway) == (self.table, self.to, link, self.gateway)
            && seen.kind == RouteKind::Unicast
            && (!self.ours || seen.protocol == OURS)
    }
}

impl fmt::Display for WantedRoute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        write!(f, " dev {}", self.link)?;
        if self.table != MAIN {
            write!(f, " table {}", self.table)?;
        }
        Ok(())
    }
}
