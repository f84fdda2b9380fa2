//! Keeps one pasta running for a namespace: found, started, started again with pauses, ended.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fd::OwnedFd;
use serde::{Deserialize, Serialize};
use sovereign_reconcile::family::Family;
use sovereign_reconcile::names::LinkName;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::super::ground;
use super::super::outside::Families;
use super::super::pace::Retry;
use super::record::Record;
use super::{VERB, arguments};
use crate::netns::{HelperConfig, Namespaces};
use crate::process::Process;

/// One that ran so long did not fail at its start: the next one is started without a pause.
const STEADY: Duration = Duration::from_secs(5);
/// One that was killed is gone after this time.
const FAREWELL: Duration = Duration::from_secs(2);
/// Bytes of its log that are looked at.
const LOG_BYTES: u64 = 64 << 10;

/// Why there is no pasta now; it is tried again by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {evidence}")]
pub(in super::super) struct PastaFailure {
    /// What did not work.
    pub(in super::super) step: &'static str,
    /// Why.
    pub(in super::super) evidence: String,
}

/// What a pasta is for.
#[derive(Debug)]
pub(in super::super) struct Attachment<'a> {
    /// What its TAP is called.
    pub(in super::super) link: LinkName,
    /// The namespace.
    pub(in super::super) namespaces: &'a Namespaces,
    /// Name servers on the machine's own loopback, for which it answers.
    pub(in super::super) resolvers: &'a BTreeSet<IpAddr>,
    /// What the machine leads out by.
    pub(in super::super) families: Families,
}

/// One that was started now.
#[derive(Debug)]
pub(in super::super) struct Started {
    /// Its process.
    pub(in super::super) pid: u32,
    /// The families for whose sake the one before it was ended.
    pub(in super::super) gained: BTreeSet<Family>,
}

impl Started {
    /// What is told of one that takes the place of another: it had `ended`, or the machine has more now.
    pub(in super::super) fn again(&self, ended: bool) -> Option<String> {
        let again = format!("pasta: start again as process {}", self.pid);
        let gained: Vec<String> = self.gained.iter().map(ToString::to_string).collect();
        match gained.is_empty() {
            true => ended.then_some(again),
            false => Some(format!("{again}: this machine has {} now", gained.join(" and "))),
        }
    }
}

/// What tells whether one that runs is the one that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    namespace: u64,
    /// It reads the machine's resolv.conf once, at its start.
    resolvers: BTreeSet<IpAddr>,
    /// Which families there are it looks once, too.
    families: BTreeSet<Family>,
    words: Vec<String>,
}

impl Identity {
    /// The families that last and were not there when this one was started; `None` when it serves for another thing. One
    /// that was lost may come back.
    fn lacks(&self, wanted: &Self, lasting: &BTreeSet<Family>) -> Option<BTreeSet<Family>> {
        let other = Self {
            families: self.families.clone(),
            ..wanted.clone()
        };
        (*self == other).then(|| lasting - &self.families)
    }
}

#[derive(Debug)]
struct Running {
    process: Process,
    /// Absent when another version of the agent started it.
    identity: Option<Identity>,
    /// When this agent started it or found it.
    since: Instant,
    /// To be reaped; absent when another agent started it.
    child: Option<Child>,
}

/// The pasta of a namespace.
#[derive(Debug)]
pub(in super::super) struct Pasta {
    program: PathBuf,
    instance: String,
    record: PathBuf,
    log: PathBuf,
    running: Option<Running>,
    /// Whether one of another agent was looked for.
    looked: bool,
    retry: Retry,
    /// Before this, none is started.
    due: Option<Instant>,
    failure: Option<PastaFailure>,
    /// What the machine had when the last one was started.
    tried: BTreeSet<Family>,
}

impl Pasta {
    /// Beside the helper of `config`: its files are in the same directory. Looks at nothing.
    pub(in super::super) fn beside(config: &HelperConfig) -> Self {
        Self {
            program: config.program.clone(),
            instance: config.instance.to_string(),
            record: config.socket.with_file_name("pasta.json"),
            log: config.socket.with_file_name("pasta.log"),
            running: None,
            looked: false,
            retry: Retry::default(),
            due: None,
            failure: None,
            tried: BTreeSet::new(),
        }
    }

