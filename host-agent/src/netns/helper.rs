//! The agent's side: find the helper or start it, take what it opens, end it.

use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::fd::OwnedFd;
use sovereign_protocol::name::Name;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::process::Child;

use super::contract::{ASK_END, ASK_SET, At, Kind, NETFILTERS, Report, Stage, StageFailure};
use super::{pass, probe};
use crate::process::Process;

/// The word after the program's name that makes it the helper.
pub const VERB: &str = "netns";
/// A helper must answer within this time.
const ANSWER: Duration = Duration::from_secs(5);
/// A helper that was asked to end may take this long before it is killed.
const FAREWELL: Duration = Duration::from_secs(2);

/// How the helper of an instance is found and started.
#[derive(Debug, Clone)]
pub struct HelperConfig {
    /// The instance, for people who read process lists.
    pub instance: Name,
    /// Our own program.
    pub program: PathBuf,
    /// Where the helper listens; the directory is ours alone.
    pub socket: PathBuf,
}

/// What one visit to the helper brings.
#[derive(Debug)]
pub struct Set {
    /// For requests.
    pub requests: OwnedFd,
    /// For subscriptions.
    pub events: OwnedFd,
    /// For the packet filter: requests, news, and connections that the kernel remembers. `None` where kernel or helper
    /// has none.
    pub netfilter: Option<[OwnedFd; NETFILTERS]>,
    /// The switches that let packets pass between links, IPv4 and IPv6, as far as they can be written.
    pub forward: [Option<OwnedFd>; 2],
    /// The namespaces themselves: with them a dead helper is replaced.
    pub namespaces: Namespaces,
    /// Unattached tun descriptors.
    pub tuns: Vec<OwnedFd>,
}

/// The namespaces, held open. They live while any descriptor of them does.
#[derive(Debug)]
pub struct Namespaces {
    net: OwnedFd,
    user: Option<OwnedFd>,
}

impl Namespaces {
    /// The number that `/proc/PID/ns/net` shows for it.
    ///
    /// # Errors
    /// The system's own.
    pub fn number(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.net)?.st_ino)
    }

    /// Whether a user namespace of the helper owns it.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        self.user.is_some()
    }

    /// Both of them again, for a process that is to enter them: the network, and the user namespace that owns it.
    ///
    /// # Errors
    /// The system's own.
    pub fn copies(&self) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
        let user = self.user.as_ref().map(OwnedFd::try_clone).transpose()?;
        Ok((self.net.try_clone()?, user))
    }
}

/// A helper that runs.
#[derive(Debug)]
pub struct Helper {
    config: HelperConfig,
    process: Process,
}

impl Helper {
    /// Finds the helper that runs; `None` when nobody listens.
    ///
    /// # Errors
    /// [`StageFailure`] when something else is in its place.
    pub async fn find(config: &HelperConfig) -> Result<Option<Self>, StageFailure> {
        let stream = match UnixStream::connect(&config.socket).await {
            Ok(stream) => stream,
            Err(error) if is_absence(&error) => return Ok(None),
            Err(error) => return Err(StageFailure::io(Stage::Answer, &error)),
        };
        let peer = stream.peer_cred().at(Stage::Answer)?;
        let ours = rustix::process::geteuid().as_raw();
        if peer.uid() != ours {
            let evidence = format!("{} is held by user {}", config.socket.display(), peer.uid());
            return Err(StageFailure::new(Stage::Answer, evidence));
        }
        let process = Process::of_peer(&stream).at(Stage::Answer)?;
        Ok(process.map(|process| Self {
            config: config.clone(),
            process,
        }))
    }

    /// Starts a helper with a new namespace, or with that of `kept`.
    ///
    /// # Errors
    /// The step that failed, as the helper names it.
    pub async fn start(config: &HelperConfig, kept: Option<&Namespaces>) -> Result<Self, StageFailure> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().at(Stage::Start)?;
        let mut command = tokio::process::Command::new(&config.program);
        command
            .arg(VERB)
            .arg(config.instance.as_str())
            .arg("--socket")
            .arg(&config.socket)
            .args(kept.map(|_| "--passed"))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().at(Stage::Start)?;
        drop(command); // and with it our copy of the helper's end
        let unproven = Unproven::of(&child)?;
        let ready = async {
            if let Some(kept) = kept {
                pass_namespaces(ours, kept).await.at(Stage::Join)?;
            }
            probe::first_line(&mut child).await
        };
        let late = || StageFailure::new(Stage::Answer, format!("nothing in {ANSWER:?}"));
        match tokio::time::timeout(ANSWER, ready)
            .await
            .unwrap_or_else(|_| Err(late()))
        {
            Ok(_) => {
                unproven.keep();
                Self::find(config).await?.ok_or_else(late)
            }
            Err(failure) => {
                drop(unproven);
                let _ = child.wait().await; // reaped here and now
                Err(failure)
            }
        }
    }

    /// Takes a fresh set: sockets that nobody used before, and more tun descriptors.
    ///
    /// # Errors
    /// The step that failed inside, or [`Stage::Answer`].
    pub async fn take(&self) -> Result<Set, StageFailure> {
        take(&self.config).await
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Waits until the helper's process has ended. Cancel safe.
    pub async fn ended(&self) {
        self.process.ended().await;
    }

    /// Ends the helper; the namespace goes when the last descriptor in it is closed.
    ///
    /// # Errors
    /// When it is still there after SIGKILL.
    pub async fn end(self) -> Result<(), StageFailure> {
        let asked = async {
            let mut stream = UnixStream::connect(&self.config.socket).await?;
            stream.write_all(&[ASK_END]).await
        };
        let orderly = async {
            let _ = asked.await; // one that does not take it is killed
            self.ended().await;
        };
        if tokio::time::timeout(FAREWELL, orderly).await.is_err() {
            self.process.kill();
            let _ = tokio::time::timeout(FAREWELL, self.ended()).await;
        }
        if tokio::time::timeout(Duration::ZERO, self.ended()).await.is_err() {
            return Err(StageFailure::new(
                Stage::Answer,
                format!("process {} does not end", self.pid()),
            ));
        }
        remove_socket(&self.config)
    }
}

