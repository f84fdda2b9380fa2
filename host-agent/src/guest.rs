//! One boot of one guest, seen from the agent: start or adopt the shim, keep the link, stop in order.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use sovereign_protocol::boot::AGENT_PORT;
use sovereign_protocol::handshake::Identity;
use sovereign_protocol::transport::Address;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::Child;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::clock::wall_ns;
use crate::core::Event;
use crate::files;
use crate::link::{self, Target, Wanted};
use crate::net::TapError;
use crate::process::Process;
use crate::program;
use crate::shim::contract::{ExitReason, ExitRecord, Machine, Message, Request, ShimConfig};

/// A shim opens its socket within this time; a KVM probe may come first.
const SHIM_START: Duration = Duration::from_secs(15);
const SHIM_PAUSE: Duration = Duration::from_millis(5);
/// The guest's services and init may take this long to power off.
const ORDERLY: Duration = Duration::from_secs(20);
/// A shim that said its last word ends within this time.
const FAREWELL: Duration = Duration::from_secs(2);
/// Then the power button is pressed, and then the VMM is ended.
const BUTTON: Duration = Duration::from_secs(5);

/// What the engine tells a running guest.
#[derive(Debug)]
pub struct Handle {
    /// The wanted spec, or shutdown.
    pub wanted: watch::Sender<Wanted>,
    /// The guest agent's address while a VMM runs.
    pub target: watch::Receiver<Option<Target>>,
}

/// Starts the task of one boot, with what opens the TAP of its card; its last event is [`Event::Ended`].
#[must_use]
pub fn start(
    config: ShimConfig,
    tap: Option<impl Future<Output = Result<OwnedFd, TapError>> + Send + 'static>,
    wanted: Wanted,
    events: mpsc::Sender<Event>,
) -> Handle {
    let (wanted_sender, wanted) = watch::channel(wanted);
    let (target_sender, target) = watch::channel(None);
    tokio::spawn(async move {
        let guest = config.guest.clone();
        let (config, tap) = with_card(config, tap, &events).await;
        let record = match run(&config, tap, wanted, &target_sender, &events).await {
            Ok(record) => record,
            Err(error) => start_failed(&error),
        };
        target_sender.send_replace(None);
        tracing::info!(%guest, reason = ?record.reason, evidence = %record.evidence.escape_debug(), "guest ended");
        let _ = events.send(Event::Ended(guest, record)).await; // the engine ends last
    });
    Handle {
        wanted: wanted_sender,
        target,
    }
}

/// The card as it comes to be: with its TAP, or, if that cannot be opened, none. It is too late for one once the VMM
/// runs, and a guest needs none to be talked to.
async fn with_card(
    mut config: ShimConfig,
    tap: Option<impl Future<Output = Result<OwnedFd, TapError>>>,
    events: &mpsc::Sender<Event>,
) -> (ShimConfig, Option<OwnedFd>) {
    let Some(opening) = tap else {
        return (config, None);
    };
    match opening.await {
        Ok(tap) => (config, Some(tap)),
        Err(error) => {
            let why = format!("{:#}", anyhow::Error::new(error));
            tracing::warn!(guest = %config.guest, error = why, "the guest boots without a card");
            config.card = None;
            let _ = events.send(Event::NoCard(config.guest.clone(), why)).await; // the engine ends last
            (config, None)
        }
    }
}

/// The record of a boot that never began.
#[must_use]
pub fn start_failed(error: &anyhow::Error) -> ExitRecord {
    ExitRecord {
        boot_id: String::new(),
        reason: ExitReason::StartFailed,
        evidence: format!("{error:#}"),
        wall_ns: wall_ns(),
    }
}

