//! Floor 2: ten thousand changes by other software while a machine of the LAN asks the guest through a forward.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sovereign_tests::lan::{Lan, Nic};
use sovereign_tests::net::{Filter, Hosted, Router, can_run, left_by_the_kernel};
use sovereign_tests::space::{Space, State};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=eth0,eth1 \
    forward=tcp:15432:192.168.100.2:5432";
const FORWARD: &str = "10.1.0.2:15432";
/// A packet that is lost is sent again after a second.
const PROBE: Duration = Duration::from_millis(1_500);

/// Numbers from a seed (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

const CHANGES: usize = 10_000;
/// Between two of them something else than links, addresses, routes or rules is changed, and there is a pause.
const CHUNK: usize = 100;

/// Changes that other software makes to its own, as lines of `ip`; those that make no sense fail, always the same.
fn foreign(numbers: &mut Numbers) -> String {
    let (n, m) = (numbers.below(20), numbers.below(200));
    let add_or_del = if numbers.below(2) == 0 { "add" } else { "del" };
    let up_or_down = if numbers.below(2) == 0 { "up" } else { "down" };
    match numbers.below(20) {
        0..=5 => format!(
            "rule {add_or_del} pref {} from 172.16.{m}.0/24 lookup {}",
            20_000 + m,
            300 + n
        ),
        // A mark of 0 would mean all packets of the machine.
        6..=8 => format!(
            "rule {add_or_del} pref {} fwmark {} unreachable",
            8_000 + m,
            1 + m
        ),
        9..=12 => format!(
            "route {add_or_del} 172.20.{m}.0/24 via 10.2.0.1 dev eth1 table {}",
            300 + n
        ),
        13..=16 => format!("route {add_or_del} 172.21.{m}.0/24 via 10.1.0.1 dev eth0"),
        17 => format!("link {add_or_del} storm{n} type bridge"),
        18 => format!("address {add_or_del} 172.30.{n}.1/24 dev storm{n}"),
        _ => format!("link set storm{n} {up_or_down}"),
    }
}

/// The same of sysctls and packet filters.
fn foreign_else(machine: &Space, numbers: &mut Numbers) -> Result<()> {
    let n = numbers.below(4);
    match numbers.below(3) {
        0 => machine.set_sysctl("net.ipv4.conf.eth1.arp_announce", &(n % 3).to_string()),
        1 => machine
            .sh(&format!(
                "nft 'add table ip storm{n}; add chain ip storm{n} c; add rule ip storm{n} c accept'"
            ))
            .map(drop),
        _ => machine
            .sh(&format!("nft delete table ip storm{n} 2>/dev/null || true"))
            .map(drop),
    }
}

/// What others may do to ours, one after another.
fn harms(hosted: &Hosted) -> Result<Vec<String>> {
    let (bridge, tap, table) = (hosted.bridge(), hosted.tap("sql")?, hosted.table());
    Ok(vec![
        "echo 0 > /proc/sys/net/ipv4/ip_forward".to_owned(),
        "ip rule del pref 9000; ip rule del pref 9010".to_owned(),
        format!("nft delete table inet {bridge}"),
        format!("ip route flush table {table}"),
        format!("ip address del 192.168.100.1/24 dev {bridge}"),
        format!("ip link del {tap}"),
        format!("ip link set {bridge} down"),
    ])
}

/// All of the storm; between the foreign changes, at even distances, these harms.
fn storm(machine: &Space, harms: &[String]) -> Result<()> {
    let mut numbers = Numbers(0x5eed_0004_cafe_f00d);
    let chunks = CHANGES / CHUNK;
    for chunk in 0..chunks {
        let lines: String = (0..CHUNK).map(|_| foreign(&mut numbers) + "\n").collect();
        let mut command = machine.command(&["ip", "-force", "-batch", "-"]);
        let mut ip = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        ip.stdin.take().context("no pipe")?.write_all(lines.as_bytes())?;
        ip.wait()?; // some lines fail
        foreign_else(machine, &mut numbers)?;
        if !harms.is_empty() {
            std::thread::sleep(Duration::from_millis(60)); // so that the storm lasts
            let every = chunks / harms.len();
            if let Some(harm) = harms.get(chunk / every).filter(|_| chunk % every == every / 2) {
                machine.sh(harm).with_context(|| harm.clone())?;
            }
        }
    }
    Ok(())
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
    let State(lines) = lan.foreign_state(ours)?;
    let made_up = |word: &&str| !word.starts_with("ifindex=") && !word.starts_with("address=");
    let plain = lines
        .iter()
        .map(|line| line.split(' ').filter(made_up).collect::<Vec<_>>().join(" "));
    Ok(State(plain.collect()))
}

/// Ten probes a second until it is over: how many, and how many failed in a row at most.
fn probe(lan: &Lan, to: SocketAddr, over: &AtomicBool) -> (u32, u32) {
    let (mut probes, mut row, mut worst) = (0, 0, 0);
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let said = lan.from_peer(to, PROBE);
        let heard = said.is_ok_and(|said| said.starts_with("hello-from-guest"));
        (probes, row) = (probes + 1, if heard { 0 } else { row + 1 });
        worst = worst.max(row);
        std::thread::sleep(Duration::from_millis(100).saturating_sub(begun.elapsed())); // ten a second
    }
    (probes, worst)
}

fn stormed(router: &mut Router) -> Result<State> {
    router.forward_works(FORWARD)?;
    let calm = Lan::new()?;
    let (over, to, lan) = (AtomicBool::new(false), FORWARD.parse()?, &router.lan);
    let harms = harms(&router.hosted)?;
    let (probes, worst) = std::thread::scope(|scope| {
        let prober = scope.spawn(|| probe(lan, to, &over));
        let without = scope.spawn(|| storm(calm.machine(), &[])); // the same where there is no agent
        let outcome = storm(lan.machine(), &harms);
        over.store(true, Ordering::Relaxed);
        let seen = prober
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        without
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        outcome.map(|()| seen)
    })?;
    eprintln!("{probes} probes, at most {worst} failures in a row");
    ensure!(
        probes > 20 && worst < 2,
        "{probes} probes, {worst} failures in a row"
    );
    router.forward_works(FORWARD)?;
    router.leaves_by(Nic::Eth0)?;
    let told = router.agent()?.rest();
    let repaired = told.iter().filter(|line| line.starts_with("repaired")).count();
    ensure!(repaired >= harms.len(), "not each harm was seen: {told:#?}");
    let left = others(&router.lan, &router.hosted)?;
    let changed = others(&calm, &router.hosted)?.difference(&left);
    ensure!(changed.is_empty(), "{changed:#?}");
    Ok(left)
}

#[test]
fn ten_thousand_foreign_changes_stay_and_the_guest_stays_reachable() -> Result<()> {
    if !can_run("storm") {
        return Ok(());
    }
    let (mut router, _) = Router::new(AGENT, Filter::Plain, WANT, |_| Ok(()))?;
    let left = match stormed(&mut router) {
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
