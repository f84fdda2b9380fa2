//! The host network: how soon a foreign change is undone, and what many guests cost.
//!
//! Each keeper has a process and a network namespace of its own, an uplink that leads nowhere, and the rules and the
//! tables that our agent made there. They take turns of a few rounds, so that a slow moment meets all of them.

mod agent;
mod change;
mod containers;
mod ground;
mod guests;
mod keep;
mod keepers;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

use self::containers::Tool;
use crate::report::{Report, Row, Target};
use crate::samples::{Samples, paired};

/// The argument that makes this program a keeper in the namespace that it is in.
pub(crate) const VERB: &str = "run-network";
/// Rounds of ours and of the bare loop, and of a peer that starts programs.
const ROUNDS: usize = 1_000;
const PEER_ROUNDS: usize = 200;
/// Times that a peer sets up its containers.
const CONTAINER_ROUNDS: usize = 3;
/// Turns that they are made in.
const TURNS: usize = 20;
/// Microseconds.
const P99: f64 = 2_000.0;

/// A keeper in its namespace.
struct Keeper {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    samples: Samples,
    medians: Vec<f64>,
    name: String,
}

impl Keeper {
    fn start(words: &[&str]) -> Result<Self> {
        let mut child = apart(words)?;
        let output = child.stdout.take().context("no output")?;
        let mut keeper = Self {
            input: child.stdin.take(),
            output: BufReader::new(output),
            child,
            samples: Samples::default(),
            medians: Vec::new(),
            name: words.join(" "),
        };
        keeper.times()?;
        Ok(keeper)
    }

    fn turn(&mut self, rounds: usize) -> Result<()> {
        writeln!(self.input.as_ref().context("no input")?, "{rounds}")?;
        let mut turn = Samples::default();
        self.times()?.into_iter().for_each(|time| turn.value(time));
        self.medians.push(turn.median());
        self.samples.extend(&turn);
        Ok(())
    }

    fn times(&mut self) -> Result<Vec<f64>> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the keeper \"{}\" ended", self.name);
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.input.take()); // which ends it, and its namespace
        let _ = self.child.wait();
    }
}

/// Starts this program in a network namespace of its own.
fn apart(words: &[&str]) -> Result<Child> {
    Command::new("unshare")
        .args(if rustix::process::geteuid().is_root() {
            ["-n", "--"]
        } else {
            ["-rn", "--"]
        })
        .arg(std::env::current_exe()?)
        .arg(VERB)
        .args(words)
        .env(ground::TEST, ground::number()?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("no unshare")
}

/// The other side of [`measure`].
pub(crate) fn run(words: &[&str]) -> Result<()> {
    ground::check()?;
    match words {
        ["guests"] => guests::run(),
        ["containers", tool] => containers::run(Tool::of(tool).context("no such tool")?),
        _ => keep::run(words),
    }
}

pub(crate) fn measure(report: &mut Report) {
    for (change, limit) in [("rule", 150.0), ("table", 300.0)] {
        let what = format!("network: {change} deleted, back");
        report.part(&what, repairs(change, limit));
        let what = format!("network: {change} deleted, back, loaded");
        report.part(&what, loaded(change));
    }
    report.part("network: iptables-restore", iptables());
    let figures = guests();
    let added = figures
        .as_ref()
        .map(|figures| figures.added.clone())
        .unwrap_or_default();
    report.part("network: guests", figures.map(|figures| many(&figures)));
    for tool in Tool::ALL {
        let what = format!("network: {}", tool.word());
        match tool.missing() {
            None => report.part(&what, containers(tool, &added)),
            Some(why) => report.skip(&what, why),
        }
    }
}

fn named(change: &str) -> &'static str {
    match change {
        "rule" => "foreign deletion of a rule, until it is back",
        _ => "foreign deletion of the nft table, until it is back",
    }
}

