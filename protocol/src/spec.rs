//! What is wanted: documents of versioned JSON, validated whole before anything changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::interface::InterfaceSpec;
use crate::limits;
use crate::link_name::LinkName;
use crate::mesh::{Client, Requirement, ServiceRef};
use crate::name::Name;
use crate::one_or_more;
use crate::port::{Ports, Taken, Transport};
use crate::secret::{self, Secret};
use crate::subnet::HostAddress;

/// The document version that this build writes.
pub const VERSION: u16 = 1;

/// Everything that one host agent is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSpec {
    /// [`VERSION`].
    pub version: u16,
    /// The guests by name.
    pub guests: BTreeMap<Name, GuestConfig>,
    /// The network that they share; without one they are reached over vsock only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<HostNetwork>,
}

/// The network of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostNetwork {
    /// Where its links are made.
    pub namespace: Namespace,
    /// The host's addresses on the bridge, one of each family at most; the first counts where one must do.
    #[serde(rename = "address", with = "one_or_more")]
    pub addresses: Vec<HostAddress>,
    /// By which way guests leave.
    #[serde(default, skip_serializing_if = "is_default")]
    pub uplink: Uplink,
    /// What they do while a VPN of the host is up.
    #[serde(default, skip_serializing_if = "is_default")]
    pub vpn: Vpn,
    /// Guests reach the host only, not each other.
    #[serde(default, skip_serializing_if = "is_default")]
    pub isolated: bool,
}

impl HostNetwork {
    /// The host's address in whose subnet this is.
    #[must_use]
    pub fn around(&self, ip: IpAddr) -> Option<HostAddress> {
        let subnets = self.addresses.iter().copied();
        { subnets }.find(|address| address.subnet().contains(ip))
    }

    /// The guests' subnets as a person reads them.
    #[must_use]
    pub fn subnets(&self) -> String {
        let subnets = self.addresses.iter().map(|address| address.subnet().to_string());
        subnets.collect::<Vec<_>>().join(" and ")
    }

    /// The first contradiction: the key below `network`, and the problem.
    fn check(&self) -> Result<(), SpecError> {
        let wrong = |problem| SpecError::Value {
            path: "network.address".to_owned(),
            problem,
        };
        if self.addresses.is_empty() {
            return Err(wrong("there is no address of this host".to_owned()));
        }
        one_or_more::one_of_each_family(self.addresses.iter().map(HostAddress::ip)).map_err(wrong)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// By which way guests leave.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Uplink {
    /// By none.
    #[default]
    None,
    /// By that of the host itself.
    Auto,
    /// By the first of these links that has a default route.
    Named(Vec<LinkName>),
}

/// What guests do while a VPN of the host is up. On plain Linux they follow the host's own routing always; on Android
/// netd's rules leave it to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vpn {
    /// They go through it.
    #[default]
    Follow,
    /// They do not leave.
    Block,
    /// They go past it.
    Bypass,
}

/// Where the links of a network are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Namespace {
    /// Private where that works, else there is no network.
    Auto,
    /// A network namespace of our own: nothing of the machine's changes.
    Private,
    /// The namespace that the host agent itself is in: guests are reached from there, and may leave.
    Host,
}

/// One guest as the host runs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// Memory of the VM, in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Size of the data disk, in MiB (a sparse file).
    pub data_mib: u32,
    /// What it boots.
    pub image: Image,
    /// What runs in it, in order of start.
    pub services: Vec<Service>,
    /// Ports of the host that lead to ports of the guest.
    pub forwards: Vec<Forward>,
    /// When it is started again by itself.
    #[serde(default)]
    pub restart: Restart,
    /// Its interface in the network, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<InterfaceSpec>,
    /// Tailscale in it, when it is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tailscale: Option<TailscaleSpec>,
}

impl GuestConfig {
    /// Its first address of the same family.
    #[must_use]
    pub fn address_of(&self, like: IpAddr) -> Option<IpAddr> {
        let addresses = self.interface.iter().flat_map(|interface| &interface.addresses);
        let mut addresses = addresses.map(|prefix| prefix.address());
        addresses.find(|address| address.is_ipv4() == like.is_ipv4())
    }

    /// The services that others than this guest reach by its address.
    #[must_use]
    pub fn open(&self) -> BTreeSet<Name> {
        let translated = self
            .forwards
            .iter()
            .filter(|forward| forward.translated.is_some());
        translated.map(|forward| forward.service().clone()).collect()
    }
}

