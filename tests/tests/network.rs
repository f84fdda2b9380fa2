//! Floor 3: a guest's network: made, healed, changed while it runs, and gone; for each kind of user.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use sovereign_host_agent::net::names;
use sovereign_tests::instance::{findings, signal};
use sovereign_tests::net::{can_run, inside};
use sovereign_tests::{Instance, Who};

/// The guest looks at its network when the kernel tells of a change; emulated, that takes a moment.
const SOON: Duration = Duration::from_secs(20);

fn condition<'a>(guest: &'a Value, layer: &str) -> Result<&'a Value> {
    let conditions = guest["conditions"].as_array().context("no conditions")?;
    let found = conditions.iter().find(|condition| condition["layer"] == layer);
    found.with_context(|| format!("no {layer} in {guest:#}"))
}

fn is(guest: &Value, layer: &str, reason: &str, evidence: &str) -> bool {
    condition(guest, layer).is_ok_and(|found| {
        found["reason"] == reason
            && found["evidence"]
                .as_str()
                .is_some_and(|text| text.contains(evidence))
    })
}

fn in_guest(instance: &Instance, line: &str) -> Result<String> {
    instance.ok(&["exec", "sql", "--", "sh", "-c", line])
}

/// Nobody listens there: the refusal comes from the other end of the card, or from nowhere.
fn reaches(instance: &Instance, gateway: &str) -> Result<()> {
    let line = format!("busybox nc -w 3 {gateway} 9 </dev/null 2>&1 || true");
    let said = in_guest(instance, &line)?;
    ensure!(said.contains("refused"), "{gateway}: {said:?}");
    Ok(())
}

#[test]
fn a_guests_network_is_kept_and_changed_while_it_runs() -> Result<()> {
    if !can_run("a_guests_network_is_kept_and_changed_while_it_runs") {
        return Ok(());
    }
    Instance::run_by(Who::Ourselves)?.go_through(private)
}

#[test]
fn an_ordinary_user_who_may_open_tun_has_the_same() -> Result<()> {
    if !can_run("an_ordinary_user_who_may_open_tun_has_the_same") {
        return Ok(());
    }
    Instance::run_by(Who::OrdinaryWithTun)?.go_through(private)
}

fn private(instance: &Instance) -> Result<()> {
    let address = "192.168.100.20";
    instance.configure_network("namespace = \"private\"", &format!("address = \"{address}\""))?;
    instance.ok(&["up"])?;
    let first = instance.guest()?;
    ensure!(is(&first, "tap", "Attached", address), "{first:#}");
    ensure!(is(&first, "interface", "Configured", address), "{first:#}");
    reaches(instance, "192.168.100.1")?;

    heals(
        instance,
        "ip address del 192.168.100.20/24 dev eth0",
        "AddressMissing",
        address,
    )?;
    heals(instance, "ip route del default", "RouteMissing", "192.168.100.1")?;
    heals(instance, "ip link set eth0 down", "Down", address)?;
    reaches(instance, "192.168.100.1")?;

    // Another subnet, address and name server: the guest runs on, and nothing of the old is left.
    let keys = "address = \"10.77.0.9\"\ndns = [\"10.77.0.1\"]";
    let network = "namespace = \"private\"\naddress = \"10.77.0.1/16\"";
    instance.configure_network(network, keys)?;
    instance.ok(&["up"])?;
    let moved = instance.guest()?;
    ensure!(is(&moved, "interface", "Configured", "10.77.0.9/16"), "{moved:#}");
    ensure!(
        moved["boot_id"] == first["boot_id"] && moved["vmm"] == first["vmm"],
        "{moved:#}"
    );
    reaches(instance, "10.77.0.1")?;
    let addresses = in_guest(instance, "busybox ip -4 address show eth0; cat /etc/resolv.conf")?;
    ensure!(
        addresses.contains("10.77.0.9/16") && addresses.contains("nameserver 10.77.0.1"),
        "{addresses}"
    );
    ensure!(!addresses.contains(address), "{addresses}");

    a_foreign_bridge_is_named_and_left_alone(instance)?;
    tailscale_is_watched_when_it_is_wanted(instance, network, keys)?;
    instance.ok(&["down"])?;
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}

