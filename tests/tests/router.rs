//! Floor 2: our agent on a plain Linux machine with two uplinks, beside the software that gets in the way.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sovereign_tests::lan::{Forwarded, GATEWAY, GATEWAY6, GUEST, GUEST6, Lan, Nic, SUBNET, SUBNET6, Way};
use sovereign_tests::net::{Agent, Filter, Hosted, can_run};
use sovereign_tests::space::{ANSWER, Guest, SILENCE, Service, State};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const FOUR: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host";
const BOTH: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2 host";
const FORWARDS: &str = "forward=tcp:15432:192.168.100.2:5432 forward=udp:5000-5002:192.168.100.2:6000 \
    forward=tcp:15432:fd00:64::2:5432";
/// The machine's address on its LAN.
const LAN4: &str = "10.1.0.2";
const LAN6: &str = "fd10:1::2";

/// A machine with an agent, and its guest.
struct Seat {
    lan: Lan,
    hosted: Hosted,
    agent: Option<Agent>,
    want: String,
}

/// What the kernel and the programs of iptables make when they are first used, and leave there, empty.
fn stays(line: &str) -> bool {
    let declared = line.contains("tables-") && line.contains(" :") && line.ends_with(" ACCEPT");
    declared
        || line.starts_with("nft {\"table\"")
            && line.contains("\"name\":\"")
            && ["nat", "filter", "mangle"]
                .iter()
                .any(|name| line.contains(&format!("\"name\":\"{name}\"")))
        || line.starts_with("nft {\"chain\"")
            && line.contains("\"policy\":\"accept\"")
            && line.contains("PUT")
        || line.starts_with("nft {\"chain\"")
            && line.contains("\"policy\":\"accept\"")
            && line.contains("ROUTING")
        || line.starts_with("nft {\"chain\"")
            && line.contains("\"policy\":\"accept\"")
            && line.contains("FORWARD")
}

impl Seat {
    fn new(filter: Filter, want: &str, before: impl FnOnce(&Lan) -> Result<()>) -> Result<(Self, State)> {
        let lan = Lan::new()?;
        before(&lan)?;
        let hosted = Hosted::new(AGENT, filter)?;
        let clean = lan.foreign_state(stays)?;
        let agent = hosted.up(lan.machine(), want)?;
        lan.plug(&hosted.bridge())?;
        let seat = Self {
            lan,
            hosted,
            agent: Some(agent),
            want: want.to_owned(),
        };
        Ok((seat, clean))
    }

    fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("no agent")
    }

    /// Everything is taken away, and the machine is as it was.
    fn down(mut self, clean: &State) -> Result<()> {
        let agent = self.agent.take().context("no agent")?;
        self.hosted.down(self.lan.machine(), agent)?;
        let left = clean.difference(&self.lan.foreign_state(stays)?);
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    }

    /// The guest's packets soon leave by this link.
    fn leaves_by(&self, nic: Nic) -> Result<()> {
        let (until, sees) = (
            Instant::now() + ANSWER,
            format!("sees [::ffff:{}]", nic.address()),
        );
        loop {
            let seen = self
                .lan
                .tcp_out(SILENCE)
                .unwrap_or_else(|error| error.to_string());
            if seen.contains(&sees) {
                return self.lan.answers(Way::PingOut);
            }
            ensure!(Instant::now() < until, "not by {nic}: {seen}");
        }
    }

    /// The other machine in the LAN soon reaches the guest by this forward.
    fn forward_works(&self, to: &str) -> Result<()> {
        let (until, to): (_, SocketAddr) = (Instant::now() + ANSWER, to.parse()?);
        loop {
            match self.lan.from_peer(to, SILENCE) {
                Ok(said) if said.starts_with("hello-from-guest") => return Ok(()),
                other => ensure!(Instant::now() < until, "{to}: {other:?}"),
            }
        }
    }
}

/// Runs a test; when it fails, what the agent logged is told.
fn run(
    name: &str,
    filter: Filter,
    want: &str,
    before: impl FnOnce(&Lan) -> Result<()>,
    body: impl FnOnce(&mut Seat) -> Result<()>,
) -> Result<()> {
    if !can_run(name) {
        return Ok(());
    }
    let (mut seat, clean) = Seat::new(filter, want, before)?;
    if let Err(error) = body(&mut seat) {
        eprintln!("{}", seat.hosted.log());
        return Err(error);
    }
    seat.down(&clean)
}

fn services(lan: &Lan) -> Result<Vec<Service>> {
    let serve = |port: u16| {
        let at = SocketAddr::from(([0u16; 8], port));
        lan.guest().space().serve_udp(at, &format!("guest:{port}"))
    };
    [6000, 6001, 6002].into_iter().map(serve).collect()
}

