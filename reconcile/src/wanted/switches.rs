//! Switches of the kernel: which are wanted, looked at, put back.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sovereign_protocol::name::Name;

use super::{NetworkSpec, Place, Wanted};
use crate::family::Family;
use crate::names::{self, LinkName, Mark};
use crate::observed::{Kind, Link, Observed};
use crate::sysctl::Sysctl;
use crate::uplink::{self, Exit};

/// What a switch was before we set it, and what we set. Kept on disk, so that the next agent can put it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prior {
    /// Before.
    pub before: i64,
    /// Set by us.
    pub set: i64,
}

/// The switches that we changed.
pub type Switched = BTreeMap<Sysctl, Prior>;

impl Wanted {
    /// The switches to look at: those that a spec may want, and those that were changed.
    #[must_use]
    pub fn watched(
        instance: &Name,
        spec: &NetworkSpec,
        switched: &Switched,
        observed: &Observed,
    ) -> BTreeSet<Sysctl> {
        let mut watched: BTreeSet<Sysctl> = switched.keys().cloned().collect();
        if deafens(spec) {
            watched.insert(Sysctl::GuestAdvertisements(names::bridge(instance)));
        }
        if !spec.routes() {
            return watched;
        }
        if spec.place == Place::Host {
            watched.insert(Sysctl::ReversePath(names::bridge(instance)));
        }
        if spec.place == Place::Host && spec.families().contains(&Family::V6) {
            let mark = Mark::of(instance);
            let listeners = listeners(&mark, observed);
            watched.extend(listeners.map(Sysctl::AcceptAdvertisements));
        }
        for family in spec.families() {
            watched.insert(match family {
                Family::V4 => Sysctl::ForwardV4,
                Family::V6 => Sysctl::ForwardV6,
            });
            let exit = uplink::exit(observed, family, &spec.uplink, spec.vpn);
            let link = exit
                .link()
                .filter(|_| family == Family::V6 && spec.place == Place::Host);
            watched.extend(link.cloned().map(Sysctl::AcceptAdvertisements));
        }
        watched
    }
}

/// Whether guests could tell this host routers and addresses of its own. In a namespace of ours the filter drops what they say
/// of routers.
fn deafens(spec: &NetworkSpec) -> bool {
    spec.place == Place::Host
}

/// Links of others from which this host may hear of routers: none that others are behind, such as a bridge of virtual
/// machines, unless a default route shows that there is a router (the way out is asked for beside these).
fn listeners(mark: &Mark, observed: &Observed) -> impl Iterator<Item = LinkName> {
    let listens = |link: &&Link| {
        let alone = link.controller.is_none() && ![Kind::Bridge, Kind::Loopback].contains(&link.kind);
        alone && !mark.is_on(&link.name, link.group)
    };
    let links = observed.links.values().filter(listens);
    links.filter_map(|link| LinkName::parse(&link.name))
}

pub(super) fn sysctls(
    mark: &Mark,
    bridge: &LinkName,
    spec: &NetworkSpec,
    exits: &BTreeMap<Family, Exit>,
    observed: &Observed,
) -> BTreeMap<Sysctl, i64> {
    let mut sysctls = BTreeMap::new();
    if deafens(spec) {
        sysctls.insert(Sysctl::GuestAdvertisements(bridge.clone()), 0);
    }
    if !spec.routes() {
        return sysctls;
    }
    if spec.place == Place::Host {
        sysctls.insert(Sysctl::ReversePath(bridge.clone()), 2); // private, all packets have one way
    }
    for (family, exit) in exits {
        match family {
            Family::V4 => sysctls.insert(Sysctl::ForwardV4, 1),
            Family::V6 => sysctls.insert(Sysctl::ForwardV6, 1),
        };
        if *family == Family::V4 || spec.place == Place::Private {
            continue;
        }
        // Also before the first one is heard, and before this host is a router: then it would be deaf.
        for link in listeners(mark, observed).chain(exit.link().cloned()) {
            let accepts = Sysctl::AcceptAdvertisements(link);
            // 0 means that nobody wants them there.
            if observed.sysctls.get(&accepts).is_some_and(|value| *value > 0) {
                sysctls.insert(accepts, 2);
            }
        }
    }
    sysctls
}

/// What is no longer wanted and is still as we set it.
pub(super) fn restored(
    switched: &Switched,
    wanted: &BTreeMap<Sysctl, i64>,
    observed: &Observed,
) -> BTreeMap<Sysctl, i64> {
    let unwanted = switched.iter().filter(|(sysctl, _)| !wanted.contains_key(sysctl));
    let still_ours = unwanted.filter(|(sysctl, prior)| observed.sysctls.get(sysctl) == Some(&prior.set));
    still_ours
        .map(|(sysctl, prior)| (sysctl.clone(), prior.before))
        .collect()
}
