//! Floor 3: one guest, hurt in every way that we know, one after the other; each time it comes back by itself.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use sovereign_tests::Instance;
use sovereign_tests::instance::{kill, signal};

/// A server that speaks PostgreSQL's protocol answers one byte.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const AGAIN: Duration = Duration::from_secs(90);

fn is_ready(guest: &Value) -> bool {
    guest["ready"] == "True"
}

fn in_guest(instance: &Instance, script: &str) -> Result<String> {
    Ok(instance
        .ok(&["exec", "sql", "--", "sh", "-c", script])?
        .trim()
        .to_owned())
}

fn postmaster(instance: &Instance) -> Result<String> {
    in_guest(
        instance,
        "head -1 /var/lib/postgresql/17/main/postmaster.pid || head -1 $(find /var/lib -name postmaster.pid)",
    )
}

/// `guest subject reason` of the events after `seq`.
fn told(instance: &Instance, seq: u64, layer: &str) -> Result<Vec<String>> {
    let events = instance.events()?;
    let fresh = events
        .iter()
        .filter(|e| e["seq"].as_u64() > Some(seq) && e["layer"] == layer);
    Ok(fresh
        .map(|e| e["reason"].as_str().unwrap_or("?").to_owned())
        .collect())
}

fn last_seq(instance: &Instance) -> Result<u64> {
    Ok(instance
        .events()?
        .last()
        .and_then(|e| e["seq"].as_u64())
        .unwrap_or(0))
}

#[test]
fn a_guest_that_is_hurt_comes_back_and_the_journal_tells_how() -> Result<()> {
    Instance::new()?.go_through(hurt)
}

fn hurt(instance: &Instance) -> Result<()> {
    a_port_in_use_is_named_with_its_program(instance)?;
    a_killed_postgres_is_restarted_and_each_step_is_told_once(instance)?;
    a_stopped_vmm_is_unknown_and_goes_on(instance)?;
    a_killed_guest_agent_leaves_postgres_alone(instance)?;
    a_stuck_guest_agent_is_restarted_by_init(instance)?;
    a_kernel_panic_is_named(instance)?;
    a_guest_that_reboots_is_a_new_boot(instance)?;
    a_killed_shim_takes_its_vmm_along_and_both_come_back(instance)?;
    more_memory_waits_for_another_boot(instance)?;
    no_secret_is_anywhere_else(instance)?;
    guests_without_an_agent_are_stopped_in_order(instance)
}

fn a_port_in_use_is_named_with_its_program(instance: &Instance) -> Result<()> {
    let holder = TcpListener::bind(("127.0.0.1", instance.port()))?;
    instance.ok(&["up"])?;
    let guest = instance.guest()?;
    let conditions = guest["conditions"].as_array().context("no conditions")?;
    let forward = conditions
        .iter()
        .find(|c| c["layer"] == "forward")
        .context("no forward")?;
    let evidence = forward["evidence"].as_str().unwrap_or_default();
    ensure!(forward["reason"] == "PortUnavailable", "{forward}");
    ensure!(
        evidence.contains(&format!("pid {} (", std::process::id())),
        "{evidence}"
    );
    drop(holder);
    instance.ok(&["up"])?;
    instance.wait("the port is free again", AGAIN, |guest| {
        guest["forwards"][0]["status"] == "True"
    })?;
    Ok(())
}

fn a_killed_postgres_is_restarted_and_each_step_is_told_once(instance: &Instance) -> Result<()> {
    let seq = last_seq(instance)?;
    let before = postmaster(instance)?;
    in_guest(instance, &format!("kill -9 {before}"))?;
    instance.wait("PostgreSQL is back", AGAIN, |guest| {
        is_ready(guest)
            && told(instance, seq, "service").is_ok_and(|told| told.last().is_some_and(|t| t == "Ready"))
    })?;
    let mut steps = told(instance, seq, "service")?;
    steps.retain(|step| step != "Recovering" && step != "Refused"); // seen or not, as fast as it was
    ensure!(steps == ["Ended", "Starting", "Ready"], "{steps:?}");
    ensure!(postmaster(instance)? != before);
    Ok(())
}

