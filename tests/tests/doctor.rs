//! Floor 3: faults are injected into a running guest and its agents, and `sovereign doctor` must name each of them, and
//! nothing else. Where a finding's own fix is safe here, the test repairs with it.

use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use sovereign_tests::Instance;
use sovereign_tests::instance::{findings, kill, signal};

/// A fault shows within this time: a probe of a service every 5 s, a clock measured every 64 s at most.
const SHOWS: Duration = Duration::from_secs(100);
/// A boot on a busy machine.
const HEALS: Duration = Duration::from_secs(120);
const HEALTHY_RUNS: usize = 50;

/// Asks again until exactly one of `wanted` is what is found.
fn until(instance: &Instance, limit: Duration, wanted: &[&[&str]]) -> Result<Value> {
    let is_wanted = |found: &[String]| wanted.iter().any(|wanted| found == *wanted);
    instance
        .until_found(limit, is_wanted)
        .with_context(|| format!("{wanted:?}"))
}

fn healthy(instance: &Instance) -> Result<()> {
    let diagnosis = until(instance, HEALS, &[&[]])?;
    ensure!(diagnosis["ok"] == true);
    ensure!(instance.run(&["test"])?.status.code() == Some(0));
    Ok(())
}

/// The evidence of a finding as one text.
fn evidence(diagnosis: &Value, index: usize) -> String {
    let all = diagnosis["findings"][index]["evidence"]
        .as_array()
        .into_iter()
        .flatten();
    let texts: Vec<String> = all.map(|e| format!("{}: {}", e["source"], e["text"])).collect();
    texts.join("\n")
}

/// Every finding says how it could be wrong, and what to do at what risk; `test` exits with 1.
fn is_whole(instance: &Instance, diagnosis: &Value) -> Result<()> {
    for finding in diagnosis["findings"].as_array().into_iter().flatten() {
        let texts = [
            &finding["what"],
            &finding["evidence"][0]["text"],
            &finding["counter_test"]["run"],
            &finding["counter_test"]["wrong_if"],
            &finding["fix"],
            &finding["risk"],
        ];
        ensure!(
            texts
                .iter()
                .all(|text| text.as_str().is_some_and(|t| !t.is_empty())),
            "{finding:#}"
        );
    }
    ensure!(instance.run(&["test"])?.status.code() == Some(1));
    Ok(())
}

