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
    /// Who visits the helper holds it: it has room for few, and one visit brings enough for many guests. When the last
    /// visit failed, and how.
    visit: tokio::sync::Mutex<Option<(Instant, StageFailure)>>,
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
        Self {
            source,
            left: Mutex::new(first),
            visit: tokio::sync::Mutex::default(),
        }
    }

    /// One descriptor; the helper is visited when none is left, by one at a time. A visit that fails is the failure of
    /// all who waited for it. Cancel safe.
    pub(super) async fn take(&self) -> Result<OwnedFd, StageFailure> {
        if let Some(tun) = self.pop() {
            return Ok(tun);
        }
        let Source::Helper(helper, namespace) = &self.source else {
            return tun::open_unattached().map_err(|error| StageFailure::io(Stage::OpenTun, &error));
        };
        let since = Instant::now();
        let mut failed = self.visit.lock().await;
        if let Some(tun) = self.pop() {
            return Ok(tun); // of who visited meanwhile
        }
        if let Some((_, failure)) = failed.as_ref().filter(|(at, _)| *at >= since) {
            return Err(failure.clone());
        }
        let visited = visit(helper, *namespace).await;
        let tuns = visited.inspect_err(|failure| *failed = Some((Instant::now(), failure.clone())))?;
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

/// What the helper passes, as long as it has the namespace of this number.
async fn visit(helper: &HelperConfig, namespace: u64) -> Result<Vec<OwnedFd>, StageFailure> {
    let Set { namespaces, tuns, .. } = take(helper).await?;
    if namespaces.number().ok() == Some(namespace) {
        return Ok(tuns);
    }
    let evidence = "the helper has another namespace now";
    Err(StageFailure::new(Stage::Answer, evidence))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use tokio::task::JoinSet;

    use super::*;
    use crate::netns::fake;

    /// Takes of so many guests at once; what each came to.
    async fn take_at_once(
        pool: &std::sync::Arc<TunPool>,
        guests: usize,
    ) -> Vec<Result<OwnedFd, StageFailure>> {
        let mut takes = JoinSet::new();
        for _ in 0..guests {
            let pool = pool.clone();
            takes.spawn(async move { pool.take().await });
        }
        takes.join_all().await
    }

    /// The helper has no time for more than a few, and each visit brings sixteen.
    #[tokio::test]
    async fn many_guests_send_one_visitor_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (helper, namespace, visitors) = fake::helper(dir.path());
        let pool = TunPool::new(Source::Helper(helper, namespace), Vec::new());
        let taken = take_at_once(&pool.into(), 40).await;
        assert!(taken.iter().all(Result::is_ok), "{taken:?}");
        assert_eq!(visitors.at_once.load(Ordering::SeqCst), 1);
        assert_eq!(visitors.all.load(Ordering::SeqCst), 3, "48 for 40");
    }

    /// Else the last of many would wait for each of those before.
    #[tokio::test(start_paused = true)]
    async fn who_waited_for_a_visit_that_failed_makes_none_and_who_comes_later_does() {
        let dir = tempfile::tempdir().unwrap();
        let (helper, namespace, _) = fake::helper(dir.path());
        let socket = helper.socket.clone();
        std::fs::remove_file(&socket).unwrap();
        let silent = tokio::net::UnixListener::bind(&socket).unwrap();
        let pool = std::sync::Arc::new(TunPool::new(Source::Helper(helper, namespace), Vec::new()));
        let begun = Instant::now();
        let taken = take_at_once(&pool, 40).await;
        assert!(taken.iter().all(Result::is_err), "{taken:?}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        drop(silent);
        std::fs::remove_file(&socket).unwrap();
        let again = fake::helper(dir.path()); // as it is again
        tokio::time::advance(AGAIN).await;
        tokio::time::resume();
        assert!(pool.take().await.is_ok(), "{again:?}");
    }
}
