//! Floor 3: a real kernel and a real PostgreSQL under QEMU, through the command line only.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;
use sovereign_tests::Instance;
use sovereign_tests::instance::kill;

const AGAIN: Duration = Duration::from_secs(90);

fn is_ready(guest: &Value) -> bool {
    guest["ready"] == "True"
}

fn select(instance: &Instance, query: &str) -> Result<String> {
    Ok(instance
        .ok(&["psql", "sql", "--", "-Atc", query])?
        .trim()
        .to_owned())
}

/// PostgreSQL's SSLRequest: one byte comes back from a server that speaks the protocol.
fn speaks_postgres(port: u16) -> Result<bool> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer == *b"N")
}

/// The whole life of one guest: boots are expensive, so each step stands on the one before.
#[test]
fn a_guest_lives_is_hurt_heals_and_leaves_nothing() -> Result<()> {
    Instance::new()?.go_through(live)
}

fn live(instance: &Instance) -> Result<()> {
    instance.ok(&["up"])?;
    let first = instance.guest()?;
    ensure!(is_ready(&first), "{first:#}");
    ensure!(
        first["conditions"]
            .as_array()
            .is_some_and(|c| c.iter().all(|c| c["evidence"] != ""))
    );
    ensure!(select(instance, "select 6 * 7")? == "42");
    ensure!(speaks_postgres(instance.port())?);
    select(instance, "create table kept (n int); insert into kept values (1)")?;

    up_again_changes_nothing(instance, &first)?;
    forwards_open_and_close_at_once(instance, &first)?;
    an_ended_host_agent_leaves_its_guest(instance, &first)?;
    a_killed_host_agent_adopts_its_guest(instance, &first)?;
    a_killed_vmm_is_started_again(instance, &first)?;
    a_changed_setting_reaches_the_running_guest(instance)?;
    down_leaves_nothing(instance)?;

    instance.ok(&["up"])?;
    ensure!(
        select(instance, "select n from kept")? == "1",
        "the data disk lasts"
    );
    down_leaves_nothing(instance)
}

fn up_again_changes_nothing(instance: &Instance, first: &Value) -> Result<()> {
    let before = instance.processes();
    instance.ok(&["up"])?;
    ensure!(instance.processes() == before);
    let again = instance.guest()?;
    for key in ["boot_id", "spec_revision", "since"] {
        ensure!(
            again[key] == first[key],
            "{key}: {} -> {}",
            first[key],
            again[key]
        );
    }
    Ok(())
}

/// Two ports of this machine that nobody has, and one that somebody has.
fn forwards_open_and_close_at_once(instance: &Instance, first: &Value) -> Result<()> {
    let file = || std::fs::read_to_string(instance.path("sovereign.toml"));
    let as_written = file()?;
    let held = TcpListener::bind("127.0.0.1:0")?;
    let port = held.local_addr()?.port();
    let forward = port.to_string();
    let refused = instance.run(&["forward", "add", "sql", &forward])?;
    ensure!(refused.status.code() == Some(6), "{refused:?}");
    ensure!(file()? == as_written, "a refused forward is not written");
    drop(held);
    instance.ok(&["forward", "add", "sql", &format!("{port}:5432")])?;
    ensure!(speaks_postgres(port)? && speaks_postgres(instance.port())?);
    ensure!(instance.ok(&["plan"])?.trim() == "nothing to do");

    let other = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    instance.ok(&["forward", "add", "sql", &other.to_string(), "--temporary"])?;
    ensure!(speaks_postgres(other)?);
    let plan = instance.ok(&["plan"])?;
    ensure!(
        plan.trim() == format!("sql: remove forward postgres-{other}"),
        "{plan}"
    );
    instance.ok(&["up"])?;
    ensure!(TcpStream::connect(("127.0.0.1", other)).is_err() && speaks_postgres(port)?);

    instance.ok(&["forward", "remove", "sql", &forward])?;
    ensure!(TcpStream::connect(("127.0.0.1", port)).is_err());
    ensure!(file()? == as_written && instance.ok(&["plan"])?.trim() == "nothing to do");
    let after = instance.guest()?;
    for key in ["boot_id", "spec_revision", "since"] {
        ensure!(after[key] == first[key], "{key}: the guest has no part in it");
    }
    Ok(())
}

fn an_ended_host_agent_leaves_its_guest(instance: &Instance, first: &Value) -> Result<()> {
    let agent = instance.process(&["sovereign-host run"])?;
    let told: Value = serde_json::from_str(&instance.ok(&["host", "status"])?)?;
    ensure!(
        told["host"]["pid"] == agent && told["host"]["guests"][0] == "sql",
        "{told}"
    );
    instance.ok(&["host", "stop"])?;
    ensure!(instance.process(&["sovereign-host run"]).is_err(), "it has ended");
    ensure!(TcpStream::connect(("127.0.0.1", instance.port())).is_err());
    let plan = instance.ok(&["plan"])?;
    ensure!(
        plan.contains("start the host agent\n") && plan.contains("sql: runs without a host agent"),
        "{plan}"
    );
    instance.ok(&["up"])?;
    ensure!(instance.guest()?["boot_id"] == first["boot_id"] && speaks_postgres(instance.port())?);
    Ok(())
}

fn a_killed_host_agent_adopts_its_guest(instance: &Instance, first: &Value) -> Result<()> {
    let agent = instance.process(&["sovereign-host run"])?;
    kill(agent);
    instance.ok(&["up"])?;
    let adopted = instance.guest()?;
    ensure!(
        adopted["boot_id"] == first["boot_id"] && is_ready(&adopted),
        "{adopted:#}"
    );
    ensure!(instance.process(&["sovereign-host run"])? != agent);
    Ok(())
}

fn a_killed_vmm_is_started_again(instance: &Instance, first: &Value) -> Result<()> {
    let vmm = instance.guest()?["vmm"]["pid"].as_u64().unwrap_or_default();
    kill(u32::try_from(vmm)?);
    let healed = instance.wait("restart after SIGKILL of the VMM", AGAIN, |guest| {
        is_ready(guest) && guest["boot_id"] != first["boot_id"]
    })?;
    ensure!(healed["vmm"]["pid"] != vmm);
    ensure!(select(instance, "select n from kept")? == "1");
    Ok(())
}

fn a_changed_setting_reaches_the_running_guest(instance: &Instance) -> Result<()> {
    let boot = instance.guest()?["boot_id"].clone();
    instance.configure("256MiB", "work_mem = \"5MB\"")?;
    instance.ok(&["up"])?;
    ensure!(select(instance, "show work_mem")? == "5MB");
    ensure!(instance.guest()?["boot_id"] == boot, "no reboot for a setting");
    Ok(())
}

fn down_leaves_nothing(instance: &Instance) -> Result<()> {
    instance.ok(&["down"])?;
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    ensure!(!instance.path("run").exists() || std::fs::read_dir(instance.path("run"))?.next().is_none());
    ensure!(TcpStream::connect(("127.0.0.1", instance.port())).is_err());
    instance.ok(&["down"])?;
    Ok(())
}
