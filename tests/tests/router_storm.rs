//! Floor 2: ten thousand changes by other software while a machine of the LAN asks the guest through a forward.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sovereign_tests::lan::{Lan, Nic};
use sovereign_tests::net::{Filter, Hosted, Router, can_run, left_by_the_kernel};
use sovereign_tests::space::{ANSWER, State};
use sovereign_tests::storm::{left_by_it, storm};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=eth0,eth1 \
    forward=tcp:15432:192.168.100.2:5432";
const FORWARD: &str = "10.1.0.2:15432";
/// A packet that is lost is sent again after a second, then after two; what is refused is asked again so long.
const PROBE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(60);

/// What others may do to ours, one after another.
fn harms(hosted: &Hosted, filter: Filter) -> Result<Vec<String>> {
    let (bridge, tap, table) = (hosted.bridge(), hosted.tap("sql")?, hosted.table());
    let mut harms = vec![
        "echo 0 > /proc/sys/net/ipv4/ip_forward".to_owned(),
        "ip rule del pref 9000; ip rule del pref 9010".to_owned(),
        format!("ip route flush table {table}"),
        format!("ip address del 192.168.100.1/24 dev {bridge}"),
        format!("ip link del {tap}"),
        format!("ip link set {bridge} down"),
    ];
    match filter {
        Filter::Plain => harms.push(format!("nft delete table inet {bridge}")),
        Filter::Owned | Filter::Iptables => {} // nobody else can; nobody is told of it
    }
    Ok(harms)
}

/// Without what the kernel numbers or makes up, and without ours.
fn others(lan: &Lan, hosted: &Hosted) -> Result<State> {
    let (bridge, table) = (hosted.bridge(), hosted.table().to_string());
    let ours = |line: &str| {
        line.contains(&bridge)
            || line.contains(&table)
            || line.starts_with("link vm_sql")
            || line.contains("forwarding")
            || line.contains("ip_forward")
            || line.contains("accept_redirects") // follows forwarding
            || left_by_the_kernel(line)
    };
    left_by_it(lan.machine(), ours)
}

/// Ten probes a second until it is over: how many, and how many failed in a row at most.
fn probe(lan: &Lan, to: SocketAddr, over: &AtomicBool) -> (u32, u32) {
    let (mut probes, mut row, mut worst) = (0, 0, 0);
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let heard = loop {
            match lan.from_peer(to, PROBE) {
                Ok(said) if said.starts_with("hello-from-guest") => break true,
                _ if begun.elapsed() > PROBE => break false,
                _ => std::thread::sleep(Duration::from_millis(50)), // its pace
            }
        };
        (probes, row) = (probes + 1, if heard { 0 } else { row + 1 });
        worst = worst.max(row);
        std::thread::sleep(Duration::from_millis(100).saturating_sub(begun.elapsed())); // ten a second
    }
    (probes, worst)
}

fn stormed(router: &mut Router, filter: Filter) -> Result<State> {
    router.forward_works(FORWARD)?;
    let calm = Lan::new()?;
    let (over, to, lan) = (AtomicBool::new(false), FORWARD.parse()?, &router.lan);
    let harms = harms(&router.hosted, filter)?;
    let (probes, worst) = std::thread::scope(|scope| {
        let prober = scope.spawn(|| probe(lan, to, &over));
        let without = scope.spawn(|| storm(calm.machine(), Duration::ZERO, &[])); // the same where there is no agent
        let outcome = storm(lan.machine(), PAUSE, &harms);
        over.store(true, Ordering::Relaxed);
        let seen = prober
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        without
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        outcome.map(|()| seen)
    })?;
    eprintln!("{filter:?}: {probes} probes, at most {worst} failures in a row");
    ensure!(
        probes > 20 && worst < 2,
        "{probes} probes, {worst} failures in a row"
    );
    router.forward_works(FORWARD)?;
    router.leaves_by(Nic::Eth0)?;
    let (mut told, begun) = (router.agent()?.rest(), Instant::now());
    let repaired = |told: &[String]| told.iter().filter(|line| line.starts_with("repaired")).count();
    while repaired(&told) * 2 < harms.len() {
        // Those that came together are told together.
        ensure!(begun.elapsed() < ANSWER, "harms were not seen: {told:#?}");
        std::thread::sleep(Duration::from_millis(20)); // polls a pipe, waits for nothing else
        told.extend(router.agent()?.rest());
    }
    let left = others(&router.lan, &router.hosted)?;
    let changed = others(&calm, &router.hosted)?.difference(&left);
    ensure!(changed.is_empty(), "{changed:#?}");
    Ok(left)
}

fn reachable(filter: Filter) -> Result<()> {
    if !can_run("storm") {
        return Ok(());
    }
    let (mut router, _) = Router::new(AGENT, filter, WANT, |_| Ok(()))?;
    let left = match stormed(&mut router, filter) {
        Ok(left) => left,
        Err(error) => {
            eprintln!("{}", router.hosted.log());
            return Err(error);
        }
    };
    let agent = router.agent.take().context("no agent")?;
    router.hosted.down(router.lan.machine(), agent)?;
    let changed = left.difference(&others(&router.lan, &router.hosted)?);
    ensure!(changed.is_empty(), "{changed:#?}");
    Ok(())
}

#[test]
fn ten_thousand_foreign_changes_stay_and_the_guest_stays_reachable_with_owned_tables() -> Result<()> {
    reachable(Filter::Owned)
}

#[test]
fn ten_thousand_foreign_changes_stay_and_the_guest_stays_reachable_with_plain_tables() -> Result<()> {
    reachable(Filter::Plain)
}

#[test]
fn ten_thousand_foreign_changes_stay_and_the_guest_stays_reachable_with_iptables() -> Result<()> {
    reachable(Filter::Iptables)
}
