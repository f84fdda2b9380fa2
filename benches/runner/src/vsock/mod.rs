//! Our vsock device beside vhost-device-vsock: the same guest three times, rounds in turn.
//!
//! `in process` is a stream of the device itself; `front` goes through the hybrid Unix socket of a process of its
//! own, as the product's shim has it. In the guest one program serves all figures (../probe).

mod device;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use sovereign_host_agent::shim::accel::Accel;
use sovereign_host_agent::vsock::{Device, Limits};
use sovereign_protocol::boot::AGENT_PORT;
use sovereign_protocol::spec::Image;
use sovereign_protocol::transport::{self, Address, BoxStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::image;
use crate::places::Places;
use crate::report::{Row, Target};
use crate::rpc::{Ours, calls};
use crate::samples::{Samples, paired};
use crate::vm::{Extra, Plan, Vm};

pub(crate) use device::{Helper, VERB, serve as serve_device};

/// The ports of the program in the guest (../probe/src/main.rs).
const ECHO: u32 = 5000;
const SINK: u32 = 5001;
const SOURCE: u32 = 5002;
/// Rounds of small exchanges; each gives one pair to every ratio.
const ROUNDS: usize = 20;
/// Exchanges of a round.
const EXCHANGES: usize = 200;
/// Rounds of large transfers.
const TRANSFERS: usize = 9;
/// Bytes of an echo.
const SMALL: usize = 64;
/// Bytes of a large transfer.
const LARGE: usize = 16 << 20;
/// A guest must be up within this time.
const BOOT: Duration = Duration::from_secs(60);

/// How a guest is reached.
enum Way {
    InProcess(Device),
    Hybrid(std::path::PathBuf),
}

/// One guest behind one device, with its open streams.
struct Peer {
    way: Way,
    /// Ends before the way and the helper: fields drop in order.
    _vm: Vm,
    _helper: Option<Helper>,
    echo: BoxStream,
    rpc: Ours,
    figures: Figures,
}

#[derive(Default)]
struct Figures {
    echo: Series,
    ping: Series,
    up: Series,
    down: Series,
}

/// All samples, and one figure a round.
#[derive(Default)]
struct Series {
    all: Samples,
    rounds: Vec<f64>,
}

impl Series {
    fn add(&mut self, round: &Samples) {
        self.rounds.push(round.median());
        self.all.extend(round);
    }
}

/// Measures all three; everything runs on this thread's runtime, as in a host agent.
pub(crate) fn measure(places: &Places) -> anyhow::Result<Vec<Row>> {
    anyhow::ensure!(
        places.device.is_file(),
        "no {}: the peer is not installed",
        places.device.display()
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(compare(places))
}

async fn compare(places: &Places) -> anyhow::Result<Vec<Row>> {
    let dir = tempfile::tempdir()?;
    let image = image::build(places)?;
    let accel = image::accel(dir.path(), &image).await?;
    let mut peers = Vec::new();
    for kind in [Kind::InProcess, Kind::Front, Kind::Peer] {
        let home = dir.path().join(kind.name());
        std::fs::create_dir(&home)?;
        peers.push(
            boot(kind, places, &home, &image, accel)
                .await
                .context(kind.name())?,
        );
    }
    for peer in &mut peers {
        peer.small().await?; // warms up; not counted
        peer.figures = Figures::default();
    }
    for _ in 0..ROUNDS {
        for peer in &mut peers {
            peer.small().await?;
        }
    }
    for _ in 0..TRANSFERS {
        for peer in &mut peers {
            peer.large().await?;
        }
    }
    let [inner, front, theirs] = &peers[..] else {
        anyhow::bail!("there are three devices");
    };
    Ok(rows(&inner.figures, &front.figures, &theirs.figures))
}

#[derive(Clone, Copy)]
enum Kind {
    InProcess,
    Front,
    Peer,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::InProcess => "in",
            Self::Front => "front",
            Self::Peer => "peer",
        }
    }
}

async fn boot(kind: Kind, places: &Places, home: &Path, image: &Image, accel: Accel) -> anyhow::Result<Peer> {
    let probe = std::fs::read(places.statics.join("probe")).context("no probe")?;
    let init = Extra {
        path: "init",
        bytes: probe,
    };
    let plan = Plan::new(home, image, &[init])?;
    let (way, helper) = match kind {
        Kind::InProcess => (
            Way::InProcess(Device::start(&plan.vhost(), 3, Limits::default())?),
            None,
        ),
        Kind::Front => (
            Way::Hybrid(plan.front()),
            Some(Helper::ours(places, &plan.vhost(), &plan.front())?),
        ),
        Kind::Peer => (
            Way::Hybrid(plan.front()),
            Some(Helper::peer(places, &plan.vhost(), &plan.front())?),
        ),
    };
    let vm = plan.start(places, accel)?;
    // The device's tasks run on this thread: it must not block.
    let vm = tokio::task::spawn_blocking(move || vm.wait("probe: ready", BOOT).map(|_| vm)).await??;
    tokio::time::sleep(Duration::from_secs(1)).await; // the agent's port is bound right after the mark
    Ok(Peer {
        echo: way.dial(ECHO).await?,
        rpc: Ours::over(way.dial(AGENT_PORT).await?).await?,
        way,
        _vm: vm,
        _helper: helper,
        figures: Figures::default(),
    })
}

