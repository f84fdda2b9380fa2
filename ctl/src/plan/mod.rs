//! What `up` would change: a pure comparison of what is wanted with what was found.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::Transport;
use sovereign_protocol::spec::{GuestConfig, HostSpec, Limits, Namespace, Service, ServiceKind};
use sovereign_reconcile::plan as reconcile;
use sovereign_reconcile::wanted::WantedError;

use crate::forward::{self, Via};

mod down;
mod network;

pub(crate) use down::{Going, down};
pub(crate) use network::{FoundNetwork, network_spec};

/// One change, in the order in which `up` makes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "action", rename_all = "snake_case")]
pub(crate) enum Step {
    /// Packages are fetched and unpacked.
    BuildImage {
        /// Its recipe.
        recipe: String,
    },
    /// No host agent runs.
    StartAgent,
    /// One runs that is older than this program; guests run on.
    ReplaceAgent,
    /// A guest runs that is not in the configuration.
    Stop {
        /// The guest.
        guest: Name,
    },
    /// A guest is stopped by `down`.
    StopGuest {
        /// The guest.
        guest: Name,
    },
    /// A private network goes with its namespace.
    EndNetwork,
    /// The host agent ends.
    StopAgent,
    /// A guest without an agent is taken over.
    Adopt {
        /// The guest.
        guest: Name,
    },
    /// A network namespace of our own is made.
    MakeNetwork {
        /// `private`, or `auto`: only where that works.
        namespace: Namespace,
    },
    /// The network of a host agent that ended is taken over; only another agent can look at it.
    AdoptNetwork,
    /// A link, address or route changes.
    Network(reconcile::Step),
    /// Something foreign is in the place of a link of ours and stays there.
    Conflict(reconcile::Conflict),
    /// A data disk is made.
    CreateDisk {
        /// The guest.
        guest: Name,
        /// Its size; the file is sparse.
        mib: u32,
    },
    /// A guest is booted.
    Start {
        /// The guest.
        guest: Name,
        /// Its memory.
        memory_mib: u32,
        /// Its own addresses, where there is a network.
        addresses: Vec<Prefix>,
    },
    /// A port of this machine leads to a guest that is booted.
    Forward {
        /// The guest.
        guest: Name,
        /// The service.
        name: Name,
        /// Where this machine listens, as sovereign.toml writes it.
        listen: String,
        /// The guest's first port.
        port: u16,
        /// By what it leads there.
        via: Via,
        /// TCP or UDP.
        protocol: Transport,
    },
    /// A running guest is changed without a reboot.
    Change {
        /// The guest.
        guest: Name,
        /// What, in words.
        what: String,
    },
    /// Something waits for the guest's next boot.
    NextBoot {
        /// The guest.
        guest: Name,
        /// What, in words.
        what: String,
    },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BuildImage { recipe } => write!(f, "build the image {recipe}"),
            Self::StartAgent => write!(f, "start the host agent"),
            Self::ReplaceAgent => write!(f, "replace the host agent by this version; guests run on"),
            Self::MakeNetwork { namespace } => f.write_str(match namespace {
                Namespace::Auto => {
                    "network: make a private network namespace where that works (auto), else guests get no card"
                }
                Namespace::Private => "network: make a private network namespace",
                Namespace::Host => "network: make links in this machine's own network namespace",
            }),
            Self::AdoptNetwork => write!(f, "network: take over what the last host agent left"),
            Self::Network(step) => write!(f, "{step}"),
            Self::Conflict(conflict) => write!(f, "{conflict}"),
            Self::Stop { guest } => write!(
                f,
                "{guest}: stop in order (not in the configuration); its data stays"
            ),
            Self::StopGuest { guest } => write!(f, "{guest}: stop in order; its data stays"),
            Self::EndNetwork => write!(f, "network: remove the private network namespace with all in it"),
            Self::StopAgent => write!(f, "stop the host agent"),
            Self::Adopt { guest } => write!(f, "{guest}: runs without a host agent, take it over"),
            Self::CreateDisk { guest, mib } => write!(f, "{guest}: make a data disk of {mib} MiB (sparse)"),
            Self::Start {
                guest,
                memory_mib,
                addresses,
            } => {
                write!(f, "{guest}: boot with {memory_mib} MiB")?;
                addresses
                    .iter()
                    .try_for_each(|own| write!(f, ", {own} (private)"))
            }
            Self::Forward {
                guest,
                name,
                listen,
                port,
                via: Via::Vsock,
                ..
            } => write!(f, "{guest}: forward {name}: {listen} to port {port}"),
            Self::Forward {
                guest,
                name,
                listen,
                port,
                protocol,
                ..
            } => write!(
                f,
                "{guest}: forward {name}: {listen} ({protocol} by the kernel) to port {port}"
            ),
            Self::Change { guest, what } => write!(f, "{guest}: {what}"),
            Self::NextBoot { guest, what } => {
                write!(
                    f,
                    "{guest}: {what}; in force after `sovereign down {guest}` and `sovereign up`"
                )
            }
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    /// A host agent runs.
    pub(crate) agent: bool,
    /// It is older than this program.
    pub(crate) outdated: bool,
    /// What is there of the network.
    pub(crate) network: FoundNetwork,
    /// All images are in the cache.
    pub(crate) image: bool,
    /// What that agent was asked for last.
    pub(crate) spec: Option<HostSpec>,
    /// Guests whose VMM runs or is about to.
    pub(crate) running: BTreeSet<Name>,
    /// Guests that have a data disk.
    pub(crate) disks: BTreeSet<Name>,
}

