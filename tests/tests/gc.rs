//! Floor 2: what a host agent that was killed left in a namespace that stays, found and removed by its marks alone.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::instance::machines_network;
use sovereign_tests::net::{User, World, can_run, signal, world};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
/// Links, rules, routes, a packet filter and switches.
const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=up0";
/// Somebody else's of each kind, and an uplink.
///
/// Without link-local addresses: whether they are there depends on how far the search for others with them is.
const THEIRS: &str = "ip link add up0 type veth peer name up1; \
    ip link set up0 addrgenmode none up; ip link set up1 addrgenmode none up; \
    ip address add 10.0.0.5/24 dev up0; ip route add default via 10.0.0.1; \
    ip rule add priority 9000 iif up0 lookup 77; ip route add 10.9.0.0/16 dev up0 table 77; \
    nft add table inet theirs; nft add chain inet theirs c; nft add rule inet theirs c counter";
/// All of it, as an independent observer sees it.
const LOOK: &str = "ip -oneline link; ip rule; ip -6 rule; ip route show table all | grep -v 'local fe80'; nft list table inet theirs; \
    cat /proc/sys/net/ipv4/ip_forward; iptables-save | grep -c sv || true";

fn left_behind(filter: &str) -> Result<()> {
    let (world, links) = world(AGENT, User::Root)?;
    world.outside(THEIRS)?;
    let before = world.outside(LOOK)?;
    let test = format!("SOVEREIGN_TEST={}", machines_network());
    let filter = format!("NETWORK_AGENT_FILTER={filter}");
    let mut agent = world.agent_under(&["env", "NETWORK_AGENT_HOST=1", &test, &filter], "-", WANT)?;
    agent.expect("ready")?;
    agent.expect("works Filter")?;
    signal(agent.pid(), Signal::KILL)?;
    let _ = agent.ends()?; // killed
    let there = world.outside(LOOK)?;
    ensure!(
        there.contains(&links.bridge) && there.contains("9020:"),
        "{there}"
    );

    let run = world.path("");
    let gc = || -> Result<String> {
        let (program, run) = (world.program(), run.to_str().context("text")?);
        let words = ["env", &test, program.as_str(), "gc", run, world.instance()];
        let output = world.command(&words).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let told = gc()?;
    ensure!(told.ends_with("failed []\n"), "{told}");
    let parts = [
        "link ",
        "route ",
        "rule IPv4 9020",
        "packet filter",
        "ip_forward: put back to 0",
    ];
    for part in parts {
        ensure!(told.contains(part), "{part}: {told}");
    }
    let after = world.outside(LOOK)?;
    ensure!(after == before, "{before}\n{after}");
    ensure!(gc()? == "failed []\n", "a second time there is nothing");
    // After a reboot nothing is to be put back, and the record goes.
    let record = world.path("switched.json");
    std::fs::write(
        &record,
        r#"{"boot":"another","switched":[["forward_v4",{"before":0,"set":1}]]}"#,
    )?;
    ensure!(gc()? == "failed []\n" && !record.exists(), "{record:?}");
    Ok(())
}

#[test]
fn what_a_killed_agent_left_is_removed_and_nothing_else() -> Result<()> {
    if can_run("gc") {
        left_behind("auto")?;
        left_behind("iptables")?;
    }
    Ok(())
}

/// Takes what an agent of an instance needs to be dead or alive: its directory with the record, and the lock.
fn instance_of(states: &Path, world: &World, name: &str) -> Result<File> {
    let state = states.join(name);
    std::fs::create_dir_all(&state)?;
    std::fs::copy(world.path("switched.json"), state.join("switched.json"))?;
    Ok(File::create(state.join("lock"))?)
}

#[test]
fn switches_of_dead_instances_are_put_back_and_those_of_a_live_one_are_not() -> Result<()> {
    if !can_run("gc_switches") {
        return Ok(());
    }
    let (world, _links) = world(AGENT, User::Root)?;
    world.outside(THEIRS)?;
    let test = format!("SOVEREIGN_TEST={}", machines_network());
    let mut agent = world.agent_under(&["env", "NETWORK_AGENT_HOST=1", &test], "-", WANT)?;
    agent.expect("ready")?;
    agent.expect("works Filter")?;
    let states = tempfile::tempdir()?;
    let lock = instance_of(states.path(), &world, "other")?;
    let gc = || -> Result<String> {
        let (program, states) = (world.program(), states.path().to_string_lossy());
        let output = world
            .command(&["env", &test, &program, "gc-all", &states])
            .output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let forwards = || world.outside("cat /proc/sys/net/ipv4/ip_forward");
    // The agent that runs holds its table: it may need what another instance switched.
    let told = gc()?;
    ensure!(told.contains("left sysctl net.ipv4.ip_forward"), "{told}");
    ensure!(forwards()?.trim() == "1", "{told}");
    signal(agent.pid(), Signal::KILL)?;
    let _ = agent.ends()?; // killed
    lock.lock()?;
    let told = gc()?;
    ensure!(
        !told.contains("ip_forward") && forwards()?.trim() == "1",
        "its agent lives: {told}"
    );
    ensure!(told.contains("packet filter"), "{told}");
    lock.unlock()?;
    let told = gc()?;
    ensure!(
        told.contains("ip_forward: put back to 0") && forwards()?.trim() == "0",
        "{told}"
    );
    ensure!(!states.path().join("other/switched.json").exists());
    ensure!(gc()? == "failed []\n", "a second time there is nothing");
    Ok(())
}

/// It may be of an older version, or cut off.
#[test]
fn a_record_that_cannot_be_understood_keeps_no_agent_from_its_work() -> Result<()> {
    if !can_run("gc_unreadable") {
        return Ok(());
    }
    let (world, _links) = world(AGENT, User::Root)?;
    world.outside(THEIRS)?;
    std::fs::write(world.path("switched.json"), "[[")?;
    let test = format!("SOVEREIGN_TEST={}", machines_network());
    let mut agent = world.agent_under(&["env", "NETWORK_AGENT_HOST=1", &test], "-", WANT)?;
    agent.expect("ready")?;
    agent.expect("works Filter")?;
    let aside = || std::fs::read_to_string(world.path("switched.json.unreadable"));
    ensure!(aside()? == "[[", "people have it");
    agent.say("end")?;
    agent.expect("ended")?;
    agent.restart_ends()?;
    let forwards = world.outside("cat /proc/sys/net/ipv4/ip_forward")?;
    ensure!(
        forwards.trim() == "0",
        "what was switched with another record is put back"
    );
    std::fs::write(world.path("switched.json"), "[[")?;
    let program = world.program();
    let run = world.path("");
    let words = [
        "env",
        &test,
        program.as_str(),
        "gc",
        run.to_str().context("text")?,
        world.instance(),
    ];
    let output = world.command(&words).output()?;
    let told = String::from_utf8(output.stdout)?;
    ensure!(
        told.contains("switched.json.unreadable") && !run.join("switched.json").exists(),
        "{told}"
    );
    Ok(())
}