fn a_stopped_vmm_is_unknown_and_goes_on(instance: &Instance) -> Result<()> {
    let before = instance.guest()?;
    let vmm = u32::try_from(before["vmm"]["pid"].as_u64().context("no pid")?)?;
    let mut held = TcpStream::connect(("127.0.0.1", instance.port()))?;
    held.write_all(&SSL_REQUEST)?;
    held.read_exact(&mut [0])?;
    signal(vmm, Signal::STOP)?;
    let stopped = instance.wait("a stopped VMM is noticed", AGAIN, |guest| {
        guest["ready"] == "Unknown"
    })?;
    let reason = stopped["conditions"]
        .as_array()
        .and_then(|c| c.iter().find(|c| c["layer"] == "vmm"));
    ensure!(reason.is_some_and(|c| c["reason"] == "Stopped"), "{stopped:#}");
    signal(vmm, Signal::CONT)?;
    let after = instance.wait("it goes on", AGAIN, is_ready)?;
    ensure!(after["boot_id"] == before["boot_id"] && after["vmm"]["pid"] == before["vmm"]["pid"]);
    held.write_all(&SSL_REQUEST)?;
    held.read_exact(&mut [0])
        .context("the connection did not survive the pause")?;
    Ok(())
}

fn guest_agent(instance: &Instance) -> Result<String> {
    in_guest(
        instance,
        "for p in /proc/[0-9]*; do case $(readlink $p/exe) in */sovereign-guest) echo ${p#/proc/}; break;; esac; done",
    )
}

fn a_killed_guest_agent_leaves_postgres_alone(instance: &Instance) -> Result<()> {
    let (postgres, agent) = (postmaster(instance)?, guest_agent(instance)?);
    let seq = last_seq(instance)?;
    let _ = instance.run(&["exec", "sql", "--", "sh", "-c", &format!("kill -9 {agent}")])?; // its own answer may be lost
    instance.wait("another agent answers", AGAIN, |guest| {
        is_ready(guest)
            && told(instance, seq, "session").is_ok_and(|told| told.last().is_some_and(|t| t == "Answered"))
    })?;
    ensure!(guest_agent(instance)? != agent);
    ensure!(postmaster(instance)? == postgres, "PostgreSQL was restarted");
    Ok(())
}

