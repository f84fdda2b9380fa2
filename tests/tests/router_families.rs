//! Floor 2: our agent on a machine whose guests speak both families, and what one of them does to the other.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sovereign_tests::lan::{GATEWAY6, GUEST6, Lan, Nic, Way};
use sovereign_tests::net::{Filter, Router as Seat, SOON, can_run};
use sovereign_tests::space::{ANSWER, Guest, SILENCE};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const BOTH: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2,fd00:64::2 host uplink=auto \
    forward=tcp:15432:192.168.100.2:5432 forward=tcp:15432:fd00:64::2:5432";
/// The machine's address on its LAN.
const LAN6: &str = "fd10:1::2";

/// Asks again until it is so; what was seen last is told otherwise.
fn soon(mut is: impl FnMut() -> Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match is() {
            Err(error) if begun.elapsed() > SOON => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(20)), // polls, waits for nothing else
            Ok(()) => return Ok(()),
        }
    }
}

fn v4_works(seat: &Seat) -> Result<()> {
    soon(|| seat.leaves_by(Nic::Eth0))?;
    seat.forward_works("10.1.0.2:15432")
}

fn v6_works(seat: &Seat) -> Result<()> {
    soon(|| {
        let seen = seat.lan.tcp6_out(ANSWER)?;
        ensure!(seen.contains(&format!("sees [{LAN6}]")), "{seen}");
        Ok(())
    })?;
    seat.forward_works(&format!("[{LAN6}]:15432"))
}

/// A switch of the machine soon has this value.
fn is_soon(seat: &Seat, switch: &str, value: &str) -> Result<()> {
    soon(|| {
        let is = seat.lan.machine().sysctl(switch)?;
        ensure!(is == value, "{switch} is {is}, not {value}");
        Ok(())
    })
}

fn both_ways(seat: &mut Seat) -> Result<()> {
    v4_works(seat)?;
    v6_works(seat)?;
    let lan = &seat.lan;
    for to in [IpAddr::from(GUEST6), IpAddr::from([192, 168, 100, 2])] {
        ensure!(lan.machine().ping(to, ANSWER)?, "the machine does not reach {to}");
    }
    Ok(())
}

#[test]
fn two_families_reach_the_outside_and_are_reached_with_tables() -> Result<()> {
    Seat::run(AGENT, "families", Filter::Owned, BOTH, |_| Ok(()), both_ways)
}

#[test]
fn two_families_reach_the_outside_and_are_reached_with_chains() -> Result<()> {
    Seat::run(
        AGENT,
        "families_iptables",
        Filter::Iptables,
        BOTH,
        |_| Ok(()),
        |seat| {
            v4_works(seat)?;
            v6_works(seat)
        },
    )
}

#[test]
fn ipv6_that_is_switched_off_is_named_with_its_switch_and_the_other_family_works() -> Result<()> {
    let before = |lan: &Lan| {
        lan.machine()
            .set_sysctl("net.ipv6.conf.default.disable_ipv6", "1")
    };
    Seat::run(AGENT, "ipv6_off", Filter::Owned, BOTH, before, |seat| {
        let bridge = seat.hosted.bridge();
        let told = seat.agent()?.told("ready")?;
        let switch = format!("net.ipv6.conf.{bridge}.disable_ipv6");
        ensure!(
            told.starts_with("ready sql without IPv6: address fd00:64::1/64: add to ")
                && told.contains(&format!("IPv6 is switched off on this host, {switch} is 1")),
            "{told}"
        );
        v4_works(seat)?;
        let told = seat.agent()?.rest();
        ensure!(!told.iter().any(|line| line.starts_with("failed")), "{told:#?}");
        // It is switched on again, where the agent said.
        seat.lan.machine().set_sysctl(&switch, "0")?;
        soon_ready(seat)?;
        v6_works(seat)?;
        v4_works(seat)
    })
}

/// Waits until nothing is missing any more.
fn soon_ready(seat: &mut Seat) -> Result<()> {
    loop {
        if seat.agent()?.expect("ready")? == "ready sql" {
            return Ok(());
        }
    }
}

