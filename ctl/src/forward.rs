//! Forwards as people ask for them: what a mapping means, and what it collides with. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use clap::ValueEnum;
use serde::Serialize;
use sovereign_protocol::limits::NAME_CHARS;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::spec::{Forward, Service, Translated};

use crate::error::{CommandError, Kind};

/// What a mapping looks like.
pub(crate) const FORM: &str = "[ADDRESS:]PORT[-LAST][:GUEST_PORT]";

/// `15433:5432`: where this machine listens, and where that leads in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Where this machine listens; its loopback unless an address is named.
    pub(crate) listen: SocketAddr,
    /// How many ports after the first lead there as well, each to the next one in the guest.
    pub(crate) more: u16,
    /// The first port in the guest; without one that of its only service.
    pub(crate) port: Option<u16>,
}

/// Why a text is no [`Mapping`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{FORM} is accepted, such as 15433:5432, 15433, 127.0.0.1:15433:5432, [::1]:15433:5432 or 0.0.0.0:8000-8010; ports are 1 to 65535"
)]
pub(crate) struct MappingError;

impl FromStr for Mapping {
    type Err = MappingError;

    fn from_str(text: &str) -> Result<Self, MappingError> {
        let ports = |text: &str| {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
            Ports::parse(text).ok().filter(|_| plain).ok_or(MappingError)
        };
        let (address, rest) =
            if let Some((address, rest)) = text.strip_prefix('[').and_then(|t| t.split_once("]:")) {
                (IpAddr::V6(address.parse().map_err(|_| MappingError)?), rest)
            } else {
                match text.split_once(':') {
                    Some((address, rest)) if address.contains('.') => {
                        (IpAddr::V4(address.parse().map_err(|_| MappingError)?), rest)
                    }
                    _ => (IpAddr::V4(Ipv4Addr::LOCALHOST), text),
                }
            };
        let (own, guest) = match rest.split_once(':') {
            Some((own, guest)) => (own, Some(ports(guest)?)),
            None => (rest, None),
        };
        let own = ports(own)?;
        if guest.is_some_and(|guest| guest.span() > 0) {
            return Err(MappingError); // its first port says it all
        }
        Ok(Self {
            listen: SocketAddr::new(address, own.first()),
            more: own.span(),
            port: guest.map(Ports::first),
        })
    }
}

/// By what a forward leads to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Via {
    /// Over vsock, to the guest's loopback: single TCP ports
    Vsock,
    /// Translated by the kernel, to the guest's address: UDP and ranges, too; needs namespace "host"
    Kernel,
}

impl Via {
    /// That of a forward.
    pub(crate) fn of(forward: &Forward) -> Self {
        match forward.translated {
            Some(_) => Self::Kernel,
            None => Self::Vsock,
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vsock => "vsock",
            Self::Kernel => "kernel",
        })
    }
}

/// What somebody asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// The guest.
    pub(crate) guest: &'a Name,
    /// From where to where.
    pub(crate) mapping: Mapping,
    /// Its name; without one, one is found.
    pub(crate) name: Option<&'a Name>,
    /// By what; without a word by vsock, if that can.
    pub(crate) via: Option<Via>,
    /// Of UDP.
    pub(crate) udp: bool,
}

impl Asked<'_> {
    /// What only the kernel can do of it.
    fn translated(&self) -> Result<Option<Translated>, CommandError> {
        let Self { mapping, udp, .. } = *self;
        let only_kernel = udp || mapping.more > 0;
        let refused = |reason, message: String, next: String| {
            Err(CommandError::new(Kind::Usage, reason, message).next(next))
        };
        match self.via {
            Some(Via::Vsock) if only_kernel => refused(
                "Contradiction",
                "vsock carries single TCP ports only".to_owned(),
                self.by_kernel(mapping.listen.ip()),
            ),
            None | Some(Via::Vsock) if !only_kernel => Ok(None),
            _ if mapping.listen.ip().is_loopback() => {
                let message = format!(
                    "the kernel does not translate packets of the loopback ({}): name an address of this machine, \
                     or 0.0.0.0 for all of them",
                    mapping.listen.ip()
                );
                refused("Loopback", message, self.by_kernel(Ipv4Addr::UNSPECIFIED.into()))
            }
            _ => Ok(Some(Translated {
                transport: if udp { Transport::Udp } else { Transport::Tcp },
                more: mapping.more,
            })),
        }
    }

    /// The command that asks for the same of the kernel.
    fn by_kernel(&self, address: IpAddr) -> String {
        let Mapping { listen, more, port } = self.mapping;
        let listen = SocketAddr::new(address, listen.port());
        let last = (more > 0).then(|| format!("-{}", listen.port().saturating_add(more)));
        let port = port.map(|port| format!(":{port}")).unwrap_or_default();
        let udp = if self.udp { " --udp" } else { "" };
        format!(
            "sovereign forward add {} {listen}{}{port} --via kernel{udp}",
            self.guest,
            last.unwrap_or_default()
        )
    }
}

/// Where a forward leads, `sql:5432`, or `sql:5432-5442` for a range.
pub(crate) fn target(guest: &Name, forward: &Forward) -> String {
    let there = forward.ports().and_then(|ports| ports.moved_to(forward.port));
    match there {
        Some(ports) => format!("{guest}:{ports}"),
        None => format!("{guest}:{}", forward.port),
    }
}

