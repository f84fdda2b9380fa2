//! Floor 2: guests of a private namespace leave by pasta, as root and as an ordinary user; nobody comes in.
//!
//! ```text
//!  outside 203.0.113.1 ── out0 203.0.113.2 [the machine] ═ pasta ═ [private] bridge 192.168.100.1 ── guest .9
//!          fd00:8::1           fd00:8::2                                     fd00:9::1               ::9
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_host_agent::net::names;
use sovereign_protocol::name::Name;
use sovereign_tests::net::{
    Agent, SOON, User, World, can_run, for_both, holders, namespace_of, signal, until,
};
use sovereign_tests::space::{SILENCE, Service, Space};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24,fd00:9::1/64 1500 sql=192.168.100.2 uplink=auto";
const OUTSIDE: [&str; 2] = ["203.0.113.1", "fd00:8::1"];
const PORT: u16 = 8080;

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse::<IpAddr>()?, port))
}

/// The other machine, and a service of it.
struct Outside {
    _space: Space,
    _service: Service,
}

impl Outside {
    fn new(world: &World) -> Result<Self> {
        let (machine, space) = (world.machine()?, Space::new()?);
        machine.ip(&format!(
            "link add out0 type veth peer name eth0 netns {}\nlink set out0 up\n\
             address add 203.0.113.2/24 dev out0\naddress add fd00:8::2/64 dev out0 nodad\n",
            space.pid()
        ))?;
        space.ip(
            "link set eth0 up\naddress add 203.0.113.1/24 dev eth0\naddress add fd00:8::1/64 dev eth0 nodad\n",
        )?;
        machine.ip("route add default via 203.0.113.1\n-6 route add default via fd00:8::1\n")?;
        let service = space.serve_tcp(at("::", PORT)?, "outside")?;
        Ok(Self {
            _space: space,
            _service: service,
        })
    }
}

/// Asks until it answers.
fn reaches(space: &Space, to: SocketAddr) -> Result<String> {
    let begun = Instant::now();
    loop {
        match space.ask_tcp(to, Duration::from_secs(2)) {
            Ok(said) if !said.is_empty() => return Ok(said),
            last => ensure!(begun.elapsed() < SOON, "{to}: {last:?}"),
        }
        std::thread::sleep(Duration::from_millis(20)); // polls what may refuse at once
    }
}

fn leave(world: &World, space: &Space) -> Result<()> {
    for address in OUTSIDE {
        let said = reaches(space, at(address, PORT)?)?;
        ensure!(said.starts_with("outside sees"), "{said}");
    }
    let pasta = world.pasta().context("no pasta")?;
    let environment = std::fs::read(format!("/proc/{pasta}/environ")).unwrap_or_default();
    let environment = String::from_utf8_lossy(&environment).into_owned();
    ensure!(!environment.contains("RUST"), "{environment:?}");
    Ok(())
}

/// Sockets of the machine that wait for others.
fn listening(machine: &Space) -> Result<String> {
    machine.sh("ss -Hltn; ss -Hlun")
}

fn ended(world: &World, mut agent: Agent) -> Result<()> {
    let namespace = namespace_of(world.helper()?)?;
    agent.say("end")?;
    agent.expect("ended")?;
    agent.restart_ends()?;
    ensure!(world.processes().is_empty(), "{:?}", world.processes());
    let files: Vec<_> = std::fs::read_dir(world.path(""))?.collect();
    ensure!(files.is_empty(), "{files:?}");
    until("the namespace is held", || {
        holders(&namespace).is_empty().then_some(())
    })
}