#[test]
fn a_subnet_of_ipv6_that_is_anothers_is_named_and_the_other_family_works() -> Result<()> {
    let theirs = "fd00:64::77/64 dev eth1";
    let before = |lan: &Lan| lan.machine().ip(&format!("address add {theirs} nodad\n"));
    Seat::run(AGENT, "ipv6_taken", Filter::Owned, BOTH, before, |seat| {
        let told = seat.agent()?.told("ready")?;
        ensure!(
            told.starts_with("ready sql without IPv6: subnet fd00:64::/64: link eth1 has fd00:64::77/64"),
            "{told}"
        );
        v4_works(seat)?;
        for _ in 0..2 {
            seat.lan.machine().ip(&format!("address del {theirs}\n"))?;
            soon_ready(seat)?;
            v6_works(seat)?;
            v4_works(seat)?;
            seat.lan.machine().ip(&format!("address add {theirs} nodad\n"))?;
            seat.agent()?.expect("ready sql without IPv6: subnet")?;
            v4_works(seat)?;
        }
        Ok(())
    })
}

/// A link that comes later is heard as well, from before its first advertisement, and all is put back.
#[test]
fn each_link_that_hears_routers_goes_on_and_our_bridge_hears_none() -> Result<()> {
    if !can_run("hears_routers") {
        return Ok(());
    }
    let accepts = |link: &str| format!("net.ipv6.conf.{link}.accept_ra");
    let before = |lan: &Lan| {
        lan.machine().set_sysctl("net.ipv6.conf.eth0.accept_ra", "1")?;
        lan.machine().set_sysctl("net.ipv6.conf.eth1.accept_ra", "0")?;
        lan.machine()
            .sh("ip link add br9 address 02:00:00:00:00:99 type bridge; ip link add early type veth peer name early9")
            .map(drop)?;
        lan.machine().set_sysctl("net.ipv6.conf.early.accept_ra", "1")?;
        lan.machine().set_sysctl("net.ipv6.conf.br9.accept_ra", "1")
    };
    for filter in [Filter::Owned, Filter::Iptables] {
        Seat::run(AGENT, "hears_routers", filter, BOTH, before, |seat| {
            v6_works(seat)?;
            let bridge = seat.hosted.bridge();
            is_soon(seat, "net.ipv6.conf.all.forwarding", "1")?;
            for (link, value) in [("eth0", "2"), ("early", "2"), (&bridge, "0")] {
                is_soon(seat, &accepts(link), value)?;
            }
            // After the positive ones: what is not to be touched is not.
            for (link, value) in [("eth1", "0"), ("br9", "1")] {
                let is = seat.lan.machine().sysctl(&accepts(link))?;
                ensure!(is == value, "{link}: {is}");
            }
            seat.lan
                .machine()
                .sh("ip link add late type veth peer name late9")?;
            is_soon(seat, &accepts("late"), "2")?;
            seat.lan.machine().sh("ip link set late master br9")?;
            is_soon(seat, &accepts("late"), "1")?;
            seat.lan.machine().sh("ip link del late")?;
            // Made anew, it is deaf again.
            seat.lan.machine().sh(&format!("ip link del {bridge}"))?;
            soon(|| seat.lan.machine().sysctl(&accepts(&bridge)).map(drop))?;
            is_soon(seat, &accepts(&bridge), "0")?;
            seat.lan.plug(&bridge)?;
            v6_works(seat)
        })?;
    }
    Ok(())
}

/// Another guest beside it, in both families.
#[test]
fn guests_reach_each_other_in_both_families() -> Result<()> {
    Seat::run(
        AGENT,
        "family_siblings",
        Filter::Owned,
        BOTH,
        |_| Ok(()),
        |seat| {
            let lan = &seat.lan;
            let sibling = Guest::new(lan.machine(), "vm_web", "192.168.100.3/24", "192.168.100.1")?;
            sibling.add_address("fd00:64::3/64", &GATEWAY6.to_string())?;
            sibling.plug(lan.machine(), &seat.hosted.bridge())?;
            for to in [
                "192.168.100.2:5432",
                "[fd00:64::2]:5432",
                "10.1.0.2:15432",
                "[fd10:1::2]:15432",
            ] {
                let to: SocketAddr = to.parse()?;
                soon(|| {
                    let said = sibling
                        .space()
                        .ask_tcp(to, SILENCE)
                        .with_context(|| to.to_string())?;
                    ensure!(said.starts_with("hello-from-guest"), "{to}: {said}");
                    Ok(())
                })?;
            }
            lan.answers(Way::PingOut)
        },
    )
}
