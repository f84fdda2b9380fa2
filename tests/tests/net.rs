//! Floor 2: the private network in real namespaces, as root and as an ordinary user.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use sovereign_host_agent::net::names;
use sovereign_protocol::name::Name;
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
    ensure!(seen.addresses(&links.bridge) == ["192.168.100.1/24"]);
    ensure!(seen.routes(&links.bridge) == ["192.168.100.0/24"]);
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

#[test]
fn a_network_lives_as_root() -> Result<()> {
    if !can_run("a_network_lives_as_root") {
        return Ok(());
    }
    a_life(User::Root)
}

#[test]
fn a_network_lives_as_an_ordinary_user() -> Result<()> {
    if !can_run("a_network_lives_as_an_ordinary_user") {
        return Ok(());
    }
    a_life(User::Ordinary)
}
