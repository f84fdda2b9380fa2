//! Floor 2: the private network in real namespaces, as root and as an ordinary user.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sovereign_host_agent::net::names;
use sovereign_protocol::name::Name;
use sovereign_tests::instance::kill;
use sovereign_tests::net::{User, World, can_run, holders, namespace_of};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24 1500 sql web";

struct Links {
    bridge: String,
    sql: String,
    web: String,
    group: String,
}

fn world(user: User) -> Result<(World, Links)> {
    let world = World::new(Path::new(AGENT), user, "666")?;
    let instance = Name::parse(world.instance())?;
    let tap = |guest: &str| Ok::<_, anyhow::Error>(names::tap(&instance, &Name::parse(guest)?).to_string());
    let links = Links {
        bridge: names::bridge(&instance).to_string(),
        sql: tap("sql")?,
        web: tap("web")?,
        group: names::Mark::of(&instance).group.to_string(),
    };
    Ok((world, links))
}

fn as_wanted(world: &World, links: &Links) -> Result<()> {
    let seen = world.picture()?;
    let bridge = seen.link(&links.bridge);
    ensure!(bridge.is_some(), "no bridge: {seen:#?}");
    let bridge = bridge.cloned().unwrap_or_default();
    ensure!(bridge["kind"] == "bridge", "{bridge:#}");
    ensure!(bridge["group"] == links.group.as_str(), "{bridge:#}");
    ensure!(bridge["up"] == true, "{bridge:#}");
    ensure!(
        seen.addresses(&links.bridge)
            .contains(&"192.168.100.1/24".to_owned())
    );
    ensure!(seen.routes(&links.bridge).contains(&"192.168.100.0/24"));
    for tap in [&links.sql, &links.web] {
        let tap = seen.link(tap).cloned().unwrap_or_default();
        ensure!(tap["tun"]["type"] == "tap", "{tap:#}");
        ensure!(tap["tun"]["persist"] == true, "{tap:#}");
        ensure!(tap["tun"]["vnet_hdr"] == true, "{tap:#}");
        ensure!(tap["master"] == links.bridge.as_str(), "{tap:#}");
        ensure!(tap["group"] == links.group.as_str(), "{tap:#}");
        ensure!(tap["up"] == true, "{tap:#}");
    }
    let lo = seen.link("lo").cloned().unwrap_or_default();
    ensure!(lo["up"] == true, "{lo:#}");
    Ok(())
}

/// The whole life: made, adopted, ended; and nothing is left.
fn a_life(user: User) -> Result<()> {
    let (world, links) = world(user)?;
    let begun = Instant::now();
    let mut agent = world.agent(WANT)?;
    ensure!(agent.expect("ready")? == "ready sql web");
    eprintln!("{user:?}: ready after {:?}", begun.elapsed());
    as_wanted(&world, &links)?;
    ensure!(
        world.outside("ip -json link show")?.matches("ifname").count() <= 3,
        "only lo (and ifb) outside"
    );
    let helper = world.helper()?;
    let namespace = namespace_of(helper)?;
    ensure!(namespace != namespace_of(std::process::id())?);
    let before = world.picture()?;
    agent.restart_ends()?;

    ensure!(world.helper()? == helper, "the helper outlives the agent");
    let mut agent = world.agent(WANT)?;
    ensure!(agent.expect("ready")? == "ready sql web");
    ensure!(world.helper()? == helper, "it was adopted");
    let after = world.picture()?;
    ensure!(after == before, "and nothing was changed: {before:#?} {after:#?}");
    agent.say("open sql")?;
    agent.expect("opened sql")?;
    agent.expect("carrier sql true")?;
    agent.say("open sql")?;
    ensure!(agent.expect("not opened")?.contains("another process holds"));
    agent.say("close sql")?;
    agent.expect("carrier sql false")?;

    agent.say("end")?;
    agent.expect("ended")?;
    ensure!(
        std::fs::read_dir(world.path(""))?.count() == 0,
        "no socket is left"
    );
    agent.restart_ends()?;
    ensure!(world.processes().is_empty(), "{:?}", world.processes());
    ensure!(holders(&namespace).is_empty(), "{:?}", holders(&namespace));
    Ok(())
}

/// Runs a test for both kinds of users at once, where it can run.
fn for_both(test: &str, body: impl Fn(User) -> Result<()> + Sync) -> Result<()> {
    if !can_run(test) {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let users = [User::Root, User::Ordinary];
        let body = &body;
        let running = users.map(|user| (user, scope.spawn(move || body(user))));
        for (user, thread) in running {
            let outcome = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.with_context(|| format!("as {user:?}"))?;
        }
        Ok(())
    })
}

