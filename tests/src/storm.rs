//! Ten thousand changes that other software makes to what is its own, always the same ones, and its harm to ours.
//!
//! For a machine with `eth0` in 10.1.0.0/24 and `eth1` in 10.2.0.0/24, the other end of each being `.1`.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::space::{Space, State};

/// Changes of links, addresses, routes and rules.
pub const CHANGES: usize = 10_000;
/// Between two of them something else is changed, and there is a pause.
const CHUNK: usize = 100;

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

/// A line of `ip`; those that make no sense fail, always the same.
fn change(numbers: &mut Numbers) -> String {
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

/// A change of a sysctl, of a packet filter, or of a link that other things stand on.
fn other_change(machine: &Space, numbers: &mut Numbers) -> Result<()> {
    let n = numbers.below(4);
    let table = format!("ip storm{n}");
    let script = match numbers.below(6) {
        0 => return machine.set_sysctl("net.ipv4.conf.eth1.arp_announce", &(n % 3).to_string()),
        1 => format!("nft 'add table {table}; add chain {table} c; add rule {table} c accept'"),
        2 => format!(
            "nft 'add table {table}; add chain {table} h {{ type filter hook forward priority {n}; }}; \
             add rule {table} h ip saddr 172.16.0.0/16 drop'"
        ),
        3 => format!("nft delete table {table} 2>/dev/null || true"),
        4 => "nft list tables ip | grep -o 'storm.*' | while read table; do nft flush table ip $table; done"
            .to_owned(),
        _ => "ip link set eth1 down; ip link set eth1 up".to_owned(), // its routes are gone
    };
    machine.sh(&script).map(drop)
}

/// All of it on this machine, with so long a pause after each hundredth; and at even distances these harms to ours.
///
/// # Errors
/// With what a program said.
pub fn storm(machine: &Space, pause: Duration, harms: &[String]) -> Result<()> {
    let mut numbers = Numbers(0x5eed_0004_cafe_f00d);
    let chunks = CHANGES / CHUNK;
    for chunk in 0..chunks {
        let lines: String = (0..CHUNK).map(|_| change(&mut numbers) + "\n").collect();
        let mut command = machine.command(&["ip", "-force", "-batch", "-"]);
        let mut ip = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        ip.stdin.take().context("no pipe")?.write_all(lines.as_bytes())?;
        ip.wait()?; // some lines fail
        other_change(machine, &mut numbers)?;
        std::thread::sleep(pause); // so that the storm lasts
        if !harms.is_empty() {
            let every = chunks / harms.len();
            if let Some(harm) = harms.get(chunk / every).filter(|_| chunk % every == every / 2) {
                machine.sh(harm).with_context(|| harm.clone())?;
            }
        }
    }
    Ok(())
}

/// What a storm left, but for lines of ours and what the kernel numbers or makes up.
///
/// # Errors
/// When a program fails.
pub fn left_by_it(machine: &Space, is_ours: impl Fn(&str) -> bool) -> Result<State> {
    let State(lines) = machine.foreign_state(is_ours)?;
    let made_up = |word: &&str| !word.starts_with("ifindex=") && !word.starts_with("address=");
    let plain = lines
        .iter()
        .map(|line| line.split(' ').filter(made_up).collect::<Vec<_>>().join(" "));
    Ok(State(plain.collect()))
}