/// What leads from `found` to `wanted`, and images of the `missing` recipes; without an image its files are not compared.
///
/// # Errors
/// When no network can be made of `wanted`.
pub(crate) fn plan(
    instance: &Name,
    wanted: &HostSpec,
    missing: &[String],
    found: &Found,
) -> Result<Vec<Step>, WantedError> {
    let mut steps = Vec::new();
    steps.extend(missing.iter().cloned().map(|recipe| Step::BuildImage { recipe }));
    if !found.agent {
        steps.push(Step::StartAgent);
    } else if found.outdated {
        steps.push(Step::ReplaceAgent);
    }
    let leaving = found
        .running
        .iter()
        .filter(|name| !wanted.guests.contains_key(*name));
    steps.extend(leaving.cloned().map(|guest| Step::Stop { guest }));
    let network = network::Outlook::of(wanted, found);
    steps.extend(network.steps(instance, wanted, found)?);
    for (name, config) in &wanted.guests {
        let old = found.spec.as_ref().and_then(|spec| spec.guests.get(name));
        steps.extend(guest_steps(name, config, old, found, network.gives_cards()));
    }
    Ok(steps)
}

fn guest_steps(
    name: &Name,
    wanted: &GuestConfig,
    old: Option<&GuestConfig>,
    found: &Found,
    cards: bool,
) -> Vec<Step> {
    let guest = name.clone();
    match (found.running.contains(name), old) {
        (false, _) => {
            let disk = Step::CreateDisk {
                guest: guest.clone(),
                mib: wanted.data_mib,
            };
            let interface = wanted.interface.iter().filter(|_| cards);
            let start = Step::Start {
                guest,
                memory_mib: wanted.memory_mib,
                addresses: interface.flat_map(|own| own.addresses.clone()).collect(),
            };
            let forwards = wanted.forwards.iter().map(|forward| Step::Forward {
                guest: name.clone(),
                name: forward.name.clone(),
                listen: forward.listens(),
                port: forward.port,
                via: Via::of(forward),
                protocol: forward.transport(),
            });
            let fresh = !found.disks.contains(name);
            let first = fresh.then_some(disk).into_iter().chain([start]);
            first.chain(forwards).collect()
        }
        (true, None) => vec![Step::Adopt { guest }],
        (true, Some(old)) => {
            let change = |what| Step::Change {
                guest: name.clone(),
                what,
            };
            let next_boot = |what| Step::NextBoot {
                guest: name.clone(),
                what,
            };
            let now = live(old, wanted).into_iter().map(change);
            now.chain(machine(old, wanted, found.image).into_iter().map(next_boot))
                .collect()
        }
    }
}

