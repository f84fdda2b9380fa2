//! What ties a service to one of another guest: who needs whom, and what both are told of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::condition::Status;
use crate::limits::{ADDRESSES, CLIENTS, ROLE_CHARS};
use crate::name::{Name, NameError};
use crate::spec::{GuestConfig, GuestSpec, HostSpec, Service, ServiceKind, SpecError};

/// A service of a guest, written `GUEST/SERVICE`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceRef {
    /// The guest.
    pub guest: Name,
    /// The service in it.
    pub service: Name,
}

/// Why a text names no service of a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceRefError {
    /// There is no slash.
    #[error("it is not of the form GUEST/SERVICE")]
    Form,
    /// One of the two is no name.
    #[error(transparent)]
    Name(#[from] NameError),
}

impl fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.guest, self.service)
    }
}

impl FromStr for ServiceRef {
    type Err = ServiceRefError;

    fn from_str(text: &str) -> Result<Self, ServiceRefError> {
        let (guest, service) = text.split_once('/').ok_or(ServiceRefError::Form)?;
        Ok(Self {
            guest: Name::parse(guest)?,
            service: Name::parse(service)?,
        })
    }
}

impl TryFrom<String> for ServiceRef {
    type Error = ServiceRefError;

    fn try_from(text: String) -> Result<Self, ServiceRefError> {
        text.parse()
    }
}

impl From<ServiceRef> for String {
    fn from(service: ServiceRef) -> Self {
        service.to_string()
    }
}

/// The name of a role and of the database that it owns: `[a-z][a-z0-9_-]{0,62}`.
///
/// Safe between double quotes in SQL, as a word of pg_hba.conf, and in a URL.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Role(String);

/// Why a text is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no role: use 1 to {ROLE_CHARS} of a-z, 0-9, '-' and '_', starting with a letter")]
pub struct RoleError(String);

impl Role {
    /// The role of a service that needs a database: `GUEST_SERVICE`. No name has a `_`, so no two services share one.
    ///
    /// # Errors
    /// [`RoleError`] when the two names together are too long: PostgreSQL would cut them.
    pub fn of(service: &ServiceRef) -> Result<Self, RoleError> {
        Self::try_from(format!("{}_{}", service.guest, service.service))
    }

    /// The role as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Role {
    type Error = RoleError;

    fn try_from(text: String) -> Result<Self, RoleError> {
        let first = text.bytes().next().is_some_and(|c| c.is_ascii_lowercase());
        let safe = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'_';
        if first && text.len() <= ROLE_CHARS && text.bytes().all(safe) {
            return Ok(Self(text));
        }
        Err(RoleError(text.chars().take(2 * ROLE_CHARS).collect()))
    }
}

impl From<Role> for String {
    fn from(role: Role) -> Self {
        role.0
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A database of another guest that a service needs; the password comes as the secret [`Requirement::secret`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    /// Whose it is.
    pub of: ServiceRef,
    /// Whether it can be used, as the host sees it. The service is started while it is True only.
    pub status: Status,
    /// What the host saw, for people.
    pub evidence: String,
    /// Where it listens.
    pub address: IpAddr,
    /// At which port.
    pub port: u16,
    /// The role to log in as, and the name of its database.
    pub role: Role,
}

impl Requirement {
    /// The name of the password in the document's secrets, for the service that has the requirement.
    #[must_use]
    pub fn secret(service: &Name) -> String {
        format!("{service}/requires")
    }

    /// Whether two documents want the same to be used, whatever is true of it at the moment.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let place = |it: &Self| (it.of.clone(), it.address, it.port, it.role.clone());
        place(self) == place(other)
    }
}

/// A service of another guest that logs in to a database of its own here; its password is the secret [`Client::secret`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// Its role, and the name of its database.
    pub role: Role,
    /// Where it comes from; nobody else may log in as this role over the network.
    pub from: Vec<IpAddr>,
}

impl Client {
    /// The name of its password in the document's secrets, for the service that it logs in to.
    #[must_use]
    pub fn secret(&self, service: &Name) -> String {
        format!("{service}/{}", self.role)
    }
}

impl HostSpec {
    /// The guests that each guest needs, by their services.
    #[must_use]
    pub fn needs(&self) -> BTreeMap<Name, BTreeSet<Name>> {
        let needs = |guest: &GuestConfig| {
            let requires = guest
                .services
                .iter()
                .filter_map(|service| service.requires.as_ref());
            requires.map(|of| of.guest.clone()).collect()
        };
        let guests = self.guests.iter();
        guests.map(|(name, guest)| (name.clone(), needs(guest))).collect()
    }

