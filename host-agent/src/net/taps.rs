//! Unattached tun descriptors of the namespace: what TAPs are made and opened with.

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use rustix::fd::OwnedFd;
use tokio::time::{Instant, sleep};

use super::names::LinkName;
use super::tun;
use crate::netns::{HelperConfig, Set, Stage, StageFailure, take};

/// A TAP that another process holds is asked for again for so long: a VMM that was killed holds it until its memory is
/// freed, and a child of ours until it runs its program. A guest whose card was not there boots without one for good.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(10);

/// Why a guest's TAP cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no namespace yet.
    #[error("the private network is not there yet")]
    NoNetwork,
    /// The TAP is not there (yet).
    #[error("there is no TAP {0}")]
    Missing(LinkName),
    /// Another process holds it: a VMM that still runs.
    #[error("another process holds the TAP {0}")]
    Busy(LinkName),
    /// No tun descriptor was to be had.
    #[error(transparent)]
    NoTun(#[from] StageFailure),
    /// Anything else.
    #[error("cannot open the TAP {0}")]
    Io(LinkName, #[source] io::Error),
}

/// The descriptors that are left of the last visits to the helper.
#[derive(Debug)]
pub(super) struct TunPool {
    source: Source,
    left: Mutex<Vec<OwnedFd>>,
}

/// Where descriptors come from.
#[derive(Debug)]
pub(super) enum Source {
    /// The helper, as long as it has the namespace of this number.
    Helper(HelperConfig, u64),
    /// We open them ourselves: the network is in our own namespace.
    Own,
}

impl TunPool {
    pub(super) fn new(source: Source, first: Vec<OwnedFd>) -> Self {
        let left = Mutex::new(first);
        Self { source, left }
    }

    /// One descriptor; the helper is visited when none is left. Cancel safe.
    pub(super) async fn take(&self) -> Result<OwnedFd, StageFailure> {
        if let Some(tun) = self.pop() {
            return Ok(tun);
        }
        let Source::Helper(helper, namespace) = &self.source else {
            return tun::open_unattached().map_err(|error| StageFailure::io(Stage::OpenTun, &error));
        };
        let Set { namespaces, tuns, .. } = take(helper).await?;
        if namespaces.number().ok() != Some(*namespace) {
            return Err(StageFailure::new(
                Stage::Answer,
                "the helper has another namespace now",
            ));
        }
        self.put_back(tuns);
        self.pop()
            .ok_or_else(|| StageFailure::new(Stage::OpenTun, "the helper passed none"))
    }

    /// Opens a persistent TAP for a VMM, as soon as nobody holds it any more. Cancel safe.
    pub(super) async fn open(&self, name: &LinkName) -> Result<OwnedFd, TapError> {
        let tun = self.take().await?;
        let until = Instant::now() + PATIENCE;
        loop {
            let Err(error) = tun::attach(&tun, name) else {
                return Ok(tun);
            };
            match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
                Some(rustix::io::Errno::BUSY) if Instant::now() < until => sleep(AGAIN).await,
                Some(rustix::io::Errno::BUSY) => {
                    self.put_back(vec![tun]); // still unattached
                    return Err(TapError::Busy(name.clone()));
                }
                None if error.kind() == io::ErrorKind::NotFound => {
                    return Err(TapError::Missing(name.clone()));
                }
                _ => return Err(TapError::Io(name.clone(), error)),
            }
        }
    }

    fn pop(&self) -> Option<OwnedFd> {
        self.left.lock().unwrap_or_else(|e| e.into_inner()).pop()
    }

    fn put_back(&self, tuns: Vec<OwnedFd>) {
        self.left.lock().unwrap_or_else(|e| e.into_inner()).extend(tuns);
    }
}