fn repairs(change: &str, limit: f64) -> Result<Vec<Row>> {
    let mut ours = Keeper::start(&["ours", change])?;
    let mut bare = Keeper::start(&["bare", change])?;
    let mut script = Keeper::start(&["script", change])?;
    for _ in 0..TURNS {
        ours.turn(ROUNDS / TURNS)?;
        bare.turn(ROUNDS / TURNS)?;
        script.turn(PEER_ROUNDS / TURNS)?;
    }
    let how = "by an observer in the namespace: from before it sends the deletion until it has read the kernel's word \
               of the repair; each change is repaired as a first one (first_pause = 0)";
    let ratio = |peer: &Keeper| paired(&ours.medians, &peer.medians);
    let mut p99 = Samples::default();
    p99.value(ours.samples.percentile(99.0));
    let what = named(change);
    let program = if change == "rule" {
        "ip monitor, ip rule add"
    } else {
        "nft monitor, nft -f"
    };
    Ok(vec![
        Row::of(what, "us", &ours.samples, how).target(Target::AtMost(limit)),
        Row::of(format!("{what}, p99"), "us", &p99, how).target(Target::AtMost(P99)),
        Row::of(what, "us", &ours.samples, how).beside("bare loop, same crates", &bare.samples, ratio(&bare)),
        Row::of(what, "us", &ours.samples, how).beside(program, &script.samples, ratio(&script)),
    ])
}

fn loaded(change: &str) -> Result<Vec<Row>> {
    let mut ours = Keeper::start(&["ours", change, "loaded"])?;
    let mut bare = Keeper::start(&["bare", change, "loaded"])?;
    for _ in 0..TURNS {
        ours.turn(ROUNDS / TURNS)?;
        bare.turn(ROUNDS / TURNS)?;
    }
    let how = "with 10,000 foreign rules and a foreign nft set of 100,000 elements; else as without";
    let ratio = paired(&ours.medians, &bare.medians);
    let row = Row::of(format!("{}, loaded", named(change)), "us", &ours.samples, how);
    Ok(vec![
        row.beside("bare loop, same crates", &bare.samples, ratio)
            .target(Target::AtMost(1.5)),
    ])
}

fn iptables() -> Result<Vec<Row>> {
    let mut ours = Keeper::start(&["ours", "table"])?;
    let mut peer = Keeper::start(&["iptables", "table"])?;
    for _ in 0..TURNS {
        ours.turn(PEER_ROUNDS / TURNS)?;
        peer.turn(PEER_ROUNDS / TURNS)?;
    }
    let how = "the peer's table is iptables-nft's own `filter` with eleven rules, made again by iptables-nft-restore";
    let ratio = paired(&ours.medians, &peer.medians);
    let row = Row::of(named("table"), "us", &ours.samples, how);
    Ok(vec![row.beside(
        "nft monitor, iptables-restore",
        &peer.samples,
        ratio,
    )])
}

fn samples(values: &[f64]) -> Samples {
    let mut samples = Samples::default();
    values.iter().for_each(|value| samples.value(*value));
    samples
}

/// From the spec sent to the event.
const CAME: &str = "from the spec sent to the event Ready: TAPs marked, in the bridge, up, with their filter; looked at again";

fn guests() -> Result<guests::Figures> {
    let output = apart(&["guests"])?.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&said).context("it ended")
}

/// Ours were measured before: programs that start others fill the machine's caches with theirs.
fn containers(tool: Tool, added: &[f64]) -> Result<Vec<Row>> {
    let mut times = Vec::new();
    for _ in 0..CONTAINER_ROUNDS {
        let output = apart(&["containers", tool.word()])?.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let took: Vec<f64> = serde_json::from_str(&said).context("it ended")?;
        times.extend(took);
    }
    let (ours, peer) = (samples(added), samples(&times));
    let ratio = ours.median() / peer.median();
    let what = format!("{} guests added at once", guests::MANY);
    Ok(vec![Row::of(what, "ms", &ours, CAME).beside(
        tool.title(),
        &peer,
        ratio,
    )])
}

fn many(figures: &guests::Figures) -> Vec<Row> {
    let (added, batch, verify) = (
        samples(&figures.added),
        samples(&figures.batch),
        samples(&figures.verify),
    );
    let verified =
        "between two looks at everything without a pause (resync = 0), as the agent's own log has them";
    let what = format!("{} guests added at once", guests::MANY);
    vec![
        Row::of(
            format!("full look and empty plan, {} guests", guests::MANY),
            "ms",
            &verify,
            verified,
        )
        .target(Target::AtMost(20.0)),
        Row::of(what.clone(), "ms", &added, CAME).target(Target::AtMost(150.0)),
        Row::of(what, "ms", &added, CAME).beside(
            "ip -batch: TAPs in a bridge, no filter",
            &batch,
            paired(&figures.added, &figures.batch),
        ),
    ]
}