    /// Sees to it that one runs for `wanted`, and for nothing else; what was started now. One that was started without a
    /// family which the machine has now is started anew, once.
    ///
    /// # Errors
    /// Why none runs.
    pub(in super::super) async fn keep(
        &mut self,
        wanted: Option<Attachment<'_>>,
    ) -> Result<Option<Started>, PastaFailure> {
        self.find()?;
        let Some(wanted) = wanted else {
            (self.due, self.failure) = (None, None);
            self.retry.reset();
            return self.end().await.map(|()| None);
        };
        let identity = describe(&wanted)?;
        self.take_ended();
        let mut gained = BTreeSet::new();
        if let Some(running) = &self.running {
            let there = running.identity.as_ref();
            match there.and_then(|there| there.lacks(&identity, &wanted.families.lasting)) {
                Some(lacking) if lacking.is_empty() => return Ok(None),
                lacking => gained = lacking.unwrap_or_default(), // else of another namespace, or another agent's version
            }
            self.end().await?;
        }
        if !wanted.families.lasting.is_subset(&self.tried) {
            self.due = None; // it may have failed for want of them
        }
        if self.due.is_some_and(|due| Instant::now() < due)
            && let Some(failure) = &self.failure
        {
            return Err(failure.clone());
        }
        self.tried.clone_from(&identity.families);
        match self.start(&wanted, identity) {
            Ok(pid) => {
                (self.due, self.failure) = (None, None);
                Ok(Some(Started { pid, gained }))
            }
            Err(failure) => Err(self.failed(failure)),
        }
    }

    /// Waits until the one that runs has ended, or until it is time to start another; once for each. Cancel safe.
    pub(in super::super) async fn changed(&mut self) {
        match (&self.running, self.due) {
            (Some(running), _) => {
                running.process.ended().await;
                self.take_ended();
            }
            (None, Some(due)) => {
                tokio::time::sleep_until(due).await;
                self.due = None;
            }
            (None, None) => std::future::pending().await,
        }
    }

    /// Ends it, of whatever agent it is, and leaves no file of it.
    ///
    /// # Errors
    /// When it is still there after SIGKILL.
    pub(in super::super) async fn end(&mut self) -> Result<(), PastaFailure> {
        self.find()?;
        if let Some(mut running) = self.running.take() {
            running.process.kill();
            if tokio::time::timeout(FAREWELL, running.process.ended())
                .await
                .is_err()
            {
                let pid = running.process.pid;
                self.running = Some(running);
                return Err(failure("end pasta", format!("process {pid} does not end")));
            }
            if let Some(child) = &mut running.child {
                let _ = child.wait().await; // it has ended
            }
        }
        for file in [&self.record, &self.log] {
            crate::files::remove(file).map_err(|error| failure("end pasta", format!("{error:#}")))?;
        }
        Ok(())
    }

    /// Finds what another agent started.
    fn find(&mut self) -> Result<(), PastaFailure> {
        if self.looked || self.running.is_some() {
            return Ok(());
        }
        if let Some(record) = Record::read(&self.record) {
            let process = record.process();
            let process = process.map_err(|error| failure("find pasta", error.to_string()))?;
            let identity = serde_json::from_str(&record.attachment).ok();
            self.running = process.map(|process| Running {
                process,
                identity,
                since: Instant::now(),
                child: None,
            });
        }
        self.looked = true;
        Ok(())
    }

    /// Notes that the one that ran has ended.
    fn take_ended(&mut self) {
        let Some(running) = self.running.take_if(|running| running.process.has_ended()) else {
            return;
        };
        if running.since.elapsed() >= STEADY {
            self.retry.reset();
            return;
        }
        let mut said = Vec::new();
        let read = File::open(&self.log).and_then(|log| log.take(LOG_BYTES).read_to_end(&mut said));
        let said = read.ok().and_then(|_| arguments::last_line(&said));
        let said = said.unwrap_or_else(|| "it ended and said nothing".to_owned());
        self.failed(failure("attach pasta", said));
        self.looked = false; // the one that was quicker, perhaps
    }

