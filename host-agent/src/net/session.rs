//! The namespace as the agent holds it: its helper, its sockets, and what was seen through them.

use std::io;
use std::sync::Arc;

use super::apply::{self, Failure};
use super::kernel::{Kernel, KernelError};
use super::notify::{Drained, Notifications};
use super::observed::Observed;
use super::plan::Plan;
use super::taps::TunPool;
use crate::netns::{Helper, HelperConfig, Namespaces, Set, Stage, StageFailure};

/// The sockets are of no use any more: take fresh ones.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// Requests are not answered.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The subscription cannot be read.
    #[error("no notifications")]
    Notifications(#[from] io::Error),
}

/// The helper, and the namespace that outlives it.
#[derive(Debug)]
pub(super) struct Place {
    config: HelperConfig,
    helper: Option<Helper>,
    /// While this is held, a helper that died can be replaced in the same namespace.
    kept: Option<Namespaces>,
}

impl Place {
    pub(super) fn new(config: HelperConfig) -> Self {
        Self {
            config,
            helper: None,
            kept: None,
        }
    }

    /// The helper: the one we know, the one that runs, or a new one in the namespace we kept.
    pub(super) async fn helper(&mut self) -> Result<&Helper, StageFailure> {
        let helper = match self.helper.take() {
            Some(helper) => helper,
            None => match Helper::find(&self.config).await? {
                Some(helper) => helper,
                None => Helper::start(&self.config, self.kept.as_ref()).await?,
            },
        };
        Ok(self.helper.insert(helper))
    }

    /// Waits until the helper that we know has ended, and forgets it. Cancel safe.
    pub(super) async fn helper_ended(&mut self) {
        match &self.helper {
            Some(helper) => helper.ended().await,
            None => std::future::pending().await,
        }
        self.helper = None;
    }

    /// Opens a session with sockets that nobody used before.
    pub(super) async fn open(&mut self, receive_buffer: usize) -> Result<Session, StageFailure> {
        let Set {
            requests,
            events,
            namespaces,
            tuns,
            ..
        } = self.helper().await?.take().await?;
        let number = namespaces
            .number()
            .map_err(|error| StageFailure::new(Stage::Proc, error.to_string()))?;
        self.kept = Some(namespaces);
        let notifications = Notifications::over(events, receive_buffer)
            .map_err(|error| StageFailure::new(Stage::Netlink, error.to_string()))?;
        Ok(Session {
            kernel: Kernel::over(requests),
            notifications,
            tuns: Arc::new(TunPool::new(self.config.clone(), number, tuns)),
            observed: Observed::default(),
        })
    }

    /// Ends the helper; the namespace goes with the last descriptor in it.
    pub(super) async fn end(self) -> Result<(), StageFailure> {
        drop(self.kept);
        let helper = match self.helper {
            Some(helper) => Some(helper),
            None => Helper::find(&self.config).await?,
        };
        match helper {
            Some(helper) => helper.end().await,
            None => crate::netns::remove_socket(&self.config), // of one that was killed
        }
    }
}

/// Sockets into the namespace.
pub(super) struct Session {
    kernel: Kernel,
    notifications: Notifications,
    /// For TAPs.
    pub(super) tuns: Arc<TunPool>,
    /// As of the last look, and of all notifications since.
    pub(super) observed: Observed,
}

impl Session {
    /// Waits for news. Cancel safe.
    pub(super) async fn changed(&mut self) -> Result<(), Broken> {
        Ok(self.notifications.wait().await?)
    }

    /// Takes the news in; looks at everything where some were lost.
    pub(super) async fn catch_up(&mut self) -> Result<(), Broken> {
        match self.notifications.drain(&mut self.observed)? {
            Drained::All => Ok(()),
            Drained::Lost => self.look().await,
        }
    }

    /// Looks at everything. News that are older than the look are dropped first; those that
    /// come later are still there for the next turn.
    pub(super) async fn look(&mut self) -> Result<(), Broken> {
        self.notifications.drain(&mut self.observed)?;
        self.observed = self.kernel.observe().await?;
        Ok(())
    }

    /// Makes the steps of a plan.
    pub(super) async fn apply(&mut self, plan: &Plan) -> Vec<Failure> {
        apply::apply(plan, &self.observed, &mut self.kernel, &self.tuns).await
    }
}
