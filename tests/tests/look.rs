//! Floor 2: what `sovereign plan` sees of a machine while no host agent runs, and that it only looks.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::lan::{Lan, Nic};
use sovereign_tests::net::{Filter, Hosted, can_run, left_by_the_kernel, signal};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
/// With links, addresses, a route, rules, switches and a packet filter.
const WANT: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2 host uplink=eth1,eth0";
/// All that could change something.
const CALLS: &str =
    "trace=sendto,sendmsg,ioctl,setsockopt,openat,unlink,rename,mkdir,execve,kill,socket,connect";

/// RTM_GETLINK, as strace writes what is said first on a socket that it does not know yet.
const GET_LINK: &str = "nlmsg_type=0x12 ";

/// What of strace's record is more than a look.
fn changes(record: &str) -> Vec<&str> {
    let is_change = |line: &&str| {
        let asked = ["sendto(", "sendmsg("].iter().any(|call| line.contains(call));
        let has = |kinds: &[&str]| kinds.iter().any(|kind| line.contains(kind));
        let changing = has(&["RTM_NEW", "RTM_DEL", "RTM_SET", "NFT_MSG_NEW", "NFT_MSG_DEL"]);
        let is_look = has(&["RTM_GET", "NFT_MSG_GET", GET_LINK]) && !changing;
        let written = ["O_WRONLY", "O_RDWR", "O_CREAT"]
            .iter()
            .any(|flag| line.contains(flag))
            && !line.contains("/dev/null");
        let touched = has(&["unlink(", "rename(", "mkdir(", "kill(", "connect(", "ioctl("])
            && !line.contains("FIONBIO");
        (asked && !is_look) || written || touched
    };
    record.lines().filter(is_change).collect()
}

/// The steps that an agent logged that it made first.
fn made(log: &str) -> Result<BTreeSet<String>> {
    let line = log.lines().find(|line| line.contains("changed the network"));
    let (_, steps) = line
        .and_then(|line| line.split_once("steps=\""))
        .with_context(|| log.to_owned())?;
    let steps = steps.trim_end_matches('"').split("; ");
    Ok(steps.map(str::to_owned).collect())
}

fn looked(filter: Filter) -> Result<()> {
    let lan = Lan::new()?;
    let machine = lan.machine();
    let hosted = Hosted::new(AGENT, filter)?;
    let record = hosted.record().with_file_name("strace");
    let file = record.to_str().context("a path that is no text")?;
    let strace = ["strace", "-f", "-o", file, "-e", CALLS];

    let before = lan.foreign_state(left_by_the_kernel)?;
    let plan = hosted.look(machine, &strace, WANT)?;
    let after = lan.foreign_state(left_by_the_kernel)?;
    ensure!(
        before.difference(&after).is_empty(),
        "{:#?}",
        before.difference(&after)
    );
    let calls = std::fs::read_to_string(&record)?;
    for look in ["RTM_GETADDR", "RTM_GETROUTE", "RTM_GETRULE", "NFT_MSG_GETTABLE"] {
        ensure!(calls.contains(look), "the record shows requests: {look}: {calls}");
    }
    ensure!(changes(&calls).is_empty(), "{:#?}", changes(&calls));
    ensure!(!hosted.record().exists(), "a record of switches was made");

    // It is what an agent then does.
    let mut agent = hosted.start(machine, WANT)?;
    agent.expect("ready")?;
    agent.expect("works Filter")?;
    let planned: BTreeSet<String> = plan.iter().cloned().collect();
    let made = made(&hosted.log())?;
    ensure!(planned == made, "planned {planned:#?}\nmade {made:#?}");
    signal(agent.pid(), Signal::KILL)?;
    agent.ends()?;

    // What a killed one left is seen, and what somebody takes of it.
    let nothing = hosted.look(machine, &[], WANT)?;
    ensure!(nothing.is_empty(), "{nothing:#?}");
    machine.sh("ip rule del priority 9020; sysctl -qw net.ipv4.ip_forward=0")?;
    let plan = hosted.look(machine, &[], WANT)?;
    ensure!(
        plan.len() == 2
            && plan.iter().any(|step| step.contains("9020"))
            && plan.iter().any(|step| step.contains("ip_forward")),
        "{plan:#?}"
    );
    lan.prefer(Nic::Eth1)?;
    ensure!(
        hosted.look(machine, &[], WANT)? == plan,
        "another default route is nothing to it"
    );
    let away = hosted.look(machine, &[], "nothing")?;
    for part in [
        hosted.bridge(),
        hosted.tap("sql")?,
        "packet filter".to_owned(),
        "rule".to_owned(),
    ] {
        ensure!(away.iter().any(|step| step.contains(&part)), "{part}: {away:#?}");
    }
    Ok(())
}

#[test]
fn a_plan_without_an_agent_is_what_one_would_do_and_changes_nothing() -> Result<()> {
    if can_run("look") {
        looked(Filter::Owned)?;
    }
    Ok(())
}