/// Masquerade out, forwards from everywhere, and nobody who was not asked.
fn everyday(seat: &mut Seat) -> Result<()> {
    let lan = &seat.lan;
    let sibling = Guest::new(lan.machine(), "vm_web", "192.168.100.3/24", &GATEWAY.to_string())?;
    sibling.add_address("fd00:64::3/64", &GATEWAY6.to_string())?;
    sibling.plug(lan.machine(), &seat.hosted.bridge())?;
    let _services = services(lan)?;
    seat.leaves_by(Nic::Eth0)?;
    lan.answers(Way::TcpIn)?;
    let seen = lan.tcp6_out(ANSWER)?;
    ensure!(seen.contains(&format!("sees [{LAN6}]")), "{seen}");
    for (host, peer) in [
        (LAN4.to_owned(), "::ffff:10.1.0.9"),
        (format!("[{LAN6}]"), "fd10:1::9"),
    ] {
        let to: SocketAddr = format!("{host}:15432").parse()?;
        let seen = lan
            .from_peer(to, ANSWER)
            .with_context(|| format!("peer to {to}"))?;
        ensure!(
            seen.starts_with(&format!("hello-from-guest sees [{peer}]")),
            "{to}: {seen}"
        );
        for (who, from) in [("machine", lan.machine()), ("sibling", sibling.space())] {
            let seen = from
                .ask_tcp(to, ANSWER)
                .with_context(|| format!("{who} to {to}"))?;
            ensure!(seen.starts_with("hello-from-guest"), "{who}, {to}: {seen}");
        }
        let unforwarded = lan.peer().ask_tcp(format!("{host}:5432").parse()?, SILENCE);
        ensure!(unforwarded.is_err(), "{unforwarded:?}");
    }
    for (here, there) in [(5000, 6000), (5001, 6001), (5002, 6002)] {
        let to = format!("{LAN4}:{here}").parse()?;
        for (who, from) in [
            ("peer", lan.peer()),
            ("machine", lan.machine()),
            ("sibling", sibling.space()),
        ] {
            let seen = from
                .ask_udp(to, ANSWER)
                .with_context(|| format!("{who} to {to}"))?;
            ensure!(seen.starts_with(&format!("guest:{there}")), "{who}, {to}: {seen}");
        }
    }
    lan.peer().sh(&format!(
        "ip route replace {SUBNET} via {LAN4}; ip -6 route replace {SUBNET6} via {LAN6}"
    ))?;
    for to in [IpAddr::from(GUEST), IpAddr::from(GUEST6)] {
        ensure!(!lan.peer().ping(to, SILENCE)?, "unasked: {to}");
    }
    drop(sibling);
    Ok(())
}

fn everyday_with(filter: Filter) -> Result<()> {
    let want = format!("{BOTH} uplink=auto {FORWARDS}");
    run("everyday", filter, &want, |_| Ok(()), everyday)
}

#[test]
fn guests_get_out_and_forwards_get_in_with_owned_tables() -> Result<()> {
    everyday_with(Filter::Owned)
}

#[test]
fn guests_get_out_and_forwards_get_in_with_plain_tables() -> Result<()> {
    everyday_with(Filter::Plain)
}

#[test]
fn guests_get_out_and_forwards_get_in_with_iptables() -> Result<()> {
    everyday_with(Filter::Iptables)
}

#[test]
fn a_named_uplink_is_taken_and_the_next_one_when_it_fails() -> Result<()> {
    let want = format!(
        "{FOUR} uplink=eth1,eth0 {}",
        "forward=tcp:15432:192.168.100.2:5432"
    );
    run(
        "named_uplinks",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            for _ in 0..2 {
                seat.leaves_by(Nic::Eth1)?;
                seat.forward_works("10.1.0.2:15432")
                    .context("by the other link")?;
                seat.lan.link_down(Nic::Eth1)?;
                seat.leaves_by(Nic::Eth0)?;
                seat.forward_works("10.1.0.2:15432")?;
                seat.lan.link_up(Nic::Eth1)?;
            }
            seat.leaves_by(Nic::Eth1)?;
            let host = seat.lan.machine().route("9.9.9.9")?;
            ensure!(host == "eth0", "the machine's own packets leave by {host}");
            Ok(())
        },
    )
}

#[test]
fn an_automatic_uplink_is_that_of_the_machine() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    run(
        "automatic_uplink",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            seat.lan.prefer(Nic::Eth1)?;
            seat.leaves_by(Nic::Eth1)?;
            seat.lan.prefer(Nic::Eth0)?;
            seat.leaves_by(Nic::Eth0)?;
            seat.lan.link_down(Nic::Eth0)?;
            seat.leaves_by(Nic::Eth1)?;
            seat.lan.link_up(Nic::Eth0)?;
            seat.leaves_by(Nic::Eth0)
        },
    )
}