/// Somebody takes our bridge away and puts another of its name there: not ours to remove.
fn a_foreign_bridge_is_named_and_left_alone(instance: &Instance) -> Result<()> {
    let bridge = names::bridge(&instance.name()?);
    let helper = instance.process(&[" netns ", "--socket"])?;
    let agent = instance.process(&["sovereign-host run"])?;
    signal(agent, Signal::STOP)?; // else it would be quicker than we are
    let taken = format!("ip link set {bridge} name gone group 0; ip link add {bridge} type bridge");
    let taken = inside(helper, &taken);
    signal(agent, Signal::CONT)?;
    taken?;
    // The bridge that was ours has our address still.
    let found = until(instance, |found| {
        let has = |code: &str| found.iter().any(|found| found == code);
        has("tap NetworkFailed") && has("tap AddressConflict")
    })?;
    ensure!(found.len() == 2, "{found:?}");
    inside(helper, &format!("ip link delete {bridge}; ip link delete gone"))?;
    until(instance, <[String]>::is_empty)?;
    reaches(instance, "10.77.0.1")
}

/// The image has no tailscaled: that is said, and the guest is ready all the same.
fn tailscale_is_watched_when_it_is_wanted(instance: &Instance, network: &str, keys: &str) -> Result<()> {
    instance.configure_network(network, &format!("{keys}\n[guest.sql.tailscale]"))?;
    instance.ok(&["up"])?;
    let found = until(instance, |found| !found.is_empty())?;
    ensure!(
        found.len() == 1 && found[0].starts_with("tailscale "),
        "{found:?}"
    );
    ensure!(instance.guest()?["ready"] == "True");
    instance.configure_network(network, keys)?;
    instance.ok(&["up"])?;
    until(instance, <[String]>::is_empty)?;
    Ok(())
}

fn until(instance: &Instance, wanted: impl Fn(&[String]) -> bool) -> Result<Vec<String>> {
    Ok(findings(&instance.until_found(SOON, wanted)?))
}

/// What was taken away is there again by itself, and the journal tells both.
fn heals(instance: &Instance, harm: &str, lack: &str, back: &str) -> Result<()> {
    let seq = |event: &Value| event["seq"].as_u64().unwrap_or(0);
    let before = instance.events()?.last().map_or(0, seq);
    in_guest(instance, &format!("busybox {harm}"))?;
    instance.wait(harm, SOON, |guest| {
        let told = instance.events().unwrap_or_default();
        let mut fresh = told
            .iter()
            .filter(|event| seq(event) > before && event["layer"] == "interface");
        fresh.any(|event| event["reason"] == lack)
            && is(guest, "interface", "Configured", back)
            && guest["ready"] == "True"
    })?;
    Ok(())
}

#[test]
fn an_ordinary_user_has_a_guest_without_a_network_and_is_told_why() -> Result<()> {
    if !can_run("an_ordinary_user_has_a_guest_without_a_network_and_is_told_why") {
        return Ok(());
    }
    Instance::run_by(Who::Ordinary)?.go_through(|instance| {
        instance.ok(&["up"])?;
        let guest = instance.guest()?;
        ensure!(guest["ready"] == "True", "{guest:#}");
        let card = condition(&guest, "tap")?;
        ensure!(card["reason"] == "NoNetwork", "{card:#}");
        let answer = instance.ok(&["psql", "sql", "-c", "select 6 * 7", "-At"])?;
        ensure!(answer.trim() == "42", "{answer}");
        instance.ok(&["down"])?;
        ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
        Ok(())
    })
}
