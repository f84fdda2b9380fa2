//! The machine around a private network, while guests are led out through it: watched, never changed.
//!
//! Who leads guests out opens sockets on the machine, so by which way those go is the guests' way, and which families the
//! machine has are theirs. Both are seen without any right: by the kernel's news, dumps and questions (RTM_GETROUTE).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_reconcile::family::Family;
use sovereign_reconcile::gain::Gains;
use sovereign_reconcile::observed::Address;
use sovereign_reconcile::uplink::{self, Uplink, Vpn};
use sovereign_reconcile::way::Way;

use super::chain;
use super::kernel::Kernel;
use super::notify::{Drained, Notifications};
use super::observed::Observed;
use super::session::Broken;
use super::ways::own_ways;
use crate::netns::{StageFailure, route_socket};

/// The pause before what broke is opened again, in milliseconds.
const AGAIN_MS: u64 = 1_000;

/// Families of IP that the machine leads out by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Families {
    /// Those that pasta finds when it starts now.
    pub(super) now: BTreeSet<Family>,
    /// Those that it would have found for a while.
    pub(super) lasting: BTreeSet<Family>,
}

/// What is watched, and what was seen.
pub(super) struct Outside {
    receive_buffer: usize,
    /// Absent while nobody is led out, and when it broke.
    watch: Option<Watch>,
    /// When what broke is opened again.
    again_ms: Option<u64>,
    gains: Gains,
}

/// Sockets of the machine's own network, of which the second is only listened to.
struct Watch {
    kernel: Kernel,
    notifications: Notifications,
    observed: Observed,
    leads: Leads,
}

/// By what a machine leads out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Leads {
    /// The ways of its own packets.
    ways: BTreeMap<Family, Way>,
    /// The families that pasta would find.
    families: BTreeSet<Family>,
}

/// Why the machine is not watched.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error(transparent)]
    Open(#[from] StageFailure),
    #[error(transparent)]
    Broken(#[from] Broken),
}

impl Outside {
    /// Watches nothing yet; `receive_buffer` in bytes.
    pub(super) fn new(receive_buffer: usize) -> Self {
        Self {
            receive_buffer,
            watch: None,
            again_ms: None,
            gains: Gains::default(),
        }
    }

    /// Begins to watch, goes on or stops, as `wanted`; takes the news in, or `afresh` looks at everything.
    /// What cannot be seen is tried again at the next call.
    pub(super) async fn keep(&mut self, wanted: bool, afresh: bool, now_ms: u64) {
        if !wanted {
            *self = Self::new(self.receive_buffer);
            return;
        }
        let kept = match self.watch.take() {
            Some(mut watch) => {
                let seen = if afresh {
                    watch.look().await
                } else {
                    watch.catch_up().await
                };
                seen.map(|()| watch).map_err(WatchError::from)
            }
            None => Watch::open(self.receive_buffer).await,
        };
        match kept {
            Ok(watch) => {
                self.gains.look(&watch.leads.families, now_ms);
                (self.watch, self.again_ms) = (Some(watch), None);
            }
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, "the machine's own network cannot be watched");
                self.again_ms = Some(now_ms.saturating_add(AGAIN_MS));
            }
        }
    }

    /// Waits for news; for ever while nothing is watched. Cancel safe.
    pub(super) async fn heard(&mut self) {
        let Some(watch) = &mut self.watch else {
            return std::future::pending().await;
        };
        if let Err(error) = watch.notifications.wait().await {
            tracing::warn!(%error, "no news of the machine's own network");
            self.watch = None;
        }
    }

    /// Takes the news in; whether they are any to guests, or nothing is watched any more. Most changes of a machine are
    /// none: containers come and go.
    pub(super) async fn take_in(&mut self) -> bool {
        let Some(watch) = &mut self.watch else {
            return true;
        };
        let before = watch.leads.clone();
        match watch.catch_up().await {
            Ok(()) => watch.leads != before,
            Err(broken) => {
                let error = chain(&broken);
                tracing::warn!(error, "the machine's own network is looked at anew");
                self.watch = None;
                true
            }
        }
    }

    /// The ways of the machine's own packets, as of the last look and the news since.
    pub(super) fn ways(&self) -> BTreeMap<Family, Way> {
        self.watch
            .as_ref()
            .map(|watch| watch.leads.ways.clone())
            .unwrap_or_default()
    }

    /// The families that the machine leads out by. Of one that cannot be watched nothing is known: what pasta found by then
    /// counts as gained when it is watched again.
    pub(super) fn families(&self) -> Families {
        let now = self.watch.as_ref().map(|watch| watch.leads.families.clone());
        Families {
            lasting: self.gains.lasting().clone(),
            now: now.unwrap_or_default(),
        }
    }

    /// When a family may have lasted, or what broke is opened again, in the milliseconds of [`Outside::keep`].
    pub(super) fn due_ms(&self) -> Option<u64> {
        match &self.watch {
            Some(_) => self.gains.due_ms(),
            None => self.again_ms,
        }
    }
}

impl Watch {
    async fn open(receive_buffer: usize) -> Result<Self, WatchError> {
        let kernel = Kernel::over(route_socket()?);
        let notifications = Notifications::over(route_socket()?, receive_buffer).map_err(Broken::from)?;
        let mut watch = Self {
            kernel,
            notifications,
            observed: Observed::default(),
            leads: Leads::default(),
        };
        watch.look().await?;
        Ok(watch)
    }

    /// Looks at everything; news that are older than the look are dropped first.
    async fn look(&mut self) -> Result<(), Broken> {
        self.notifications.drain(&mut self.observed, &[])?;
        self.observed = self.kernel.observe().await?;
        self.ask().await
    }

    async fn catch_up(&mut self) -> Result<(), Broken> {
        match self.notifications.drain(&mut self.observed, &[])? {
            Drained::Nothing => Ok(()),
            Drained::All | Drained::AllAndSwitches => self.ask().await,
            Drained::Lost => self.look().await,
        }
    }

    async fn ask(&mut self) -> Result<(), Broken> {
        self.leads = Leads {
            ways: own_ways(&mut self.kernel, &self.observed).await?,
            families: families(&self.observed),
        };
        Ok(())
    }
}

/// The families that pasta would find: it looks for a default route in the main table, not for what rules lead elsewhere,
/// and speaks IPv6 under a link-local address as well.
fn families(observed: &Observed) -> BTreeSet<Family> {
    let is_found = |family: &Family| {
        let exit = uplink::exit(observed, *family, &Uplink::Auto, Vpn::Bypass);
        let link = exit.link().and_then(|link| observed.link(link.as_str()));
        let is_local = |address: &Address| matches!(address.ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        link.is_some_and(|link| match family {
            Family::V4 => true,
            Family::V6 => observed.addresses_of(link.index).any(is_local),
        })
    };
    Family::BOTH.into_iter().filter(is_found).collect()
}
