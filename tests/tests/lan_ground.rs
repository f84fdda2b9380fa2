//! Floor 2: the plain Linux machine of the harness behaves as such machines do, with rules made by hand.

use anyhow::{Context, Result, ensure};
use sovereign_tests::lan::{
    Forwarded, GATEWAY, GATEWAY6, INTERNET6, Lan, Nic, PEER, PORT, SUBNET, SUBNET6, Way,
};
use sovereign_tests::net::can_run;
use sovereign_tests::space::{ANSWER, SILENCE};

const BRIDGE: &str = "hand0";

/// Forwarding, and a table of our own that accepts and translates.
const TABLE: &str = "table inet hand {\n\
    chain forward { type filter hook forward priority filter; policy accept; accept; }\n\
    chain post { type nat hook postrouting priority srcnat; policy accept;\n\
    ip saddr 192.168.100.0/24 oifname != \"hand0\" masquerade\n\
    ip6 saddr fd00:64::/64 oifname != \"hand0\" masquerade; }\n\
    chain pre { type nat hook prerouting priority dstnat; policy accept;\n\
    fib daddr type local tcp dport 15432 dnat ip to 192.168.100.2:5432; }\n}\n";

fn scenario(name: &str, body: impl Fn(&Lan) -> Result<()>) -> Result<()> {
    if !can_run(name) {
        return Ok(());
    }
    let lan = Lan::new()?;
    lan.machine().ip(&format!(
        "link add {BRIDGE} type bridge\naddress add {GATEWAY}/24 dev {BRIDGE}\n\
         address add {GATEWAY6}/64 dev {BRIDGE} nodad\nlink set {BRIDGE} up\n"
    ))?;
    lan.plug(BRIDGE)?;
    lan.answers(Way::TcpIn)?;
    lan.is_silent(Way::PingOut)?; // it forwards nothing
    lan.machine().set_sysctl("net.ipv4.ip_forward", "1")?;
    lan.machine().set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
    body(&lan)
}

fn by_hand(lan: &Lan) -> Result<()> {
    lan.machine().feed(&["nft", "-f", "-"], TABLE).map(drop)
}

fn seen_from(lan: &Lan, nic: Nic) -> Result<()> {
    lan.answers(Way::TcpOut)?;
    let said = lan.tcp_out(ANSWER)?;
    let wanted = format!("hello-from-wan sees [::ffff:{}]", nic.address());
    ensure!(said.starts_with(&wanted), "{said} instead of {wanted}");
    Ok(())
}

#[test]
fn traffic_follows_the_better_default_route_and_the_links() -> Result<()> {
    scenario("traffic_follows", |lan| {
        lan.is_silent(Way::TcpOut)?; // nobody knows the way back
        by_hand(lan)?;
        seen_from(lan, Nic::Eth0)?;
        let said = lan.tcp6_out(ANSWER)?;
        ensure!(said.starts_with("hello-from-wan sees [fd10:1::2]"), "{said}");
        let said = lan.from_peer((Nic::Eth0.address(), 15432).into(), ANSWER)?;
        ensure!(
            said.starts_with(&format!("hello-from-guest sees [::ffff:{PEER}]")),
            "{said}"
        );
        let said = lan.guest().space().ask_tcp((PEER, PORT).into(), ANSWER)?;
        ensure!(said.starts_with("hello-from-peer"), "{said}");
        lan.prefer(Nic::Eth1)?;
        seen_from(lan, Nic::Eth1)?;
        lan.prefer(Nic::Eth1)?;
        seen_from(lan, Nic::Eth1)?;
        lan.prefer(Nic::Eth0)?;
        seen_from(lan, Nic::Eth0)?;
        lan.link_down(Nic::Eth0)?;
        seen_from(lan, Nic::Eth1)?;
        lan.link_up(Nic::Eth0)?;
        seen_from(lan, Nic::Eth0)
    })
}

