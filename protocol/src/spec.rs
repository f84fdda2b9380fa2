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
use crate::port::{Ports, Transport};
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
    /// The host's address on the bridge.
    pub address: HostAddress,
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

    /// Whether both take a port of the same address.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let (ours, theirs) = (self.listen.ip(), other.listen.ip());
        let all = ours.is_unspecified() || theirs.is_unspecified();
        let address = ours == theirs || (all && ours.is_ipv4() == theirs.is_ipv4());
        let ports = self.ports().zip(other.ports());
        address && self.transport() == other.transport() && ports.is_some_and(|(a, b)| a.overlaps(b))
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
                        problem: format!("{} is also forwarded to guest {other}", forward.listen),
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
            let Some(network) = &self.network else {
                return Err(wrong("addresses", "there is no network".to_owned()));
            };
            for prefix in &interface.addresses {
                let address = prefix.address();
                if !network.address.subnet().contains(address) || prefix.length() != network.address.prefix()
                {
                    let problem = format!("{prefix} is not in {}", network.address.subnet());
                    return Err(wrong("addresses", problem));
                }
                if address == network.address.ip() {
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
mod tests {
    use super::*;

    fn guest() -> GuestSpec {
        GuestSpec {
            version: VERSION,
            revision: 1,
            hostname: Name::parse("sql").unwrap(),
            services: vec![Service {
                name: Name::parse("postgres").unwrap(),
                kind: ServiceKind::Postgres {
                    settings: BTreeMap::from([("work_mem".into(), "4MB".into())]),
                    port: 5432,
                },
                limits: None,
                requires: None,
            }],
            secrets: BTreeMap::from([("postgres".into(), Exposed(Secret::new("s3cret".into())))]),
            interface: None,
            open: BTreeSet::new(),
            tailscale: None,
            requirements: BTreeMap::new(),
            clients: BTreeMap::new(),
        }
    }

    #[test]
    fn a_guest_spec_survives_the_way_and_shows_no_secret() {
        let document = serde_json::to_vec(&guest()).unwrap();
        assert_eq!(GuestSpec::parse(&document).unwrap(), guest());
        assert!(!format!("{:?}", guest()).contains("s3cret"));
    }

    #[test]
    fn a_document_of_before_interfaces_and_limits_still_reads_and_is_still_written() {
        let text = r#"{"version":1,"revision":1,"hostname":"sql","services":[{"name":"postgres","kind":{"postgres":{"settings":{"work_mem":"4MB"},"port":5432}}}],"secrets":{"postgres":"s3cret"}}"#;
        assert_eq!(GuestSpec::parse(text.as_bytes()).unwrap(), guest());
        assert_eq!(serde_json::to_string(&guest()).unwrap(), text);
    }

    #[test]
    fn interface_tailscale_and_limits_survive_the_way_and_are_checked() {
        let mut full = guest();
        full.interface = Some(InterfaceSpec {
            addresses: vec!["192.168.100.2/24".parse().unwrap()],
            gateway: Some("192.168.100.1".parse().unwrap()),
            dns: vec!["192.168.100.1".parse().unwrap()],
            mtu: Some(1400),
        });
        full.tailscale = Some(TailscaleSpec {});
        full.services[0].limits = Some(Limits {
            memory_max_mib: Some(128),
            cpu_percent: Some(150),
            pids_max: None,
        });
        let parse = |spec: &GuestSpec| GuestSpec::parse(&serde_json::to_vec(spec).unwrap());
        assert_eq!(parse(&full).unwrap(), full);
        let short = r#"{"addresses":["192.168.100.2/24"]}"#;
        assert_eq!(serde_json::from_str::<InterfaceSpec>(short).unwrap().mtu, None);

        let mut wrong = full.clone();
        wrong.interface.as_mut().unwrap().gateway = Some("10.0.0.1".parse().unwrap());
        let error = parse(&wrong).unwrap_err().to_string();
        assert!(
            error.starts_with("interface.gateway: 10.0.0.1 is in none"),
            "{error}"
        );
        let mut wrong = full;
        wrong.services[0].limits.as_mut().unwrap().cpu_percent = Some(0);
        let error = parse(&wrong).unwrap_err().to_string();
        assert_eq!(error, "services[0].limits.cpu_percent: 0 is not from 1 to 6400");
    }

    #[test]
    fn a_host_document_of_before_tailscale_still_reads_and_is_still_written() {
        let text = r#"{"version":1,"guests":{"sql":{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"},"services":[],"forwards":[],"restart":{"when":"on-failure","wedged":false}}}}"#;
        let mut spec = HostSpec::parse(text.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&spec).unwrap(), text);
        let sql = spec.guests.values_mut().next().unwrap();
        sql.tailscale = Some(TailscaleSpec {});
        let written = serde_json::to_string(&spec).unwrap();
        assert_eq!(written, text.replace("}}}}", r#"},"tailscale":{}}}}"#));
        assert_eq!(HostSpec::parse(written.as_bytes()).unwrap(), spec);
    }

    #[test]
    fn forwards_of_a_guest_have_names_of_their_own_and_a_service_to_lead_to() {
        let with = |forwards: &str| {
            let text = format!(
                r#"{{"version":1,"guests":{{"sql":{{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"}},"services":[{{"name":"pg","kind":{{"postgres":{{"settings":{{}},"port":5432}}}}}}],"forwards":[{forwards}]}}}}}}"#
            );
            HostSpec::parse(text.as_bytes()).map_err(|error| error.to_string())
        };
        let plain = r#"{"name":"pg","listen":"127.0.0.1:1","port":5432}"#;
        let second = r#"{"name":"b","service":"pg","listen":"127.0.0.1:2","port":5432}"#;
        let both = with(&format!("{plain},{second}")).unwrap();
        let forwards = &both.guests.values().next().unwrap().forwards;
        assert_eq!(forwards[0].service(), forwards[1].service());
        assert_eq!(serde_json::to_string(&forwards[0]).unwrap(), plain);
        let twice = with(&format!("{plain},{}", plain.replace(":1", ":2"))).unwrap_err();
        assert_eq!(twice, "guests.sql.forwards: pg is there twice");
        let nobody = with(&second.replace("pg", "no")).unwrap_err();
        assert_eq!(nobody, "guests.sql.forwards: guest sql has no service no");
    }

    #[test]
    fn contradictions_are_named_by_path() {
        let mut twice = guest();
        twice.services.push(twice.services[0].clone());
        let error = GuestSpec::parse(&serde_json::to_vec(&twice).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "services[1].name: postgres is there twice");

        let mut injected = guest();
        injected.services[0].kind = ServiceKind::Postgres {
            settings: BTreeMap::from([("a".into(), "1\nb=2".into())]),
            port: 5432,
        };
        assert!(GuestSpec::parse(&serde_json::to_vec(&injected).unwrap()).is_err());
        let mut future = guest();
        future.version = 2;
        let error = GuestSpec::parse(&serde_json::to_vec(&future).unwrap()).unwrap_err();
        assert!(matches!(error, SpecError::Version(2)));
    }

    fn host() -> HostSpec {
        let interface = |address: &str| InterfaceSpec {
            addresses: vec![address.parse().unwrap()],
            ..InterfaceSpec::default()
        };
        let config = |listen: &str, address: &str| GuestConfig {
            memory_mib: 96,
            vcpus: 1,
            data_mib: 64,
            image: Image {
                kernel: "k".into(),
                initramfs: "i".into(),
                root: "r".into(),
                agent: "a".into(),
                digest: "d".into(),
            },
            services: guest().services,
            forwards: vec![Forward {
                name: Name::parse("postgres").unwrap(),
                service: None,
                listen: listen.parse().unwrap(),
                port: 5432,
                translated: None,
            }],
            restart: Restart::default(),
            interface: Some(interface(address)),
            tailscale: None,
        };
        let name = |text| Name::parse(text).unwrap();
        HostSpec {
            version: VERSION,
            guests: BTreeMap::from([
                (name("one"), config("127.0.0.1:1", "10.0.0.2/24")),
                (name("two"), config("127.0.0.1:2", "10.0.0.3/24")),
            ]),
            network: Some(HostNetwork {
                namespace: Namespace::Auto,
                address: "10.0.0.1/24".parse().unwrap(),
                uplink: Uplink::None,
                vpn: Vpn::Follow,
                isolated: false,
            }),
        }
    }

    /// What is said of a changed host spec; the unchanged one is good.
    fn said(change: impl FnOnce(&mut HostSpec, &mut GuestConfig)) -> String {
        let mut spec = host();
        let two = Name::parse("two").unwrap();
        let mut config = spec.guests.remove(&two).unwrap();
        change(&mut spec, &mut config);
        spec.guests.insert(two, config);
        let parsed = HostSpec::parse(&serde_json::to_vec(&spec).unwrap());
        parsed.map_or_else(|error| error.to_string(), |read| format!("{}", read == spec))
    }

    #[test]
    fn a_host_spec_is_checked_whole_and_limits_are_within() {
        assert_eq!(said(|_, _| {}), "true");
        assert_eq!(
            said(|_, two| (two.memory_mib, two.vcpus, two.data_mib) = (1 << 20, 64, 16 << 20)),
            "true"
        );
        let limits = Limits {
            memory_max_mib: Some(1 << 20),
            cpu_percent: Some(6_400),
            pids_max: Some(1 << 22),
        };
        assert_eq!(said(|_, two| two.services[0].limits = Some(limits)), "true");
        assert_eq!(
            said(|_, two| two.memory_mib = 95),
            "guests.two.memory_mib: 95 is not from 96 to 1048576"
        );
        assert!(said(|_, two| two.data_mib = (16 << 20) + 1).contains("data_mib"));
    }

    #[test]
    fn addresses_belong_to_one_guest_of_the_network() {
        let at = |address: &'static str| {
            said(move |_, two| two.interface.as_mut().unwrap().addresses = vec![address.parse().unwrap()])
        };
        let key = "guests.two.interface.addresses: ";
        assert_eq!(
            at("10.0.1.3/24"),
            format!("{key}10.0.1.3/24 is not in 10.0.0.0/24")
        );
        assert_eq!(
            at("10.0.0.3/16"),
            format!("{key}10.0.0.3/16 is not in 10.0.0.0/24")
        );
        assert_eq!(at("10.0.0.1/24"), format!("{key}10.0.0.1 is the host's own"));
        assert_eq!(at("10.0.0.2/24"), format!("{key}10.0.0.2 is guest one's as well"));
        assert_eq!(
            said(|spec, _| spec.network = None),
            "guests.one.interface.addresses: there is no network"
        );
    }

    #[test]
    fn a_forward_leads_from_its_own_port_to_a_service() {
        let two = "guests.two.forwards: ";
        assert_eq!(
            said(|_, two| two.forwards[0].port = 0),
            format!("{two}port 0 cannot be forwarded")
        );
        assert_eq!(
            said(|_, two| two.forwards[0].listen.set_port(0)),
            format!("{two}port 0 cannot be forwarded")
        );
        assert_eq!(
            said(|_, two| two.forwards[0].listen.set_port(1)),
            format!("{two}127.0.0.1:1 is also forwarded to guest one")
        );
        assert!(said(|_, two| two.forwards[0].name = Name::parse("web").unwrap()).contains("no service web"));
    }

    #[test]
    fn a_setting_has_the_name_of_one() {
        let set = |key: &str| {
            let settings = BTreeMap::from([(key.to_owned(), "1".to_owned())]);
            said(|_, two| two.services[0].kind = ServiceKind::Postgres { settings, port: 5432 })
        };
        assert_eq!(set("auto_explain.log_min_duration"), "true");
        for bad in ["", "a b", "a=b\nc"] {
            assert!(set(bad).contains("not one line"), "{bad:?}");
        }
    }
}
