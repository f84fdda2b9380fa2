//! How large the programs are and what the host agent holds when nothing happens.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::machine::resident_kib;
use crate::places::Places;
use crate::report::{Row, Target};
use crate::samples::{Samples, paired};

/// An idle program is looked at so often.
const LOOKS: usize = 3;
/// After its start a program has this long until its memory counts as idle.
const SETTLE: Duration = Duration::from_secs(2);

/// Sizes of the four programs, and resident memory of an idle host agent without guests.
pub(crate) fn measure(places: &Places) -> anyhow::Result<Vec<Row>> {
    let empty_path = places.statics.join("empty");
    let empty = size_of(&empty_path)?;
    let budgets = [
        ("sovereign-guest", Some(2.5)),
        ("sovereign-init", None),
        ("sovereign-host", None),
        ("sovereign", None),
    ];
    let mut rows = Vec::new();
    for (name, budget) in budgets {
        let ours = size_of(&places.product.join(name))?;
        let ratio = paired(&[ours.median()], &[empty.median()]);
        let how = "bytes of the stripped file; the peer is static and built with the guest's profile";
        let row = Row::of(format!("size of {name}"), "MB", &ours, how);
        // The budget is of the size, not of the ratio: the peer stands in a row of its own.
        rows.push(match budget {
            Some(megabytes) => row.target(Target::AtMost(megabytes)),
            None => row.beside("empty tarpc + tokio, static", &empty, ratio),
        });
    }
    rows.push(Row::of(
        "size of an empty tarpc + tokio static binary",
        "MB",
        &empty,
        "the same",
    ));
    rows.extend(resident(places, &empty_path)?);
    Ok(rows)
}

fn size_of(path: &Path) -> anyhow::Result<Samples> {
    let bytes = std::fs::metadata(path)
        .with_context(|| format!("no {}", path.display()))?
        .len();
    let mut samples = Samples::default();
    #[allow(clippy::cast_precision_loss)] // a file of less than 2^52 bytes
    samples.value(bytes as f64 / 1e6);
    Ok(samples)
}

fn resident(places: &Places, empty: &Path) -> anyhow::Result<Vec<Row>> {
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for _ in 0..LOOKS {
        let dir = tempfile::tempdir()?;
        let control = dir.path().join("run/control.sock");
        let host = Command::new(places.product.join("sovereign-host"))
            .args(["run", "--instance", "bench", "--run-dir"])
            .arg(dir.path().join("run"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stderr(Stdio::null())
            .spawn()?;
        let host = Ended(host);
        let begun = Instant::now();
        while !control.exists() {
            anyhow::ensure!(begun.elapsed().as_secs() < 10, "the host agent does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        let empty = Ended(Command::new(empty).stdout(Stdio::null()).spawn()?);
        std::thread::sleep(SETTLE);
        ours.value(resident_kib(host.0.id()).context("the host agent ended")? / 1024.0);
        theirs.value(resident_kib(empty.0.id()).context("the empty program ended")? / 1024.0);
    }
    let how = "VmRSS 2 s after the start, no guest";
    Ok(vec![
        Row::of("RSS of sovereign-host, no guest", "MiB", &ours, how).target(Target::AtMost(12.0)),
        Row::of("RSS of an empty tarpc + tokio static binary", "MiB", &theirs, how),
    ])
}

/// A program that ends with this value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // SIGTERM first: the host agent removes its socket. Both may fail only because it has ended.
        let pid = i32::try_from(self.0.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}