impl Way {
    async fn dial(&self, port: u32) -> anyhow::Result<BoxStream> {
        Ok(match self {
            Self::InProcess(device) => Box::new(device.dial(port).await?),
            Self::Hybrid(path) => {
                let path = path.clone();
                transport::dial(&Address::Hybrid { path, port }).await?
            }
        })
    }
}

impl Peer {
    async fn small(&mut self) -> anyhow::Result<()> {
        let mut samples = Samples::default();
        let (out, mut back) = ([7; SMALL], [0; SMALL]);
        for _ in 0..EXCHANGES {
            let begun = Instant::now();
            self.echo.write_all(&out).await?;
            self.echo.read_exact(&mut back).await?;
            samples.time(begun.elapsed());
        }
        anyhow::ensure!(out == back, "the echo is another one");
        self.figures.echo.add(&samples);
        let pings = calls(&self.rpc, EXCHANGES).await?;
        self.figures.ping.add(&pings);
        Ok(())
    }

    /// 16 MiB each way on streams of their own; MiB/s.
    async fn large(&mut self) -> anyhow::Result<()> {
        let mut chunk = vec![7; 64 << 10];
        let mut sink = self.way.dial(SINK).await?;
        let begun = Instant::now();
        sink.write_u64(LARGE as u64).await?;
        for _ in 0..LARGE / chunk.len() {
            sink.write_all(&chunk).await?;
        }
        sink.flush().await?;
        sink.read_u8().await?; // the guest has all of it
        self.figures.down.add(&rate(begun.elapsed()));
        let mut source = self.way.dial(SOURCE).await?;
        let begun = Instant::now();
        source.write_u64(LARGE as u64).await?;
        let mut left = LARGE;
        while left > 0 {
            let length = source.read(&mut chunk).await?;
            anyhow::ensure!(length > 0, "the guest ended the stream");
            left = left.saturating_sub(length);
        }
        self.figures.up.add(&rate(begun.elapsed()));
        Ok(())
    }
}

fn rate(time: Duration) -> Samples {
    let mut samples = Samples::default();
    samples.value(16.0 / time.as_secs_f64());
    samples
}

fn rows(inner: &Figures, front: &Figures, theirs: &Figures) -> Vec<Row> {
    let peer = "vhost-device-vsock 0.3.0";
    let how = "same image, kernel and guest program, three guests at once, rounds in turn; the peer with its \
               defaults but --tx-buffer-size 32768, without which it drops packets over 32 KiB";
    let row = |what: &str, unit, ours: &Series, series: &Series, target| {
        let row = Row::of(what, unit, &ours.all, how);
        row.beside(peer, &series.all, paired(&ours.rounds, &series.rounds))
            .target(target)
    };
    let most = Target::AtMost;
    let least = Target::AtLeast(1.2);
    let mut rows = vec![
        row(
            "vsock echo 64 B, in process",
            "us",
            &inner.echo,
            &theirs.echo,
            most(0.70),
        ),
        row(
            "vsock echo 64 B, hybrid front",
            "us",
            &front.echo,
            &theirs.echo,
            most(0.90),
        ),
        row(
            "vsock 16 MiB host to guest, in process",
            "MiB/s",
            &inner.down,
            &theirs.down,
            least,
        ),
        row(
            "vsock 16 MiB guest to host, in process",
            "MiB/s",
            &inner.up,
            &theirs.up,
            least,
        ),
        row(
            "vsock 16 MiB host to guest, hybrid front",
            "MiB/s",
            &front.down,
            &theirs.down,
            least,
        ),
        row(
            "vsock 16 MiB guest to host, hybrid front",
            "MiB/s",
            &front.up,
            &theirs.up,
            least,
        ),
    ];
    for (what, figures) in [
        ("RPC ping over vsock, in process", inner),
        ("RPC ping over vsock, hybrid front", front),
    ] {
        let against = paired(&figures.ping.rounds, &theirs.ping.rounds);
        rows.push(Row::of(what, "us", &figures.ping.all, how).beside(peer, &theirs.ping.all, against));
        let against = paired(&figures.ping.rounds, &figures.echo.rounds);
        let name = "raw echo on the same device";
        rows.push(Row::of(what, "us", &figures.ping.all, how).beside(name, &figures.echo.all, against));
    }
    let against = paired(&theirs.ping.rounds, &theirs.echo.rounds);
    let what = "RPC ping over vhost-device-vsock";
    rows.push(Row::of(what, "us", &theirs.ping.all, how).beside("raw echo on it", &theirs.echo.all, against));
    rows
}
