//! The plan's part about links, addresses and routes: made by the function with which the host agent makes its own.

use std::collections::BTreeSet;
use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, HostSpec, Namespace};
use sovereign_reconcile::observed::Observed;
use sovereign_reconcile::plan::plan;
use sovereign_reconcile::view::{NetworkLook, NetworkMode, NetworkView};
use sovereign_reconcile::wanted::{NetworkSpec, Place, Switched, Wanted, WantedError};

use super::{Found, Step};

/// What is there of the network.
#[derive(Debug, Clone, Default)]
pub(crate) enum FoundNetwork {
    /// No host agent runs and none left one.
    #[default]
    Absent,
    /// There is one, and nobody here can look at it: its host agent has ended, or is of another build.
    Hidden,
    /// What the host agent sees.
    Seen(NetworkView),
    /// What the namespace is like in which a host agent will make it: none runs.
    Looked(NetworkLook),
}

/// What the network will be.
#[derive(Debug)]
pub(super) enum Outlook<'a> {
    /// There is none and none is made.
    None,
    /// It is made.
    Made(Namespace),
    /// It is taken over unseen.
    Adopted,
    /// It is made in a namespace that was looked at.
    MadeHere(&'a NetworkLook),
    /// It is there.
    There(&'a NetworkView),
}

impl<'a> Outlook<'a> {
    pub(super) fn of(wanted: &HostSpec, found: &'a Found) -> Self {
        let made = || match &wanted.network {
            Some(network) => Self::Made(network.namespace),
            None => Self::None,
        };
        match &found.network {
            FoundNetwork::Absent => made(),
            FoundNetwork::Hidden => Self::Adopted,
            FoundNetwork::Looked(look) if wanted.network.is_some() => Self::MadeHere(look),
            FoundNetwork::Looked(_) => Self::None,
            FoundNetwork::Seen(view) => match &view.mode {
                NetworkMode::Private | NetworkMode::Host => Self::There(view),
                NetworkMode::Undecided => made(),
                // The host agent tries again only when another network is asked for.
                NetworkMode::Off(_) => {
                    let before = found.spec.as_ref().map(|spec| &spec.network);
                    if before == Some(&wanted.network) {
                        Self::None
                    } else {
                        made()
                    }
                }
            },
        }
    }

    /// Whether a guest that boots gets a card.
    pub(super) fn gives_cards(&self) -> bool {
        !matches!(self, Self::None)
    }

    pub(super) fn steps(
        &self,
        instance: &Name,
        wanted: &HostSpec,
        found: &Found,
    ) -> Result<Vec<Step>, WantedError> {
        let fresh = Observed::fresh();
        let (first, observed, cards) = match self {
            Self::None => return Ok(Vec::new()),
            Self::Adopted => return Ok(vec![Step::AdoptNetwork]),
            Self::Made(namespace) => {
                let namespace = *namespace;
                (Some(Step::MakeNetwork { namespace }), &fresh, BTreeSet::new())
            }
            Self::MadeHere(look) => (None, &look.observed, BTreeSet::new()),
            Self::There(view) => (None, &view.observed, view.cards.clone()),
        };
        // A guest keeps its TAP until its VMM has ended, also when the file gives it no address any more.
        let kept = |name: &Name| cards.contains(name) && found.running.contains(name);
        let spec = network_spec(wanted, kept);
        let mut first = first;
        let plan = match self {
            Self::MadeHere(look) => {
                let plan = look.plan(instance, Some(&spec))?;
                let namespace = Namespace::Host;
                first = (!plan.steps.is_empty()).then_some(Step::MakeNetwork { namespace });
                plan
            }
            _ => plan(
                &Wanted::of(instance, &spec, &Switched::new(), observed)?,
                observed,
            ),
        };
        let steps = plan.steps.into_iter().map(Step::Network);
        let conflicts = plan.conflicts.into_iter().map(Step::Conflict);
        Ok(first.into_iter().chain(steps).chain(conflicts).collect())
    }
}

/// What a document means for the network while no guest is ready; guests without an address have a card if it is `kept`.
pub(crate) fn network_spec(wanted: &HostSpec, kept: impl Fn(&Name) -> bool) -> NetworkSpec {
    let guests = wanted.guests.iter();
    let guests = guests.filter(|(name, guest)| guest.interface.is_some() || kept(name));
    let addresses = |guest: &GuestConfig| -> BTreeSet<IpAddr> {
        let interface = guest.interface.iter();
        interface
            .flat_map(|interface| &interface.addresses)
            .map(Prefix::address)
            .collect()
    };
    let network = wanted.network.as_ref();
    NetworkSpec {
        place: match network.map(|network| network.namespace) {
            Some(Namespace::Host) => Place::Host,
            _ => Place::Private,
        },
        addresses: network
            .into_iter()
            .flat_map(|n| n.addresses.iter().copied())
            .collect(),
        guests: guests
            .map(|(name, guest)| (name.clone(), addresses(guest)))
            .collect(),
        uplink: network.map(|network| network.uplink.clone()).unwrap_or_default(),
        vpn: network.map(|network| network.vpn).unwrap_or_default(),
        isolated: network.is_some_and(|network| network.isolated),
        ..NetworkSpec::default()
    }
}