/// Runs the fix of a finding as a person would, in a shell that finds `sovereign`.
fn apply_fix(instance: &Instance, diagnosis: &Value, index: usize) -> Result<()> {
    let fix = diagnosis["findings"][index]["fix"].as_str().context("no fix")?;
    let ours = instance.command(&[]);
    let directory = std::path::Path::new(ours.get_program())
        .parent()
        .context("no directory")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-ec", fix])
        .env("PATH", format!("{}:{path}", directory.display()));
    shell.envs(ours.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = shell.output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{fix}: {}\n{text}", output.status);
    Ok(())
}

fn host_agent(instance: &Instance) -> Result<u32> {
    instance.process(&["sovereign-host run"])
}

/// Runs a line of shell in the guest after a second, when the command that began it is long gone.
fn later(instance: &Instance, line: &str) -> Result<()> {
    let line = format!("setsid sh -c 'sleep 1; {line}' > /dev/null 2>&1 < /dev/null & sleep 0.2");
    instance.ok(&["exec", "sql", "--", "sh", "-c", &line]).map(drop)
}

/// The whole life of one guest: boots are expensive, so each step stands on the one before.
#[test]
fn each_injected_fault_gets_its_verdict_and_none_is_left_after_the_repair() -> Result<()> {
    Instance::new()?.go_through(inject)
}

fn inject(instance: &Instance) -> Result<()> {
    nothing_runs(instance)?;
    instance.ok(&["up"])?;
    healthy_runs_find_nothing(instance)?;
    a_wrong_configuration_is_named_while_the_guest_runs_on(instance)?;
    a_stopped_vmm(instance)?;
    a_stopped_guest_agent(instance)?;
    a_stopped_service(instance)?;
    a_broken_loopback(instance)?;
    a_lost_interface_and_a_kernel_that_lacks(instance)?;
    a_wrong_clock(instance)?;
    a_stopped_host_agent(instance)?;
    a_killed_host_agent(instance)?;
    a_killed_shim(instance)?;
    a_panicked_kernel(instance)?;
    a_foreign_data_disk(instance)?;
    instance.ok(&["down"])?;
    ensure!(findings(&instance.doctor()?) == ["host NothingRuns"]);
    Ok(())
}

fn nothing_runs(instance: &Instance) -> Result<()> {
    let diagnosis = instance.doctor()?;
    ensure!(findings(&diagnosis) == ["host NothingRuns"], "{diagnosis:#}");
    is_whole(instance, &diagnosis)?;
    ensure!(
        !instance.path("state").exists() && !instance.path("run").exists(),
        "a look makes nothing"
    );
    Ok(())
}

fn healthy_runs_find_nothing(instance: &Instance) -> Result<()> {
    let begun = Instant::now();
    for run in 0..HEALTHY_RUNS {
        let diagnosis = instance.doctor()?;
        ensure!(findings(&diagnosis).is_empty(), "run {run}: {diagnosis:#}");
        let layers = diagnosis["guests"][0]["layers"].as_array().map_or(0, Vec::len);
        ensure!(layers >= 8, "{layers} layers: {diagnosis:#}");
    }
    eprintln!("{HEALTHY_RUNS} healthy runs in {:?}", begun.elapsed());
    ensure!(instance.run(&["test"])?.status.code() == Some(0));
    Ok(())
}

fn a_wrong_configuration_is_named_while_the_guest_runs_on(instance: &Instance) -> Result<()> {
    let file = instance.path("sovereign.toml");
    let right = std::fs::read_to_string(&file)?;
    std::fs::write(&file, right.replace("memory", "memry"))?;
    let diagnosis = instance.doctor()?;
    let found = findings(&diagnosis);
    ensure!(
        found.len() == 1 && found[0].starts_with("configuration "),
        "{diagnosis:#}"
    );
    ensure!(
        evidence(&diagnosis, 0).contains("sovereign.toml:2:"),
        "{diagnosis:#}"
    );
    ensure!(diagnosis["guests"][0]["ready"] == "True");
    is_whole(instance, &diagnosis)?;
    std::fs::write(&file, right)?;
    healthy(instance)
}

fn a_stopped_vmm(instance: &Instance) -> Result<()> {
    let pid = u32::try_from(instance.guest()?["vmm"]["pid"].as_u64().context("no VMM")?)?;
    signal(pid, Signal::STOP)?;
    let diagnosis = until(instance, SHOWS, &[&["vmm Stopped"]])?;
    is_whole(instance, &diagnosis)?;
    ensure!(diagnosis["findings"][0]["fix"] == format!("kill -CONT {pid}"));
    ensure!(evidence(&diagnosis, 0).contains("is in state T"), "{diagnosis:#}");
    apply_fix(instance, &diagnosis, 0)?;
    healthy(instance)
}

fn a_stopped_guest_agent(instance: &Instance) -> Result<()> {
    later(instance, "kill -STOP $(pidof sovereign-guest)")?;
    let diagnosis = until(instance, SHOWS, &[&["session Silent"], &["session Lost"]])?;
    let text = evidence(&diagnosis, 0);
    ensure!(
        text.contains("fresh dial") && text.contains("shim") && text.contains("Running"),
        "{text}"
    );
    healthy(instance) // init restarts an agent that is silent for 20 s
}

fn a_stopped_service(instance: &Instance) -> Result<()> {
    instance.ok(&["exec", "sql", "--", "busybox", "killall", "-STOP", "postgres"])?;
    let diagnosis = until(instance, SHOWS, &[&["service Silent"]])?;
    ensure!(diagnosis["findings"][0]["subject"] == "postgres");
    is_whole(instance, &diagnosis)?;
    apply_fix(instance, &diagnosis, 0)?;
    healthy(instance)
}

/// The agent raises a link that is down, so what is taken away is the kernel's own route of it.
fn a_broken_loopback(instance: &Instance) -> Result<()> {
    let break_it =
        "for net in 127.0.0.0/8 127.0.0.1; do busybox ip route del table local local $net dev lo; done";
    instance.ok(&["exec", "sql", "--", "sh", "-c", break_it])?;
    let diagnosis = until(instance, SHOWS, &[&["loopback Down"], &["loopback NoAnswer"]])?;
    is_whole(instance, &diagnosis)?;
    ensure!(diagnosis["guests"][0]["ready"] == "False", "{diagnosis:#}");
    let counter_test = instance.run(&[
        "exec",
        "sql",
        "--",
        "busybox",
        "ping",
        "-c",
        "1",
        "-W",
        "2",
        "127.0.0.1",
    ])?;
    ensure!(
        !counter_test.status.success(),
        "the counter-test agrees with the diagnosis"
    );
    apply_fix(instance, &diagnosis, 0)?;
    healthy(instance)
}

/// Two faults, one above the other: the lower one is the finding until it is repaired.
fn a_lost_interface_and_a_kernel_that_lacks(instance: &Instance) -> Result<()> {
    let in_guest = |line: &str| instance.ok(&["exec", "sql", "--", "sh", "-c", line]);
    if layer(&instance.doctor()?, "interface").is_ok() {
        in_guest(&virtio_net("unbind"))?;
        let diagnosis = until(instance, SHOWS, &[&["interface NoDevice"]])?;
        is_whole(instance, &diagnosis)?;
    } else {
        eprintln!("SKIPPED: the lost interface; guests have no card here (network `none`)");
    }
    // As a kernel without SYSVIPC answers: no segment can be made. It is tried once a minute.
    in_guest("echo 0 > /proc/sys/kernel/shmmni")?;
    let diagnosis = until(instance, SHOWS, &[&["kernel Lacks"]])?;
    is_whole(instance, &diagnosis)?;
    ensure!(evidence(&diagnosis, 0).contains("SYSVIPC"), "{diagnosis:#}");
    if let Ok(interface) = layer(&diagnosis, "interface") {
        ensure!(interface["blocked_by"][0]["layer"] == "kernel", "{interface:#}");
    }
    ensure!(
        layer(&diagnosis, "service")?["verdict"] == "holds",
        "PostgreSQL has its segment"
    );
    in_guest("echo 4096 > /proc/sys/kernel/shmmni")?;
    if layer(&diagnosis, "interface").is_ok() {
        until(instance, SHOWS, &[&["interface NoDevice"]])?;
        in_guest(&virtio_net("bind"))?;
    }
    healthy(instance)
}

/// Takes the card's driver away, or gives it back.
fn virtio_net(what: &str) -> String {
    let drivers = "/sys/bus/virtio/drivers/virtio_net";
    let card =
        "for d in /sys/bus/virtio/devices/*; do [ \"$(cat $d/device)\" = 0x0001 ] && basename $d; done";
    format!("echo $({card}) > {drivers}/{what}")
}

/// What a diagnosis says of a layer of the guest.
fn layer<'d>(diagnosis: &'d Value, name: &str) -> Result<&'d Value> {
    let mut layers = diagnosis["guests"][0]["layers"].as_array().into_iter().flatten();
    layers
        .find(|layer| layer["layer"] == name)
        .context("no such layer")
}