/// When a guest is started again by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restart {
    /// After its end.
    pub when: RestartWhen,
    /// Also when it is wedged: its VMM is silent, or takes connections that nobody answers.
    pub wedged: bool,
}

/// See [`Restart`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartWhen {
    /// When nobody meant the end.
    #[default]
    OnFailure,
    /// When it powered itself off, too.
    Always,
    /// Only when somebody asks for it.
    Never,
}

/// A port of the host that leads to one of the guest: over vsock to its loopback, or translated by the kernel to its
/// address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forward {
    /// Its name, which no other forward of the guest has.
    pub name: Name,
    /// The service that it leads to; without one, that of its own name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Where the host listens.
    pub listen: SocketAddr,
    /// The port in the guest.
    pub port: u16,
    /// Packets are translated by the host's kernel; without it, TCP connections are carried over vsock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub translated: Option<Translated>,
}

/// What of a forward only the kernel can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Translated {
    /// TCP or UDP.
    #[serde(default, skip_serializing_if = "is_default")]
    pub transport: Transport,
    /// How many ports after the first lead there as well, each to the next one in the guest.
    #[serde(default, skip_serializing_if = "is_default")]
    pub more: u16,
}

impl Forward {
    /// The ports of the host that it takes; `None` when they go beyond the last.
    #[must_use]
    pub fn ports(&self) -> Option<Ports> {
        let more = self.translated.map_or(0, |translated| translated.more);
        Ports::range(self.listen.port(), self.listen.port().checked_add(more)?)
    }

    /// TCP or UDP.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.translated
            .map_or(Transport::Tcp, |translated| translated.transport)
    }

    /// What it takes of the host; `None` as for [`Forward::ports`].
    #[must_use]
    pub fn takes(&self) -> Option<Taken> {
        Some(Taken {
            transport: self.transport(),
            address: self.listen.ip(),
            ports: self.ports()?,
        })
    }

    /// Whether both take a port of the same address.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let both = self.takes().zip(other.takes());
        both.is_some_and(|(ours, theirs)| ours.collides(theirs))
    }

    /// Where the host listens, as sovereign.toml writes it: `0.0.0.0:8000`, or `0.0.0.0:8000-8010` for a range.
    #[must_use]
    pub fn listens(&self) -> String {
        match self.ports().filter(|ports| ports.span() > 0) {
            Some(ports) => format!("{}-{}", self.listen, ports.last()),
            None => self.listen.to_string(),
        }
    }

    /// The name of the service that it leads to.
    #[must_use]
    pub fn service(&self) -> &Name {
        self.service.as_ref().unwrap_or(&self.name)
    }
}

/// The files a guest boots from, made by `sovereign build`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// An uncompressed kernel.
    pub kernel: PathBuf,
    /// The initramfs without the boot segment.
    pub initramfs: PathBuf,
    /// The read-only root (erofs).
    pub root: PathBuf,
    /// The read-only disk with guest agent and modules (erofs).
    pub agent: PathBuf,
    /// Digest over all of them.
    pub digest: String,
}

/// Everything that one guest agent is to keep true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// [`VERSION`].
    pub version: u16,
    /// The host's count of changes to this guest's spec.
    pub revision: u64,
    /// The guest's host name.
    pub hostname: Name,
    /// What runs, in order of start.
    pub services: Vec<Service>,
    /// Secret values by name; kept on /run only.
    pub secrets: BTreeMap<String, Exposed>,
    /// The network interface; without one the guest's is left alone and nothing is said about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<InterfaceSpec>,
    /// Tailscale in the guest; without it nothing is said about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tailscale: Option<TailscaleSpec>,
    /// What services here need of other guests, by service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub requirements: BTreeMap<Name, Requirement>,
    /// Services of other guests that log in here, by the service that they log in to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub clients: BTreeMap<Name, Vec<Client>>,
    /// Services that are reached by the guest's address from anywhere, each by its own log-in.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub open: BTreeSet<Name>,
}

/// Tailscale in a guest is to run: `{}`. Its daemon's socket is at its usual place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TailscaleSpec {}

/// A secret in a document that goes to the guest, and nowhere else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Exposed(#[serde(with = "secret::expose")] pub Secret);

/// A service in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// Its name, and its data directory's under `/var/lib`.
    pub name: Name,
    /// What it is.
    pub kind: ServiceKind,
    /// What it may use; everything without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// The service of another guest that it needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requires: Option<ServiceRef>,
}