async fn run(
    config: &ShimConfig,
    tap: Option<OwnedFd>,
    wanted: watch::Receiver<Wanted>,
    target: &watch::Sender<Option<Target>>,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<ExitRecord> {
    let (mut shim, child) = Shim::adopt_or_start(config, tap).await?;
    let record = follow(config, &mut shim, wanted, target, events).await?;
    shim.farewell(child).await;
    Ok(record)
}

async fn follow(
    config: &ShimConfig,
    shim: &mut Shim,
    mut wanted: watch::Receiver<Wanted>,
    target: &watch::Sender<Option<Target>>,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<ExitRecord> {
    let mut stop = Stop::default();
    let (boot_id, key, vmm) = match shim.identify(&mut wanted, &mut stop).await? {
        Some(Message::Identity { boot_id, key, vmm }) => (boot_id, key, vmm),
        Some(Message::Exited(record)) => return Ok(record),
        _ => return Ok(last_record(config, None)),
    };
    let pid = vmm.pid;
    tracing::info!(guest = %config.guest, boot_id, pid, "guest started");
    let reached = Target {
        address: Address::Hybrid {
            path: config.paths.vsock(),
            port: AGENT_PORT,
        },
        identity: Identity {
            boot_id: boot_id.clone(),
            key,
        },
    };
    target.send_replace(Some(reached.clone()));
    let guest = config.guest.clone();
    events
        .send(Event::Booted {
            guest: guest.clone(),
            boot_id: boot_id.clone(),
            vmm,
            machine: started_with(config),
        })
        .await?;

    let link = link::keep(guest.clone(), reached, wanted.clone(), events.clone());
    tokio::pin!(link);
    loop {
        // Losing an arm is safe: lines and watch are cancel safe, the link is pinned.
        tokio::select! {
            () = &mut link => anyhow::bail!("the engine is gone"),
            message = shim.next() => match message {
                Some(Message::Exited(record)) => return Ok(record),
                Some(Message::State(state)) => events.send(Event::VmmState(guest.clone(), state)).await?,
                Some(Message::Identity { .. }) => {}
                None => return Ok(last_record(config, Some(&boot_id))),
            },
            changed = wanted.changed() => {
                changed.context("the engine is gone")?;
                stop.heed(&wanted.borrow_and_update());
            }
            () = stop.due() => shim.take(stop.next()).await?,
        }
    }
}

/// What the shim, perhaps another agent's, was started with.
fn started_with(config: &ShimConfig) -> Machine {
    let written = files::read_optional(&config.paths.config()).ok().flatten();
    let started = written.and_then(|bytes| serde_json::from_slice::<ShimConfig>(&bytes).ok());
    started.as_ref().unwrap_or(config).machine()
}

/// The escalation of a stop: the agent's own shutdown, the power button, the VMM's end, and that of a shim which does
/// not even do that (it may be stopped by a signal); its VMM dies with it.
#[derive(Debug, Default)]
struct Stop {
    due: Option<Instant>,
    done: usize,
}

/// One step of it.
#[derive(Debug)]
enum Step {
    Ask(Request),
    EndShim,
}

impl Stop {
    fn heed(&mut self, wanted: &Wanted) {
        if wanted.kill && self.done < 1 {
            (self.due, self.done) = (Some(Instant::now()), 1);
        } else if wanted.shutdown {
            self.due.get_or_insert(Instant::now() + ORDERLY);
        }
    }

    async fn due(&self) {
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
    }

    fn next(&mut self) -> Step {
        self.due = Some(Instant::now() + BUTTON);
        self.done += 1;
        match self.done {
            1 => Step::Ask(Request::PowerDown),
            2 => Step::Ask(Request::Kill),
            _ => Step::EndShim,
        }
    }
}

/// How a boot ended whose shim is gone without a word.
fn last_record(config: &ShimConfig, boot_id: Option<&str>) -> ExitRecord {
    let kept = files::read_optional(&config.paths.exit_record)
        .ok()
        .flatten()
        .and_then(|bytes| serde_json::from_slice::<ExitRecord>(&bytes).ok())
        .filter(|record| boot_id.is_none_or(|id| id == record.boot_id));
    kept.unwrap_or_else(|| ExitRecord {
        boot_id: boot_id.unwrap_or_default().to_owned(),
        reason: ExitReason::ShimDied,
        evidence: "the shim ended without an exit record, and its VMM with it".to_owned(),
        wall_ns: wall_ns(),
    })
}

struct Shim {
    /// `None` when it ended as we connected.
    process: Option<Process>,
    lines: Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

impl Shim {
    /// The child is kept so that it is reaped; it is not ended with us.
    async fn adopt_or_start(
        config: &ShimConfig,
        tap: Option<OwnedFd>,
    ) -> anyhow::Result<(Self, Option<Child>)> {
        let path = config.paths.shim();
        if let Ok(stream) = UnixStream::connect(&path).await {
            return Ok((Self::new(stream), None));
        }
        let mut child = spawn(config, tap)?;
        let connecting = async {
            loop {
                if let Ok(stream) = UnixStream::connect(&path).await {
                    return stream;
                }
                tokio::time::sleep(SHIM_PAUSE).await;
            }
        };
        tokio::select! {
            stream = tokio::time::timeout(SHIM_START, connecting) => {
                Ok((Self::new(stream.context("the shim did not open its socket in time")?), Some(child)))
            }
            status = child.wait() => {
                let evidence = last_record(config, None).evidence;
                anyhow::bail!("the shim ended with {}: {evidence}", status.context("the shim cannot be waited for")?)
            }
        }
    }

    fn new(stream: UnixStream) -> Self {
        let process = Process::of_peer(&stream).ok().flatten();
        let (read, write) = stream.into_split();
        Self {
            process,
            lines: BufReader::new(read).lines(),
            write,
        }
    }

    async fn ask(&mut self, request: Request) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(&request)?;
        line.push(b'\n');
        let _ = self.write.write_all(&line).await; // a dead shim is seen by next()
        Ok(())
    }

    async fn take(&mut self, step: Step) -> anyhow::Result<()> {
        match (step, &self.process) {
            (Step::Ask(request), _) => self.ask(request).await?,
            (Step::EndShim, Some(process)) => process.kill(),
            (Step::EndShim, None) => {}
        }
        Ok(())
    }

    /// Asks who the shim is; the identity, its last word, or `None` when it is gone. A stop does not wait for the answer.
    async fn identify(
        &mut self,
        wanted: &mut watch::Receiver<Wanted>,
        stop: &mut Stop,
    ) -> anyhow::Result<Option<Message>> {
        self.ask(Request::Identify).await?;
        loop {
            // Each arm is cancel safe.
            tokio::select! {
                message = self.next() => match message {
                    Some(Message::State(_)) => {} // told again after the identity
                    other => return Ok(other),
                },
                changed = wanted.changed() => {
                    changed.context("the engine is gone")?;
                    stop.heed(&wanted.borrow_and_update());
                }
                () = stop.due() => self.take(stop.next()).await?,
            }
        }
    }

    /// Waits until the shim's process is gone, so that the next boot meets no remains.
    async fn farewell(mut self, child: Option<Child>) {
        let gone = async {
            while let Ok(Some(_)) = self.lines.next_line().await {}
            match (child, self.process) {
                (Some(mut child), _) => drop(child.wait().await), // reaped; its record says how it ended
                (None, Some(adopted)) => adopted.ended().await,
                (None, None) => {}
            }
        };
        let _ = tokio::time::timeout(FAREWELL, gone).await;
    }

    /// The next message; `None` when the shim is gone. Cancel safe.
    async fn next(&mut self) -> Option<Message> {
        let line = self.lines.next_line().await.ok()??;
        serde_json::from_str(&line).ok()
    }
}

fn spawn(config: &ShimConfig, tap: Option<OwnedFd>) -> anyhow::Result<Child> {
    let path = config.paths.config();
    files::private_dir(&config.paths.run)?;
    files::private_dir(config.paths.data_disk.parent().unwrap_or(Path::new("/")))?;
    files::remove(&config.paths.exit_record)?; // a record belongs to the last boot that was begun
    files::replace(&path, &serde_json::to_vec_pretty(config)?)?;
    let log = config.paths.console.with_file_name("shim.log");
    let log = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
    program::command()
        .arg("shim")
        .arg(config.guest.as_str())
        .arg("--config")
        .arg(&path)
        .stdin(tap.map_or_else(Stdio::null, Stdio::from)) // our copy closes with the command
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .context("cannot start the shim")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Edition;
    use crate::shim::contract::VmmState;

    /// A shim that has not told its VMM's state yet may tell it to a new agent before the answer.
    #[tokio::test]
    async fn a_state_before_the_identity_is_not_the_end_of_the_shim() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let record = ExitRecord {
            boot_id: "b".to_owned(),
            reason: ExitReason::Killed,
            evidence: String::new(),
            wall_ns: 1,
        };
        for message in [Message::State(VmmState::Starting), Message::Exited(record)] {
            let line = serde_json::to_string(&message).unwrap() + "\n";
            theirs.write_all(line.as_bytes()).await.unwrap();
        }
        let (_wanted, mut wants) = wanted();
        let answer = Shim::new(ours).identify(&mut wants, &mut Stop::default()).await;
        let answer = answer.unwrap();
        assert!(matches!(answer, Some(Message::Exited(_))), "{answer:?}");
    }

    fn wanted() -> (watch::Sender<Wanted>, watch::Receiver<Wanted>) {
        watch::channel(Wanted {
            document: Vec::new(),
            edition: Edition::default(),
            shutdown: false,
            kill: false,
        })
    }

    /// Else `down` would wait for it for ever, and an adopting agent could not even be told to stop it.
    #[tokio::test(start_paused = true)]
    async fn a_shim_that_does_not_answer_is_ended_by_a_stop_and_by_nothing_else() {
        for kill in [false, true] {
            let mut frozen = tokio::process::Command::new("sleep").arg("600").spawn().unwrap();
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut shim = Shim::new(ours);
            shim.process = Process::of_child(&frozen).unwrap();
            let (wanted, mut wants) = wanted();
            let (mut stop, begun) = (Stop::default(), Instant::now());
            let story = async {
                tokio::time::sleep(Duration::from_secs(3_600)).await;
                assert!(frozen.try_wait().unwrap().is_none(), "silence ends nobody");
                wanted.send_modify(|wanted| (wanted.shutdown, wanted.kill) = (true, kill));
                let status = frozen.wait().await.unwrap();
                let mut asked = Vec::new();
                theirs.try_read_buf(&mut asked).unwrap();
                drop(theirs);
                (status, String::from_utf8(asked).unwrap())
            };
            let (answer, (status, asked)) = tokio::join!(shim.identify(&mut wants, &mut stop), story);
            assert!(answer.unwrap().is_none());
            assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
            let (steps, limit) = match kill {
                true => ("\"identify\"\n\"kill\"\n", 3_605),
                false => ("\"identify\"\n\"power_down\"\n\"kill\"\n", 3_630),
            };
            assert_eq!(asked, steps);
            assert!(begun.elapsed().as_secs() >= limit, "earlier than after {limit} s");
        }
    }
}