/// Removes the socket that a dead helper may have left.
pub(crate) fn remove_socket(config: &HelperConfig) -> Result<(), StageFailure> {
    match std::fs::remove_file(&config.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at(Stage::Listen),
        _ => Ok(()),
    }
}

/// A helper that has not said that it is ready: killed when we stop waiting for it, because
/// before it listens nobody else could find it.
struct Unproven(Option<Process>);

impl Unproven {
    fn of(child: &Child) -> Result<Self, StageFailure> {
        let process = Process::of_child(child).at(Stage::Start)?;
        let process = process.ok_or_else(|| StageFailure::new(Stage::Start, "it has no process id"))?;
        Ok(Self(Some(process)))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            process.kill();
        }
    }
}

/// Takes a fresh set from whoever listens at the instance's socket.
pub(crate) async fn take(config: &HelperConfig) -> Result<Set, StageFailure> {
    let asked = async {
        let mut stream = UnixStream::connect(&config.socket).await?;
        stream.write_all(&[ASK_SET]).await?;
        pass::receive(&stream).await
    };
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let answer = tokio::time::timeout(ANSWER, asked).await.map_err(late);
    let (line, descriptors) = answer.and_then(|answer| answer).at(Stage::Answer)?;
    sort(Report::parse(&line)?, descriptors)
}

fn is_absence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

async fn pass_namespaces(socket: std::os::unix::net::UnixStream, kept: &Namespaces) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    let stream = UnixStream::from_std(socket)?;
    let mut kinds = vec![Kind::Net];
    let mut descriptors = vec![kept.net.try_clone()?];
    if let Some(user) = &kept.user {
        kinds.push(Kind::User);
        descriptors.push(user.try_clone()?);
    }
    pass::send(&stream, &Report::Ready(kinds).line(), &descriptors).await
}

fn sort(kinds: Vec<Kind>, descriptors: Vec<OwnedFd>) -> Result<Set, StageFailure> {
    if kinds.len() != descriptors.len() {
        let evidence = format!("{} names for {} descriptors", kinds.len(), descriptors.len());
        return Err(StageFailure::new(Stage::Answer, evidence));
    }
    let (mut single, mut tuns, mut netfilter) = (Vec::new(), Vec::new(), Vec::new());
    for (kind, descriptor) in kinds.into_iter().zip(descriptors) {
        match kind {
            Kind::Tun => tuns.push(descriptor),
            Kind::Netfilter => netfilter.push(descriptor),
            other => single.push((other, descriptor)),
        }
    }
    let mut take = |kind| {
        let at = single.iter().position(|(found, _)| *found == kind);
        at.map(|at| single.swap_remove(at).1)
    };
    let missing = |kind| StageFailure::new(Stage::Answer, format!("{kind:?} is not among the descriptors"));
    Ok(Set {
        requests: take(Kind::Requests).ok_or_else(|| missing(Kind::Requests))?,
        events: take(Kind::Events).ok_or_else(|| missing(Kind::Events))?,
        forward: [take(Kind::ForwardV4), take(Kind::ForwardV6)],
        namespaces: Namespaces {
            net: take(Kind::Net).ok_or_else(|| missing(Kind::Net))?,
            user: take(Kind::User),
        },
        netfilter: netfilter.try_into().ok(),
        tuns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn set(kinds: &[Kind]) -> Result<Set, StageFailure> {
        sort(kinds.to_vec(), kinds.iter().map(|_| descriptor()).collect())
    }

    #[test]
    fn a_set_is_complete_or_names_what_lacks() {
        let all = [
            Kind::Tun,
            Kind::Requests,
            Kind::Unknown,
            Kind::Events,
            Kind::Net,
            Kind::Sysctl,
            Kind::Tun,
        ];
        let older = set(&all).unwrap();
        assert_eq!(older.tuns.len(), 2);
        assert!(older.netfilter.is_none(), "a helper from before them works");
        let with = |sockets: usize| {
            let kinds = all
                .into_iter()
                .chain(std::iter::repeat_n(Kind::Netfilter, sockets));
            set(&kinds.collect::<Vec<_>>()).unwrap().netfilter
        };
        assert!(with(NETFILTERS).is_some());
        assert!(with(NETFILTERS - 1).is_none(), "all or nothing");
        for lacking in [Kind::Requests, Kind::Events, Kind::Net] {
            let rest: Vec<Kind> = all.into_iter().filter(|kind| *kind != lacking).collect();
            let failure = set(&rest).unwrap_err();
            assert!(failure.evidence.contains(&format!("{lacking:?}")), "{failure}");
        }
        assert!(sort(all.to_vec(), vec![descriptor()]).is_err());
    }
}