    /// What a service needs is there, can be reached, and does not need it in turn.
    pub(crate) fn check_requirements(&self) -> Result<(), SpecError> {
        for (name, guest) in &self.guests {
            for (index, service) in guest.services.iter().enumerate() {
                self.check_requirement(name, guest, service)
                    .map_err(|problem| SpecError::Value {
                        path: format!("guests.{name}.services[{index}].requires"),
                        problem,
                    })?;
            }
        }
        let Some(way) = cycle(&self.needs()) else {
            return Ok(());
        };
        let words: Vec<&str> = way.iter().map(Name::as_str).collect();
        Err(SpecError::Value {
            path: format!("guests.{}.services", words[0]),
            problem: format!(
                "{} need each other: none could be stopped first",
                words.join(", ")
            ),
        })
    }

    fn check_requirement(&self, name: &Name, guest: &GuestConfig, service: &Service) -> Result<(), String> {
        let of = match (&service.kind, &service.requires) {
            (ServiceKind::Postgres { .. }, None) => return Ok(()),
            (ServiceKind::Postgres { .. }, Some(_)) => {
                return Err("PostgreSQL needs no other service".to_owned());
            }
            (ServiceKind::Miniflux { .. }, None) => {
                return Err("Miniflux needs a PostgreSQL, and none is named".to_owned());
            }
            (ServiceKind::Miniflux { .. }, Some(of)) => of,
        };
        if of.guest == *name {
            return Err(format!(
                "{of} is of the same guest, and only another one's can be required"
            ));
        }
        let other = self.guests.get(&of.guest);
        let other = other.ok_or_else(|| format!("there is no guest {}", of.guest))?;
        let needed = other.services.iter().find(|service| service.name == of.service);
        let needed = needed.ok_or_else(|| format!("guest {} has no service {}", of.guest, of.service))?;
        if !matches!(needed.kind, ServiceKind::Postgres { .. }) {
            return Err(format!("{of} is no PostgreSQL but {}", needed.kind.as_str()));
        }
        let has_address = |guest: &GuestConfig| {
            let interface = guest.interface.as_ref();
            interface.is_some_and(|interface| !interface.addresses.is_empty())
        };
        // Without a network nobody has one.
        if !has_address(guest) || !has_address(other) {
            return Err(format!("there is no network between {name} and {}", of.guest));
        }
        if self.network.as_ref().is_some_and(|network| network.isolated) {
            let other = &of.guest;
            return Err(format!(
                "the network is isolated: {name} and {other} do not reach each other"
            ));
        }
        let own = ServiceRef {
            guest: name.clone(),
            service: service.name.clone(),
        };
        Role::of(&own).map(drop).map_err(|error| error.to_string())
    }
}

impl GuestSpec {
    /// What is said of ties to other guests is said of a service that is there.
    pub(crate) fn check_ties(&self) -> Result<(), SpecError> {
        let kind = |name: &Name| self.services.iter().find(|s| s.name == *name).map(|s| &s.kind);
        let wrong = |path: String, problem: &str| SpecError::Value {
            path,
            problem: problem.to_owned(),
        };
        for service in self.requirements.keys() {
            if !matches!(kind(service), Some(ServiceKind::Miniflux { .. })) {
                let path = format!("requirements.{service}");
                return Err(wrong(path, "no such service, or none that needs another"));
            }
        }
        for (service, clients) in &self.clients {
            let path = format!("clients.{service}");
            if !matches!(kind(service), Some(ServiceKind::Postgres { .. })) {
                return Err(wrong(path, "no such service, or none that has clients"));
            }
            if clients.len() > CLIENTS || clients.iter().any(|c| c.from.len() > ADDRESSES) {
                return Err(wrong(path, "more clients or addresses than are taken"));
            }
        }
        Ok(())
    }
}

/// A guest that needs itself by way of others, with that way; nobody could be stopped first.
#[must_use]
pub fn cycle(needs: &BTreeMap<Name, BTreeSet<Name>>) -> Option<Vec<Name>> {
    let mut done = BTreeSet::new();
    needs
        .keys()
        .find_map(|guest| follow(guest, needs, &mut Vec::new(), &mut done))
}

fn follow(
    guest: &Name,
    needs: &BTreeMap<Name, BTreeSet<Name>>,
    way: &mut Vec<Name>,
    done: &mut BTreeSet<Name>,
) -> Option<Vec<Name>> {
    if let Some(at) = way.iter().position(|before| before == guest) {
        let closed = way[at..].iter().chain([guest]);
        return Some(closed.cloned().collect());
    }
    if done.contains(guest) {
        return None;
    }
    way.push(guest.clone());
    let found = needs
        .get(guest)
        .into_iter()
        .flatten()
        .find_map(|next| follow(next, needs, way, done));
    way.pop();
    done.insert(guest.clone());
    found
}

#[cfg(test)]
#[path = "mesh_tests.rs"]
mod tests;
