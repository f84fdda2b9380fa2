//! The namespace of one measurement: an uplink, and what others have there.
//!
//! Everything here changes the namespace that this process is in; [`check`] refuses the machine's own.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use sovereign_host_agent::net::{NetworkSpec, Place};
use sovereign_protocol::link_name::LinkName;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::spec::Uplink;
use sovereign_protocol::subnet::HostAddress;
use sovereign_reconcile::filter::PortForward;

/// Holds the number of the namespace that is out of bounds.
pub(super) const TEST: &str = "SOVEREIGN_TEST";
/// What others have in a loaded namespace.
pub(super) const FOREIGN_RULES: u32 = 10_000;
pub(super) const FOREIGN_ELEMENTS: u32 = 100_000;

/// The number of the namespace that this process is in, as `readlink /proc/self/ns/net` has it.
pub(super) fn number() -> Result<String> {
    let link = std::fs::read_link("/proc/self/ns/net").context("no namespace")?;
    Ok(link.to_string_lossy().replace(|c: char| !c.is_ascii_digit(), ""))
}

/// Refuses the namespace that this program was started in.
pub(super) fn check() -> Result<()> {
    let outer = std::env::var(TEST).with_context(|| format!("{TEST} is not set"))?;
    if outer.parse::<u64>().is_err() || outer == number()? {
        bail!("not in a namespace of our own");
    }
    Ok(())
}

/// An uplink with a default route, which is a pair of links that lead nowhere else.
pub(super) fn uplink() -> Result<()> {
    batch(
        "link set lo up\n\
         link add up0 type veth peer name up1\n\
         link set up1 up\n\
         link set up0 up\n\
         address add 10.9.0.2/24 dev up0\n\
         route add default via 10.9.0.1 dev up0\n",
    )
}

/// Ten thousand rules and a set of a hundred thousand addresses, as a VPN with an allow list has them.
pub(super) fn load() -> Result<()> {
    let mut rules = String::new();
    let address = |n: u32| format!("10.{}.{}.{}", 64 + (n >> 16), n >> 8 & 255, n & 255);
    for n in 0..FOREIGN_RULES {
        writeln!(
            rules,
            "rule add pref {} from {} lookup 77",
            10_000 + n,
            address(n)
        )?;
    }
    batch(&rules)?;
    let mut set = "add table inet foreign\nadd set inet foreign listed { type ipv4_addr; }\n".to_owned();
    let all: Vec<String> = (0..FOREIGN_ELEMENTS).map(address).collect();
    for some in all.chunks(1_000) {
        writeln!(set, "add element inet foreign listed {{ {} }}", some.join(", "))?;
    }
    feed("nft", &["-f", "-"], &set)
}

/// What an instance with so many guests is told. Its rules are of a named uplink.
pub(super) fn spec(guests: usize) -> Result<NetworkSpec> {
    let name = |text: &str| LinkName::parse(text).context("no name of a link");
    let guest = |n: usize| -> Result<_> {
        let address = format!("192.168.{}.{}", 100 + n / 250, 2 + n % 250);
        Ok((Name::parse(&format!("g{n}"))?, [address.parse()?].into()))
    };
    Ok(NetworkSpec {
        place: Place::Host,
        addresses: [HostAddress::parse("192.168.100.1/22").context("no address")?].into(),
        guests: (0..guests).map(guest).collect::<Result<_>>()?,
        uplink: Uplink::Named(vec![name("up0")?]),
        forwards: [PortForward {
            transport: Transport::Tcp,
            listen: None,
            ports: Ports::parse("8080")?,
            to: "192.168.100.2".parse()?,
            to_port: 80,
        }]
        .into(),
        ..NetworkSpec::default()
    })
}

/// Runs `ip` over many lines.
pub(super) fn batch(lines: &str) -> Result<()> {
    feed("ip", &["-batch", "-"], lines)
}

/// Runs a program with this on its input.
pub(super) fn feed(program: &str, words: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(words)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("no {program}"))?;
    let mut pipe = child.stdin.take().context("no pipe")?;
    pipe.write_all(input.as_bytes())?;
    drop(pipe);
    let status = child.wait()?;
    if !status.success() {
        bail!("{program} {words:?}: {status}");
    }
    Ok(())
}

/// What a program prints.
pub(super) fn said(program: &str, words: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("no {program}"))?;
    if !output.status.success() {
        bail!("{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}
