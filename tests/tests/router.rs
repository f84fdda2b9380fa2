//! Floor 2: our agent on a plain Linux machine with two uplinks, beside the software that gets in the way.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sovereign_tests::lan::{
    Forwarded, GATEWAY, GATEWAY6, GUEST, GUEST6, INTERNET, INTERNET6, Lan, Nic, SUBNET, SUBNET6, Way,
};
use sovereign_tests::net::{Filter, Hosted, Router as Seat, can_run, left_by_the_kernel as stays};
use sovereign_tests::space::{ANSWER, Guest, SILENCE, Service};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const FOUR: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host";
const BOTH: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2 host";
const FORWARDS: &str = "forward=tcp:15432:192.168.100.2:5432 forward=udp:5000-5002:192.168.100.2:6000 \
    forward=tcp:15432:fd00:64::2:5432";
/// The machine's address on its LAN.
const LAN4: &str = "10.1.0.2";
const LAN6: &str = "fd10:1::2";

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
    Seat::run(AGENT, "everyday", filter, &want, |_| Ok(()), everyday)
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
    Seat::run(
        AGENT,
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

/// Who asks by a link is answered there: what comes back to `internet` by another one is dropped.
fn answers_go_back(seat: &Seat, address: &str, link: &str) -> Result<()> {
    let internet = seat.lan.internet();
    let (family, bits, source) = match address.parse()? {
        IpAddr::V4(_) => ("ip", 32, INTERNET.to_string()),
        IpAddr::V6(_) => ("ip6", 128, INTERNET6.to_string()),
    };
    internet.sh(&format!(
        "nft 'add table inet wrong; flush table inet wrong; add chain inet wrong c {{ type filter hook prerouting \
         priority -300; }}; add rule inet wrong c {family} saddr {address} iifname != {link} drop'"
    ))?;
    let option = if bits == 128 { "-6 " } else { "" };
    internet.ip(&format!(
        "{option}route replace {address}/{bits} dev {link} src {source}\n"
    ))?;
    let to = SocketAddr::new(address.parse()?, 15432);
    soon(|| {
        let what = || format!("{to} by {link}");
        let said = internet.ask_tcp(to, SILENCE).with_context(what)?;
        ensure!(said.starts_with("hello-from-guest"), "{}: {said}", what());
        Ok(())
    })
}

fn second_uplink(filter: Filter) -> Result<()> {
    // As people have two providers: what is sent from the address of the second one goes by it.
    let before = |lan: &Lan| {
        lan.machine().ip(
            "route add default via 10.2.0.1 dev eth1 table 200\nrule add from 10.2.0.2 lookup 200\n\
             -6 route add default via fd10:2::1 dev eth1 table 200\n-6 rule add from fd10:2::2 lookup 200\n",
        )
    };
    let want = format!("{BOTH} uplink=auto {FORWARDS}");
    Seat::run(AGENT, "second_uplink", filter, &want, before, |seat| {
        for (address, link) in [
            (LAN4, "lan0"),
            ("10.2.0.2", "isp1"),
            (LAN6, "lan0"),
            ("fd10:2::2", "isp1"),
        ] {
            answers_go_back(seat, address, link)?;
        }
        seat.leaves_by(Nic::Eth0)
    })
}

#[test]
fn who_asks_by_the_second_uplink_is_answered_there_with_tables() -> Result<()> {
    second_uplink(Filter::Plain)
}

#[test]
fn who_asks_by_the_second_uplink_is_answered_there_with_chains() -> Result<()> {
    second_uplink(Filter::Iptables)
}

/// The gateway of a network need not send on within it: isolated clients, stateful firewalls.
#[test]
fn a_neighbour_on_the_second_uplink_is_answered_directly() -> Result<()> {
    let before = |lan: &Lan| {
        lan.prefer(Nic::Eth1)?;
        for family in [4, 6] {
            lan.internet()
                .set_sysctl(&format!("net.ipv{family}.conf.lan0.forwarding"), "0")?;
        }
        lan.machine().ip(
            "route add default via 10.1.0.1 dev eth0 table 200\n-6 route add default via fd10:1::1 dev eth0 table 200\n",
        )
    };
    let want = format!("{BOTH} uplink=auto {FORWARDS}");
    Seat::run(AGENT, "neighbour", Filter::Plain, &want, before, |seat| {
        seat.leaves_by(Nic::Eth1)?;
        let rules = seat.lan.machine().sh("ip rule; ip -6 rule")?;
        ensure!(rules.contains("lookup 200"), "{rules}");
        seat.forward_works(&format!("{LAN4}:15432"))?;
        seat.forward_works(&format!("[{LAN6}]:15432"))
    })
}

#[test]
fn who_asks_by_the_machines_own_uplink_is_answered_there_beside_a_named_one() -> Result<()> {
    let want = format!("{BOTH} uplink=eth1 {FORWARDS}");
    Seat::run(
        AGENT,
        "own_uplink",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth1)?;
            for (address, link) in [(LAN4, "lan0"), ("10.2.0.2", "isp1"), (LAN6, "lan0")] {
                answers_go_back(seat, address, link)?;
            }
            Ok(())
        },
    )
}

