//! What is asked of a guest that runs: commands, and how soon `watch` tells.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde_json::Value;

use super::{Product, event_time};
use crate::report::{Row, Target};
use crate::samples::Samples;

/// How often the loopback device is taken down.
const BREAKS: usize = 12;
/// Between two of them: more than four repairs within 10 s would be slowed down by the agent.
const PAUSE: Duration = Duration::from_millis(2_600);

/// Wall times of commands against a Ready guest.
pub(super) fn commands(product: &Product) -> anyhow::Result<Vec<Row>> {
    let how = "whole process, spawn to exit, one Ready guest";
    let row = |what: &str, arguments: &[&str], count, target| {
        let samples = product.times(arguments, count)?;
        anyhow::Ok(Row::of(what, "ms", &samples, how).target(Target::AtMost(target)))
    };
    product.times(&["status"], 3)?; // warms up
    let doctor = product.times(&["doctor"], 10)?;
    Ok(vec![
        row("no-op up", &["up"], 20, 150.0)?,
        row("status", &["status"], 100, 30.0)?,
        row("status --json", &["status", "--json"], 100, 30.0)?,
        Row::of("doctor, healthy", "ms", &doctor, how),
    ])
}

/// From an event in the guest to its line on the standard output of `sovereign watch`.
///
/// The event's time is that of the guest's observation under the host's clock without the trip from guest to host,
/// which no clock of ours could tell: so the difference to now is what comes on top of a bare one-way trip.
pub(super) fn watch(product: &Product) -> anyhow::Result<Vec<Row>> {
    let mut child = product
        .command(&["watch", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let lines = lines(&mut child)?;
    let watching = Killed(child);
    let mut samples = Samples::default();
    for _ in 0..BREAKS {
        let down = ["exec", "sql", "--", "busybox", "ip", "link", "set", "lo", "down"];
        product.timed(&down)?;
        // The link's own events: it went down, it answers again.
        let deadline = std::time::Instant::now() + PAUSE;
        while let Ok((at, line)) = lines.recv_timeout(deadline - std::time::Instant::now().min(deadline)) {
            let event: Value = serde_json::from_str(&line)?;
            if event["layer"] == "loopback" {
                let late = at.duration_since(event_time(&event)?).unwrap_or_default();
                samples.value(late.as_secs_f64() * 1e3);
            }
        }
    }
    drop(watching);
    anyhow::ensure!(samples.count() >= BREAKS, "{} lines came", samples.count());
    let how = "`lo` is taken down in the guest; line read minus the event's time, which has steps of 1 ms and counts \
               from the arrival at the host minus the event's age";
    let mut row = Row::of("event in the guest to a line of watch", "ms", &samples, how);
    row.p99 = Some(samples.percentile(99.0));
    Ok(vec![row.target(Target::AtMost(5.0))])
}

fn lines(child: &mut Child) -> anyhow::Result<Receiver<(SystemTime, String)>> {
    let stdout = child.stdout.take().context("no output")?;
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send((SystemTime::now(), line)).is_err() {
                return;
            }
        }
    });
    Ok(lines)
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}