/// What a service with all its processes may use (cgroup v2); what is `None` has no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory in MiB, page cache included; over it the kernel reclaims, then kills (`memory.max`).
    #[serde(default)]
    pub memory_max_mib: Option<u32>,
    /// Processor time in percent of one CPU; 150 is one and a half (`cpu.max`).
    #[serde(default)]
    pub cpu_percent: Option<u32>,
    /// Processes and threads (`pids.max`).
    #[serde(default)]
    pub pids_max: Option<u32>,
}

/// The services that are understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum ServiceKind {
    /// PostgreSQL from the image.
    Postgres {
        /// Lines of postgresql.conf over the generated ones.
        settings: BTreeMap<String, String>,
        /// The TCP port inside the guest.
        port: u16,
    },
    /// Miniflux from the image; it keeps all that it knows in a PostgreSQL of another guest.
    Miniflux {
        /// The TCP port inside the guest.
        port: u16,
    },
}

impl ServiceKind {
    /// The TCP port inside the guest.
    #[must_use]
    pub fn port(&self) -> u16 {
        match self {
            Self::Postgres { port, .. } | Self::Miniflux { port } => *port,
        }
    }

    /// Its name in documents and in sovereign.toml.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Postgres { .. } => "postgres",
            Self::Miniflux { .. } => "miniflux",
        }
    }
}

/// Why a document is not valid.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It is no JSON of this shape.
    #[error("the document cannot be read")]
    Unreadable(#[source] serde_json::Error),
    /// It is of another version.
    #[error("the document is of version {0}; this build reads version {VERSION}")]
    Version(u16),
    /// Its values contradict each other or a limit.
    #[error("{path}: {problem}")]
    Value {
        /// Where, such as `guests.sql.memory_mib`.
        path: String,
        /// What is wrong and what is accepted.
        problem: String,
    },
}

