//! Forwards as people ask for them: what a mapping means, and what it collides with. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use sovereign_protocol::limits::NAME_CHARS;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{Forward, Service};

use crate::error::{CommandError, Kind};

/// What a mapping looks like.
pub(crate) const FORM: &str = "[ADDRESS:]PORT[:GUEST_PORT]";

/// `15433:5432`: where this machine listens, and where that leads in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Where this machine listens; its loopback unless an address is named.
    pub(crate) listen: SocketAddr,
    /// The port in the guest; without one that of its only service.
    pub(crate) port: Option<u16>,
}

/// Why a text is no [`Mapping`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{FORM} is accepted, such as 15433:5432, 15433, 127.0.0.1:15433:5432 or [::1]:15433:5432; ports are 1 to 65535"
)]
pub(crate) struct MappingError;

impl FromStr for Mapping {
    type Err = MappingError;

    fn from_str(text: &str) -> Result<Self, MappingError> {
        let port = |text: &str| {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit());
            let port = text.parse().ok().filter(|port| plain && *port > 0);
            port.ok_or(MappingError)
        };
        let (address, ports) =
            if let Some((address, ports)) = text.strip_prefix('[').and_then(|t| t.split_once("]:")) {
                (IpAddr::V6(address.parse().map_err(|_| MappingError)?), ports)
            } else {
                match text.split_once(':') {
                    Some((address, ports)) if address.contains('.') => {
                        (IpAddr::V4(address.parse().map_err(|_| MappingError)?), ports)
                    }
                    _ => (IpAddr::V4(Ipv4Addr::LOCALHOST), text),
                }
            };
        let (own, guest) = match ports.split_once(':') {
            Some((own, guest)) => (own, Some(port(guest)?)),
            None => (ports, None),
        };
        Ok(Self {
            listen: SocketAddr::new(address, port(own)?),
            port: guest,
        })
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
        write!(
            f,
            "{} leads to {guest}:{} (forward {})",
            forward.listen, forward.port, forward.name
        )
    }
}

/// The port that a service has in its guest.
pub(crate) fn port_of(service: &Service) -> u16 {
    service.kind.port()
}

/// The forward that is asked for, named; `known` are all that exist, in file and host agent.
///
/// # Errors
/// `Configuration` when the guest has no such service; `Refused` when name or address is another's.
pub(crate) fn decide(
    guest: &Name,
    services: &[Service],
    mapping: Mapping,
    name: Option<&Name>,
    known: &[Known],
) -> Result<Forward, CommandError> {
    let service = service(guest, services, mapping.port)?;
    let port = port_of(service);
    let leads_there = |other: &Known| {
        other.guest == *guest && other.forward.listen == mapping.listen && other.forward.port == port
    };
    let same = known.iter().find(|other| leads_there(other));
    if let Some(same) = same.filter(|same| name.is_none_or(|name| *name == same.forward.name)) {
        return Ok(same.forward.clone());
    }
    if let Some(other) = known
        .iter()
        .find(|other| overlap(other.forward.listen, mapping.listen))
    {
        let message = format!("{} is taken: {other}", mapping.listen);
        let next = format!("sovereign forward remove {} {}", other.guest, other.forward.name);
        return Err(CommandError::new(Kind::Refused, "AddressTaken", message).next(next));
    }
    let taken = |name: &Name| {
        known
            .iter()
            .find(|other| other.guest == *guest && other.forward.name == *name)
    };
    let name = match name {
        Some(name) => name.clone(),
        None => free_name(&service.name, mapping.listen.port(), |name| taken(name).is_some()),
    };
    if let Some(other) = taken(&name) {
        let message = format!("guest {guest} has a forward {name} already: {other}");
        return Err(
            CommandError::new(Kind::Refused, "NameTaken", message).next(format!(
                "sovereign forward add {guest} {}:{port} --name OTHER",
                mapping.listen
            )),
        );
    }
    Ok(Forward {
        service: (service.name != name).then(|| service.name.clone()),
        name,
        listen: mapping.listen,
        port,
        translated: None,
    })
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

/// Whether two listeners would be in each other's way.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let all = one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port() && (one.ip() == other.ip() || (all && one.is_ipv4() == other.is_ipv4()))
}

/// Whether a forward is the one that `text` means: its name, its port here, or address and port.
pub(crate) fn is_meant(forward: &Forward, text: &str) -> bool {
    forward.name.as_str() == text
        || forward.listen.to_string() == text
        || text.parse() == Ok(forward.listen.port())
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
        let own = own.map(name);
        let services = services(&[("postgres", 5432)]);
        decide(
            &name("sql"),
            &services,
            mapping.parse().unwrap(),
            own.as_ref(),
            known,
        )
    }

    #[test]
    fn mappings_have_one_to_three_parts() {
        for (text, listen, port) in [
            ("15433", "127.0.0.1:15433", None),
            ("15433:5432", "127.0.0.1:15433", Some(5432)),
            ("0.0.0.0:15433", "0.0.0.0:15433", None),
            ("10.0.0.1:15433:5432", "10.0.0.1:15433", Some(5432)),
            ("[::1]:15433:5432", "[::1]:15433", Some(5432)),
            ("[::]:1", "[::]:1", None),
        ] {
            let mapping: Mapping = text.parse().unwrap();
            assert_eq!(
                (mapping.listen.to_string().as_str(), mapping.port),
                (listen, port),
                "{text}"
            );
        }
        for text in [
            "", ":", "0", "1:0", "65536", "1:2:3", "a", "::1:5432", "[::1]", "1.2.3:4", "1.2.3.4:", "+1",
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
        let error = decide(&name("sql"), &two, "15434".parse().unwrap(), None, &[]).unwrap_err();
        assert_eq!(error.reason, "Ambiguous");
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
}