#[test]
fn a_network_lives() -> Result<()> {
    for_both("a_network_lives", a_life)
}

/// How others harm it, and a piece of what the repair must say. The last takes all addresses with it.
fn harms(links: &Links) -> [(String, String); 10] {
    let Links { bridge, sql, .. } = links;
    let says = str::to_owned;
    [
        (format!("ip link delete {sql}"), format!("link {sql}: create tap")),
        (
            format!("ip address delete 192.168.100.1/24 dev {bridge}"),
            says("address 192.168.100.1/24: add"),
        ),
        (
            format!("ip route delete 192.168.100.0/24 dev {bridge}"),
            says("route 192.168.100.0/24: add"),
        ),
        (
            format!("ip link set {bridge} down"),
            format!("link {bridge}: set up"),
        ),
        (format!("ip link set {sql} down"), format!("link {sql}: set up")),
        (
            format!("ip link set {sql} nomaster"),
            format!("link {sql}: make port of {bridge}"),
        ),
        (
            format!("ip link set {sql} mtu 1400"),
            format!("link {sql}: set mtu 1500"),
        ),
        (
            format!("ip link set {bridge} address 02:00:00:00:00:07"),
            format!("link {bridge}: set address"),
        ),
        (says("ip link set lo down"), says("link lo: set up")),
        (
            format!("ip link delete {bridge}"),
            format!("link {bridge}: create bridge"),
        ),
    ]
}

#[test]
fn what_others_harm_is_repaired_and_what_is_theirs_stays() -> Result<()> {
    for_both("what_others_harm_is_repaired", |user| {
        let (world, links) = world(user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        // Ours by group alone, ours by name alone, and nobody's: three that are not ours.
        let theirs = [
            format!("{}-zz", links.bridge),
            "their0".to_owned(),
            "their1".to_owned(),
        ];
        let [by_name, by_group, nobodys] = &theirs;
        world.inside(&format!(
            "ip link add {by_name} type bridge; ip link add {by_group} type bridge; ip link set {by_group} group {}; \
             ip link add {nobodys} type bridge; ip link set {nobodys} up; ip address add 10.9.9.9/24 dev {nobodys}; \
             ip address add 10.7.7.7/24 dev {}",
            links.group, links.bridge
        ))?;
        let before = world.picture()?;
        let mut unmarked = Vec::new();
        for (harm, repair) in harms(&links) {
            world.inside(&harm)?;
            let told = agent.expect("repaired").with_context(|| harm.clone())?;
            ensure!(told.contains(&repair), "{harm}: {told}");
            as_wanted(&world, &links).context(harm)?;
            unmarked.push(
                world
                    .picture()?
                    .addresses(&links.bridge)
                    .contains(&"10.7.7.7/24".to_owned()),
            );
        }
        ensure!(unmarked[..9].iter().all(|stays| *stays), "{unmarked:?}");
        agent.say("want 10.1.0.1/16 1400 sql forge")?;
        ensure!(agent.expect("ready")? == "ready forge sql");
        let seen = world.picture()?;
        ensure!(
            seen.addresses(&links.bridge).contains(&"10.1.0.1/16".to_owned()),
            "{seen:#?}"
        );
        ensure!(
            !seen
                .addresses(&links.bridge)
                .contains(&"192.168.100.1/24".to_owned()),
            "{seen:#?}"
        );
        ensure!(seen.link(&links.web).is_none() && seen.link(&links.sql).is_some_and(|l| l["mtu"] == 1400));
        for name in &theirs {
            ensure!(
                before.link(name).is_some() && before.link(name) == seen.link(name),
                "{name}: {seen:#?}"
            );
        }
        Ok(())
    })
}

#[test]
fn a_foreign_link_in_our_place_is_named_and_not_touched() -> Result<()> {
    for_both("a_foreign_link_in_our_place", |user| {
        let (world, links) = world(user)?;
        let mut agent = world.agent("want 192.168.100.1/24 1500 sql")?;
        agent.expect("ready sql")?;
        world.inside(&format!("ip link add {} type bridge", links.web))?;
        let before = world.picture()?;
        agent.say(WANT)?;
        let told = agent.expect("failed")?;
        ensure!(told.contains(&links.web) && told.contains("not ours"), "{told}");
        ensure!(world.picture()? == before);
        // What is ours is still repaired beside it.
        world.inside(&format!("ip link delete {}", links.sql))?;
        agent.expect("repaired")?;
        world.inside(&format!("ip link delete {}", links.web))?;
        ensure!(agent.expect("ready")? == "ready sql web");
        as_wanted(&world, &links)
    })
}

/// Requests of the route protocol that change something, out of strace's record.
fn changes(record: &str) -> Vec<&str> {
    let is_change = |line: &&str| {
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
        let (world, _) = world(user)?;
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
        let (world, links) = world(user)?;
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
            as_wanted(&world, &links).with_context(|| format!("killed at step {step}"))?;
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
        let (world, links) = world(user)?;
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
        as_wanted(&world, &links)?;
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()?;
        ensure!(holders(&namespace).is_empty(), "{:?}", holders(&namespace));
        Ok(())
    })
}

