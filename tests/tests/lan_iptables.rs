//! Floor 2: the plans of the iptables back end beside Docker's rules, legacy and nft, IPv4 and IPv6, with real packets.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use sovereign_protocol::port::{Ports, Transport};
use sovereign_reconcile::filter::{Filter, PortForward, WayOut};
use sovereign_reconcile::iptables::{Able, Family, Table, parse, plan, remove, wanted};
use sovereign_reconcile::names::LinkName;
use sovereign_tests::lan::{GATEWAY, GATEWAY6, GUEST, GUEST6, Lan, Nic, SUBNET, SUBNET6, Way};
use sovereign_tests::net::can_run;
use sovereign_tests::space::{ANSWER, Guest, SILENCE};

const BRIDGE: &str = "sv5pkj";
/// The machine's address on its LAN.
const LAN6: &str = "fd10:1::2";

struct Program {
    /// `legacy` or `nft`.
    variant: &'static str,
    family: Family,
}

impl Program {
    fn named(&self, verb: &str) -> String {
        let six = if self.family == Family::V6 { "6" } else { "" };
        format!("ip{six}tables-{}-{verb}", self.variant)
    }

    fn converge(&self, lan: &Lan, filter: &Filter) -> Result<String> {
        let machine = lan.machine();
        let (tables, marks) = (Table::ALL.into(), true);
        let wanted = wanted(filter, self.family, &Able { tables, marks })?;
        let observe = || -> Result<_> { Ok(parse(BRIDGE, &machine.sh(&self.named("save"))?)) };
        let Some(change) = plan(&wanted, &observe()?) else {
            return Ok(String::new());
        };
        machine.feed(&[&self.named("restore"), "--noflush"], &change.to_string())?;
        let left = plan(&wanted, &observe()?);
        ensure!(left.is_none(), "{left:?} after {change}");
        Ok(change.to_string())
    }

    fn remove(&self, lan: &Lan) -> Result<()> {
        let gone =
            remove(&parse(BRIDGE, &lan.machine().sh(&self.named("save"))?)).context("nothing is there")?;
        let words = [&self.named("restore"), "--noflush"];
        lan.machine().feed(&words, &gone.to_string()).map(drop)
    }
}

fn forward(
    transport: Transport,
    listen: Option<IpAddr>,
    ports: &str,
    to: IpAddr,
    to_port: u16,
) -> Result<PortForward> {
    let ports = Ports::parse(ports)?;
    Ok(PortForward {
        transport,
        listen,
        ports,
        to,
        to_port,
    })
}

fn filter() -> Result<Filter> {
    use Transport::{Tcp, Udp};
    let (four, six) = (IpAddr::from(GUEST), IpAddr::from(GUEST6));
    let forwards = [
        forward(Tcp, None, "15432", four, 5432)?,
        forward(Tcp, Some(Nic::Eth0.address().into()), "80", four, 5432)?,
        forward(Udp, None, "5000-5002", four, 6000)?,
        forward(Tcp, None, "15432", six, 5432)?,
        forward(Tcp, Some(LAN6.parse()?), "80", six, 5432)?,
        forward(Udp, None, "5000-5002", six, 6000)?,
    ];
    Ok(Filter {
        tag: BRIDGE.to_owned(),
        bridge: LinkName::parse(BRIDGE).context("a name")?,
        subnets: [SUBNET.parse()?, SUBNET6.parse()?].into(),
        way_out: WayOut::Masquerade,
        forwards: forwards.into(),
        answers: [].into(),
        senders: [].into(),
    })
}

fn machine() -> Result<Lan> {
    let lan = Lan::new()?;
    lan.machine().ip(&format!(
        "link add {BRIDGE} type bridge\naddress add {GATEWAY}/24 dev {BRIDGE}\n\
         address add {GATEWAY6}/64 dev {BRIDGE} nodad\nlink set {BRIDGE} up\n"
    ))?;
    lan.plug(BRIDGE)?;
    lan.machine().set_sysctl("net.ipv4.ip_forward", "1")?;
    lan.machine().set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
    Ok(lan)
}

