//! Floor 3: `namespace = "host"` on a machine of its own: a guest that other machines of the LAN reach, and that gets out.

use anyhow::{Result, ensure};
use sovereign_tests::client;
use sovereign_tests::machine::{ADDRESS, Machine, PEER, SOON, holds, until};
use sovereign_tests::net::can_run;

/// The port on the LAN.
const PORT: u16 = 15_999;

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

fn on_the_lan(machine: &Machine) -> Result<()> {
    let instance = &machine.instance;
    machine.configure(&format!(
        "[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n\n\
         [[guest.sql.forward]]\nname = \"lan\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:{PORT}\"\nvia = \"kernel\"\n\n\
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

    // Others tidy up, and nobody notices; then without a host agent.
    machine
        .space()
        .sh("nft flush ruleset; echo 0 > /proc/sys/net/ipv4/ip_forward")?;
    answers_the_lan(machine, "after a flush")?;
    instance.ok(&["host", "stop"])?;
    answers_the_lan(machine, "without the host agent: the kernel goes on")?;
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
