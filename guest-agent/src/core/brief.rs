//! All that one service is told of a specification.

use sovereign_protocol::condition::Status;
use sovereign_protocol::mesh::{Client, Requirement};
use sovereign_protocol::spec::{Exposed, GuestSpec, Service};

/// One service with what the rest of the document says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brief {
    /// Its own part.
    pub service: Service,
    /// Its own password.
    pub password: Option<Exposed>,
    /// The database of another guest that it needs, with the password for it.
    pub requirement: Option<(Requirement, Option<Exposed>)>,
    /// Who logs in to it from other guests, with their passwords.
    pub clients: Vec<(Client, Option<Exposed>)>,
    /// It is reached by the guest's address from anywhere.
    pub open: bool,
}

/// Whether a requirement can be used at the moment, and what the host saw.
pub type Required = (Status, String);

impl Brief {
    /// What a document says of one of its services.
    #[must_use]
    pub fn of(spec: &GuestSpec, service: &Service) -> Self {
        let name = &service.name;
        let secret = |key: &str| spec.secrets.get(key).cloned();
        let requirement = spec.requirements.get(name);
        let clients = spec.clients.get(name).into_iter().flatten();
        Self {
            service: service.clone(),
            password: secret(name.as_str()),
            requirement: requirement.map(|needed| (needed.clone(), secret(&Requirement::secret(name)))),
            clients: clients
                .map(|client| (client.clone(), secret(&client.secret(name))))
                .collect(),
            open: spec.open.contains(name),
        }
    }

    /// Whether what it needs can be used; `None` when it needs nothing.
    #[must_use]
    pub fn required(&self) -> Option<Required> {
        let (needed, _) = self.requirement.as_ref()?;
        Some((needed.status, needed.evidence.clone()))
    }

    /// The same order, whatever is true of the requirement at the moment.
    #[must_use]
    pub fn is_same_order(&self, other: &Self) -> bool {
        let place = match (&self.requirement, &other.requirement) {
            (Some((one, secret)), Some((two, other))) => one.is_same_place(two) && secret == other,
            (None, None) => true,
            _ => false,
        };
        let rest = |it: &Self| {
            (
                it.service.clone(),
                it.password.clone(),
                it.clients.clone(),
                it.open,
            )
        };
        place && rest(self) == rest(other)
    }
}
