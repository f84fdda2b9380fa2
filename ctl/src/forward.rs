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
mod tests {
    use super::*;
    use sovereign_protocol::spec::ServiceKind;
    use std::collections::BTreeMap;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    fn services(ports: &[(&str, u16)]) -> Vec<Service> {
        let service = |(own, port): &(&str, u16)| Service {
            name: name(own),
            kind: ServiceKind::Postgres {
                settings: BTreeMap::new(),
                port: *port,
            },
            limits: None,
            requires: None,
        };
        ports.iter().map(service).collect()
    }

    fn translated(forward: &Forward) -> (Transport, u16) {
        let Translated { transport, more } = forward.translated.unwrap();
        (transport, more)
    }

    fn known(guest: &str, own: &str, listen: &str) -> Known {
        Known {
            guest: name(guest),
            forward: Forward {
                name: name(own),
                service: None,
                listen: listen.parse().unwrap(),
                port: 5432,
                translated: None,
            },
        }
    }

    fn asked(mapping: &str, own: Option<&str>, known: &[Known]) -> Result<Forward, CommandError> {
        by(None, false, mapping, own, known)
    }

    fn by(
        via: Option<Via>,
        udp: bool,
        mapping: &str,
        own: Option<&str>,
        known: &[Known],
    ) -> Result<Forward, CommandError> {
        let own = own.map(name);
        let asked = Asked {
            guest: &name("sql"),
            mapping: mapping.parse().unwrap(),
            name: own.as_ref(),
            via,
            udp,
        };
        decide(&asked, &services(&[("postgres", 5432)]), known)
    }

    #[test]
    fn mappings_have_one_to_three_parts() {
        for (text, listen, more, port) in [
            ("15433", "127.0.0.1:15433", 0, None),
            ("15433:5432", "127.0.0.1:15433", 0, Some(5432)),
            ("0.0.0.0:15433", "0.0.0.0:15433", 0, None),
            ("10.0.0.1:15433:5432", "10.0.0.1:15433", 0, Some(5432)),
            ("[::1]:15433:5432", "[::1]:15433", 0, Some(5432)),
            ("[::]:1", "[::]:1", 0, None),
            ("0.0.0.0:8000-8010", "0.0.0.0:8000", 10, None),
            ("[::]:8000-8000:80", "[::]:8000", 0, Some(80)),
            ("8000-8010:5432", "127.0.0.1:8000", 10, Some(5432)),
        ] {
            let mapping: Mapping = text.parse().unwrap();
            assert_eq!(
                (mapping.listen.to_string().as_str(), mapping.more, mapping.port),
                (listen, more, port),
                "{text}"
            );
        }
        for text in [
            "", ":", "0", "1:0", "65536", "1:2:3", "a", "::1:5432", "[::1]", "1.2.3:4", "1.2.3.4:", "+1",
            "1-", "2-1", "1-+2", "1:2-3", "1-2-3",
        ] {
            let parsed = text.parse::<Mapping>();
            assert!(parsed.is_err(), "{text}: {parsed:?}");
        }
    }

    #[test]
    fn a_second_forward_gets_a_name_with_its_port_and_names_its_service() {
        let first = asked("15432:5432", None, &[]).unwrap();
        assert_eq!((first.name.as_str(), &first.service), ("postgres", &None));
        let there = [known("sql", "postgres", "127.0.0.1:15432")];
        let second = asked("15433", None, &there).unwrap();
        assert_eq!(
            (second.name.as_str(), second.service().as_str()),
            ("postgres-15433", "postgres")
        );
        let own = asked("15433", Some("db"), &there).unwrap();
        assert_eq!((own.name.as_str(), own.service().as_str()), ("db", "postgres"));
        let long = name(&"x".repeat(NAME_CHARS));
        assert_eq!(
            free_name(&long, 65535, |_| true).as_str(),
            format!("{}-65535", "x".repeat(26))
        );
    }

    #[test]
    fn the_same_again_is_the_one_that_is_there() {
        let there = [known("sql", "pg", "127.0.0.1:15432")];
        assert_eq!(asked("15432:5432", None, &there).unwrap(), there[0].forward);
        assert_eq!(asked("15432", Some("pg"), &there).unwrap(), there[0].forward);
    }