fn a_wrong_clock(instance: &Instance) -> Result<()> {
    let set = |ahead_s: u64| -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let wanted = format!("@{}", now.as_secs() + ahead_s);
        instance
            .ok(&["exec", "sql", "--", "busybox", "date", "-u", "-s", &wanted])
            .map(drop)
    };
    set(3_600)?;
    let diagnosis = until(instance, SHOWS, &[&["clock Ahead"]])?;
    is_whole(instance, &diagnosis)?;
    let text = evidence(&diagnosis, 0); // seconds are cut off, and the command takes a while
    ensure!(text.contains("+359") || text.contains("+3600"), "{diagnosis:#}");
    ensure!(diagnosis["guests"][0]["ready"] == "True", "the clock is advisory");
    set(0)?;
    healthy(instance)
}

fn a_stopped_host_agent(instance: &Instance) -> Result<()> {
    signal(host_agent(instance)?, Signal::STOP)?;
    let diagnosis = until(instance, SHOWS, &[&["host HostAgentStopped"]])?;
    apply_fix(instance, &diagnosis, 0)?;
    healthy(instance)
}

fn a_killed_host_agent(instance: &Instance) -> Result<()> {
    let boot = instance.guest()?["boot_id"].clone();
    kill(host_agent(instance)?);
    let diagnosis = until(instance, SHOWS, &[&["host HostAgentDown"]])?;
    is_whole(instance, &diagnosis)?;
    let service = layer(&diagnosis, "service")?;
    ensure!(
        (&service["status"], &service["source"]) == (&"True".into(), &"guest agent".into()),
        "the guest runs on and is asked past its host agent: {service:#}"
    );
    apply_fix(instance, &diagnosis, 0)?;
    ensure!(instance.guest()?["boot_id"] == boot, "the guest was adopted");
    healthy(instance)
}

