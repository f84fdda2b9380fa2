//! The network as the engine holds it: found out, opened, told what is wanted, ended.

use std::path::Path;

use sovereign_protocol::spec::{HostNetwork, Namespace, Uplink};
use sovereign_protocol::v1::Refusal;
use sovereign_reconcile::finding::FindingsView;
use sovereign_reconcile::view::{NetworkMode, NetworkView};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Engine, OpenNetwork, QUEUE};
use crate::core::Event;
use crate::net::{
    ExamineError, Ground, Network, NetworkConfig, NetworkSpec, Observed, Place, Removal, RemoveMode,
};
use crate::netns::{self, HelperConfig, StageFailure};
use crate::program;

impl Engine {
    /// The network's loop may wait for us, so we do not wait for it.
    pub(super) fn network_view(&self, reply: oneshot::Sender<NetworkView>) {
        let (mode, cards) = (self.world.network_mode(), self.world.holding_cards());
        let observed = self.network.as_ref().map(|open| open.network.observed());
        tokio::spawn(async move {
            let observed = match observed {
                Some(observed) => observed.await.unwrap_or_default(),
                None => Observed::default(),
            };
            let _ = reply.send(NetworkView {
                mode,
                observed,
                cards,
            }); // who asked may be gone
        });
    }

    /// What others did that harms guests. Nothing is to be found where there is no network.
    pub(super) fn findings(&self, reply: oneshot::Sender<Result<FindingsView, Refusal>>) {
        let cards = self.world.cards();
        let looked = self.network.as_ref().map(|open| open.network.findings(cards));
        tokio::spawn(async move {
            let view = match looked {
                Some(looked) => examined(looked).await,
                None => Ok(FindingsView::default()),
            };
            let _ = reply.send(view); // who asked may be gone
        });
    }

    pub(super) fn remove_leftovers(
        &self,
        names: Vec<String>,
        mode: RemoveMode,
        reply: oneshot::Sender<Result<Removal, Refusal>>,
    ) {
        let open = self.network.as_ref();
        let removed = open.map(|open| open.network.remove_leftovers(names, mode));
        tokio::spawn(async move {
            let removal = match removed {
                Some(removed) => examined(removed).await,
                None => Err(Refusal::Conflict(
                    "there is no network, and so no leftover".to_owned(),
                )),
            };
            let _ = reply.send(removal); // who asked may be gone
        });
    }

    /// Tries in a child whether a private network works; the answer comes as an event.
    pub(super) fn decide_network(&self, namespace: Namespace) {
        let events = self.events.clone();
        tokio::spawn(async move {
            let mode = match namespace {
                Namespace::Private => NetworkMode::Private,
                Namespace::Host => NetworkMode::Host,
                Namespace::Auto => match netns::probe(Path::new(program::ITSELF)).await {
                    Ok(()) => NetworkMode::Private,
                    Err(failure) => NetworkMode::Off(format!("namespace none (auto): {failure}")),
                },
            };
            events.send(Event::NetworkMode(mode)).await
        });
    }

    pub(super) fn open_network(&mut self) {
        if self.network.is_some() {
            return;
        }
        let (wanted, wants) = watch::channel(self.network_spec());
        let (sender, mut told) = mpsc::channel(QUEUE);
        let ground = match self.place() {
            Place::Host => Ground::Host,
            Place::Private => Ground::Private(self.helper()),
        };
        let config = NetworkConfig::new(self.layout.instance.clone(), ground, self.layout.switched());
        let network = Network::start(config, wants, sender);
        let events = self.events.clone();
        tokio::spawn(async move {
            while let Some(event) = told.recv().await {
                if events.send(Event::Network(event)).await.is_err() {
                    return;
                }
            }
        });
        self.network = Some(OpenNetwork { network, wanted });
    }

    /// Ends the network: ours, or the one that another agent left before we had opened it.
    pub(super) async fn end_network(&mut self) -> Result<(), StageFailure> {
        if self.place() == Place::Host {
            self.open_network();
        }
        if let Some(open) = self.network.take() {
            return open.network.end().await;
        }
        Network::end_private(&self.helper()).await
    }

    pub(super) fn helper(&self) -> HelperConfig {
        HelperConfig {
            instance: self.layout.instance.clone(),
            program: program::ITSELF.into(),
            socket: self.layout.netns(),
        }
    }

    /// Where the network is, or will be.
    fn place(&self) -> Place {
        let spec = self.world.spec().and_then(|spec| spec.network.as_ref());
        let asked = spec.is_some_and(|network| network.namespace == Namespace::Host);
        match self.world.network_mode() {
            NetworkMode::Host => Place::Host,
            NetworkMode::Private => Place::Private,
            NetworkMode::Undecided | NetworkMode::Off(_) if asked => Place::Host,
            NetworkMode::Undecided | NetworkMode::Off(_) => Place::Private,
        }
    }

    /// A private namespace has one way out at most, whatever its links are called.
    fn uplink(&self, network: &HostNetwork) -> Uplink {
        match (self.place(), &network.uplink) {
            (Place::Private, Uplink::Named(_)) => Uplink::Auto,
            (_, uplink) => uplink.clone(),
        }
    }

    fn network_spec(&self) -> NetworkSpec {
        let network = self.world.spec().and_then(|spec| spec.network.as_ref());
        NetworkSpec {
            place: self.place(),
            addresses: network
                .into_iter()
                .flat_map(|n| n.addresses.iter().copied())
                .collect(),
            guests: self.world.carded(),
            uplink: network.map(|network| self.uplink(network)).unwrap_or_default(),
            vpn: network.map(|network| network.vpn).unwrap_or_default(),
            isolated: network.is_some_and(|network| network.isolated),
            forwards: self.translations(),
            resolvers: self.world.advised().forwarded.clone(),
            ..NetworkSpec::default()
        }
    }

    /// A TAP for each guest that has a card, until its VMM has ended.
    pub(super) fn want_cards(&mut self) {
        if let Some(open) = &self.network {
            let now = self.network_spec();
            open.wanted.send_if_modified(|wanted| {
                *wanted != now && {
                    *wanted = now;
                    true
                }
            });
        }
    }
}

/// The answer of who looks at the network.
async fn examined<T>(answer: oneshot::Receiver<Result<T, ExamineError>>) -> Result<T, Refusal> {
    let answer = answer.await.unwrap_or(Err(ExamineError::Ended));
    answer.map_err(|error| match error {
        ExamineError::NotThere { .. } => Refusal::Conflict(error.to_string()),
        ExamineError::Look(_) | ExamineError::Ended => Refusal::Failed(error.to_string()),
    })
}
