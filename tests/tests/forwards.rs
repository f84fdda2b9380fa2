//! Floor 2: forwards of the kernel beside programs of the machine, and those that cannot be made.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use sovereign_tests::lan::{Lan, Nic};
use sovereign_tests::net::{Agent, Filter, Hosted, Router, can_run};

const NETWORK_AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const FORWARD_AGENT: &str = env!("CARGO_BIN_EXE_forward-agent");
/// The machine's address on its LAN.
const LAN4: &str = "10.1.0.2";

/// A guest that never boots, with forwards of the kernel by name: address and ports, protocol, how many more.
fn document(forwards: &[(&str, &str, &str, u16)]) -> String {
    let forward = |(name, listen, transport, more): &(&str, &str, &str, u16)| {
        serde_json::json!({
            "name": name, "service": "postgres", "listen": listen, "port": 5432,
            "translated": {"transport": transport, "more": more},
        })
    };
    let image =
        serde_json::json!({"kernel": "/k", "initramfs": "/i", "root": "/r", "agent": "/a", "digest": "d"});
    let document = serde_json::json!({
        "version": 1,
        "network": {"namespace": "host", "address": "192.168.100.1/24"},
        "guests": {"sql": {
            "memory_mib": 256, "vcpus": 1, "data_mib": 64, "image": image,
            "services": [{"name": "postgres", "kind": {"postgres": {"settings": {}, "port": 5432}}}],
            "forwards": forwards.iter().map(forward).collect::<Vec<_>>(),
            "interface": {"addresses": ["192.168.100.2/24"]},
        }},
    });
    document.to_string()
}

/// Looks come every ten seconds, and one more is needed for UDP: longer than usual.
fn expect(agent: &mut Agent, begin: &str) -> Result<String> {
    agent
        .expect(begin)
        .or_else(|_| agent.expect(begin))
        .or_else(|_| agent.expect(begin))
}

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(format!("{address}:{port}").parse()?)
}

/// `run` with a host agent of these forwards on a machine; what it logged is told when that fails.
fn with_agent(
    forwards: &[(&str, &str, &str, u16)],
    lan: &Lan,
    run: impl FnOnce(&mut Agent) -> Result<()>,
) -> Result<()> {
    let hosted = Hosted::new(FORWARD_AGENT, Filter::Owned)?;
    let mut agent = hosted.start(lan.machine(), &document(forwards))?;
    if let Err(error) = run(&mut agent) {
        eprintln!("{}", hosted.log());
        return Err(error);
    }
    agent.restart_ends()
}

#[test]
fn a_program_that_has_a_port_at_first_is_named_and_the_forward_has_not() -> Result<()> {
    if !can_run("forward_claims") {
        return Ok(());
    }
    let lan = Lan::new()?;
    let ours = format!("pid {} (", std::process::id());
    let _tcp = lan.machine().serve_tcp(at("0.0.0.0", 8_005)?, "tcp")?;
    let _udp = lan.machine().serve_udp(at(LAN4, 5_001)?, "udp")?;
    let _loopback = lan.machine().serve_udp(at("127.0.0.1", 6_000)?, "local")?;
    let forwards = [
        ("range", "0.0.0.0:8000", "tcp", 10),
        ("udp", "0.0.0.0:5000", "udp", 1),
        ("tcp", "0.0.0.0:5000", "tcp", 1),
        ("six", "10.1.0.2:6000", "udp", 0),
    ];
    with_agent(&forwards, &lan, |agent| {
        // In the order in which they are printed.
        for (begin, named) in [
            ("range False PortUnavailable 0.0.0.0:8005", true),
            ("six Unknown Reserved", false),
            ("tcp Unknown Reserved", false),
            ("udp False PortUnavailable 0.0.0.0:5001", true),
        ] {
            let said = agent.expect(begin)?;
            ensure!(said.contains(&ours) == named, "{said}");
        }
        Ok(())
    })
}

#[test]
fn a_program_that_comes_later_is_told_beside_the_forward_until_it_goes() -> Result<()> {
    if !can_run("shared_ports") {
        return Ok(());
    }
    let lan = Lan::new()?;
    let ours = format!("pid {} (", std::process::id());
    let forwards = [
        ("range", "0.0.0.0:8000", "tcp", 10),
        ("udp", "0.0.0.0:5000", "udp", 2),
        ("six", "10.1.0.2:6000", "udp", 0),
        ("seven", "0.0.0.0:7000", "udp", 0),
    ];
    with_agent(&forwards, &lan, |agent| {
        agent.expect("udp Unknown Reserved")?;
        let machine = lan.machine();
        // Nobody is in anybody's way on the loopback, on another address or in the other family.
        let _apart = [
            machine.serve_udp(at("127.0.0.1", 7_000)?, "x")?,
            machine.serve_udp(at("10.2.0.2", 6_000)?, "x")?,
            machine.serve_udp("[fd10:1::2]:5000".parse()?, "x")?,
        ];
        let udp = machine.serve_udp(at(LAN4, 5_002)?, "x")?;
        let said = expect(agent, "udp.port False PortShared")?;
        ensure!(
            said.contains(&ours) && said.contains("udp 10.1.0.2:5002"),
            "{said}"
        );
        let tcp = machine.serve_tcp(at("0.0.0.0", 8_001)?, "x")?;
        let said = expect(agent, "range.port False PortShared")?;
        ensure!(
            said.contains(&ours) && said.contains("tcp 0.0.0.0:8001"),
            "{said}"
        );
        drop(udp);
        expect(agent, "udp.port gone")?;
        drop(tcp);
        expect(agent, "range.port gone")?;
        let rest = agent.rest();
        let mut all = agent.seen().iter().chain(&rest);
        let apart = all.find(|line| line.starts_with("six.port") || line.starts_with("seven.port"));
        ensure!(apart.is_none(), "{apart:?}");
        Ok(())
    })
}

fn one_that_cannot_be_made(filter: Filter) -> Result<()> {
    const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=auto \
        forward=tcp:15432:192.168.100.2:5432 forward=tcp:20000-25000:192.168.100.2:5432";
    const WITHOUT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=auto \
        forward=tcp:15432:192.168.100.2:5432";
    Router::run(
        NETWORK_AGENT,
        "forward_refused",
        filter,
        WITHOUT,
        |_| Ok(()),
        |router| {
            router.agent()?.say(WANT)?;
            let said = router.agent()?.expect("works Filter 1 ")?;
            ensure!(
                said.contains("refused tcp 20000-25000: ") && said.contains("ports change their number"),
                "{said}"
            );
            router.forward_works(&format!("{LAN4}:15432"))?;
            router.leaves_by(Nic::Eth0)?;
            router.agent()?.say(WITHOUT)?;
            let said = router.agent()?.expect("works Filter 1 ")?;
            ensure!(!said.contains("refused"), "{said}");
            Ok(())
        },
    )
}

#[test]
fn a_forward_that_cannot_be_made_keeps_nobody_from_another_one() -> Result<()> {
    one_that_cannot_be_made(Filter::Owned)?;
    one_that_cannot_be_made(Filter::Plain)
}
