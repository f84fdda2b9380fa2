//! Floor 2: a private network in real namespaces, made, harmed and kept, as root and as an ordinary user.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::net::{Links, User, WANT, for_both, holders, namespace_of, signal, world};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");

/// The whole life: made, adopted, ended; and nothing is left.
fn a_life(user: User) -> Result<()> {
    let (world, links) = world(AGENT, user)?;
    let begun = Instant::now();
    let mut agent = world.agent(WANT)?;
    ensure!(agent.expect("ready")? == "ready sql web");
    eprintln!("{user:?}: ready after {:?}", begun.elapsed());
    links.as_wanted(&world)?;
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

#[test]
fn a_network_lives() -> Result<()> {
    for_both("a_network_lives", a_life)
}

#[test]
fn a_vmm_has_carrier_as_long_as_it_lives_and_frames_pass() -> Result<()> {
    for_both("a_vmm_has_carrier", |user| {
        let (world, _) = world(AGENT, user)?;
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

/// What holds it a moment longer is a VMM that ends, or a child of the agent that does not run its program yet.
#[test]
fn a_tap_that_is_held_a_moment_longer_is_waited_for() -> Result<()> {
    for_both("a_tap_that_is_held", |user| {
        let (world, _) = world(AGENT, user)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("ready")?;
        agent.say("hold sql")?;
        agent.expect("holds sql")?;
        agent.say("open sql")?;
        agent.expect("opened sql").map(drop)
    })
}

#[test]
fn sixty_four_guests_have_their_taps() -> Result<()> {
    for_both("sixty_four_guests", |user| {
        let (world, _) = world(AGENT, user)?;
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
            says("route 192.168.100.0/24 dev"),
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
        let (world, links) = world(AGENT, user)?;
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
            links.as_wanted(&world).context(harm)?;
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
fn ipv6_is_kept_beside_ipv4() -> Result<()> {
    for_both("ipv6_is_kept_beside_ipv4", |user| {
        let (world, links) = world(AGENT, user)?;
        let mut agent = world.agent("want 192.168.100.1/24,fd00:64::1/64 1500 sql web")?;
        agent.expect("ready")?;
        let bridge = &links.bridge;
        let has = |address: &str, route: &str| -> Result<bool> {
            let seen = world.picture()?;
            let (addresses, routes) = (seen.addresses(bridge), seen.routes(bridge));
            Ok(addresses.iter().any(|a| a == address) && routes.contains(&route))
        };
        ensure!(has("fd00:64::1/64", "fd00:64::/64")?);
        let tentative = world.inside(&format!("ip -6 address show dev {bridge} tentative scope global"))?;
        ensure!(tentative.is_empty(), "it cannot be used yet: {tentative}");
        for harm in ["address delete fd00:64::1/64", "route delete fd00:64::/64"] {
            world.inside(&format!("ip -6 {harm} dev {bridge}"))?;
            agent.expect("repaired")?;
            ensure!(has("fd00:64::1/64", "fd00:64::/64")?, "{harm}");
        }
        agent.say("want 192.168.100.1/24,fd00:65::1/64 1500 sql web")?;
        world.wait("the other address", |seen| {
            seen.addresses(bridge).iter().all(|a| a != "fd00:64::1/64")
                && seen.routes(bridge).contains(&"fd00:65::/64")
        })?;
        links.as_wanted(&world)
    })
}

#[test]
fn a_foreign_link_in_our_place_is_named_and_not_touched() -> Result<()> {
    for_both("a_foreign_link_in_our_place", |user| {
        let (world, links) = world(AGENT, user)?;
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
        links.as_wanted(&world)
    })
}

#[test]
fn a_fight_is_slowed_down_and_reported() -> Result<()> {
    for_both("a_fight", |user| {
        let (world, links) = world(AGENT, user)?;
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

#[test]
fn lost_notifications_are_made_up_for() -> Result<()> {
    for_both("lost_notifications", |user| {
        let (world, links) = world(AGENT, user)?;
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
            .filter(|columns| columns.get(3) == Some(&"018405d1"))
            .filter_map(|columns| columns.get(8)?.parse::<u64>().ok())
            .sum();
        ensure!(dropped > 0, "nothing was lost, so this shows nothing");
        signal(agent.pid(), Signal::CONT)?;
        let told = agent.expect("repaired")?;
        ensure!(
            told.contains("create bridge") && told.contains("create tap"),
            "{told}"
        );
        links.as_wanted(&world)
    })
}