#[test]
fn guests_leave_by_pasta_and_nobody_comes_in() -> Result<()> {
    for_both("guests_leave_by_pasta_and_nobody_comes_in", |user| {
        let world = World::new(Path::new(AGENT), user, "666")?;
        let _outside = Outside::new(&world)?;
        let machine = world.machine()?;
        let before = listening(&machine)?;
        let mut agent = world.agent(WANT)?;
        agent.expect("works Filter")?;
        let guest = world.guest()?;
        leave(&world, &guest)?;
        ensure!(listening(&machine)? == before, "{}", listening(&machine)?);

        // What listens on the machine's loopback is not to be had, by whatever name; by its own address it would be.
        let _shown = machine.serve_tcp(at("203.0.113.2", 7070)?, "shown")?;
        let _hidden = machine.serve_tcp(at("127.0.0.1", 7071)?, "hidden")?;
        let private = world.private()?;
        for space in [&guest, &private] {
            ensure!(reaches(space, at("203.0.113.2", 7070)?)?.starts_with("shown"));
            for address in [
                "127.0.0.1",
                "192.0.0.1",
                "192.0.0.3",
                "203.0.113.2",
                "192.168.100.1",
            ] {
                let said = space.ask_tcp(at(address, 7071)?, SILENCE);
                ensure!(said.is_err(), "{address}: {said:?}");
            }
        }
        drop(private);
        drop(guest);
        ended(&world, agent)
    })
}

#[test]
fn whoever_is_killed_guests_leave_again() -> Result<()> {
    for_both("whoever_is_killed_guests_leave_again", |user| {
        let world = World::new(Path::new(AGENT), user, "666")?;
        let _outside = Outside::new(&world)?;
        let agent = world.agent(WANT)?;
        let first = until("no helper", || world.helper().ok())?;
        until("no pasta", || world.pasta())?;
        until("no bridge", || guest_of(&world))?.and_then(|guest| {
            leave(&world, &guest)?;

            // pasta.
            let old = world.pasta().context("no pasta")?;
            signal(old, Signal::KILL)?;
            until("no other pasta", || world.pasta().filter(|new| *new != old))?;
            leave(&world, &guest)?;

            // The agent: the next one finds pasta as it is.
            let kept = world.pasta().context("no pasta")?;
            signal(agent.pid(), Signal::KILL)?;
            agent.ends()?;
            leave(&world, &guest)?;
            let mut agent = world.agent(WANT)?;
            agent.expect("works Routing")?;
            leave(&world, &guest)?;
            ensure!(world.pasta() == Some(kept), "{:?} for {kept}", world.pasta());

            // The helper: another one is in the same namespace, and pasta goes on.
            signal(first, Signal::KILL)?;
            until("no other helper", || {
                world.helper().ok().filter(|new| *new != first)
            })?;
            leave(&world, &guest)?;
            ensure!(world.pasta() == Some(kept), "{:?} for {kept}", world.pasta());

            // All of them: a new namespace, and nothing of the old one.
            for pid in [agent.pid(), world.helper()?, kept] {
                signal(pid, Signal::KILL)?;
            }
            agent.ends()?;
            Ok(())
        })?;
        let mut agent = world.agent(WANT)?;
        agent.expect("works Filter")?;
        let guest = world.guest()?;
        leave(&world, &guest)?;
        // An agent that was killed while pasta runs: the next one ends it, whatever it is asked.
        signal(agent.pid(), Signal::KILL)?;
        agent.ends()?;
        drop(guest);
        let mut last = world.agent("want 192.168.100.1/24 1500 sql=192.168.100.2")?;
        last.expect("works Filter")?;
        until("pasta runs", || world.pasta().is_none().then_some(()))?;
        ended(&world, last)
    })
}

/// A guest, once there is a bridge for it.
fn guest_of(world: &World) -> Option<Result<Space>> {
    let bridge = names::bridge(&Name::parse(world.instance()).ok()?).to_string();
    let picture = world.picture().ok()?;
    picture.link(&bridge).map(|_| world.guest())
}

