//! Floor 2: the plans of the iptables back end on a phone, with real packets; routing by hand.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use sovereign_protocol::port::{Ports, Transport};
use sovereign_reconcile::filter::{Filter, PortForward, WayOut};
use sovereign_reconcile::iptables::{Able, Family, Restore, Table, parse, plan, remove, wanted};
use sovereign_reconcile::names::LinkName;
use sovereign_tests::android::{
    APP, CHOSE_CELLULAR, Chains, GATEWAY, GUEST, INTERNET, PORT, Phone, SUBNET, Uplink, Way,
};
use sovereign_tests::net::can_run;
use sovereign_tests::space::{ANSWER, Guest, SILENCE, Service, Space, State};

const BRIDGE: &str = "sv5pkj";
const OWN: u32 = 20_100;
/// The phone's address on its Wi-Fi, whose other side is the internet's namespace.
const WLAN: &str = "10.0.0.5";

/// A phone with the guest behind our bridge, and its three rules.
fn phone(chains: Chains) -> Result<Phone> {
    let phone = Phone::new()?;
    phone.netd_iptables(chains)?;
    phone.machine().ip(&format!(
        "link add {BRIDGE} type bridge\naddress add {GATEWAY}/24 dev {BRIDGE}\nlink set {BRIDGE} up\n\
         route replace {SUBNET} dev {BRIDGE} table {OWN}\n"
    ))?;
    phone.plug(BRIDGE)?;
    route(&phone)?;
    Ok(phone)
}

fn route(phone: &Phone) -> Result<()> {
    let table = phone.table(Uplink::Wlan0);
    phone.machine().set_sysctl("net.ipv4.ip_forward", "1")?;
    phone.machine().ip(&format!(
        "rule add pref 9000 to {SUBNET} lookup {OWN}\nrule add pref 9010 iif {BRIDGE} lookup {table}\n\
         rule add pref 9020 iif {BRIDGE} unreachable\n"
    ))
}

fn forward(transport: Transport, ports: &str, to_port: u16) -> Result<PortForward> {
    Ok(PortForward {
        transport,
        listen: None,
        ports: Ports::parse(ports)?,
        to: GUEST.into(),
        to_port,
    })
}

fn filter(way_out: WayOut) -> Result<Filter> {
    use Transport::{Tcp, Udp};
    let forwards = [
        forward(Tcp, "15432", 5432)?,
        forward(Udp, "5000-5002", 6000)?,
        forward(Udp, "7000-7001", 7000)?,
    ];
    Ok(Filter {
        tag: BRIDGE.to_owned(),
        bridge: LinkName::parse(BRIDGE).context("a name")?,
        subnets: [SUBNET.parse()?].into(),
        way_out,
        forwards: forwards.into(),
        answers: [].into(),
        senders: [].into(),
    })
}

/// Plans and applies until there is nothing to plan, which must be so after the first time.
fn converge(machine: &Space, filter: &Filter) -> Result<Option<Restore>> {
    let (tables, marks) = (Table::ALL.into(), true);
    let wanted = wanted(filter, Family::V4, &Able { tables, marks })?;
    let observe = || -> Result<_> { Ok(parse(BRIDGE, &machine.sh("iptables-save")?)) };
    let change = plan(&wanted, &observe()?);
    if let Some(change) = &change {
        machine.feed(&["iptables-restore", "--noflush"], &change.to_string())?;
        let left = plan(&wanted, &observe()?);
        ensure!(left.is_none(), "{left:?} after {change}");
    }
    Ok(change)
}

/// UDP services of the guest that say their own port.
fn services(phone: &Phone) -> Result<Vec<Service>> {
    let serve = |port: u16| {
        let at = SocketAddr::from(([0, 0, 0, 0], port));
        phone.guest().space().serve_udp(at, &format!("guest:{port}"))
    };
    [6000, 6001, 6002, 7000, 7001].into_iter().map(serve).collect()
}

fn tcp(from: &Space, to: &str) -> Result<String> {
    from.ask_tcp(to.parse()?, ANSWER).with_context(|| to.to_owned())
}

fn forwards_work(phone: &Phone, sibling: &Guest) -> Result<()> {
    let at = format!("{WLAN}:15432");
    let seen = tcp(phone.internet(), &at).context("from the LAN")?;
    ensure!(
        seen.starts_with("hello-from-guest sees [::ffff:10.0.0.1]"),
        "from the LAN: {seen}"
    );
    let seen = tcp(sibling.space(), &at).context("hairpin")?;
    ensure!(
        seen.starts_with("hello-from-guest sees [::ffff:192.168.100.1]"),
        "hairpin: {seen}"
    );
    let seen = tcp(phone.machine(), &at).context("from the phone itself")?;
    ensure!(
        seen.starts_with("hello-from-guest"),
        "from the phone itself: {seen}"
    );
    let seen = tcp(phone.machine(), &format!("{GATEWAY}:15432"))?;
    ensure!(
        seen.starts_with("hello-from-guest"),
        "at the bridge's address: {seen}"
    );
    // What listens on the phone's own loopback stays there.
    let own: SocketAddr = "127.0.0.1:15432".parse()?;
    let _service = phone.machine().serve_tcp(own, "loopback")?;
    let seen = phone.machine().ask_tcp(own, ANSWER).context("the loopback")?;
    ensure!(seen.starts_with("loopback sees 127.0.0.1"), "{seen}");
    for (here, there) in [
        (5000, 6000),
        (5001, 6001),
        (5002, 6002),
        (7000, 7000),
        (7001, 7001),
    ] {
        let to = format!("{WLAN}:{here}").parse()?;
        let seen = phone.internet().ask_udp(to, ANSWER)?;
        ensure!(
            seen.starts_with(&format!("guest:{there} sees 10.0.0.1:")),
            "{here}: {seen}"
        );
    }
    Ok(())
}

