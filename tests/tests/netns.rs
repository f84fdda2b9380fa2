//! Floor 2: the netns helper and agents that end, die or find nothing to do, as root and as an ordinary user.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::instance::kill;
use sovereign_tests::net::{User, WANT, World, can_run, for_both, holders, namespace_of, signal, world};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");

/// `-probe` as strace shows it: a batch of nf_tables with this name in it is refused whole, and shows what it would do.
const PROBE: &str = r"\x2d\x70\x72\x6f\x62\x65";

/// Requests that change something, out of strace's record.
fn changes(record: &str) -> Vec<&str> {
    let is_change = |line: &&str| {
        if line.contains("nlmsg_type=0xa") {
            return !line.contains(PROBE) && !line.contains("nlmsg_type=0xa10"); // looks begin with the generation
        }
        let kind = line
            .split("nlmsg_type=0x")
            .nth(1)
            .and_then(|rest| rest.split([' ', ',']).next());
        let kind = kind.and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let get = 2; // RTM_GET* end in binary 10
        kind.is_some_and(|kind| kind % 4 != get) || line.contains("TUNSET")
    };
    record.lines().filter(is_change).collect()
}

#[test]
fn an_agent_that_finds_all_as_wanted_changes_nothing() -> Result<()> {
    for_both("an_agent_that_finds_all_as_wanted", |user| {
        let (world, _) = world(AGENT, user)?;
        let record = |name: &str| -> Result<String> {
            let file = world.path(name);
            let text = file.to_str().context("a path that is no text")?;
            let over = ["strace", "-o", text, "-e", "trace=sendto,sendmsg,ioctl"];
            let mut agent = world.agent_under(&over, "-", WANT)?;
            agent.expect("ready")?;
            agent.restart_ends()?;
            Ok(std::fs::read_to_string(file)?)
        };
        let first = record("first")?;
        ensure!(changes(&first).len() > 10, "the record shows changes: {first}");
        let second = record("second")?;
        ensure!(
            second.contains("nlmsg_type=0x12"),
            "the record shows requests: {second}"
        );
        ensure!(changes(&second).is_empty(), "{:#?}", changes(&second));
        Ok(())
    })
}

#[test]
fn killed_at_any_step_the_next_agent_goes_on() -> Result<()> {
    for_both("killed_at_any_step", |user| {
        let (world, links) = world(AGENT, user)?;
        for step in 1.. {
            let inject = format!("inject=sendto,sendmsg,ioctl:signal=KILL:when={step}");
            let over = [
                "strace",
                "-o",
                "/dev/null",
                "-e",
                "trace=sendto,sendmsg,ioctl",
                "-e",
                &inject,
            ];
            let mut first = world.agent_under(&over, "-", WANT)?;
            let survived = first.expect("ready").is_ok();
            if !survived {
                first.ends()?;
            }
            let mut next = world.agent(WANT)?;
            next.expect("ready")
                .with_context(|| format!("killed at step {step}"))?;
            links
                .as_wanted(&world)
                .with_context(|| format!("killed at step {step}"))?;
            next.say("end")?;
            next.expect("ended")?;
            next.restart_ends()?;
            if survived {
                ensure!(step > 20, "only {step} steps were seen");
                eprintln!("{user:?}: killed at each of {} steps", step - 1);
                return Ok(());
            }
            ensure!(
                world.processes().is_empty(),
                "step {step}: {:?}",
                world.processes()
            );
        }
        Ok(())
    })
}

#[test]
fn a_helper_that_dies_is_replaced_in_the_same_namespace() -> Result<()> {
    for_both("a_helper_that_dies", |user| {
        let (world, links) = world(AGENT, user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        agent.say("open sql")?;
        agent.expect("opened sql")?;
        let (first, before) = (world.helper()?, world.picture()?);
        let namespace = namespace_of(first)?;
        kill(first);
        agent.expect("repaired netns helper")?;
        let second = world.helper()?;
        ensure!(second != first && namespace_of(second)? == namespace);
        ensure!(world.picture()? == before);
        agent.restart_ends()?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        links.as_wanted(&world)?;
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()?;
        ensure!(holders(&namespace).is_empty(), "{:?}", holders(&namespace));
        Ok(())
    })
}

#[test]
fn a_helper_that_hangs_is_named_and_ended_by_force() -> Result<()> {
    for_both("a_helper_that_hangs", |user| {
        let (world, _) = world(AGENT, user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        agent.restart_ends()?;
        signal(world.helper()?, Signal::STOP)?;
        let mut agent = world.agent(WANT)?;
        let told = agent.expect("failed")?;
        ensure!(told.contains("get an answer from the netns helper"), "{told}");
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()?;
        ensure!(
            std::fs::read_dir(world.path(""))?.count() == 0,
            "no socket is left"
        );
        ensure!(world.processes().is_empty(), "{:?}", world.processes());
        Ok(())
    })
}

fn probe(user: User, tun_mode: &str, words: &[&str]) -> Result<String> {
    let world = World::new(Path::new(AGENT), user, tun_mode)?;
    let program = world.program();
    let all: Vec<&str> = [program.as_str(), "probe"]
        .into_iter()
        .chain(words.iter().copied())
        .collect();
    let output = world.command(&all).output()?;
    ensure!(world.processes().is_empty(), "{:?}", world.processes());
    let links = world.outside("ip -json link show")?;
    ensure!(!links.contains("svprobe"), "{links}");
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

#[test]
fn the_probe_names_the_step_that_fails() -> Result<()> {
    if !can_run("the_probe_names_the_step_that_fails") {
        return Ok(());
    }
    ensure!(probe(User::Root, "600", &[])? == "works");
    ensure!(probe(User::Ordinary, "666", &[])? == "works");
    let cases: [(User, &[&str], &str); 3] = [
        (
            User::Ordinary,
            &[],
            "OpenTun Some(13): cannot open /dev/net/tun: Permission denied",
        ),
        (
            User::Ordinary,
            &["--refuse-unshare"],
            "UnshareUser Some(1): cannot unshare a user namespace",
        ),
        (
            User::Root,
            &["--refuse-unshare"],
            "UnshareNet Some(1): cannot unshare a network namespace",
        ),
    ];
    for (user, words, says) in cases {
        let said = probe(user, "600", words)?;
        ensure!(said.starts_with(says), "{user:?} {words:?}: {said}");
    }
    Ok(())
}

#[test]
fn an_agent_that_cannot_have_a_network_says_which_step_failed() -> Result<()> {
    if !can_run("an_agent_that_cannot_have_a_network") {
        return Ok(());
    }
    let world = World::new(Path::new(AGENT), User::Ordinary, "600")?;
    let mut agent = world.agent(WANT)?;
    let told = agent.expect("failed")?;
    ensure!(
        told.starts_with("failed Links open /dev/net/tun: Permission denied"),
        "{told}"
    );
    agent.say("end")?;
    agent.expect("ended")?;
    ensure!(std::fs::read_dir(world.path(""))?.count() == 0);
    Ok(())
}
