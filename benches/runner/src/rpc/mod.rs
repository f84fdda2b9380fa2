//! One tiny call over one Unix socket: our stack as the product uses it, tonic, ttrpc.
//!
//! Each server and each client has a thread and a runtime of its own (current_thread, as both agents have), all
//! alive during the whole run; rounds take them in turn, so that a slow moment of the machine meets all of them.

mod ours;
pub(crate) mod tonic_peer;
mod ttrpc_peer;

pub(crate) use ours::Ours;

use std::path::Path;
use std::time::Instant;

use anyhow::Context;

use crate::report::{Row, Target};
use crate::samples::{Samples, paired};

/// Rounds; each gives one pair to every ratio.
const ROUNDS: usize = 15;
/// Calls one after the other, per round and peer.
const SINGLE: usize = 2_000;
/// Calls in a round with many in flight.
const MANY: usize = 32_768;
/// How many are in flight then.
const IN_FLIGHT: usize = 64;

/// A client that is connected to its server.
pub(crate) trait Client: Clone + Send + 'static {
    /// One call: a time there, two times back.
    fn ping(&self, sent_ns: i64) -> impl Future<Output = anyhow::Result<(i64, i64)>> + Send;
}

/// The figures of one peer.
#[derive(Debug, Default)]
struct Figures {
    single: Samples,
    single_rounds: Vec<f64>,
    many: Samples,
    many_rounds: Vec<f64>,
    cpu: Samples,
    cpu_rounds: Vec<f64>,
}

/// What is asked of a peer's thread.
#[derive(Debug, Clone, Copy)]
enum Round {
    Single,
    Many,
}

/// A peer on threads of its own.
struct Peer {
    name: &'static str,
    rounds: tokio::sync::mpsc::UnboundedSender<Round>,
    answers: std::sync::mpsc::Receiver<anyhow::Result<Samples>>,
    figures: Figures,
}

/// Measures all three.
pub(crate) fn measure() -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let mut peers = [
        Peer::start("ours", dir.path(), ours::serve, ours::connect)?,
        Peer::start("tonic 0.14", dir.path(), tonic_peer::serve, tonic_peer::connect)?,
        Peer::start("ttrpc 0.10", dir.path(), ttrpc_peer::serve, ttrpc_peer::connect)?,
    ];
    for peer in &mut peers {
        peer.round(Round::Single)?; // warms up; not counted
        peer.round(Round::Many)?;
    }
    for _ in 0..ROUNDS {
        for peer in &mut peers {
            let single = peer.round(Round::Single)?;
            peer.figures.single_rounds.push(single.median());
            peer.figures.single.extend(&single);
        }
        for peer in &mut peers {
            let begun = cpu_us();
            let many = peer.round(Round::Many)?;
            #[allow(clippy::cast_precision_loss)] // a small constant
            let cpu = (cpu_us() - begun) / MANY as f64;
            peer.figures.many_rounds.push(many.median());
            peer.figures.many.extend(&many);
            peer.figures.cpu_rounds.push(cpu);
            peer.figures.cpu.value(cpu);
        }
    }
    let [ours, others @ ..] = &peers;
    Ok(rows(ours, others))
}

fn rows(ours: &Peer, others: &[Peer]) -> Vec<Row> {
    let how = "current_thread runtime each for client and server, own threads, same process, Unix socket; \
               handshake excluded; peers with their defaults";
    let mut rows = Vec::new();
    for other in others {
        let ratio = paired(&ours.figures.single_rounds, &other.figures.single_rounds);
        let row = Row::of("RPC, Unix socket, 1 in flight", "us", &ours.figures.single, how);
        let row = row.beside(other.name, &other.figures.single, ratio);
        rows.push(match other.name.starts_with("tonic") {
            true => row.target(Target::AtMost(0.55)),
            false => row,
        });
    }
    for other in others {
        let ratio = paired(&ours.figures.many_rounds, &other.figures.many_rounds);
        let row = Row::of("RPC, Unix socket, 64 in flight", "k/s", &ours.figures.many, how);
        rows.push(
            row.beside(other.name, &other.figures.many, ratio)
                .target(Target::AtLeast(4.0)),
        );
    }
    for other in others {
        let ratio = paired(&ours.figures.cpu_rounds, &other.figures.cpu_rounds);
        let how = "CPU time of this process while one peer works, client and server together: says the same on a \
                   busy machine";
        let row = Row::of(
            "RPC, Unix socket, CPU per request, 64 in flight",
            "us",
            &ours.figures.cpu,
            how,
        );
        rows.push(row.beside(other.name, &other.figures.cpu, ratio));
    }
    rows
}

