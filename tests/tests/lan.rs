//! Floor 3: `namespace = "host"` on a machine of its own: a guest that other machines of the LAN reach, and that gets out.

use anyhow::{Result, ensure};
use serde_json::Value;
use sovereign_tests::client;
use sovereign_tests::machine::{ADDRESS, Machine, PEER, SOON, holds, until};
use sovereign_tests::net::can_run;

/// The port on the LAN.
const PORT: u16 = 15_999;
/// The last port of a second forward, which leads to one where nobody waits in the guest.
const SHARED: u16 = 16_001;

#[test]
fn a_guest_is_on_the_lan_and_the_machine_is_as_it_was_afterwards() -> Result<()> {
    if !can_run("a_guest_is_on_the_lan") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.instance.go_through(|_| on_the_lan(&machine))
}

/// PostgreSQL answers the other machine, now or soon.
fn answers_the_lan(machine: &Machine, when: &str) -> Result<()> {
    until(&format!("PostgreSQL answers the LAN {when}"), || {
        let heard = client::answers(machine.from_peer(PORT, SOON)?)?;
        Ok((heard, "another answer".to_owned()))
    })
}

/// A program begins to wait on a port of a forward that nobody holds, which is all but the first: that is told beside the
/// forward, what comes for it goes to the guest as before, and it is over when the program ends.
fn a_program_on_a_port_is_told_and_hears_nothing(machine: &Machine) -> Result<()> {
    let instance = &machine.instance;
    let program = machine
        .space()
        .serve_tcp(([0, 0, 0, 0], SHARED).into(), "a program")?;
    let us = format!("pid {} (", std::process::id());
    until("the program is told beside the forward", || {
        let guest = instance.guest()?;
        let shared = condition(&guest, "more.port");
        let told = shared["reason"] == "PortShared"
            && shared["status"] == "False"
            && shared["evidence"].as_str().is_some_and(|said| said.contains(&us));
        let goes_on = guest["ready"] == "True" && condition(&guest, "more")["reason"] == "Translated";
        Ok((told && goes_on, format!("{guest:#}")))
    })?;
    instance.until_found(SOON, |found| found.iter().any(|code| code.contains("PortShared")))?;
    ensure!(
        machine.from_peer(SHARED, SOON).is_err(),
        "nobody waits in the guest, and the program is not asked"
    );
    answers_the_lan(machine, "beside a program on a port")?;
    drop(program);
    until("the program is gone", || {
        let guest = instance.guest()?;
        Ok((condition(&guest, "more.port").is_null(), format!("{guest:#}")))
    })?;
    instance.until_found(SOON, <[String]>::is_empty).map(drop)
}

/// What is true of a forward.
fn condition(guest: &Value, subject: &str) -> Value {
    let mut all = guest["conditions"].as_array().into_iter().flatten();
    let found = all.find(|one| one["layer"] == "forward" && one["subject"] == subject);
    found.cloned().unwrap_or_default()
}

fn on_the_lan(machine: &Machine) -> Result<()> {
    let instance = &machine.instance;
    machine.configure(&format!(
        "[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n\n\
         [[guest.sql.forward]]\nname = \"lan\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:{PORT}\"\nvia = \"kernel\"\n\n\
         [[guest.sql.forward]]\nname = \"more\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:16000-{SHARED}\"\nvia = \"kernel\"\n\n\
         [guest.sql.service.postgres]\nkind = \"postgres\"\n"
    ))?;
    let before = machine.state()?;
    instance.ok(&["up"])?;
    let first = instance.guest()?;
    until("way out and filter are told", || {
        let status = instance.status()?;
        let told =
            holds(&status["network"], "routing", "WayOut") && holds(&status["network"], "nat", "Filtered");
        Ok((told, format!("{status:#}")))
    })?;
    until("the forward is translated", || {
        let guest = instance.guest()?;
        Ok((
            holds(&guest["conditions"], "forward", "Translated"),
            format!("{guest:#}"),
        ))
    })?;
    answers_the_lan(machine, "at first")?;
    let here = machine
        .space()
        .enter(|| std::net::TcpStream::connect((ADDRESS, PORT)))??;
    here.set_read_timeout(Some(SOON))?;
    ensure!(client::answers(here)?, "from this machine");
    let out = format!("busybox nc -w 10 {PEER} 9 </dev/null 2>&1 || true");
    let said = instance.ok(&["exec", "sql", "--", "sh", "-c", &out])?;
    ensure!(said.contains("refused"), "the guest gets out: {said:?}");
    ensure!(instance.ok(&["plan"])?.trim() == "nothing to do");
    instance.ok(&["up", "--timeout", "60"])?; // it asks for the same forward again
    a_program_on_a_port_is_told_and_hears_nothing(machine)?;

    // Others tidy up, and nobody notices; then without a host agent.
    machine
        .space()
        .sh("nft flush ruleset; echo 0 > /proc/sys/net/ipv4/ip_forward")?;
    answers_the_lan(machine, "after a flush")?;
    instance.ok(&["host", "stop"])?;
    answers_the_lan(machine, "without the host agent: the kernel goes on")?;
    let guest = instance.guest()?;
    ensure!(
        guest["phase"] == "Running" && guest["ready"] == "Unknown",
        "{guest:#}"
    );
    instance.ok(&["up"])?;
    ensure!(instance.guest()?["boot_id"] == first["boot_id"]);
    answers_the_lan(machine, "after another agent")?;
    instance.ok(&["down"])?;
    ensure!(machine.from_peer(PORT, SOON).is_err(), "nobody is there");
    let changed = before.difference(&machine.state()?);
    ensure!(changed.is_empty(), "{changed:#?}");
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}
