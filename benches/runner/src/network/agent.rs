//! Our own network loop as the host agent runs it: on a current_thread runtime in a thread of its own.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use sovereign_host_agent::net::{
    FilterChoice, Ground, Network, NetworkConfig, NetworkEvent, NetworkSpec, Part,
};
use sovereign_protocol::name::Name;
use tokio::sync::{mpsc, oneshot, watch};

/// The instance.
pub(super) const INSTANCE: &str = "bench";
/// Something of it takes longer only when it is broken.
const PATIENCE: Duration = Duration::from_secs(30);

/// A network that is kept.
pub(super) struct Agent {
    pub(super) specs: watch::Sender<NetworkSpec>,
    events: mpsc::Receiver<NetworkEvent>,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Agent {
    /// Starts it; `directory` is for what it keeps. `change` sees its configuration.
    pub(super) fn start(
        directory: &Path,
        spec: NetworkSpec,
        change: impl FnOnce(&mut NetworkConfig),
    ) -> Result<Self> {
        let instance = Name::parse(INSTANCE)?;
        let mut config = NetworkConfig::new(instance, Ground::Host, directory.join("switched.json"));
        config.filter = FilterChoice::PlainNft; // what everybody may delete
        config.first_pause = Duration::ZERO; // each round is a first change
        change(&mut config);
        let (specs, wanted) = watch::channel(spec);
        let (sender, events) = mpsc::channel(1_024);
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let network = Network::start(config, wanted, sender);
                let _ = stopped.await; // or its sender is gone
                drop(network);
            });
        });
        Ok(Self {
            specs,
            events,
            stop,
            thread,
        })
    }

    /// Waits until an event is as described.
    pub(super) fn wait(&mut self, is_it: impl Fn(&NetworkEvent) -> bool) -> Result<Instant> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let event = self.events.blocking_recv().context("the agent's thread ended")?;
            if let NetworkEvent::Failed { step, evidence, .. } = &event {
                eprintln!("the agent failed: {step}: {evidence}");
            }
            if is_it(&event) {
                return Ok(Instant::now());
            }
        }
        anyhow::bail!("the agent does not get there")
    }

    /// Waits until all of it is as wanted the first time.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.wait(|event| {
            matches!(
                event,
                NetworkEvent::Works {
                    part: Part::Filter,
                    ..
                }
            )
        })?;
        Ok(())
    }

    /// Takes what it told without a look at it; how much it was.
    pub(super) fn hear(&mut self) -> usize {
        std::iter::from_fn(|| self.events.try_recv().ok()).count()
    }

    /// Ends it like an agent that is restarted: the network stays.
    pub(super) fn end(self) -> Result<()> {
        drop((self.stop, self.specs, self.events));
        self.thread
            .join()
            .map_err(|_| anyhow::anyhow!("the agent's thread panicked"))
    }
}

/// When each look at everything began, read off the agent's own log.
#[derive(Clone, Default)]
pub(super) struct Turns(Arc<Mutex<Vec<Instant>>>);

impl Turns {
    /// Takes all so far.
    pub(super) fn take(&self) -> Vec<Instant> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Becomes the log of this process.
    pub(super) fn install(&self) {
        let turns = self.clone();
        tracing_subscriber::fmt()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .with_ansi(false)
            .with_writer(move || turns.clone())
            .init();
    }
}

impl Write for Turns {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let now = Instant::now();
        if String::from_utf8_lossy(line).contains("looking at the network") {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(now);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