impl Peer {
    fn start<C: Client, S, F>(
        name: &'static str,
        dir: &Path,
        serve: fn(std::path::PathBuf) -> S,
        connect: fn(std::path::PathBuf) -> F,
    ) -> anyhow::Result<Self>
    where
        S: Future<Output = anyhow::Result<()>> + 'static,
        F: Future<Output = anyhow::Result<C>> + 'static,
    {
        let socket = dir.join(name.replace(' ', "-"));
        let (rounds, mut asked) = tokio::sync::mpsc::unbounded_channel::<Round>();
        let (answer, answers) = std::sync::mpsc::channel();
        let listens = socket.clone();
        spawn(format!("{name} server"), move || serve(listens))?;
        wait_for(&socket)?;
        spawn(format!("{name} client"), move || async move {
            let client = connect(socket).await?;
            while let Some(round) = asked.recv().await {
                let result = match round {
                    Round::Single => single(&client).await,
                    Round::Many => many(&client).await,
                };
                answer.send(result)?;
            }
            Ok(())
        })?;
        Ok(Self {
            name,
            rounds,
            answers,
            figures: Figures::default(),
        })
    }

    fn round(&mut self, round: Round) -> anyhow::Result<Samples> {
        self.rounds
            .send(round)
            .with_context(|| format!("{} ended", self.name))?;
        self.answers
            .recv()
            .with_context(|| format!("{} ended", self.name))?
            .with_context(|| self.name)
    }
}

/// A thread with a runtime of its own; it ends with the process.
fn spawn<F>(name: String, work: impl FnOnce() -> F + Send + 'static) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        if let Err(error) = runtime.block_on(work()) {
            eprintln!("{name}: {error:#}");
        }
    })?;
    Ok(())
}

/// CPU time of this process, in microseconds: while one peer works, the others wait.
fn cpu_us() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    #[allow(clippy::cast_precision_loss)] // seconds and nanoseconds of a process
    let us = time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3;
    us
}

/// Waits until a server has its socket; looks, because a peer does not tell.
fn wait_for(socket: &Path) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !socket.exists() {
        anyhow::ensure!(begun.elapsed().as_secs() < 5, "no {}", socket.display());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(())
}

/// One call after the other: microseconds each.
pub(crate) async fn single(client: &impl Client) -> anyhow::Result<Samples> {
    calls(client, SINGLE).await
}

/// So many calls, one after the other: microseconds each.
pub(crate) async fn calls(client: &impl Client, count: usize) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    for number in 0..count {
        let begun = Instant::now();
        let (received, sent) = client.ping(i64::try_from(number)?).await?;
        samples.time(begun.elapsed());
        anyhow::ensure!(received <= sent, "no answer of a ping");
    }
    Ok(samples)
}

/// Many calls at once: thousands of requests per second.
async fn many(client: &impl Client) -> anyhow::Result<Samples> {
    let begun = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let client = client.clone();
        tasks.spawn(async move {
            for number in 0..MANY / IN_FLIGHT {
                client.ping(i64::try_from(number)?).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let mut samples = Samples::default();
    #[allow(clippy::cast_precision_loss)] // a small constant
    samples.value(MANY as f64 / begun.elapsed().as_secs_f64() / 1e3);
    Ok(samples)
}