impl HostSpec {
    /// Reads and validates a document.
    ///
    /// # Errors
    /// The first problem, as [`SpecError`].
    pub fn parse(document: &[u8]) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_slice(document).map_err(SpecError::Unreadable)?;
        check_version(spec.version)?;
        spec.network.as_ref().map_or(Ok(()), HostNetwork::check)?;
        spec.check_addresses()?;
        let mut others: Vec<(&Name, &Forward)> = Vec::new();
        for (name, guest) in &spec.guests {
            let at = |key: &str| format!("guests.{name}.{key}");
            within(at("memory_mib"), guest.memory_mib, limits::MEMORY_MIB)?;
            within(at("vcpus"), u32::from(guest.vcpus), limits::VCPUS)?;
            within(at("data_mib"), guest.data_mib, limits::DATA_MIB)?;
            check_services(&at("services"), &guest.services)?;
            for (index, forward) in guest.forwards.iter().enumerate() {
                check_forward(&at("forwards"), name, guest, forward)?;
                if forward.translated.is_some() {
                    spec.check_translated(&at("forwards"), guest, forward)?;
                }
                if guest.forwards[..index]
                    .iter()
                    .any(|other| other.name == forward.name)
                {
                    return Err(SpecError::Value {
                        path: at("forwards"),
                        problem: format!("{} is there twice", forward.name),
                    });
                }
                if let Some((other, _)) = others.iter().find(|(_, other)| other.collides(forward)) {
                    return Err(SpecError::Value {
                        path: at("forwards"),
                        problem: format!("{} is also forwarded to guest {other}", forward.listens()),
                    });
                }
                others.push((name, forward));
            }
        }
        spec.check_requirements()?;
        Ok(spec)
    }

    /// The kernel translates in the host's own namespace only, to an address of the guest's.
    fn check_translated(&self, path: &str, guest: &GuestConfig, forward: &Forward) -> Result<(), SpecError> {
        let listen = forward.listen.ip();
        let to = guest.address_of(listen);
        let here = self.network.as_ref().map(|network| network.namespace);
        let problem = if here != Some(Namespace::Host) {
            "the kernel leads to guests only from network namespace \"host\"".to_owned()
        } else if listen.is_loopback() {
            format!("{listen} is the loopback, whose packets the kernel does not translate")
        } else if to.is_none() {
            format!("the guest has no address of the family of {listen}")
        } else {
            return Ok(());
        };
        Err(SpecError::Value {
            path: path.to_owned(),
            problem,
        })
    }

    /// Each address is one guest's, in the network's subnet, and not the host's own.
    fn check_addresses(&self) -> Result<(), SpecError> {
        let mut owners = BTreeMap::new();
        for (name, guest) in &self.guests {
            let Some(interface) = &guest.interface else {
                continue;
            };
            let wrong = |key: &str, problem| SpecError::Value {
                path: format!("guests.{name}.interface.{key}"),
                problem,
            };
            interface.check().map_err(|(key, problem)| wrong(&key, problem))?;
            if !interface.ways.is_empty() {
                return Err(wrong("ways", "only the host agent says them".to_owned()));
            }
            let Some(network) = &self.network else {
                return Err(wrong("addresses", "there is no network".to_owned()));
            };
            for prefix in &interface.addresses {
                let address = prefix.address();
                let host = network.around(address);
                let Some(host) = host.filter(|host| host.prefix() == prefix.length()) else {
                    let problem = format!("{prefix} is not in {}", network.subnets());
                    return Err(wrong("addresses", problem));
                };
                if address == host.ip() {
                    return Err(wrong("addresses", format!("{address} is the host's own")));
                }
                if let Some(other) = owners.insert(address, name) {
                    return Err(wrong(
                        "addresses",
                        format!("{address} is guest {other}'s as well"),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl GuestSpec {
    /// Reads and validates a document.
    ///
    /// # Errors
    /// The first problem, as [`SpecError`].
    pub fn parse(document: &[u8]) -> Result<Self, SpecError> {
        let spec: Self = serde_json::from_slice(document).map_err(SpecError::Unreadable)?;
        check_version(spec.version)?;
        check_services("services", &spec.services)?;
        if let Some(interface) = &spec.interface {
            interface.check().map_err(|(key, problem)| SpecError::Value {
                path: format!("interface.{key}"),
                problem,
            })?;
        }
        spec.check_ties()?;
        Ok(spec)
    }
}

fn check_version(version: u16) -> Result<(), SpecError> {
    if version == VERSION {
        Ok(())
    } else {
        Err(SpecError::Version(version))
    }
}

fn within(path: String, value: u32, range: RangeInclusive<u32>) -> Result<(), SpecError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(SpecError::Value {
        path,
        problem: format!("{value} is not from {} to {}", range.start(), range.end()),
    })
}

fn check_forward(path: &str, guest: &Name, config: &GuestConfig, forward: &Forward) -> Result<(), SpecError> {
    let fits = forward.ports().and_then(|ports| ports.moved_to(forward.port));
    let problem = if forward.listen.port() == 0 || forward.port == 0 {
        "port 0 cannot be forwarded".to_owned()
    } else if fits.is_none() {
        "its ports go beyond 65535".to_owned()
    } else if !config
        .services
        .iter()
        .any(|service| service.name == *forward.service())
    {
        format!("guest {guest} has no service {}", forward.service())
    } else {
        return Ok(());
    };
    Err(SpecError::Value {
        path: path.to_owned(),
        problem,
    })
}

fn check_services(path: &str, services: &[Service]) -> Result<(), SpecError> {
    for (index, service) in services.iter().enumerate() {
        if services[..index].iter().any(|other| other.name == service.name) {
            return Err(SpecError::Value {
                path: format!("{path}[{index}].name"),
                problem: format!("{} is there twice", service.name),
            });
        }
        if let Some(limits) = &service.limits {
            check_limits(&format!("{path}[{index}].limits"), limits)?;
        }
        let ServiceKind::Postgres { settings, .. } = &service.kind else {
            continue;
        };
        for (key, value) in settings {
            if !is_setting_name(key) || value.contains(['\n', '\r', '\0']) {
                return Err(SpecError::Value {
                    path: format!("{path}[{index}].settings"),
                    problem: format!("{key:?} is not one line of postgresql.conf"),
                });
            }
        }
    }
    Ok(())
}

fn check_limits(path: &str, wanted: &Limits) -> Result<(), SpecError> {
    let ranges = [
        (
            "memory_max_mib",
            wanted.memory_max_mib,
            limits::SERVICE_MEMORY_MIB,
        ),
        ("cpu_percent", wanted.cpu_percent, limits::SERVICE_CPU_PERCENT),
        ("pids_max", wanted.pids_max, limits::SERVICE_TASKS),
    ];
    for (key, value, range) in ranges {
        if let Some(value) = value {
            within(format!("{path}.{key}"), value, range)?;
        }
    }
    Ok(())
}

fn is_setting_name(key: &str) -> bool {
    !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_.".contains(c))
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
