//! What this host asks itself: its resolv.conf, read again when somebody changes it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
use sovereign_reconcile::resolver::{FILE_BYTES, HostResolver, ResolvConf};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::core::Event;

const OWN: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the servers that it asks (systemd-resolved.service(8)).
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
/// Who writes a file in several steps has done so after this time.
const SETTLE: Duration = Duration::from_millis(100);
/// Directories that were not there may be now; the files are looked at again after this time in any case.
const LOOK: Duration = Duration::from_secs(60);

/// The files that are looked at.
#[derive(Debug, Clone)]
pub struct Files {
    own: PathBuf,
    upstream: Option<PathBuf>,
}

impl Files {
    /// This host's, or `instead` of them that one.
    #[must_use]
    pub fn of(instead: Option<OsString>) -> Self {
        match instead {
            Some(path) => Self {
                own: path.into(),
                upstream: None,
            },
            None => Self {
                own: OWN.into(),
                upstream: Some(UPSTREAM.into()),
            },
        }
    }

    /// What they say now.
    #[must_use]
    pub fn read(&self) -> HostResolver {
        HostResolver {
            own: read(&self.own),
            upstream: self.upstream.as_deref().and_then(read),
        }
    }

    /// Tells of each change after `known`; ends when nobody listens. Cancel safe.
    pub async fn watch(&self, mut known: HostResolver, events: mpsc::Sender<Event>) {
        loop {
            let watched = self.watched();
            let waits = async {
                match &watched {
                    Ok(notifications) => notifications.readable().await,
                    Err(_) => std::future::pending().await, // it is looked at now and then
                }
            };
            // What is missed between two watches is seen here.
            let now = self.read();
            if now != known {
                known = now;
                if events.send(Event::Resolver(known.clone())).await.is_err() {
                    return;
                }
            }
            if tokio::time::timeout(LOOK, waits).await.is_ok() {
                tokio::time::sleep(SETTLE).await;
            }
        }
    }

    /// A descriptor that is readable when something happens in a directory of the files: they are replaced as a whole.
    fn watched(&self) -> io::Result<pipe::Receiver> {
        let notifications = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::MOVED_FROM
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        for directory in self.directories() {
            // One that is not there is tried again by the slow look.
            let _ = add_watch(&notifications, &directory, flags);
        }
        pipe::Receiver::from_owned_fd_unchecked(notifications)
    }

    /// Those of the files and of what they are links to.
    fn directories(&self) -> BTreeSet<PathBuf> {
        let named = || [Some(&self.own), self.upstream.as_ref()].into_iter().flatten();
        let meant = named().filter_map(|file| file.canonicalize().ok());
        let all = named().cloned().chain(meant);
        all.filter_map(|file| file.parent().map(Path::to_owned)).collect()
    }
}

fn read(path: &Path) -> Option<ResolvConf> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(ResolvConf::parse(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Longer than any machine takes, and shorter than [`LOOK`]: what is seen within it was told by the kernel.
    const SOON: Duration = Duration::from_secs(30);

    async fn next(events: &mut mpsc::Receiver<Event>) -> String {
        let event = tokio::time::timeout(SOON, events.recv()).await.unwrap().unwrap();
        let Event::Resolver(HostResolver { own, .. }) = event else {
            panic!("{event:?}");
        };
        let servers = own.map(|own| own.servers.iter().map(ToString::to_string).collect());
        servers.map_or("none".to_owned(), |servers: Vec<String>| servers.join(" "))
    }

    #[tokio::test]
    async fn a_file_is_read_again_however_it_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let write = |name: &str, server: &str| {
            let parent = at(name);
            fs::create_dir_all(parent.parent().unwrap()).unwrap();
            fs::write(parent, format!("nameserver {server}\n")).unwrap();
        };
        write("etc/resolv.conf", "10.0.0.1");
        let files = Files::of(Some(at("etc/resolv.conf").into()));
        let known = files.read();
        let (sender, mut events) = mpsc::channel(4);
        let task = tokio::spawn(async move { files.watch(known, sender).await });

        write("etc/resolv.conf", "10.0.0.2");
        assert_eq!(next(&mut events).await, "10.0.0.2");
        write("etc/other", "10.0.0.9"); // says nothing of it
        write("etc/new", "10.0.0.3");
        fs::rename(at("etc/new"), at("etc/resolv.conf")).unwrap();
        assert_eq!(next(&mut events).await, "10.0.0.3");
        fs::remove_file(at("etc/resolv.conf")).unwrap();
        assert_eq!(next(&mut events).await, "none");

        // A link, and then what it leads to, in another directory.
        write("run/stub", "10.0.0.4");
        symlink(at("run/stub"), at("etc/resolv.conf")).unwrap();
        assert_eq!(next(&mut events).await, "10.0.0.4");
        write("run/stub", "10.0.0.5");
        assert_eq!(next(&mut events).await, "10.0.0.5");
        drop(events);
        write("run/stub", "10.0.0.6");
        tokio::time::timeout(SOON, task).await.unwrap().unwrap();
    }
}