#[test]
fn an_automatic_uplink_is_that_of_the_machine() -> Result<()> {
    let want = format!("{FOUR} uplink=auto");
    Seat::run(
        AGENT,
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

#[test]
fn a_firewall_that_reloads_leaves_our_tables_alone_and_may_refuse_what_they_accept() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "firewalld",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            for _ in 0..3 {
                seat.lan.firewalld_reload(Forwarded::Accepted)?;
                seat.leaves_by(Nic::Eth0)?;
            }
            // Of two accepting and refusing tables the refusing one has the last word, whatever their order: for doctor.
            // Its exception for translated connections lets forwards in.
            seat.lan.firewalld_reload(Forwarded::Refused)?;
            seat.lan.is_silent(Way::TcpOut)?;
            seat.forward_works("10.1.0.2:15432")?;
            let told = seat.agent()?.rest();
            ensure!(told.iter().all(|line| !line.starts_with("repaired")), "{told:#?}");
            seat.lan.firewalld_reload(Forwarded::Accepted)?;
            seat.leaves_by(Nic::Eth0)?;
            seat.lan.machine().sh("nft delete table inet firewalld").map(drop)
        },
    )
}

#[test]
fn dockers_policy_is_stronger_than_our_tables() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "docker_tables",
        Filter::Owned,
        &want,
        Lan::docker,
        |seat| {
            // An accept of ours ends our table only; Docker's chain is asked all the same. The agent does not see it: for
            // doctor, which names a foreign FORWARD drop.
            seat.lan.is_silent(Way::PingOut)?;
            seat.lan.answers(Way::TcpIn)?;
            ensure!(seat.lan.from_peer("10.1.0.2:15432".parse()?, SILENCE).is_err());
            // What Docker's documentation asks for: an accept in the chain that it leaves to others.
            let bridge = seat.hosted.bridge();
            let accept = format!(
                "iptables -I DOCKER-USER -i {bridge} -j ACCEPT; iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
            );
            seat.lan.machine().sh(&accept)?;
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")?;
            seat.lan.machine().sh(&accept.replace("-I", "-D")).map(drop)
        },
    )
}

#[test]
fn beside_docker_our_chains_come_first() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "docker_chains",
        Filter::Iptables,
        &want,
        Lan::docker,
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")?;
            // It puts its jumps before ours, which refuse nothing that we accept.
            seat.lan.docker_restart()?;
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")
        },
    )
}

#[test]
fn who_flushes_all_tables_does_not_flush_those_that_are_owned() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "flush_owned",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            seat.leaves_by(Nic::Eth0)?;
            seat.lan.nft_flush()?;
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")?;
            let told = seat.agent()?.rest();
            ensure!(told.iter().all(|line| !line.starts_with("repaired")), "{told:#?}");
            Ok(())
        },
    )
}

#[test]
fn who_flushes_all_tables_has_ours_made_again_and_is_named() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "flush_plain",
        Filter::Plain,
        &want,
        |_| Ok(()),
        |seat| {
            for _ in 0..3 {
                seat.leaves_by(Nic::Eth0)?;
                seat.lan.nft_flush()?;
                let told = seat.agent()?.expect("repaired packet filter")?;
                ensure!(told.contains("(nft)"), "{told}");
            }
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")
        },
    )
}

