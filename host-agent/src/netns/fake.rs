//! A helper for tests: it passes descriptors of `/dev/null` and counts its visitors.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fd::OwnedFd;
use sovereign_protocol::name::Name;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::contract::{Kind, Report, TUNS};
use super::{HelperConfig, pass};

/// Who came.
#[derive(Debug, Default)]
pub(crate) struct Visitors {
    here: AtomicUsize,
    /// Connections that were taken.
    pub(crate) all: AtomicUsize,
    /// At one time, at most.
    pub(crate) at_once: AtomicUsize,
}

/// A helper in this directory, the number of its "namespace", and its visitors.
pub(crate) fn helper(directory: &Path) -> (HelperConfig, u64, Arc<Visitors>) {
    let config = HelperConfig {
        instance: Name::parse("t").unwrap(),
        program: "/nonexistent".into(),
        socket: directory.join("netns"),
    };
    let listener = UnixListener::bind(&config.socket).unwrap();
    let visitors = Arc::new(Visitors::default());
    tokio::spawn(serve(listener, visitors.clone()));
    let number = std::fs::metadata("/dev/null").unwrap().ino();
    (config, number, visitors)
}

async fn serve(listener: UnixListener, visitors: Arc<Visitors>) {
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let visitors = visitors.clone();
        visitors.all.fetch_add(1, Ordering::SeqCst);
        let here = visitors.here.fetch_add(1, Ordering::SeqCst) + 1;
        visitors.at_once.fetch_max(here, Ordering::SeqCst);
        tokio::spawn(async move {
            stream.read_u8().await.unwrap();
            let mut kinds = vec![Kind::Requests, Kind::Events, Kind::Net];
            kinds.extend([Kind::Tun; TUNS]);
            let descriptor = |_: &Kind| OwnedFd::from(File::open("/dev/null").unwrap());
            let descriptors: Vec<OwnedFd> = kinds.iter().map(descriptor).collect();
            visitors.here.fetch_sub(1, Ordering::SeqCst); // before the next one can know of the answer
            let line = Report::Ready(kinds).line();
            pass::send(&stream, &line, &descriptors).await.unwrap();
        });
    }
}
