//! The network of an instance, for the engine.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::fd::OwnedFd;
use sovereign_protocol::name::Name;
use sovereign_reconcile::finding::{Cards, FindingsView};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::examine::{Ask, ExamineError, Examiner, Mode as RemoveMode, Removal};
use super::filter::Choice;
use super::ground::Ground;
use super::names;
use super::notify::RECEIVE_BUFFER;
use super::observed::Observed;
use super::pace::FIRST_PAUSE_MS;
use super::reconcile::Reconciler;
use super::report::NetworkEvent;
use super::session::Seat;
use super::taps::{TapError, TunPool};
use super::wanted::NetworkSpec;
use crate::netns::{HelperConfig, Stage, StageFailure};

/// Everything is looked at again after this time, whatever the kernel told.
const RESYNC: Duration = Duration::from_secs(60);
/// Questions that wait for an answer.
const QUESTIONS: usize = 8;

/// How the network of an instance is run.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Whose network it is.
    pub instance: Name,
    /// Where it is.
    pub ground: Ground,
    /// The file that keeps what the host's switches were before we set them; that of a private network is beside its helper.
    pub switched: PathBuf,
    /// The back end of the packet filter.
    pub filter: Choice,
    /// Bytes of the kernel's buffer for notifications that we have not read yet.
    pub receive_buffer: usize,
    /// The pause after which everything is looked at again without a reason.
    pub resync: Duration,
    /// The pause before the second of two repairs within ten seconds, which each further one doubles. Zero repairs
    /// each change as if it was the first: for measurements of many, as it loses every fight's brake.
    pub first_pause: Duration,
}

impl NetworkConfig {
    /// The usual way.
    #[must_use]
    pub fn new(instance: Name, ground: Ground, switched: PathBuf) -> Self {
        Self {
            instance,
            ground,
            switched,
            filter: Choice::Auto,
            receive_buffer: RECEIVE_BUFFER,
            resync: RESYNC,
            first_pause: Duration::from_millis(FIRST_PAUSE_MS),
        }
    }
}

/// The network of an instance: kept as wanted by a task of its own until it is dropped.
///
/// Dropping it leaves namespace, links and helper as they are, for the next agent to adopt.
pub struct Network {
    instance: Name,
    tuns: watch::Receiver<Option<Arc<TunPool>>>,
    ask: mpsc::Sender<oneshot::Sender<Observed>>,
    examine: mpsc::Sender<Ask>,
    examiner: JoinHandle<()>,
    task: JoinHandle<Reconciler>,
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
        let (sender, tuns) = watch::channel(None);
        let (ask, asked) = mpsc::channel(QUESTIONS);
        let stop = CancellationToken::new();
        let instance = config.instance.clone();
        let (examine, questions) = mpsc::channel(QUESTIONS);
        let news = Arc::new(Notify::new());
        let examiner = Examiner {
            config: config.clone(),
            spec: wanted.clone(),
            asked: questions,
            news: news.clone(),
            events: events.clone(),
            told: Vec::new(),
        };
        let examiner = tokio::spawn(examiner.run(stop.clone()));
        let reconciler = Reconciler::new(config, wanted, events, sender, asked, news);
        Self {
            instance,
            tuns,
            ask,
            examine,
            examiner,
            task: tokio::spawn(reconciler.run(stop.clone())),
            stop: stop.drop_guard(),
        }
    }

    /// Opens the TAP of a guest for its VMM; it has carrier until the last copy is closed, so
    /// close ours right after the VMM was started. Cancel safe; waits for the helper, and up to three seconds for who
    /// holds the TAP still, so it borrows nothing.
    ///
    /// # Errors
    /// [`TapError`].
    pub fn open_tap(&self, guest: &Name) -> impl Future<Output = Result<OwnedFd, TapError>> + Send + use<> {
        let (tuns, tap) = (self.tuns.borrow().clone(), names::tap(&self.instance, guest));
        async move { tuns.ok_or(TapError::NoNetwork)?.open(&tap).await }
    }

    /// What is seen in the namespace, to plan against; the sender is dropped when the loop has ended. The answer must
    /// not be waited for by who takes the network's events.
    #[must_use]
    pub fn observed(&self) -> oneshot::Receiver<Observed> {
        let (sender, receiver) = oneshot::channel();
        let _ = self.ask.try_send(sender); // too many ask: this one hears nothing
        receiver
    }

    /// Ends the private network that another agent left and that was not opened since.
    ///
    /// # Errors
    /// As [`end`](Self::end).
    pub async fn end_private(helper: &HelperConfig) -> Result<(), StageFailure> {
        Seat::new(&Ground::Private(helper.clone())).end().await
    }

    /// What others did that harms guests, and where the kernel would send packets: looked at anew. `cards`: what is
    /// known of guests' cards. The answer must not be waited for by who takes the network's events.
    #[must_use]
    pub fn findings(&self, cards: Cards) -> oneshot::Receiver<Result<FindingsView, ExamineError>> {
        let (sender, receiver) = oneshot::channel();
        let _ = self.examine.try_send(Ask::Look(cards, sender)); // too many ask: this one hears nothing
        receiver
    }

    /// Removes leftovers of scripts by their names, or says what that would be; all of the names must be there. The
    /// answer must not be waited for by who takes the network's events.
    #[must_use]
    pub fn remove_leftovers(
        &self,
        names: Vec<String>,
        mode: RemoveMode,
    ) -> oneshot::Receiver<Result<Removal, ExamineError>> {
        let (sender, receiver) = oneshot::channel();
        let _ = self.examine.try_send(Ask::Remove(names, mode, sender));
        receiver
    }

    /// Takes away what is ours and ends the helper. A private namespace and all links in it are gone when the last
    /// VMM that holds a TAP has ended; nothing else of it is left anywhere.
    ///
    /// # Errors
    /// What could not be removed, or that the helper does not end.
    pub async fn end(self) -> Result<(), StageFailure> {
        drop((self.stop, self.tuns, self.examine));
        let _ = self.examiner.await; // it has nothing to say
        let reconciler = self.task.await.map_err(|error| {
            let error = io::Error::from(error);
            StageFailure::new(Stage::Answer, error.to_string())
        })?;
        reconciler.end().await
    }
}

#[cfg(test)]
impl Network {
    /// One that is there, and whose TAPs come from this helper; nothing is kept.
    pub(crate) fn over_helper(helper: HelperConfig) -> Self {
        use super::taps::Source;
        let instance = helper.instance.clone();
        let pool = TunPool::new(Source::Helper(helper, 0), Vec::new());
        let (ask, examine) = (mpsc::channel(1).0, mpsc::channel(1).0);
        Self {
            instance,
            tuns: watch::channel(Some(Arc::new(pool))).1,
            ask,
            examine,
            examiner: tokio::spawn(std::future::pending()),
            task: tokio::spawn(std::future::pending()),
            stop: CancellationToken::new().drop_guard(),
        }
    }
}
