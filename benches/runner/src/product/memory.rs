//! Resident memory of the agents while one guest is Ready, and of the empty program in the same guest.

use std::fs::File;
use std::time::Duration;

use anyhow::Context;

use super::Product;
use crate::machine::{resident_in, resident_kib};
use crate::places::Places;
use crate::report::{Row, Target};
use crate::samples::Samples;

/// A guest that has been asked nothing for this long is idle.
const SETTLE: Duration = Duration::from_secs(5);

/// Guest agent and init in the guest, beside the empty program there; host agent and shim on this machine.
pub(super) fn measure(places: &Places, product: &Product) -> anyhow::Result<Vec<Row>> {
    std::thread::sleep(SETTLE);
    let how = "VmRSS with one Ready guest; guest figures are read by `sovereign exec`";
    let agent = in_guest(
        product,
        "busybox cat /proc/$(busybox pidof sovereign-guest)/status",
    )?;
    let init = in_guest(product, "busybox cat /proc/1/status")?;
    let empty = empty_in_guest(places, product)?;
    let mut rows = vec![
        Row::of("RSS of sovereign-guest, in the guest", "MiB", &agent, how).target(Target::AtMost(3.0)),
        Row::of("RSS of sovereign-init, in the guest", "MiB", &init, how),
        Row::of(
            "RSS of an empty tarpc + tokio binary, in the guest",
            "MiB",
            &empty,
            how,
        ),
    ];
    for (what, word) in [("host agent, one guest", "run"), ("shim, one guest", "shim")] {
        let pid = product
            .instance
            .process(&["sovereign-host", &format!(" {word} ")])?;
        let mut samples = Samples::default();
        samples.value(resident_kib(pid).context("it ended")? / 1024.0);
        let row = Row::of(format!("RSS of the {what}"), "MiB", &samples, how);
        rows.push(match word {
            "run" => row.target(Target::AtMost(12.0)),
            _ => row,
        });
    }
    Ok(rows)
}

fn in_guest(product: &Product, script: &str) -> anyhow::Result<Samples> {
    let (_, status) = product.timed(&["exec", "sql", "--", "busybox", "sh", "-c", script])?;
    resident(&status)
}

fn empty_in_guest(places: &Places, product: &Product) -> anyhow::Result<Samples> {
    let script = "busybox cat >/tmp/empty; busybox chmod 755 /tmp/empty; /tmp/empty >/dev/null & p=$!; \
                  busybox sleep 2; busybox cat /proc/$p/status; kill $p; busybox rm /tmp/empty";
    let output = product
        .command(&["exec", "sql", "--", "busybox", "sh", "-c", script])
        .stdin(File::open(places.statics.join("empty"))?)
        .output()?;
    resident(&String::from_utf8_lossy(&output.stdout))
}

fn resident(status: &str) -> anyhow::Result<Samples> {
    let kib = resident_in(status).with_context(|| format!("no VmRSS in {status:?}"))?;
    let mut samples = Samples::default();
    samples.value(kib / 1024.0);
    Ok(samples)
}
