//! The network of an instance, for the engine.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::fd::OwnedFd;
use sovereign_protocol::name::Name;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::names;
use super::notify::RECEIVE_BUFFER;
use super::observed::Observed;
use super::reconcile::Reconciler;
use super::report::NetworkEvent;
use super::session::{Place, Session};
use super::taps::{TapError, TunPool};
use super::wanted::NetworkSpec;
use crate::netns::{HelperConfig, Stage, StageFailure};

/// Everything is looked at again after this time, whatever the kernel told.
const RESYNC: Duration = Duration::from_secs(60);

/// How the network of an instance is run.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// The helper that holds the namespace.
    pub helper: HelperConfig,
    /// Bytes of the kernel's buffer for notifications that we have not read yet.
    pub receive_buffer: usize,
    /// The pause after which everything is looked at again without a reason.
    pub resync: Duration,
}

impl NetworkConfig {
    /// The usual way.
    #[must_use]
    pub fn new(helper: HelperConfig) -> Self {
        Self {
            helper,
            receive_buffer: RECEIVE_BUFFER,
            resync: RESYNC,
        }
    }
}

/// What the loop last saw.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    tuns: Option<Arc<TunPool>>,
    observed: Arc<Observed>,
}

impl Seen {
    pub(super) fn of(session: &Session) -> Self {
        Self {
            tuns: Some(session.tuns.clone()),
            observed: Arc::new(session.observed.clone()),
        }
    }
}

/// The private network of an instance: kept as wanted by a task of its own until it is dropped.
///
/// Dropping it leaves namespace, links and helper as they are, for the next agent to adopt.
#[derive(Debug)]
pub struct Network {
    instance: Name,
    seen: watch::Receiver<Seen>,
    task: JoinHandle<Place>,
    stop: DropGuard,
}

impl Network {
    /// Finds the namespace of the instance or makes it, and keeps it as `wanted` says. The task
    /// ends when the network is dropped or ended, or when the sender of `wanted` is gone.
    ///
    /// `events` may be small, but whoever takes them must not wait for anything of this network.
    #[must_use]
    pub fn start(
        config: NetworkConfig,
        wanted: watch::Receiver<NetworkSpec>,
        events: mpsc::Sender<NetworkEvent>,
    ) -> Self {
        let (sender, seen) = watch::channel(Seen::default());
        let stop = CancellationToken::new();
        let reconciler = Reconciler::new(&config, wanted, events, sender);
        Self {
            instance: config.helper.instance,
            seen,
            task: tokio::spawn(reconciler.run(stop.clone())),
            stop: stop.drop_guard(),
        }
    }

    /// Opens the TAP of a guest for its VMM; it has carrier until the last copy is closed, so
    /// close ours right after the VMM was started. Cancel safe; waits for nothing but the helper.
    ///
    /// # Errors
    /// [`TapError`].
    pub async fn open_tap(&self, guest: &Name) -> Result<OwnedFd, TapError> {
        let tuns = self.seen.borrow().tuns.clone().ok_or(TapError::NoNetwork)?;
        tuns.open(&names::tap(&self.instance, guest)).await
    }

    /// What was last seen in the namespace; a plan can be made against it.
    #[must_use]
    pub fn observed(&self) -> Arc<Observed> {
        self.seen.borrow().observed.clone()
    }

    /// Ends the helper. The namespace and all links in it are gone when the last VMM that holds
    /// a TAP has ended; nothing else of it is left anywhere.
    ///
    /// # Errors
    /// When the helper does not end.
    pub async fn end(self) -> Result<(), StageFailure> {
        drop((self.stop, self.seen));
        let place = self.task.await.map_err(|error| {
            let error = io::Error::from(error);
            StageFailure::new(Stage::Answer, error.to_string())
        })?;
        place.end().await
    }
}