/// While the host agent is dead, too: else the next boot begins at once.
fn a_killed_shim(instance: &Instance) -> Result<()> {
    kill(host_agent(instance)?);
    kill(instance.process(&["sovereign-host shim"])?);
    let diagnosis = until(instance, SHOWS, &[&["host HostAgentDown", "vmm ShimDied"]])?;
    is_whole(instance, &diagnosis)?;
    ensure!(evidence(&diagnosis, 1).contains("console"), "{diagnosis:#}");
    apply_fix(instance, &diagnosis, 1)?;
    healthy(instance)
}

fn a_panicked_kernel(instance: &Instance) -> Result<()> {
    later(instance, "echo c > /proc/sysrq-trigger")?;
    kill(host_agent(instance)?);
    let diagnosis = until(instance, SHOWS, &[&["host HostAgentDown", "vmm GuestPanicked"]])?;
    is_whole(instance, &diagnosis)?;
    let text = evidence(&diagnosis, 1);
    let console = text
        .lines()
        .find(|line| line.starts_with("\"console\""))
        .unwrap_or_default();
    ensure!(
        console.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{text}"
    );
    apply_fix(instance, &diagnosis, 0)?;
    healthy(instance)?;

    // With the host agent there the guest is booted again, and the journal still says why.
    later(instance, "echo c > /proc/sysrq-trigger")?;
    let diagnosis = until(instance, SHOWS, &[&["session Dialling"]])?;
    ensure!(evidence(&diagnosis, 0).contains("GuestPanicked"), "{diagnosis:#}");
    healthy(instance)
}

fn a_foreign_data_disk(instance: &Instance) -> Result<()> {
    instance.ok(&["down"])?;
    let mut disks = glob(&instance.path("state"), "data.img");
    let disk = disks.pop().context("no data disk")?;
    std::fs::rename(&disk, disk.with_extension("kept"))?;
    let foreign = std::fs::File::create(&disk)?;
    foreign.write_all_at(b"XFSB", 0)?; // fs/xfs/libxfs/xfs_format.h
    foreign.set_len(512 << 20)?;
    drop(foreign);
    ensure!(!instance.run(&["up", "--timeout", "3"])?.status.success());
    let diagnosis = until(instance, HEALS, &[&["disk Foreign"]])?;
    is_whole(instance, &diagnosis)?;
    let service = layer(&diagnosis, "service")?;
    ensure!(service["blocked_by"][0]["layer"] == "disk", "{service:#}");
    apply_fix(instance, &diagnosis, 0)?;
    let aside = std::fs::read(disk.with_extension("img.aside"))?;
    ensure!(aside.starts_with(b"XFSB"), "what is foreign is kept");
    healthy(instance)
}

/// Files of this name below a directory.
fn glob(directory: &std::path::Path, name: &str) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let below = entries.flat_map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => glob(&entry.path(), name),
        _ if entry.file_name() == name => vec![entry.path()],
        _ => Vec::new(),
    });
    below.collect()
}
