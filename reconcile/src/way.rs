//! By which way packets of guests leave this host, and whether it is another one than guests were told of. Pure.
//!
//! Connections that were opened by a former way are translated to an address that is no longer ours, or go to a gateway
//! that does not know them: they are dead and look alive. Guests are told by a number that counts up
//! ([`Ways`]), so that only equal or not matters, and a guest that missed one hears of it by the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::ways::Ways;

use crate::family::Family;
use crate::names::LinkName;
use crate::observed::{Address, Observed};
use crate::route::{MAIN, Route};
use crate::uplink::{self, Exit, Uplink, Vpn};

/// A way that does not last so long is none: a DHCP client takes its route away and puts it back, and a link that comes up
/// has its addresses one after the other.
pub const LASTING_MS: u64 = 100;

/// What a kernel answers who asks where a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// The link's number.
    pub link: u32,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// The address that a packet of the machine's own would have; none is said of a guest's.
    pub source: Option<IpAddr>,
}

/// The way out of one family: all that a connection which was opened by it needs to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// The link, by name: numbers change when it is made anew as it was.
    pub link: LinkName,
    /// The next hop, where there is one.
    pub gateway: Option<IpAddr>,
    /// The addresses that packets may be translated to there.
    pub sources: BTreeSet<IpAddr>,
}

impl Way {
    /// The way that packets of guests take; `asked` is the kernel's own answer, where the main table decides. `None` where
    /// there is no way, or none with an address.
    #[must_use]
    pub fn of(observed: &Observed, family: Family, exit: &Exit, asked: Option<Hop>) -> Option<Self> {
        let asked = asked.and_then(|hop| Some((uplink::working(observed, hop.link)?, hop.gateway)));
        let (link, gateway) = match (exit, asked) {
            (Exit::None(_), _) => return None,
            (Exit::Main(_), Some(hop)) => hop,
            (Exit::Main(link), None) => (link.clone(), gateway(observed, family, MAIN, link)),
            (Exit::Table(table, link), _) => (link.clone(), gateway(observed, family, *table, link)),
            (Exit::Own(link, gateway), _) => (link.clone(), *gateway),
        };
        Self::by(observed, family, link, gateway, None)
    }

    /// The way that packets of the machine's own take: those of who opens sockets here for guests of a private namespace.
    /// `asked` is the kernel's answer about such a packet; without one, who rules this machine's routing decides.
    #[must_use]
    pub fn of_machine(observed: &Observed, family: Family, asked: Option<Hop>) -> Option<Self> {
        let answer = asked.and_then(|hop| Some((uplink::working(observed, hop.link)?, hop)));
        let Some((link, hop)) = answer else {
            let exit = uplink::exit(observed, family, &Uplink::Auto, Vpn::Follow);
            return Self::of(observed, family, &exit, None);
        };
        Self::by(observed, family, link, hop.gateway, hop.source)
    }

    /// `source` counts where the link itself has no address: that of a router may be on its loopback.
    fn by(
        observed: &Observed,
        family: Family,
        link: LinkName,
        gateway: Option<IpAddr>,
        source: Option<IpAddr>,
    ) -> Option<Self> {
        let mut sources = sources(observed, family, &link, gateway);
        if sources.is_empty() {
            sources.extend(source.filter(|source| !is_link_local(*source) && !source.is_loopback()));
        }
        (!sources.is_empty()).then_some(Self {
            link,
            gateway,
            sources,
        })
    }

    /// Whether what was opened by `former` may not go on: a further address alone ends nothing.
    #[must_use]
    pub fn leaves(&self, former: &Self) -> bool {
        (&self.link, self.gateway) != (&former.link, former.gateway)
            || !former.sources.is_subset(&self.sources)
    }
}

/// The gateway of a table's first default route by this link.
fn gateway(observed: &Observed, family: Family, table: u32, link: &LinkName) -> Option<IpAddr> {
    let index = observed.link(link.as_str())?.index;
    let of_it =
        |route: &&Route| route.table == table && route.link == Some(index) && route.is_default(family);
    let routes = observed.routes.iter().filter(of_it);
    routes.min_by_key(|route| route.metric)?.gateway
}