    #[test]
    fn conflicts_are_named_with_who_is_in_the_way() {
        let there = [
            known("forge", "web", "127.0.0.1:15433"),
            known("sql", "db", "127.0.0.1:15432"),
        ];
        let refused = |mapping: &str, own: Option<&str>| {
            let error = asked(mapping, own, &there).unwrap_err();
            assert_eq!(error.kind, Kind::Refused, "{mapping}");
            error.human()
        };
        let text = refused("15433", None);
        assert!(
            text.contains("127.0.0.1:15433 leads to forge:5432 (forward web)"),
            "{text}"
        );
        assert!(
            text.contains("next: sovereign forward remove forge web"),
            "{text}"
        );
        assert!(refused("0.0.0.0:15433", None).contains("is taken"));
        assert!(refused("15434", Some("db")).contains("has a forward db already"));
        assert!(
            refused("15432", Some("other")).contains("is taken"),
            "another name for the same port"
        );
        assert!(asked("[::]:15433", None, &there).is_ok(), "another family");
        let error = asked("15434:80", None, &[]).unwrap_err();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Configuration, "NoSuchService")
        );
        assert!(error.human().contains("it has postgres on 5432"));
        let two = services(&[("a", 1), ("b", 2)]);
        let asked = Asked {
            guest: &name("sql"),
            mapping: "15434".parse().unwrap(),
            name: None,
            via: None,
            udp: false,
        };
        let error = decide(&asked, &two, &[]).unwrap_err();
        assert_eq!(error.reason, "Ambiguous");
    }

    #[test]
    fn the_kernel_is_asked_for_by_word_by_udp_or_by_a_range() {
        let tcp = by(Some(Via::Kernel), false, "0.0.0.0:15433", None, &[]).unwrap();
        assert_eq!(translated(&tcp), (Transport::Tcp, 0));
        let udp = by(None, true, "[::]:15433", None, &[]).unwrap();
        assert_eq!(translated(&udp), (Transport::Udp, 0));
        let range = by(None, false, "10.0.0.5:8000-8010", None, &[]).unwrap();
        assert_eq!(translated(&range), (Transport::Tcp, 10));
        let known = Known {
            guest: name("sql"),
            forward: range,
        };
        assert_eq!(
            known.to_string(),
            "10.0.0.5:8000-8010 (tcp by the kernel) leads to sql:5432-5442 (forward postgres)"
        );
        let plain = by(Some(Via::Vsock), false, "15433", None, &[]).unwrap();
        assert_eq!(plain.translated, None);
    }

    #[test]
    fn what_cannot_be_carried_is_refused_with_what_can() {
        for (via, udp, mapping, reason, next) in [
            (
                Some(Via::Vsock),
                true,
                "10.0.0.5:53",
                "Contradiction",
                "10.0.0.5:53 --via kernel --udp",
            ),
            (
                Some(Via::Vsock),
                false,
                "0.0.0.0:80-90:5432",
                "Contradiction",
                "0.0.0.0:80-90:5432 --via kernel",
            ),
            (
                Some(Via::Kernel),
                false,
                "80",
                "Loopback",
                "0.0.0.0:80 --via kernel",
            ),
            (
                None,
                true,
                "[::1]:80",
                "Loopback",
                "0.0.0.0:80 --via kernel --udp",
            ),
        ] {
            let error = by(via, udp, mapping, None, &[]).unwrap_err();
            assert_eq!(
                (error.kind, error.reason.as_str()),
                (Kind::Usage, reason),
                "{mapping}"
            );
            let text = error.human();
            assert!(
                text.ends_with(&format!("next: sovereign forward add sql {next}\n")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_port_of_udp_is_another_than_that_of_tcp_and_a_range_has_all_of_its_own() {
        let tcp = by(Some(Via::Kernel), false, "0.0.0.0:8000-8010", None, &[]).unwrap();
        let there = [Known {
            guest: name("sql"),
            forward: tcp.clone(),
        }];
        assert_eq!(by(None, false, "0.0.0.0:8000-8010", None, &there).unwrap(), tcp);
        let udp = by(None, true, "0.0.0.0:8000-8010", None, &there).unwrap();
        assert_eq!(udp.name.as_str(), "postgres-8000");
        for taken in ["8010", "10.0.0.5:8005", "0.0.0.0:8000"] {
            let error = asked(taken, None, &there).unwrap_err();
            assert_eq!(error.reason, "AddressTaken", "{taken}");
        }
        assert!(asked("8011", None, &there).is_ok());
    }

    #[test]
    fn a_forward_is_meant_by_name_port_or_address() {
        let Known { forward, .. } = known("sql", "db", "127.0.0.1:15432");
        for text in ["db", "15432", "127.0.0.1:15432"] {
            assert!(is_meant(&forward, text), "{text}");
        }
        for text in ["d", "5432", "0.0.0.0:15432", ""] {
            assert!(!is_meant(&forward, text), "{text}");
        }
    }
    #[test]
    fn a_range_is_meant_as_a_whole_and_a_protocol_tells_two_apart() {
        let udp = by(None, true, "0.0.0.0:8000-8010", Some("x"), &[]).unwrap();
        for text in ["x", "8000-8010", "0.0.0.0:8000-8010", "8000-8010/udp"] {
            assert!(is_meant(&udp, text), "{text}");
        }
        for text in ["8000", "8000-8010/tcp", "x/udp", "0.0.0.0:8000"] {
            assert!(!is_meant(&udp, text), "{text}");
        }
    }
}