/// A sender that goes on is sent where it belongs, although the kernel knows its conversation as one with the machine.
#[test]
fn datagrams_that_began_while_our_tables_were_gone_reach_the_guest() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=udp:5000:192.168.100.2:6000");
    // Without a rule of somebody's that needs it, the kernel remembers no connections while ours are gone.
    let others = "add table inet others; add chain inet others c { type filter hook input priority 0; }; \
        add rule inet others c ct state new accept";
    let before = |lan: &Lan| lan.machine().sh(&format!("nft '{others}'")).map(drop);
    Seat::run(AGENT, "gap", Filter::Plain, &want, before, |seat| {
        let _services = services(&seat.lan)?;
        let (agent, table) = (seat.agent()?.pid(), seat.hosted.bridge());
        signal(agent, Signal::STOP)?; // else it would be quicker than we are
        seat.lan.machine().sh(&format!("nft delete table inet {table}"))?;
        let to = format!("{LAN4}:5000");
        let sender = seat.lan.peer().enter(|| -> std::io::Result<UdpSocket> {
            let sender = UdpSocket::bind("0.0.0.0:0")?;
            sender.set_read_timeout(Some(SILENCE))?;
            sender.send_to(b"early", &to)?;
            Ok(sender)
        })??;
        // The machine itself answers, that nobody listens: not heard on a socket that is not connected.
        ensure!(sender.recv(&mut [0; 64]).is_err(), "the table was there");
        signal(agent, Signal::CONT)?;
        seat.agent()?.expect("repaired packet filter")?;
        let begun = Instant::now();
        let mut answer = [0; 64];
        loop {
            sender.send_to(b"again", &to)?;
            match sender.recv(&mut answer) {
                Ok(length) => break ensure!(answer[..length].starts_with(b"guest:6000"), "{answer:?}"),
                Err(error) => ensure!(begun.elapsed() < ANSWER, "{error}"),
            }
        }
        Ok(())
    })
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    Ok(kill_process(pid.context("no process")?, signal)?)
}

/// Asks again until it is so, for as long as a repair may take when somebody keeps undoing it.
fn soon(mut is: impl FnMut() -> Result<()>) -> Result<()> {
    let begun = std::time::Instant::now();
    loop {
        match is() {
            Err(error) if begun.elapsed() > sovereign_tests::net::SOON => return Err(error),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
            Ok(()) => return Ok(()),
        }
    }
}

#[test]
fn who_removes_foreign_rules_and_routes_has_ours_made_again() -> Result<()> {
    let want = format!("{BOTH} uplink=eth1 forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "networkd",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            for _ in 0..3 {
                seat.leaves_by(Nic::Eth1)?;
                seat.lan.networkd_sweep()?;
                // It sweeps with many commands: repairs come between them.
                while !seat.agent()?.expect("repaired")?.contains("9010: iif") {}
                soon(|| seat.leaves_by(Nic::Eth1))?;
            }
            soon(|| {
                let seen = seat.lan.tcp6_out(ANSWER)?;
                ensure!(seen.contains("sees [fd10:2::2]"), "{seen}");
                Ok(())
            })?;
            seat.forward_works("10.1.0.2:15432")
        },
    )
}

