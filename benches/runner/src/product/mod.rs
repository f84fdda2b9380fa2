//! The product through its command line, on a throw-away instance, beside a bare shell init.

mod bare;
mod memory;
mod running;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, ensure};
use serde_json::Value;
use sovereign_protocol::spec::Image;
use sovereign_tests::Instance;

use crate::places::Places;
use crate::report::{Report, Row, Target};
use crate::samples::{Samples, paired};
use crate::{interrupt, machine};

/// Later boots, each with one of the bare init.
const BOOTS: usize = 5;

/// One throw-away instance and the image cache that it uses.
struct Product {
    instance: Instance,
    /// `None`: this user's own.
    cache: Option<PathBuf>,
}

impl Product {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.instance.command(arguments);
        if let Some(cache) = &self.cache {
            command.env("XDG_CACHE_HOME", cache);
        }
        command
    }

    /// Runs a command that must succeed; its wall time and standard output.
    fn timed(&self, arguments: &[&str]) -> anyhow::Result<(Duration, String)> {
        let mut command = self.command(arguments);
        let begun = Instant::now();
        let output = command.output()?;
        let time = begun.elapsed();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "{arguments:?}: {}: {}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        Ok((time, text(&output.stdout)))
    }

    /// The wall time of a command, in milliseconds, so many times.
    fn times(&self, arguments: &[&str], count: usize) -> anyhow::Result<Samples> {
        let mut samples = Samples::default();
        for _ in 0..count {
            samples.value(self.timed(arguments)?.0.as_secs_f64() * 1e3);
        }
        Ok(samples)
    }

    fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.timed(arguments)?.1)?)
    }
}

/// Measures everything; parts that cannot be measured are said aloud on their own.
pub(crate) fn measure(places: &Places, report: &mut Report) -> anyhow::Result<()> {
    let cold = tempfile::tempdir()?;
    let mut product = Product {
        instance: Instance::new()?,
        cache: Some(cold.path().to_owned()),
    };
    interrupt::stop_with(Some((product.command(&["down"]), product.instance.path(""))));
    let outcome = everything(places, report, &mut product);
    interrupt::stop_with(None);
    drop(product);
    outcome
}

fn everything(places: &Places, report: &mut Report, product: &mut Product) -> anyhow::Result<()> {
    let first = first_up(product);
    let worked = first.is_ok();
    report.part("first up from an empty image cache", first);
    if !worked {
        product.cache = None; // this user's cache may have what the network does not give
        product.timed(&["up"])?;
    }
    report.part("commands", running::commands(product));
    report.part("memory", memory::measure(places, product));
    report.part("event to watch", running::watch(product));
    report.part("later boots", later(places, product));
    Ok(())
}

fn first_up(product: &Product) -> anyhow::Result<Vec<Row>> {
    let mut samples = Samples::default();
    samples.value(product.timed(&["up"])?.0.as_secs_f64());
    let how = "`sovereign up`, empty cache and data disk: index, packages, image, boot, initdb, until it returns Ready; \
               depends on the mirror";
    Ok(vec![
        Row::of("first up, empty image cache", "s", &samples, how).target(Target::AtMost(60.0)),
    ])
}

/// Later boots of the product and of the bare init in turn, on the same kernel, image and data disk.
fn later(places: &Places, product: &Product) -> anyhow::Result<Vec<Row>> {
    let image = product.json(&["build", "--json"])?;
    let image: Image = serde_json::from_value(image["image"]["files"].clone())?;
    let accel = product.instance.guest()?["vmm"]["accel"] == "kvm";
    let mut down = Samples::default();
    down.value(product.timed(&["down"])?.0.as_secs_f64());
    let dir = tempfile::tempdir()?;
    let bare = bare::Bare::new(places, dir.path(), &image, product, accel)?;
    let mut boots = Boots {
        down,
        ..Boots::default()
    };
    for _ in 0..BOOTS {
        boots.up.push(product.timed(&["up"])?.0.as_secs_f64());
        boots.ours.push(until_ready(product)?.as_secs_f64());
        boots.down.value(product.timed(&["down"])?.0.as_secs_f64());
        let times = bare.boot(places)?.map(|time| time.as_secs_f64());
        boots.bare.push(times[bare::STEPS.len() - 1]);
        let steps = boots.steps.iter_mut().zip(times);
        steps.for_each(|(all, time)| all.value(time));
    }
    Ok(boots.rows())
}

/// Boots in turn, in seconds.
#[derive(Default)]
struct Boots {
    /// `up` until it returns.
    up: Vec<f64>,
    /// From the VMM's start to Ready.
    ours: Vec<f64>,
    /// The same of the bare init.
    bare: Vec<f64>,
    /// The bare init's steps.
    steps: [Samples; bare::STEPS.len()],
    down: Samples,
}

impl Boots {
    fn rows(&self) -> Vec<Row> {
        let samples = |values: &[f64]| {
            let mut samples = Samples::default();
            values.iter().for_each(|value| samples.value(*value));
            samples
        };
        let how = "same kernel, image, data disk and VMM command line, in turn; the bare init (busybox) mounts, \
                   starts PostgreSQL and asks `select 1` by psql until it answers";
        let (up, ours, bare) = (samples(&self.up), samples(&self.ours), samples(&self.bare));
        let name = "bare shell init";
        let later = || Row::of("later up until it returns Ready", "s", &up, how);
        let down = "`sovereign down` until it returns";
        let mut rows = vec![
            later().target(Target::AtMost(10.0)),
            later().beside(name, &bare, paired(&self.up, &self.bare)),
            Row::of("QEMU start to PostgreSQL ready", "s", &ours, how)
                .beside(name, &bare, paired(&self.ours, &self.bare))
                .target(Target::AtMost(1.10)),
            Row::of("down, PostgreSQL's own stop included", "s", &self.down, down)
                .target(Target::AtMost(3.0)),
        ];
        for (step, times) in bare::STEPS.iter().zip(&self.steps) {
            let what = format!("bare shell init, QEMU start to {step}");
            rows.push(Row::of(what, "s", times, how));
        }
        rows
    }
}

/// From the start of the VMM's process (10 ms steps) to the event that says Ready, by this machine's clock.
fn until_ready(product: &Product) -> anyhow::Result<Duration> {
    let guest = product.instance.guest()?;
    let pid = guest["vmm"]["pid"].as_u64().context("no VMM")?;
    let begun = machine::started(u32::try_from(pid)?).context("the VMM has ended")?;
    let events = product.instance.events()?;
    let ready = events
        .iter()
        .rev()
        .find(|event| event["layer"] == "service" && event["reason"] == "Ready")
        .context("no event says Ready")?;
    Ok(event_time(ready)?.duration_since(begun)?)
}

/// When an event happened.
fn event_time(event: &Value) -> anyhow::Result<SystemTime> {
    let time = event["time"].as_str().context("an event without a time")?;
    Ok(humantime::parse_rfc3339(time)?)
}