#[test]
fn without_pasta_all_else_works_and_it_is_said_until_it_is_installed() -> Result<()> {
    if !can_run("without_pasta_all_else_works") {
        return Ok(());
    }
    let world = World::new(Path::new(AGENT), User::Root, "666")?;
    let _outside = Outside::new(&world)?;
    let directory = world.path("bin");
    std::fs::create_dir(&directory)?;
    let path = format!("PATH={}", directory.display());
    let mut agent = world.agent_under(&["/usr/bin/env", &path], "-", WANT)?;
    agent.expect("ready")?;
    let told = agent.expect("failed Routing")?;
    ensure!(told.contains("attach pasta: pasta is not installed"), "{told}");
    ensure!(told.contains("apt-get install passt"), "{told}");
    // One that cannot lead out says why.
    std::fs::write(
        directory.join("pasta"),
        "#!/bin/sh\necho 'what it wanted'>&2\necho 'no way' >&2\nexit 1\n",
    )?;
    std::fs::set_permissions(
        directory.join("pasta"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let told = agent.expect("failed Routing attach pasta: no way")?;
    ensure!(!told.contains("what it wanted"), "{told}");
    std::fs::remove_file(directory.join("pasta"))?;
    std::os::unix::fs::symlink("/usr/bin/pasta", directory.join("pasta"))?;
    agent.expect("works Routing")?;
    leave(&world, &world.guest()?)?;
    std::fs::remove_dir_all(&directory)?;
    ended(&world, agent)
}

/// Of cellular, PPP and WireGuard: no hardware address is there for pasta to take.
#[test]
fn a_machine_that_leaves_by_a_link_without_a_hardware_address_leads_guests_out() -> Result<()> {
    for_both(
        "a_machine_that_leaves_by_a_link_without_a_hardware_address",
        |user| {
            let world = World::new(Path::new(AGENT), user, "666")?;
            world.machine()?.ip(
                "tuntap add dev tun9 mode tun\nlink set tun9 up\naddress add 203.0.113.2/32 dev tun9\n\
             route add default dev tun9\n",
            )?;
            let mut agent = world.agent(WANT)?;
            let told = agent.expect_any(&["works Routing", "failed Routing"])?;
            ensure!(told.starts_with("works"), "{told}");
            let led_out = || world.private().ok()?.sh("ip route show default").ok();
            let way_out = world.way_out();
            until("no default route by pasta", || {
                led_out().filter(|routes| routes.contains(&way_out))
            })?;
            ended(&world, agent)
        },
    )
}

#[test]
fn in_the_machines_own_network_pasta_is_refused() -> Result<()> {
    if !can_run("in_the_machines_own_network_pasta_is_refused") {
        return Ok(());
    }
    let world = World::new(Path::new(AGENT), User::Root, "666")?;
    let _outside = Outside::new(&world)?;
    let own = world.machine()?.sh("readlink /proc/self/ns/net")?;
    let number: String = own.chars().filter(char::is_ascii_digit).collect();
    let as_machine = format!("SOVEREIGN_TEST={number}");
    let mut agent = world.agent_under(&["env", &as_machine], "-", WANT)?;
    agent.expect("ready")?;
    let told = agent.expect("failed Routing")?;
    ensure!(told.contains("this is the machine's own network"), "{told}");
    ensure!(world.pasta().is_none(), "{:?}", world.processes());
    let links = world.private()?.sh("ip -brief link")?;
    ensure!(!links.contains(&world.way_out()), "{links}");
    ended(&world, agent)
}

/// The frame that the agent sends claims 02:00:00:00:00:09, which is no guest's of ours.
#[test]
fn a_guest_of_a_private_namespace_cannot_take_anothers_address() -> Result<()> {
    for_both("a_guest_of_a_private_namespace", |user| {
        let world = World::new(Path::new(AGENT), user, "666")?;
        let mut agent = world.agent("want 192.168.100.1/24 1500 sql")?;
        agent.expect("ready")?;
        agent.say("arp sql")?;
        let told = agent.expect("arp")?;
        ensure!(told.starts_with("arp answered"), "{told}");
        agent.say("want 192.168.100.1/24 1500 sql=192.168.100.9")?;
        let told = agent.expect("works Filter 0 nf_tables")?;
        agent.say("arp sql")?;
        ensure!(agent.expect("arp")? == "arp: no answer", "{told}");
        let tables = world.private()?.sh("nft list ruleset")?;
        ensure!(tables.contains("table bridge"), "{tables}");
        ended(&world, agent)
    })
}