/// All but what this test itself switches.
fn state(phone: &Phone) -> Result<State> {
    phone.foreign_state(|line| line.starts_with("sysctl net/bridge/"))
}

/// A guest at its own forward. With br_netfilter the bridge itself would have to send the frame back to its port, which it
/// does only for ports in hairpin mode.
fn own_hairpin(phone: &Phone) -> Result<()> {
    const SWITCH: &str = "net.bridge.bridge-nf-call-iptables";
    let at = format!("{WLAN}:15432");
    if phone.machine().sysctl(SWITCH).is_ok_and(|value| value == "1") {
        let guest = phone.guest().space();
        ensure!(
            guest.ask_tcp(at.parse()?, SILENCE).is_err(),
            "br_netfilter has learnt it"
        );
        phone
            .machine()
            .sh(&format!("bridge link set dev {PORT} hairpin on"))?;
        tcp(guest, &at).context("own hairpin")?;
        phone
            .machine()
            .sh(&format!("bridge link set dev {PORT} hairpin off"))?;
        phone.machine().set_sysctl(SWITCH, "0")?;
    }
    tcp(phone.guest().space(), &at).context("own hairpin without br_netfilter")?;
    Ok(())
}

fn on_a_phone(chains: Chains) -> Result<()> {
    let phone = phone(chains)?;
    let machine = phone.machine();
    let _services = services(&phone)?;
    let sibling = Guest::new(machine, "vm_web", "192.168.100.3/24", &GATEWAY.to_string())?;
    sibling.plug(machine, BRIDGE)?;
    let before = state(&phone)?;
    phone.is_silent(Way::PingOut)?; // netd's DROP

    let out = filter(WayOut::Masquerade)?;
    converge(machine, &out)?.context("nothing to do")?;
    ensure!(converge(machine, &out)?.is_none(), "up; up");
    phone.answers(Way::PingOut)?;
    phone.answers(Way::TcpIn)?;
    let seen = phone.tcp_out(ANSWER)?;
    ensure!(
        seen.starts_with(&format!("hello-from-wan sees {WLAN}:")),
        "{seen}"
    );
    let clamped = machine.sh("iptables-save -c -t mangle")?;
    let clamped = clamped
        .lines()
        .filter(|line| line.contains("TCPMSS") && !line.starts_with("[0:0]"));
    ensure!(clamped.count() == 2, "the SYN of each direction is clamped");
    forwards_work(&phone, &sibling)?;
    ensure!(phone.route_of(CHOSE_CELLULAR)? == "rmnet1" && phone.route_of(APP)? == "wlan0");

    own_hairpin(&phone)?;

    // Nobody reaches a guest who was not asked, even if he knows the way.
    phone.internet().ip(&format!("route add {SUBNET} via {WLAN}\n"))?;
    ensure!(
        !phone.internet().ping(GUEST.into(), SILENCE)?,
        "unasked from outside"
    );

    phone.netd_restart()?;
    route(&phone)?;
    phone.is_silent(Way::PingOut)?;
    let repair = converge(machine, &out)?.context("nothing to repair")?;
    ensure!(repair.tables.len() == 3, "{repair}");
    phone.answers(Way::PingOut)?;
    forwards_work(&phone, &sibling)?;

    let closed = filter(WayOut::None)?;
    converge(machine, &closed)?.context("nothing to do")?;
    let refused = phone.tcp_out(ANSWER).err().context("it gets out")?;
    ensure!(
        refused.to_string().contains("o route to host"),
        "refused at once: {refused}"
    );
    forwards_work(&phone, &sibling)?;
    ensure!(!phone.guest().space().ping(INTERNET.into(), SILENCE)?);

    let gone = remove(&parse(BRIDGE, &machine.sh("iptables-save")?)).context("nothing to remove")?;
    machine.feed(&["iptables-restore", "--noflush"], &gone.to_string())?;
    let left = before.difference(&state(&phone)?);
    ensure!(left.is_empty(), "{left:#?}");
    phone.is_silent(Way::TcpOut)
}

#[test]
fn on_androids_rules_our_chains_come_before_netds_drop() -> Result<()> {
    if !can_run("on_androids_rules_our_chains_come_before_netds_drop") {
        return Ok(());
    }
    on_a_phone(Chains::Netd)
}

#[test]
fn with_the_vendors_chain_ours_is_the_first_of_it() -> Result<()> {
    if !can_run("with_the_vendors_chain_ours_is_the_first_of_it") {
        return Ok(());
    }
    on_a_phone(Chains::WithOem)
}