/// From where and by what a forward leads, in words.
pub(crate) fn from(forward: &Forward) -> String {
    match forward.translated {
        None => forward.listens(),
        Some(translated) => format!("{} ({} by the kernel)", forward.listens(), translated.transport),
    }
}

/// A forward with its guest, wherever it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) guest: Name,
    pub(crate) forward: Forward,
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { guest, forward } = self;
        let (from, to) = (from(forward), target(guest, forward));
        write!(f, "{from} leads to {to} (forward {})", forward.name)
    }
}

/// The port that a service has in its guest.
pub(crate) fn port_of(service: &Service) -> u16 {
    service.kind.port()
}

/// The forward that is asked for, named; `known` are all that exist, in file and host agent.
///
/// # Errors
/// `Usage` when it contradicts itself; `Configuration` when the guest has no such service; `Refused` when name or
/// address is another's.
pub(crate) fn decide(
    asked: &Asked<'_>,
    services: &[Service],
    known: &[Known],
) -> Result<Forward, CommandError> {
    let Asked { guest, mapping, .. } = *asked;
    let translated = asked.translated()?;
    let service = service(guest, services, mapping.port)?;
    let forward = |name: &Name| Forward {
        service: (service.name != *name).then(|| service.name.clone()),
        name: name.clone(),
        listen: mapping.listen,
        port: port_of(service),
        translated,
    };
    let wanted = forward(asked.name.unwrap_or(&service.name));
    let leads_there = |other: &&Known| {
        let Forward {
            listen,
            port,
            translated,
            ..
        } = other.forward;
        let same = (listen, port, translated) == (wanted.listen, wanted.port, wanted.translated);
        other.guest == *guest && same
    };
    let same = known.iter().find(leads_there);
    if let Some(same) = same.filter(|same| asked.name.is_none_or(|name| *name == same.forward.name)) {
        return Ok(same.forward.clone());
    }
    if let Some(other) = known.iter().find(|other| other.forward.collides(&wanted)) {
        let message = format!("{} is taken: {other}", wanted.listens());
        let next = format!("sovereign forward remove {} {}", other.guest, other.forward.name);
        return Err(CommandError::new(Kind::Refused, "AddressTaken", message).next(next));
    }
    let taken = |name: &Name| {
        known
            .iter()
            .find(|other| other.guest == *guest && other.forward.name == *name)
    };
    let name = match asked.name {
        Some(name) => name.clone(),
        None => free_name(&service.name, mapping.listen.port(), |name| taken(name).is_some()),
    };
    if let Some(other) = taken(&name) {
        let message = format!("guest {guest} has a forward {name} already: {other}");
        let way = match translated {
            Some(_) if asked.udp => " --via kernel --udp",
            Some(_) => " --via kernel",
            None => "",
        };
        return Err(
            CommandError::new(Kind::Refused, "NameTaken", message).next(format!(
                "sovereign forward add {guest} {}:{}{way} --name OTHER",
                wanted.listens(),
                wanted.port
            )),
        );
    }
    Ok(forward(&name))
}

fn service<'s>(
    guest: &Name,
    services: &'s [Service],
    port: Option<u16>,
) -> Result<&'s Service, CommandError> {
    let mut fitting = services
        .iter()
        .filter(|service| port.is_none_or(|port| port_of(service) == port));
    let known: Vec<String> = services
        .iter()
        .map(|s| format!("{} on {}", s.name, port_of(s)))
        .collect();
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    match (fitting.next(), fitting.next(), port) {
        (Some(service), None, _) => Ok(service),
        (Some(_), Some(_), _) => {
            let message = format!("guest {guest} has several services ({known}): name the port in the guest");
            Err(CommandError::new(Kind::Usage, "Ambiguous", message).next("sovereign forward add --help"))
        }
        (None, ..) => {
            let what = port.map_or_else(
                || "no service".to_owned(),
                |port| format!("no service on port {port}"),
            );
            let message = format!("guest {guest} has {what}; it has {known}");
            Err(CommandError::new(Kind::Configuration, "NoSuchService", message).next("sovereign status"))
        }
    }
}

/// The service's own name, else one with the port in it.
fn free_name(service: &Name, port: u16, taken: impl Fn(&Name) -> bool) -> Name {
    let suffix = format!("-{port}");
    let short: String = service.as_str().chars().take(NAME_CHARS - suffix.len()).collect();
    let with_port = Name::parse(&format!("{short}{suffix}"));
    match with_port {
        Ok(longer) if taken(service) => longer,
        _ => service.clone(),
    }
}

/// Whether a forward is the one that `text` means: its name, its port or ports here, or address and ports; behind a
/// port may stand `/tcp` or `/udp`.
pub(crate) fn is_meant(forward: &Forward, text: &str) -> bool {
    if forward.name.as_str() == text {
        return true;
    }
    let (place, transport) = match text.rsplit_once('/') {
        Some((place, transport)) => (place, Some(transport)),
        None => (text, None),
    };
    let ports = forward.ports().map(|ports| ports.to_string());
    let is_place = forward.listens() == place || ports.is_some_and(|ports| ports == place);
    is_place && transport.is_none_or(|wanted| forward.transport().to_string() == wanted)
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