#[test]
fn a_vmm_has_carrier_as_long_as_it_lives_and_frames_pass() -> Result<()> {
    for_both("a_vmm_has_carrier", |user| {
        let (world, _) = world(user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        agent.say("arp web")?;
        eprintln!("{user:?}: {}", agent.expect("arp answered")?);
        agent.say("vmm sql")?;
        agent.expect("vmm sql runs")?;
        agent.expect("carrier sql true")?;
        agent.say("open sql")?;
        ensure!(agent.expect("not opened")?.contains("another process holds"));
        agent.say("kill sql")?;
        agent.expect("carrier sql false")?;
        agent.say("open sql")?;
        agent.expect("opened sql")?;
        Ok(())
    })
}

#[test]
fn a_helper_that_hangs_is_named_and_ended_by_force() -> Result<()> {
    for_both("a_helper_that_hangs", |user| {
        let (world, _) = world(user)?;
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

#[test]
fn sixty_four_guests_have_their_taps() -> Result<()> {
    for_both("sixty_four_guests", |user| {
        let (world, _) = world(user)?;
        let guests: Vec<String> = (0..64).map(|n| format!("a-guest-with-a-long-name-{n}")).collect();
        let begun = Instant::now();
        let mut agent = world.agent(&format!("want 192.168.100.1/24 1500 {}", guests.join(" ")))?;
        agent.expect("ready")?;
        eprintln!("{user:?}: 64 guests ready after {:?}", begun.elapsed());
        for guest in &guests {
            agent.say(&format!("open {guest}"))?;
            agent.expect(&format!("opened {guest}"))?;
        }
        let seen = world.picture()?;
        ensure!(seen.names().len() >= 66, "{:?}", seen.names());
        Ok(())
    })
}

#[test]
fn lost_notifications_are_made_up_for() -> Result<()> {
    for_both("lost_notifications", |user| {
        let (world, links) = world(user)?;
        let mut agent = world.agent_under(&[], "1", WANT)?;
        agent.expect("ready")?;
        signal(agent.pid(), Signal::STOP)?;
        let storm = "for n in $(seq 40); do ip link add storm type bridge; ip link delete storm; done";
        world.inside(&format!(
            "{storm}; ip link delete {}; ip link delete {}",
            links.bridge, links.sql
        ))?;
        // Of our socket's groups: the kernel counts what it dropped, in the last column but one.
        let dropped: u64 = world
            .inside("cat /proc/net/netlink")?
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|columns| columns.get(3) == Some(&"00000551"))
            .filter_map(|columns| columns.get(8)?.parse::<u64>().ok())
            .sum();
        ensure!(dropped > 0, "nothing was lost, so this shows nothing");
        signal(agent.pid(), Signal::CONT)?;
        let told = agent.expect("repaired")?;
        ensure!(
            told.contains("create bridge") && told.contains("create tap"),
            "{told}"
        );
        as_wanted(&world, &links)
    })
}

#[test]
fn a_fight_is_slowed_down_and_reported() -> Result<()> {
    for_both("a_fight", |user| {
        let (world, links) = world(user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        let begun = Instant::now();
        let mut harms = 0;
        while begun.elapsed() < Duration::from_secs(3) {
            let deleted = world.inside(&format!(
                "ip address delete 192.168.100.1/24 dev {}",
                links.bridge
            ));
            harms += u32::from(deleted.is_ok());
        }
        let told = agent.expect("fight")?;
        ensure!(told.contains("address 192.168.100.1/24: add"), "{told}");
        world.wait("the last repair", |seen| {
            seen.addresses(&links.bridge) == ["192.168.100.1/24"]
        })?;
        // 0, 20, 40 .. 2000 ms apart: in three seconds nine at most.
        ensure!(
            (6..=10).contains(&harms),
            "{harms} harms could be done: repairs were not slowed down"
        );
        Ok(())
    })
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).context("no process")?;
    Ok(kill_process(pid, signal)?)
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
        told.starts_with("failed open /dev/net/tun: Permission denied"),
        "{told}"
    );
    agent.say("end")?;
    agent.expect("ended")?;
    ensure!(std::fs::read_dir(world.path(""))?.count() == 0);
    Ok(())
}