#[test]
fn a_subnet_that_is_anothers_is_named_and_nothing_of_it_is_made() -> Result<()> {
    let before = |lan: &Lan| lan.machine().ip("address add 192.168.100.77/24 dev eth1\n");
    if !can_run("a_subnet_that_is_anothers") {
        return Ok(());
    }
    let lan = Lan::new()?;
    before(&lan)?;
    let hosted = Hosted::new(AGENT, Filter::Owned)?;
    let clean = lan.foreign_state(stays)?;
    let want = format!("{BOTH} uplink=eth0");
    let mut agent = hosted.start(lan.machine(), &want)?;
    let told = agent.expect("ready")?;
    ensure!(
        told.contains("without IPv4: subnet 192.168.100.0/24: link eth1 has 192.168.100.77/24"),
        "{told}"
    );
    lan.plug(&hosted.bridge())?;
    let seen = lan
        .machine()
        .sh("ip -4 rule; ip -4 route show table all; ip -4 address")?;
    ensure!(
        !seen.contains("192.168.100.1 ") && !seen.contains("192.168.100.1/"),
        "{seen}"
    );
    ensure!(!seen.contains("9000:"), "{seen}");
    ensure!(lan.machine().route("192.168.100.50")? == "eth1");
    let seen = lan.tcp6_out(ANSWER)?; // the other subnet is not in the way
    ensure!(seen.contains(&format!("sees [{LAN6}]")), "{seen}");
    lan.machine().ip("address del 192.168.100.77/24 dev eth1\n")?;
    while agent.expect("ready")?.contains("without") {}
    lan.answers(Way::PingOut)?;
    lan.machine().ip("address add 192.168.100.77/24 dev eth1\n")?;
    agent.expect("ready sql without IPv4")?;
    hosted.down(lan.machine(), agent)?;
    let left = clean.difference(&lan.foreign_state(stays)?);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

#[test]
fn a_router_still_hears_routers() -> Result<()> {
    let accepts = |seat: &Seat, nic: Nic| {
        seat.lan
            .machine()
            .sysctl(&format!("net.ipv6.conf.{nic}.accept_ra"))
    };
    let want = format!("{BOTH} uplink=auto");
    let before = |lan: &Lan| {
        lan.machine().set_sysctl("net.ipv6.conf.eth0.accept_ra", "1")?;
        lan.machine().set_sysctl("net.ipv6.conf.eth1.accept_ra", "1")
    };
    Seat::run(AGENT, "accept_ra", Filter::Owned, &want, before, |seat| {
        let seen = seat.lan.tcp6_out(ANSWER)?;
        ensure!(seen.contains(&format!("sees [{LAN6}]")), "NAT66: {seen}");
        ensure!(accepts(seat, Nic::Eth0)? == "2" && accepts(seat, Nic::Eth1)? == "2");
        ensure!(seat.lan.machine().sysctl("net.ipv6.conf.all.forwarding")? == "1");
        seat.lan.prefer(Nic::Eth1)?;
        soon(|| {
            let seen = seat.lan.tcp6_out(ANSWER)?;
            ensure!(seen.contains("sees [fd10:2::2]"), "NAT66: {seen}");
            Ok(())
        })?;
        // It hears both still: the one that is not the way out may become it by its next advertisement.
        ensure!(accepts(seat, Nic::Eth0)? == "2" && accepts(seat, Nic::Eth1)? == "2");
        seat.lan.prefer(Nic::Eth0)
    })
}

#[test]
fn an_address_that_is_taken_away_takes_our_route_with_it_and_both_come_back() -> Result<()> {
    let want = format!("{FOUR} uplink=eth0 forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "address",
        Filter::Owned,
        &want,
        |_| Ok(()),
        |seat| {
            let bridge = seat.hosted.bridge();
            for _ in 0..2 {
                seat.forward_works("10.1.0.2:15432")?;
                seat.lan
                    .machine()
                    .ip(&format!("address del 192.168.100.1/24 dev {bridge}\n"))?;
                seat.agent()?.expect("repaired address 192.168.100.1/24: add")?;
            }
            seat.leaves_by(Nic::Eth0)?;
            seat.forward_works("10.1.0.2:15432")
        },
    )
}

/// Nothing tells of a flush of x_tables: they are looked at every ten seconds.
#[test]
fn who_flushes_all_chains_and_nothing_else_is_noticed_soon() -> Result<()> {
    let want = format!("{FOUR} uplink=auto forward=tcp:15432:192.168.100.2:5432");
    Seat::run(
        AGENT,
        "flush_chains",
        Filter::Iptables,
        &want,
        |_| Ok(()),
        |seat| {
            seat.forward_works("10.1.0.2:15432")?;
            // What follows from changes that the kernel told of is over after some of them.
            for _ in 0..4 {
                seat.lan.machine().sh(
                    "for program in iptables ip6tables; do for table in filter nat mangle; do \
                     $program -t $table -F; done; done",
                )?;
                seat.agent()?.expect("repaired packet filter")?;
            }
            // A look in the middle of a flush mends a half, and the rest at the next look.
            soon(|| seat.leaves_by(Nic::Eth0))?;
            soon(|| seat.forward_works("10.1.0.2:15432"))
        },
    )
}