/// The addresses that a kernel may translate to on this link: of IPv4 those in the gateway's subnet, if there are any
/// (`inet_select_addr`), of IPv6 any (`ipv6_dev_get_saddr` looks at where each packet goes).
fn sources(
    observed: &Observed,
    family: Family,
    link: &LinkName,
    gateway: Option<IpAddr>,
) -> BTreeSet<IpAddr> {
    let Some(link) = observed.link(link.as_str()) else {
        return BTreeSet::new();
    };
    let lasting = |address: &&Address| {
        address.link == link.index
            && Family::of(address.ip) == family
            && !address.passed_over
            && !is_link_local(address.ip)
    };
    let all = || observed.addresses.iter().filter(lasting);
    let near = |address: &&Address| {
        let subnet = Prefix::new(address.ip, address.prefix);
        subnet
            .zip(gateway)
            .is_some_and(|(subnet, gateway)| subnet.contains(gateway))
    };
    let of_gateway: BTreeSet<IpAddr> = all().filter(near).map(|address| address.ip).collect();
    match family {
        Family::V4 if !of_gateway.is_empty() => of_gateway,
        _ => all().map(|address| address.ip).collect(),
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// A way that guests were told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Told {
    number: u64,
    way: Way,
}

/// What guests were told, and what may become news. Who looks keeps it on disk, so that another agent goes on with the same
/// numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ToldWays {
    told: BTreeMap<Family, Told>,
    /// Other ways than those that were told, and since when they are there.
    #[serde(skip)]
    seen: BTreeMap<Family, (u64, Way)>,
}

impl ToldWays {
    /// Takes a look in, of all families that have a way out; whether there is something new to keep and to tell.
    ///
    /// A family without a way is no news: where packets cannot leave, nothing is told until they can. `wall_s` are seconds
    /// since 1970: a number is never less, so that it was never told for another way even if a record was lost.
    pub fn look(&mut self, now: BTreeMap<Family, Way>, now_ms: u64, wall_s: u64) -> bool {
        self.seen.retain(|family, _| now.contains_key(family));
        let mut news = false;
        for (family, way) in now {
            if self.told.get(&family).is_some_and(|told| told.way == way) {
                self.seen.remove(&family);
                continue;
            }
            let since_ms = match self.seen.get(&family) {
                Some((since_ms, seen)) if *seen == way => *since_ms,
                _ => now_ms,
            };
            if now_ms.saturating_sub(since_ms) < LASTING_MS {
                self.seen.insert(family, (since_ms, way));
                continue;
            }
            self.seen.remove(&family);
            news = true;
            let number = match self.told.get(&family) {
                Some(told) if !way.leaves(&told.way) => told.number,
                Some(told) => (told.number + 1).max(wall_s),
                None => wall_s.max(1),
            };
            self.told.insert(family, Told { number, way });
        }
        news
    }

    /// What is there now is another way although it looks the same: what led out ended, and was started again.
    pub fn renew(&mut self, wall_s: u64) {
        for told in self.told.values_mut() {
            told.number = (told.number + 1).max(wall_s);
        }
    }

    /// When the next look is due, in the milliseconds of [`ToldWays::look`].
    #[must_use]
    pub fn due_ms(&self) -> Option<u64> {
        let since = self.seen.values().map(|(since_ms, _)| *since_ms);
        since.min().map(|since_ms| since_ms.saturating_add(LASTING_MS))
    }

    /// The ways that guests were told of.
    #[must_use]
    pub fn told(&self) -> BTreeMap<Family, Way> {
        let told = self.told.iter();
        told.map(|(family, told)| (*family, told.way.clone())).collect()
    }

    /// What guests are told.
    #[must_use]
    pub fn ways(&self) -> Ways {
        let number = |family| self.told.get(&family).map(|told| told.number);
        Ways {
            v4: number(Family::V4),
            v6: number(Family::V6),
        }
    }
}

#[cfg(test)]
#[path = "way_tests.rs"]
mod tests;