fn a_stuck_guest_agent_is_restarted_by_init(instance: &Instance) -> Result<()> {
    let (postgres, agent) = (postmaster(instance)?, guest_agent(instance)?);
    let seq = last_seq(instance)?;
    let mut stuck = instance
        .command(&["exec", "sql", "--", "sh", "-c", &format!("kill -STOP {agent}")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?; // who answers it is stuck
    instance.wait("init restarts the agent", AGAIN, |guest| {
        is_ready(guest)
            && told(instance, seq, "session").is_ok_and(|told| told.last().is_some_and(|t| t == "Answered"))
    })?;
    stuck.kill()?;
    stuck.wait()?;
    ensure!(guest_agent(instance)? != agent);
    ensure!(postmaster(instance)? == postgres, "PostgreSQL was restarted");
    Ok(())
}

/// Makes the guest end by itself and waits for its next boot.
fn next_boot(instance: &Instance, trigger: &str) -> Result<(Value, Vec<String>)> {
    let boot = instance.guest()?["boot_id"].clone();
    let seq = last_seq(instance)?;
    let mut cause = instance
        .command(&["exec", "sql", "--", "sh", "-c", trigger])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let guest = instance.wait("the next boot", AGAIN, |guest| {
        is_ready(guest) && guest["boot_id"] != boot
    })?;
    cause.wait()?;
    let told = instance
        .events()?
        .into_iter()
        .filter(|e| e["seq"].as_u64() > Some(seq) && e["layer"] == "vmm");
    Ok((
        guest,
        told.map(|e| format!("{} {}", e["reason"], e["evidence"]))
            .collect(),
    ))
}

fn a_kernel_panic_is_named(instance: &Instance) -> Result<()> {
    let (_, told) = next_boot(
        instance,
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger",
    )?;
    let panic = told
        .iter()
        .any(|t| t.contains("GuestPanicked") && t.contains("Kernel panic"));
    ensure!(panic, "{told:?}");
    Ok(())
}

fn a_guest_that_reboots_is_a_new_boot(instance: &Instance) -> Result<()> {
    let (_, told) = next_boot(
        instance,
        "echo 1 > /proc/sys/kernel/sysrq; echo b > /proc/sysrq-trigger",
    )?;
    ensure!(told.iter().any(|t| t.contains("GuestRebooted")), "{told:?}");
    Ok(())
}

fn a_killed_shim_takes_its_vmm_along_and_both_come_back(instance: &Instance) -> Result<()> {
    let before = instance.guest()?;
    let shim = instance.process(&["sovereign-host shim"])?;
    kill(shim);
    let after = instance.wait("another shim", AGAIN, |guest| {
        is_ready(guest) && guest["boot_id"] != before["boot_id"]
    })?;
    ensure!(after["vmm"]["pid"] != before["vmm"]["pid"]);
    let events = instance.events()?;
    ensure!(events.iter().any(|e| e["reason"] == "ShimDied"));
    for one in ["sovereign-host run", "sovereign-host shim", "qemu-system"] {
        instance.process(&[one])?;
    }
    Ok(())
}

fn more_memory_waits_for_another_boot(instance: &Instance) -> Result<()> {
    let boot = instance.guest()?["boot_id"].clone();
    instance.configure("320MiB", "")?;
    instance.ok(&["up"])?;
    let guest = instance.guest()?;
    let machine = guest["conditions"]
        .as_array()
        .and_then(|c| c.iter().find(|c| c["subject"] == "machine"));
    ensure!(
        machine.is_some_and(|c| c["reason"] == "RestartNeeded"),
        "{guest:#}"
    );
    ensure!(guest["boot_id"] == boot && is_ready(&guest));
    instance.ok(&["down", "sql"])?;
    ensure!(instance.guest()?["phase"] == "stopped" || instance.guest()?["phase"] == "Stopped");
    instance.ok(&["up"])?;
    let total = in_guest(
        instance,
        "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo",
    )?;
    ensure!(total.parse::<u64>()? > 270 << 10, "{total} kB");
    Ok(())
}

/// The generated password is the canary: only secrets.json may hold it.
fn no_secret_is_anywhere_else(instance: &Instance) -> Result<()> {
    let canary = instance.ok(&["secret", "sql/postgres"])?.trim().to_owned();
    ensure!(canary.len() >= 16);
    let mut files = Vec::new();
    collect(&instance.state(), &mut files)?;
    collect(&instance.path("run"), &mut files)?;
    ensure!(files.len() >= 5, "{files:?}");
    let mut holders = Vec::new();
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_default(); // a socket
        if contains(&bytes, canary.as_bytes()) {
            holders.push(file);
        }
    }
    ensure!(holders == [instance.state().join("secrets.json")], "{holders:?}");
    for pid in instance.processes() {
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            ensure!(!contains(&bytes, canary.as_bytes()), "{pid} {file}");
        }
    }
    let searched = in_guest(
        instance,
        &format!(
            "cat /proc/cmdline /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null | tr '\\0' ' ' | grep -v grep | grep -c -e '{canary}' || true"
        ),
    )?;
    // The searching shell's own command line has it: one line.
    ensure!(searched == "0" || searched == "1", "{searched}");
    let image = instance.ok(&["build", "--json"])?;
    let image: Value = serde_json::from_str(&image)?;
    for key in ["kernel", "initramfs", "root", "agent"] {
        let path = image["image"]["files"][key].as_str().context("no path")?;
        ensure!(!contains(&std::fs::read(path)?, canary.as_bytes()), "{path}");
    }
    Ok(())
}

fn collect(dir: &std::path::Path, files: &mut Vec<std::path::PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.file_name().is_none_or(|name| name != "data.img") {
            files.push(path); // PostgreSQL itself keeps a SCRAM verifier on the data disk, not the password
        }
    }
    Ok(())
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

fn guests_without_an_agent_are_stopped_in_order(instance: &Instance) -> Result<()> {
    kill(instance.process(&["sovereign-host run"])?);
    instance.ok(&["down"])?;
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    let console = std::fs::read(instance.state().join("guests/sql/exit.json"))?;
    ensure!(
        contains(&console, b"powered_off") || contains(&console, b"PoweredOff"),
        "not in order"
    );
    Ok(())
}
