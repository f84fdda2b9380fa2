//! Connections are forgotten beside the loop: a look at all that the kernel remembers takes milliseconds in one system call,
//! and the next foreign change is repaired meanwhile.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fd::OwnedFd;

use super::chain;
use super::conntrack::{Conntrack, Stale};

/// Between two looks, so that somebody who keeps taking our rules away does not keep a processor busy.
const PAUSE: Duration = Duration::from_millis(100);

/// A thread with a socket of its own.
pub(super) struct Forgetter {
    asked: Sender<Stale>,
    thread: JoinHandle<()>,
}

impl Forgetter {
    /// Starts it over a socket (NETLINK_NETFILTER) that was opened in the namespace and not bound.
    ///
    /// # Errors
    /// The system's own.
    pub(super) fn start(socket: OwnedFd) -> io::Result<Self> {
        let (asked, stale) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let conntrack = {
            let _inside = runtime.enter();
            Conntrack::over(socket)?
        };
        let thread = std::thread::Builder::new().name("connections".to_owned());
        let thread = thread.spawn(move || runtime.block_on(forget(conntrack, &stale)))?;
        Ok(Self { asked, thread })
    }

    /// Has connections forgotten, soon.
    pub(super) fn forget(&self, stale: Stale) {
        if !stale.is_empty() {
            let _ = self.asked.send(stale); // a thread that ended has said why
        }
    }

    /// Waits until all that was asked for is done.
    pub(super) async fn finish(self) {
        let Self { asked, thread } = self;
        drop(asked);
        let _ = tokio::task::spawn_blocking(move || thread.join()).await; // a panic is in the log
    }
}

async fn forget(mut conntrack: Conntrack, asked: &Receiver<Stale>) {
    while let Ok(mut stale) = asked.recv() {
        asked.try_iter().for_each(|more| stale.add(more));
        match conntrack.flush(&stale).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "connections begin anew"),
            Err(error) => tracing::warn!(
                error = chain(&error),
                "connections of a former forward or way may go on"
            ),
        }
        std::thread::sleep(PAUSE); // this thread has nothing else to do
    }
}