/// What the guest takes over while it runs.
fn live(old: &GuestConfig, new: &GuestConfig) -> Vec<String> {
    let mut lines = Vec::new();
    let named = |config: &GuestConfig| -> BTreeMap<Name, Service> {
        let services = config.services.iter();
        services.map(|s| (s.name.clone(), s.clone())).collect()
    };
    let (before, after) = (named(old), named(new));
    compare(&before, &after, |name, change| match change {
        Difference::Added(_) => lines.push(format!("add service {name}")),
        Difference::Removed => lines.push(format!("stop service {name}; its data stays")),
        Difference::Changed(was, is) => {
            service(name, &was.kind, &is.kind, &mut lines);
            if was.requires != is.requires {
                let words = |service: &Service| {
                    let of = service.requires.as_ref();
                    of.map_or_else(|| "nothing".to_owned(), ToString::to_string)
                };
                lines.push(format!("{name}: requires {} -> {}", words(was), words(is)));
            }
            if was.limits != is.limits {
                let (was, is) = (limits(was.limits.as_ref()), limits(is.limits.as_ref()));
                lines.push(format!("{name}: limits {was} -> {is}"));
            }
        }
    });
    match (&old.tailscale, &new.tailscale) {
        (None, Some(_)) => lines.push("watch tailscale".to_owned()),
        (Some(_), None) => lines.push("watch tailscale no more".to_owned()),
        _ => {}
    }
    if old.interface != new.interface {
        lines.push(format!("interface: {} -> {}", interface(old), interface(new)));
    }
    let forwards = |config: &GuestConfig| -> BTreeMap<Name, String> {
        let forwards = config.forwards.iter();
        forwards
            .map(|f| (f.name.clone(), format!("{} to port {}", forward::from(f), f.port)))
            .collect()
    };
    let (before, after) = (forwards(old), forwards(new));
    compare(&before, &after, |name, change| {
        lines.push(match change {
            Difference::Added(to) => format!("forward {name}: {to}"),
            Difference::Removed => format!("remove forward {name}"),
            Difference::Changed(was, is) => format!("forward {name}: {was} -> {is}"),
        });
    });
    lines
}

fn interface(config: &GuestConfig) -> String {
    let Some(interface) = &config.interface else {
        return "none".to_owned();
    };
    let addresses: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
    let dns: Vec<String> = interface.dns.iter().map(ToString::to_string).collect();
    let dns = if dns.is_empty() {
        "not set".to_owned()
    } else {
        dns.join(", ")
    };
    let gateways: Vec<String> = interface.gateways.iter().map(ToString::to_string).collect();
    let way = if gateways.is_empty() {
        String::new()
    } else {
        format!(" via {}", gateways.join(" and "))
    };
    format!("{}{way} (DNS {dns})", addresses.join(", "))
}

fn limits(limits: Option<&Limits>) -> String {
    let limits = limits.cloned().unwrap_or_default();
    let parts = [
        limits.memory_max_mib.map(|mib| format!("memory {mib} MiB")),
        limits.cpu_percent.map(|percent| format!("cpu {percent}%")),
        limits.pids_max.map(|count| format!("tasks {count}")),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        return "none".to_owned();
    }
    parts.join(", ")
}

fn service(name: &Name, was: &ServiceKind, is: &ServiceKind, lines: &mut Vec<String>) {
    if was.as_str() != is.as_str() {
        lines.push(format!("{name}: {} -> {}", was.as_str(), is.as_str()));
    }
    let (from, to) = (was.port(), is.port());
    if from != to {
        lines.push(format!("{name}: port {from} -> {to}"));
    }
    let none = BTreeMap::new();
    let settings = |kind: &ServiceKind| match kind {
        ServiceKind::Postgres { settings, .. } => settings.clone(),
        ServiceKind::Miniflux { .. } => none.clone(),
    };
    compare(&settings(was), &settings(is), |key, change| {
        lines.push(match change {
            Difference::Added(value) => format!("{name}: set {key} = {value}"),
            Difference::Removed => format!("{name}: {key} back to its default"),
            Difference::Changed(was, is) => format!("{name}: {key} {was} -> {is}"),
        });
    });
}

/// What only another boot takes over.
fn machine(old: &GuestConfig, new: &GuestConfig, image_known: bool) -> Vec<String> {
    let number = |what: &str, was: u32, is: u32| (was != is).then(|| format!("{what} {was} -> {is}"));
    let lines = [
        number("memory in MiB", old.memory_mib, new.memory_mib),
        number("vcpus", old.vcpus.into(), new.vcpus.into()),
        number("data disk in MiB", old.data_mib, new.data_mib),
        (image_known && old.image.digest != new.image.digest).then(|| "another image".to_owned()),
    ];
    lines.into_iter().flatten().collect()
}

enum Difference<'a, V> {
    Added(&'a V),
    Removed,
    Changed(&'a V, &'a V),
}

fn compare<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    mut tell: impl FnMut(&K, Difference<'_, V>),
) {
    for (key, value) in new {
        match old.get(key) {
            None => tell(key, Difference::Added(value)),
            Some(was) if was != value => tell(key, Difference::Changed(was, value)),
            Some(_) => {}
        }
    }
    old.keys()
        .filter(|key| !new.contains_key(key))
        .for_each(|key| tell(key, Difference::Removed));
}

#[cfg(test)]
mod tests;
