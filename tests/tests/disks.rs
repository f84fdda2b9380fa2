//! Floor 3: full disks, the host's and the guest's: named, waited for, and nothing is lost.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use sovereign_tests::instance::findings;
use sovereign_tests::net::can_run;
use sovereign_tests::{Instance, Who};

/// A look of the guest at its disk, or of the shim at its VMM, and the way up.
const SHOWS: Duration = Duration::from_secs(30);

fn says(guest: &Value, layer: &str, reason: &str) -> bool {
    let conditions = guest["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["layer"] == layer && c["reason"] == reason))
}

fn exec(instance: &Instance, line: &str) -> Command {
    instance.command(&["exec", "sql", "--", "sh", "-c", line])
}

#[test]
fn a_full_disk_is_named_and_waited_for() -> Result<()> {
    if !can_run("a_full_disk_is_named_and_waited_for") {
        return Ok(());
    }
    Instance::run_by(Who::OurselvesOnASmallDisk)?.go_through(|instance| {
        instance.ok(&["up"])?;
        instance.ok(&[
            "psql",
            "sql",
            "-c",
            "create table kept (n int); insert into kept values (1)",
        ])?;
        let first = instance.guest()?;
        the_hosts_disk_is_full(instance)?;
        the_data_disk_is_full(instance)?;
        let last = instance.guest()?;
        ensure!(last["boot_id"] == first["boot_id"], "{last:#}");
        let kept = instance.ok(&["psql", "sql", "-Atc", "select n from kept"])?;
        ensure!(kept.trim() == "1", "{kept}");
        instance.ok(&["down"])?;
        ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
        Ok(())
    })
}

fn the_hosts_disk_is_full(instance: &Instance) -> Result<()> {
    let postgres = "pgrep -o postgres || busybox pidof postgres | tr ' ' '\\n' | sort -n | head -1";
    let before = exec(instance, postgres).output()?.stdout;
    let filler = instance.state_from_here().join("filler");
    fill(&filler)?;
    let writer = exec(
        instance,
        "busybox dd if=/dev/zero of=/var/lib/postgresql/written bs=1M count=64 conv=fsync",
    )
    .stdin(Stdio::null())
    .stdout(Stdio::null())
    .stderr(Stdio::piped())
    .spawn()?;
    let stuck = instance.wait("a guest that waits for room", SHOWS, |guest| {
        says(guest, "vmm", "HostDiskFull")
    })?;
    ensure!(stuck["ready"] == "False", "{stuck:#}");
    let found = findings(&instance.doctor()?);
    ensure!(found == ["vmm HostDiskFull"], "{found:?}");
    std::fs::remove_file(filler)?;
    instance.wait("a guest that goes on", SHOWS, |guest| {
        guest["ready"] == "True" && says(guest, "vmm", "Running")
    })?;
    let written = writer.wait_with_output()?;
    let said = String::from_utf8_lossy(&written.stderr);
    ensure!(written.status.success(), "the write that had to wait: {said}");
    let after = exec(instance, postgres).output()?.stdout;
    ensure!(before == after && !after.is_empty(), "PostgreSQL noticed nothing");
    exec(instance, "rm /var/lib/postgresql/written").status()?;
    Ok(())
}

fn the_data_disk_is_full(instance: &Instance) -> Result<()> {
    let full = exec(
        instance,
        "busybox dd if=/dev/zero of=/var/lib/postgresql/filler bs=1M; true",
    );
    instance_says_full(instance, full)?;
    exec(instance, "rm /var/lib/postgresql/filler").status()?;
    instance.wait("a guest with room", SHOWS, |guest| {
        guest["ready"] == "True" && says(guest, "disk", "Mounted")
    })?;
    Ok(())
}

fn instance_says_full(instance: &Instance, mut fill: Command) -> Result<()> {
    fill.stdin(Stdio::null()).stderr(Stdio::null()).status()?;
    instance.wait("a full data disk", SHOWS, |guest| {
        guest["ready"] == "False" && says(guest, "disk", "Full")
    })?;
    let found = findings(&instance.doctor()?);
    ensure!(
        found.first().is_some_and(|first| first == "disk Full"),
        "{found:?}"
    );
    Ok(())
}

/// Takes all the room there is.
fn fill(path: &std::path::Path) -> Result<()> {
    let file = std::fs::File::create(path)?;
    let mut end = 0_u64;
    let mut step = 64 << 20;
    while step >= 4096 {
        match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), end, step) {
            Ok(()) => end += step,
            Err(rustix::io::Errno::NOSPC) => step /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