#[test]
fn no_accept_of_ours_overrides_dockers_or_firewallds_refusal() -> Result<()> {
    scenario("no_accept", |lan| {
        by_hand(lan)?;
        lan.answers(Way::PingOut)?;
        lan.docker()?;
        lan.is_silent(Way::PingOut)?;
        let line =
            format!("iptables -I FORWARD -i {BRIDGE} -j ACCEPT; iptables -I FORWARD -o {BRIDGE} -j ACCEPT");
        lan.machine().sh(&line)?;
        lan.answers(Way::PingOut)?;
        lan.docker_restart()?;
        let chain = lan.machine().sh("iptables -S FORWARD")?;
        ensure!(
            chain.lines().nth(1) == Some("-A FORWARD -j DOCKER-USER"),
            "{chain}"
        );
        lan.answers(Way::PingOut)?; // they are before ours now, and only return

        lan.firewalld_reload(Forwarded::Accepted)?;
        lan.answers(Way::PingOut)?;
        lan.firewalld_reload(Forwarded::Refused)?;
        lan.is_silent(Way::PingOut)?;
        ensure!(
            !lan.guest().space().ping(INTERNET6.into(), SILENCE)?,
            "inet is both"
        );
        let said = lan.from_peer((Nic::Eth0.address(), 15432).into(), ANSWER)?;
        ensure!(
            said.starts_with("hello-from-guest"),
            "what is translated may pass: {said}"
        );
        ensure!(
            lan.machine().sh("nft list tables")?.contains("inet hand"),
            "a reload spares others"
        );
        lan.nft_flush()?;
        let left = lan.machine().sh("nft list ruleset")?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(())
    })
}

#[test]
fn networkd_removes_everybodys_rules_and_routes() -> Result<()> {
    scenario("networkd", |lan| {
        let clean = lan.foreign_state(|_| false)?;
        lan.machine().ip(&format!(
            "rule add pref 9000 to {SUBNET} lookup 20100\n-6 rule add pref 9000 to {SUBNET6} lookup 20100\n\
             route add {SUBNET} dev {BRIDGE} table 20100\n-6 route add {SUBNET6} dev {BRIDGE} table 20100\n\
             route add unreachable 10.77.0.0/16 metric 7\nroute add 10.78.0.0/16 via 10.1.0.9\n"
        ))?;
        let changed = clean.difference(&lan.foreign_state(|_| false)?);
        ensure!(
            changed.len() == 6 && changed.iter().all(|line| line.starts_with('+')),
            "{changed:#?}"
        );
        let ours = |line: &str| line.contains("20100");
        ensure!(clean.difference(&lan.foreign_state(ours)?).len() == 2);
        lan.networkd_sweep()?;
        let left = clean.difference(&lan.foreign_state(|_| false)?);
        ensure!(left.is_empty(), "{left:#?}");
        by_hand(lan)?;
        lan.answers(Way::TcpOut) // DHCP's default route is still there
    })
}

#[test]
fn every_kind_of_foreign_object_is_seen() -> Result<()> {
    scenario("every_kind", |lan| {
        lan.docker()?;
        let clean = lan.foreign_state(|_| false)?;
        for (change, shows, undo) in [
            (
                "ip link set eth1 mtu 1400",
                "link eth1",
                "ip link set eth1 mtu 1500",
            ),
            (
                "ip address add 10.9.9.9/32 dev lo",
                "address lo",
                "ip address del 10.9.9.9/32 dev lo",
            ),
            (
                "ip rule add pref 77 lookup 77",
                "rule4 77:",
                "ip rule del pref 77",
            ),
            (
                "ip -6 rule add pref 77 lookup 77",
                "rule6 77:",
                "ip -6 rule del pref 77",
            ),
            (
                "iptables-legacy -A INPUT -j DROP",
                "iptables-legacy filter -A INPUT",
                "iptables-legacy -F INPUT",
            ),
            (
                "iptables-nft -A DOCKER-USER -j DROP",
                "iptables-nft filter -A DOCKER-USER",
                "iptables-nft -D DOCKER-USER -j DROP",
            ),
            (
                "nft add table ip their",
                "nft {\"table\"",
                "nft delete table ip their",
            ),
            (
                "echo 65 > /proc/sys/net/ipv4/ip_default_ttl",
                "sysctl net/ipv4/ip_default_ttl",
                "echo 64 > /proc/sys/net/ipv4/ip_default_ttl",
            ),
        ] {
            lan.machine().sh(change)?;
            let seen = clean.difference(&lan.foreign_state(|_| false)?);
            let shown = seen
                .iter()
                .any(|line| line.trim_start_matches(['+', '-']).starts_with(shows));
            ensure!(shown, "{change}: {seen:#?}");
            lan.machine().sh(undo).context(undo)?;
        }
        let left = clean.difference(&lan.foreign_state(|line| line.starts_with("iptables-legacy"))?);
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    })
}