/// Everybody who may reaches the guest, and it reaches everybody.
fn works(lan: &Lan, sibling: &Guest) -> Result<()> {
    lan.answers(Way::PingOut)?;
    let seen = lan.tcp_out(ANSWER)?;
    ensure!(seen.contains("sees [::ffff:10.1.0.2]"), "masqueraded: {seen}");
    let seen = lan.tcp6_out(ANSWER)?;
    ensure!(seen.contains(&format!("sees [{LAN6}]")), "masqueraded: {seen}");
    let four = Nic::Eth0.address().to_string();
    for (host, peer) in [(four, "::ffff:10.1.0.9"), (format!("[{LAN6}]"), "fd10:1::9")] {
        for port in [15432, 80] {
            let to: SocketAddr = format!("{host}:{port}").parse()?;
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
        }
        let to = format!("{host}:5001").parse()?;
        let seen = lan
            .peer()
            .ask_udp(to, ANSWER)
            .with_context(|| format!("peer to {to}"))?;
        ensure!(seen.starts_with("guest:6001"), "{to}: {seen}");
        let middle = lan.peer().ask_tcp(format!("{host}:5432").parse()?, SILENCE);
        ensure!(middle.is_err(), "what is not forwarded: {middle:?}");
    }
    lan.peer().sh(&format!(
        "ip route replace {SUBNET} via 10.1.0.2; ip -6 route replace {SUBNET6} via {LAN6}"
    ))?;
    for to in [IpAddr::from(GUEST), IpAddr::from(GUEST6)] {
        ensure!(!lan.peer().ping(to, SILENCE)?, "unasked: {to}");
    }
    Ok(())
}

/// The nft programs make the tables and chains that the kernel has with x_tables when they first need them, and leave
/// them there, empty.
fn stays(line: &str) -> bool {
    let declared = line.contains("tables-nft") && line.contains(" :") && line.ends_with(" ACCEPT");
    declared
        || line.starts_with("nft {\"table\"")
        || line.starts_with("nft {\"chain\"") && line.contains("accept")
}

fn beside_docker(variant: &'static str) -> Result<()> {
    let lan = machine()?;
    lan.docker()?;
    let sibling = Guest::new(lan.machine(), "vm_web", "192.168.100.3/24", &GATEWAY.to_string())?;
    sibling.add_address("fd00:64::3/64", &GATEWAY6.to_string())?;
    sibling.plug(lan.machine(), BRIDGE)?;
    let serve = |port: u16| {
        let at = SocketAddr::from(([0u16; 8], port));
        lan.guest().space().serve_udp(at, &format!("guest:{port}"))
    };
    let _services = [serve(6000)?, serve(6001)?, serve(6002)?];
    let programs = Family::ALL.map(|family| Program { variant, family });
    lan.machine()
        .sh("iptables-legacy-save -t nat; iptables-legacy-save -t mangle; ip6tables-legacy-save -t nat")?;
    lan.machine().sh(
        "ip6tables-legacy-save -t mangle; ip6tables-legacy-save -t filter; iptables-legacy-save -t filter",
    )?;
    let before = lan.foreign_state(stays)?;
    let filter = filter()?;
    lan.is_silent(Way::PingOut)?; // Docker's policy
    for program in &programs {
        ensure!(!program.converge(&lan, &filter)?.is_empty());
        ensure!(program.converge(&lan, &filter)?.is_empty(), "up; up");
    }
    if variant == "legacy" {
        // Docker's DROP is in the nft tables: no accept in others overrides it.
        lan.is_silent(Way::PingOut)?;
        lan.machine().sh("iptables -P FORWARD ACCEPT")?;
    }
    works(&lan, &sibling)?;

    if variant == "nft" {
        lan.nft_flush()?;
        lan.docker()?;
        for program in &programs {
            ensure!(!program.converge(&lan, &filter)?.is_empty());
        }
        works(&lan, &sibling)?;
    }

    lan.docker_restart()?;
    let repair = programs[0].converge(&lan, &filter)?;
    ensure!(
        repair.is_empty() == (variant == "legacy"),
        "its jumps came before ours: {repair}"
    );
    works(&lan, &sibling)?;
    programs.iter().try_for_each(|program| program.remove(&lan))?;
    lan.machine().sh("iptables -P FORWARD DROP")?;
    let left = before.difference(&lan.foreign_state(stays)?);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

#[test]
fn the_nft_programs_rules_work_beside_dockers() -> Result<()> {
    if !can_run("the_nft_programs_rules_work_beside_dockers") {
        return Ok(());
    }
    beside_docker("nft")
}

#[test]
fn the_legacy_programs_rules_work_where_nobody_else_drops() -> Result<()> {
    if !can_run("the_legacy_programs_rules_work_where_nobody_else_drops") {
        return Ok(());
    }
    beside_docker("legacy")
}