    fn failed(&mut self, failure: PastaFailure) -> PastaFailure {
        let pause = Duration::from_millis(self.retry.failed());
        self.due = Some(Instant::now() + pause);
        self.failure = Some(failure.clone());
        failure
    }

    fn start(&mut self, wanted: &Attachment<'_>, identity: Identity) -> Result<u32, PastaFailure> {
        if let Some(why) = ground::out_of_bounds() {
            return Err(failure("attach pasta", why));
        }
        let pasta = arguments::find(std::env::var_os("PATH")).ok_or_else(|| {
            let missing = "pasta is not installed; on Debian and Ubuntu: apt-get install passt";
            failure("attach pasta", missing.to_owned())
        })?;
        let started = self.spawn(wanted, &pasta, &identity);
        let (child, process) = started.map_err(|error| failure("attach pasta", error.to_string()))?;
        let pid = process.pid;
        self.running = Some(Running {
            process,
            identity: Some(identity),
            since: Instant::now(),
            child: Some(child),
        });
        Ok(pid)
    }

    fn spawn(
        &self,
        wanted: &Attachment<'_>,
        pasta: &Path,
        identity: &Identity,
    ) -> io::Result<(Child, Process)> {
        let attachment = serde_json::to_string(identity)?;
        let (net, user) = wanted.namespaces.copies()?;
        let user = match user {
            Some(user) => user,
            None => OwnedFd::from(File::open("/dev/null")?),
        };
        let child = Command::new(&self.program)
            .args([VERB, &self.instance, "--record"])
            .arg(&self.record)
            .args(["--parent", &std::process::id().to_string()])
            .args(["--attachment", &attachment, "--"])
            .arg(pasta)
            .args(&identity.words)
            .env_clear()
            .stdin(net)
            .stdout(user)
            .stderr(File::create(&self.log)?)
            .spawn()?;
        let process = Process::of_child(&child)?;
        let process = process.ok_or_else(|| io::Error::other("it has no process id"))?;
        Ok((child, process))
    }
}

fn failure(step: &'static str, evidence: String) -> PastaFailure {
    PastaFailure { step, evidence }
}

fn describe(wanted: &Attachment<'_>) -> Result<Identity, PastaFailure> {
    let root = rustix::process::geteuid().is_root();
    let owned = wanted.namespaces.is_owned();
    let number = wanted.namespaces.number();
    Ok(Identity {
        namespace: number.map_err(|error| failure("attach pasta", error.to_string()))?,
        resolvers: wanted.resolvers.clone(),
        families: wanted.families.now.clone(),
        words: arguments::arguments(&wanted.link, owned, root && !owned, wanted.resolvers),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_serves_until_a_family_is_gained_and_whatever_is_lost() {
        let (none, four) = (BTreeSet::new(), BTreeSet::from([Family::V4]));
        let (six, both) = (BTreeSet::from([Family::V6]), BTreeSet::from(Family::BOTH));
        let of = |namespace, families: &BTreeSet<Family>| Identity {
            namespace,
            resolvers: ["127.0.0.53".parse().unwrap()].into(),
            families: families.clone(),
            words: vec!["--foreground".to_owned()],
        };
        for (began, now, lasting, lacks) in [
            (&four, &four, &none, &none),
            (&four, &four, &four, &none),
            (&four, &both, &four, &none), // not for long
            (&four, &both, &both, &six),
            (&four, &six, &six, &six), // IPv4 went and IPv6 came
            (&both, &four, &four, &none),
            (&both, &none, &none, &none),
            (&none, &both, &both, &both),
        ] {
            let found = of(1, began).lacks(&of(1, now), lasting);
            assert_eq!(found.as_ref(), Some(lacks), "{began:?} {now:?} {lasting:?}");
        }
        assert_eq!(of(1, &four).lacks(&of(2, &four), &four), None);
        let mut other = of(1, &four);
        other.words.push("--quiet".to_owned());
        assert_eq!(of(1, &four).lacks(&other, &four), None);

        // What another agent finds in the record.
        let kept = serde_json::to_string(&of(1, &both)).unwrap();
        assert_eq!(serde_json::from_str::<Identity>(&kept).unwrap(), of(1, &both));
        assert!(serde_json::from_str::<Identity>(r#"{"namespace":1,"resolvers":[],"words":[]}"#).is_err());
    }
}
