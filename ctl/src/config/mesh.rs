//! Services that need one of another guest: which guests come along, and what is wrong with a requirement.

use std::collections::BTreeSet;

use sovereign_protocol::mesh::ServiceRef;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::ServiceKind;

use super::source::Source;
use super::{Problem, Settings, keys};

impl Settings {
    /// These guests with all that they need, near or far.
    pub(crate) fn with_required(&self, names: &BTreeSet<Name>) -> BTreeSet<Name> {
        let mut found = BTreeSet::new();
        let mut open: Vec<Name> = names.iter().cloned().collect();
        while let Some(name) = open.pop() {
            let Some(guest) = self.guests.get(&name) else {
                continue;
            };
            if found.insert(name) {
                let requires = guest
                    .services
                    .iter()
                    .filter_map(|service| service.requires.as_ref());
                open.extend(requires.map(|of| of.guest.clone()));
            }
        }
        found
    }
}

/// A requirement as it is written.
pub(super) fn requires(
    source: &Source<'_>,
    path: &[&str],
    written: Option<&str>,
) -> Result<Option<ServiceRef>, Box<Problem>> {
    let parse = |text: &str| {
        text.parse().map_err(|error| {
            source
                .problem(path, "BadRequirement", format!("{text:?}: {error}"))
                .accepts(keys::REQUIRES.accepted())
        })
    };
    written.map(parse).transpose()
}

/// The contract's objection to a requirement, with what it could be instead.
pub(super) fn objection(
    source: &Source<'_>,
    settings: &Settings,
    path: &[&str],
    problem: String,
) -> Box<Problem> {
    let (guest, service) = (path[1], path[3]);
    let all = settings.guests.iter().filter(|(name, _)| name.as_str() != guest);
    let known: Vec<String> = all
        .flat_map(|(name, guest)| guest.services.iter().map(move |service| (name, service)))
        .filter(|(_, service)| matches!(service.kind, ServiceKind::Postgres { .. }))
        .map(|(name, service)| format!("{name}/{}", service.name))
        .collect();
    let written = settings.guests.iter().find(|(name, _)| name.as_str() == guest);
    let services = written.into_iter().flat_map(|(_, guest)| &guest.services);
    let own = { services }.find(|own| own.name.as_str() == service);
    let words: Vec<&str> = known.iter().map(String::as_str).collect();
    let found = source.problem(path, "BadRequirement", problem);
    match own {
        Some(own) if matches!(own.kind, ServiceKind::Postgres { .. }) => found.accepts("no value"),
        _ if settings.network.is_none() => {
            found.accepts("another [network] namespace than \"none\": guests reach each other over it")
        }
        _ if settings.network.as_ref().is_some_and(|network| network.isolated) => {
            found.accepts("isolated = false in [network], or no value")
        }
        _ if known.is_empty() => found.accepts("none: add a guest with PostgreSQL first"),
        Some(own) => match &own.requires {
            Some(of) if !known.contains(&of.to_string()) => {
                found.near(&of.to_string(), &words).accepts(words.join(", "))
            }
            _ => found.accepts(words.join(", ")),
        },
        None => found.accepts(words.join(", ")),
    }
}
