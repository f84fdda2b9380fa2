//! One look: everything dumped once, the kernel asked about packets, foreign filters read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;

use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::{Cards, Look, Networked, Switches};
use sovereign_reconcile::plan::{Step, plan};
use sovereign_reconcile::route::Route;
use sovereign_reconcile::rule::Rule;
use sovereign_reconcile::wanted::{Switched, Wanted};

use super::super::chain;
use super::super::ground::{self, Ground};
use super::super::kernel::{Kernel, KernelError};
use super::super::network::NetworkConfig;
use super::super::observed::{any_route, any_rule};
use super::super::switches::Place;
use super::super::wanted::NetworkSpec;
use super::{ExamineError, Seen, filters, probes};
use crate::netns::{Helper, Stage, StageFailure};

/// Bytes of a switch's text.
const TEXT_BYTES: u64 = 64;
/// The local table, which only has this host's own addresses.
const LOCAL: u32 = 255;

/// What a look is made through.
pub(super) struct Eyes {
    pub(super) kernel: Kernel,
    /// Absent in a namespace of our own, in which nobody else filters.
    pub(super) netfilter: Option<OwnedFd>,
    /// Absent there, too: switches can be read from inside only, and nobody else sets them.
    sysctl: Option<OwnedFd>,
}

impl Eyes {
    /// Opens the namespace that the network is in.
    pub(super) async fn open(ground: &Ground) -> Result<Self, StageFailure> {
        match ground {
            Ground::Host => {
                let opened = ground::open_own()?;
                Ok(Self {
                    kernel: Kernel::over(opened.requests),
                    netfilter: opened.netfilter.map(|(requests, _)| requests),
                    sysctl: match opened.switches {
                        Place::Directory(directory) => Some(directory),
                        Place::Files(_) => None,
                    },
                })
            }
            Ground::Private(config) => {
                let no = || StageFailure::new(Stage::Answer, "there is no private network");
                let set = Helper::find(config).await?.ok_or_else(no)?.take().await?;
                Ok(Self {
                    kernel: Kernel::over(set.requests),
                    netfilter: None,
                    sysctl: None,
                })
            }
        }
    }
}

/// Looks at everything.
pub(super) async fn look(
    config: &NetworkConfig,
    spec: &NetworkSpec,
    cards: Cards,
) -> Result<Seen, ExamineError> {
    let mut eyes = Eyes::open(&config.ground).await.map_err(ExamineError::Look)?;
    look_with(&mut eyes, config, spec, cards).await
}

pub(super) async fn look_with(
    eyes: &mut Eyes,
    config: &NetworkConfig,
    spec: &NetworkSpec,
    cards: Cards,
) -> Result<Seen, ExamineError> {
    let failed = |error: KernelError| ExamineError::Look(StageFailure::new(Stage::Netlink, chain(&error)));
    let observed = eyes.kernel.observe().await.map_err(failed)?;
    let wanted = Wanted::of(&config.instance, spec, &Switched::new(), &observed)
        .map_err(|error| ExamineError::Look(StageFailure::new(Stage::Answer, error.to_string())))?;
    let rules = rules(&mut eyes.kernel).await.map_err(failed)?;
    let routes = routes(&mut eyes.kernel, &wanted).await.map_err(failed)?;
    // Switches are judged by the loop itself.
    let is_switch = |step: &Step| matches!(step, Step::SetSysctl { .. } | Step::RestoreSysctl { .. });
    let steps = plan(&wanted, &observed).steps;
    let unsettled: BTreeSet<Family> = steps
        .iter()
        .filter(|step| !is_switch(step))
        .flat_map(|step| {
            step.family()
                .map_or_else(|| vec![Family::V4, Family::V6], |family| vec![family])
        })
        .collect();
    let links = observed.links.values().map(|link| link.name.as_str());
    let seen = eyes.sysctl.as_ref().map(|directory| switches(directory, links));
    let switches = seen.unwrap_or_default();
    let mut look = Look {
        ours: Networked {
            wanted,
            guests: spec.guests.clone(),
            cards,
        },
        observed,
        rules,
        routes,
        switches,
        probes: Vec::new(),
        tables: Vec::new(),
        saves: Vec::new(),
        unsettled,
    };
    look.probes = probes::ask(&mut eyes.kernel, &look).await.map_err(failed)?;
    let filtered = match eyes.netfilter.as_ref().map(OwnedFd::try_clone) {
        Some(Ok(socket)) if look.ours.wanted.filter.is_some() => filters::read(socket).await,
        _ => filters::Filters::default(),
    };
    (look.tables, look.saves) = (filtered.tables, filtered.saves);
    Ok(Seen {
        look,
        unseen: filtered.unseen,
    })
}

/// All rules, in the kernel's order.
async fn rules(kernel: &mut Kernel) -> Result<Vec<Rule>, KernelError> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RuleMessage::default();
        message.header.family = family;
        let dumped = dump(kernel, &RouteNetlinkMessage::GetRule(message)).await?;
        rules.extend(dumped.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRule(rule) => any_rule(rule),
            _ => None,
        }));
    }
    Ok(rules)
}

/// All routes to guests' addresses, of whatever table but the local one.
async fn routes(kernel: &mut Kernel, wanted: &Wanted) -> Result<Vec<Route>, KernelError> {
    let mut routes = Vec::new();
    let Some(bridge) = &wanted.bridge else {
        return Ok(routes);
    };
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let dumped = dump(kernel, &RouteNetlinkMessage::GetRoute(message)).await?;
        let seen = dumped.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => any_route(route),
            _ => None,
        });
        routes.extend(seen.filter(|route| {
            let to = route.to.address();
            let within = bridge
                .addresses
                .iter()
                .any(|address| address.subnet().contains(to));
            route.table != LOCAL && within
        }));
    }
    Ok(routes)
}

/// A dump; nothing of a family that this kernel has not.
async fn dump(
    kernel: &mut Kernel,
    what: &RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, KernelError> {
    match kernel.dump(what).await {
        Err(error) if error.is(Errno::AFNOSUPPORT) || error.is(Errno::OPNOTSUPP) => Ok(Vec::new()),
        other => other,
    }
}

fn switches<'a>(directory: &OwnedFd, links: impl Iterator<Item = &'a str>) -> Switches {
    let number = |file: &str| number(directory, file);
    let reverse_path: BTreeMap<String, i64> = links
        .chain(["all"])
        .filter_map(|link| Some((link.to_owned(), number(&format!("ipv4/conf/{link}/rp_filter"))?)))
        .collect();
    let calls = [
        (Family::V4, "bridge/bridge-nf-call-iptables"),
        (Family::V6, "bridge/bridge-nf-call-ip6tables"),
    ];
    Switches {
        reverse_path,
        bridge_calls: calls
            .into_iter()
            .filter_map(|(family, file)| Some((family, number(file)? != 0)))
            .collect(),
    }
}

fn number(directory: &impl AsFd, file: &str) -> Option<i64> {
    let opened = openat(directory, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut text = String::new();
    std::fs::File::from(opened)
        .take(TEXT_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}
