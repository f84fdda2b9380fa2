//! Floor 2: the lab's 39 assertions about Android's routing (lab/android-netd-netns.sh, S0 to S10), with rules made by
//! hand: so the phone of the harness is known to be as the lab's.

use anyhow::{Context, Result, ensure};
use sovereign_tests::android::{APP, CHOSE_CELLULAR, Chains, GATEWAY, Phone, SUBNET, Uplink, Vpn, Way};
use sovereign_tests::net::{can_run, holders, namespace_of};

const BRIDGE: &str = "vm_bridge";
/// A route table that nobody else has.
const OWN: u32 = 20_100;

/// A phone with the guest in a bridge that is nobody's.
fn phone(vpn: Vpn) -> Result<Phone> {
    let phone = Phone::new()?;
    phone.set_vpn(vpn)?;
    phone.machine().ip(&format!(
        "link add {BRIDGE} type bridge\naddress add {GATEWAY}/24 dev {BRIDGE}\nlink set {BRIDGE} up\n"
    ))?;
    let filter = format!("net.ipv4.conf.{BRIDGE}.rp_filter");
    phone.machine().set_sysctl(&filter, "0")?;
    phone.plug(BRIDGE)?;
    Ok(phone)
}

/// Runs a scenario where namespaces can be made.
fn scenario(name: &str, vpn: Vpn, body: impl Fn(&Phone) -> Result<()>) -> Result<()> {
    if !can_run(name) {
        return Ok(());
    }
    body(&phone(vpn)?)
}

/// What the users' old start script does besides routing.
fn script_nat(phone: &Phone) -> Result<()> {
    phone.machine().set_sysctl("net.ipv4.ip_forward", "1")?;
    accept(phone, Uplink::Wlan0)?;
    let line = format!("iptables -t nat -A POSTROUTING -s {SUBNET} -o wlan0 -j MASQUERADE");
    phone.machine().sh(&line).map(drop)
}

fn accept(phone: &Phone, up: Uplink) -> Result<()> {
    let line = format!(
        "iptables -I FORWARD 1 -i {BRIDGE} -o {up} -j ACCEPT; \
         iptables -I FORWARD 2 -i {up} -o {BRIDGE} -m state --state RELATED,ESTABLISHED -j ACCEPT"
    );
    phone.machine().sh(&line).map(drop)
}

/// The old scripts' "key fix".
fn key_fix(phone: &Phone) -> Result<()> {
    phone.machine().ip("rule add from all lookup main pref 1\n")
}

fn default_in_main(phone: &Phone) -> Result<()> {
    phone.machine().ip("route add default via 10.0.0.1 dev wlan0\n")
}

/// Three rules of our own below netd's 10000, nothing global.
fn scoped(phone: &Phone, up: Uplink) -> Result<()> {
    let table = phone.table(up);
    phone.machine().ip(&format!(
        "route replace {SUBNET} dev {BRIDGE} table {OWN}\n\
         rule add pref 9000 to {SUBNET} lookup {OWN}\n\
         rule add pref 9010 iif {BRIDGE} lookup {table}\n\
         rule add pref 9020 iif {BRIDGE} unreachable\n"
    ))
}

/// netd's own slot for tethering.
fn tethering_slot(phone: &Phone) -> Result<()> {
    let table = phone.table(Uplink::Wlan0);
    phone
        .machine()
        .ip(&format!("rule add pref 21000 iif {BRIDGE} lookup {table}\n"))
}

fn to_cellular(phone: &Phone) -> Result<()> {
    phone.link_down(Uplink::Wlan0)?;
    phone.switch_default(Uplink::Rmnet1)
}

#[track_caller]
fn is(found: Result<String>, wanted: &str) -> Result<()> {
    let (found, at) = (found?, std::panic::Location::caller());
    ensure!(found == wanted, "{at}: {found} instead of {wanted}");
    Ok(())
}

#[test]
fn s0_androids_rules_and_nat_without_routing_are_not_enough() -> Result<()> {
    scenario("s0", Vpn::Off, |phone| {
        script_nat(phone)?;
        is(phone.route_out(BRIDGE), "unreachable")?;
        phone.is_silent(Way::PingOut)?;
        phone.is_silent(Way::TcpIn)
    })
}

#[test]
fn s1_with_the_way_out_alone_answers_do_not_come_back() -> Result<()> {
    scenario("s1", Vpn::Off, |phone| {
        script_nat(phone)?;
        tethering_slot(phone)?;
        is(phone.route_out(BRIDGE), "wlan0")?;
        is(phone.route_back(Uplink::Wlan0), "unreachable")?;
        phone.is_silent(Way::PingOut)?;
        phone.is_silent(Way::TcpOut)
    })
}

#[test]
fn s2_the_key_fix_brings_answers_back() -> Result<()> {
    scenario("s2", Vpn::Off, |phone| {
        script_nat(phone)?;
        tethering_slot(phone)?;
        key_fix(phone)?;
        phone.answers(Way::PingOut)?;
        phone.answers(Way::TcpOut)?;
        phone.answers(Way::TcpIn)
    })
}

#[test]
fn s3_the_key_fix_alone_is_no_way_out() -> Result<()> {
    scenario("s3", Vpn::Off, |phone| {
        script_nat(phone)?;
        key_fix(phone)?;
        phone.is_silent(Way::PingOut)?;
        phone.answers(Way::TcpIn)
    })
}

#[test]
fn s4_a_default_route_in_main_takes_sockets_off_the_network_they_chose() -> Result<()> {
    scenario("s4", Vpn::Off, |phone| {
        script_nat(phone)?;
        key_fix(phone)?;
        is(phone.route_of(CHOSE_CELLULAR), "rmnet1")?;
        default_in_main(phone)?;
        phone.answers(Way::PingOut)?;
        phone.answers(Way::TcpOut)?;
        is(phone.route_of(CHOSE_CELLULAR), "wlan0")
    })
}

#[test]
fn s4v_and_takes_apps_out_of_their_vpn() -> Result<()> {
    scenario("s4v", Vpn::On, |phone| {
        is(phone.route_of(APP), "tun1")?;
        script_nat(phone)?;
        key_fix(phone)?;
        default_in_main(phone)?;
        is(phone.route_of(APP), "wlan0")
    })
}

#[test]
fn s4s_and_does_not_follow_the_default_network() -> Result<()> {
    scenario("s4s", Vpn::Off, |phone| {
        script_nat(phone)?;
        key_fix(phone)?;
        default_in_main(phone)?;
        phone.answers(Way::PingOut)?;
        to_cellular(phone)?;
        phone.is_silent(Way::PingOut)
    })
}

#[test]
fn s5_three_scoped_rules_do_it_and_touch_nothing_else() -> Result<()> {
    scenario("s5", Vpn::Off, |phone| {
        script_nat(phone)?;
        scoped(phone, Uplink::Wlan0)?;
        phone.answers(Way::PingOut)?;
        phone.answers(Way::TcpOut)?;
        phone.answers(Way::TcpIn)?;
        is(phone.route_of(CHOSE_CELLULAR), "rmnet1")?;
        is(phone.route_of(APP), "wlan0")
    })
}

#[test]
fn s5v_also_with_a_vpn() -> Result<()> {
    scenario("s5v", Vpn::On, |phone| {
        script_nat(phone)?;
        scoped(phone, Uplink::Wlan0)?;
        phone.answers(Way::PingOut)?;
        is(phone.route_of(APP), "tun1")?;
        phone.answers(Way::TcpIn)
    })
}

#[test]
fn s5s_and_one_rule_follows_the_default_network() -> Result<()> {
    scenario("s5s", Vpn::Off, |phone| {
        script_nat(phone)?;
        scoped(phone, Uplink::Wlan0)?;
        phone.answers(Way::PingOut)?;
        to_cellular(phone)?;
        phone.is_silent(Way::PingOut)?;
        let cellular = phone.table(Uplink::Rmnet1);
        phone.machine().ip(&format!(
            "rule del pref 9010\nrule add pref 9010 iif {BRIDGE} lookup {cellular}\n"
        ))?;
        let masquerade = format!("iptables -t nat -A POSTROUTING -s {SUBNET} ! -o {BRIDGE} -j MASQUERADE");
        phone.machine().sh(&masquerade)?;
        accept(phone, Uplink::Rmnet1)?;
        phone.answers(Way::PingOut)?;
        is(phone.route_of(APP), "rmnet1")?;
        phone.link_up(Uplink::Wlan0)?;
        phone.switch_default(Uplink::Wlan0)?;
        is(phone.route_of(APP), "wlan0")
    })
}

#[test]
fn s6_netds_own_slots_work_without_a_vpn() -> Result<()> {
    scenario("s6", Vpn::Off, |phone| {
        script_nat(phone)?;
        phone
            .machine()
            .ip(&format!("route add {SUBNET} dev {BRIDGE} table 97\n"))?;
        tethering_slot(phone)?;
        phone.answers(Way::PingOut)?;
        phone.answers(Way::TcpIn)?;
        is(phone.route_of(CHOSE_CELLULAR), "rmnet1")
    })
}

#[test]
fn s6v_and_lose_the_phones_own_connections_to_a_vpn() -> Result<()> {
    scenario("s6v", Vpn::On, |phone| {
        script_nat(phone)?;
        phone
            .machine()
            .ip(&format!("route add {SUBNET} dev {BRIDGE} table 97\n"))?;
        tethering_slot(phone)?;
        phone.answers(Way::PingOut)?;
        phone.is_silent(Way::TcpIn)
    })
}

#[test]
fn s7_accepts_after_netds_drop_are_none() -> Result<()> {
    scenario("s7", Vpn::Off, |phone| {
        phone.machine().set_sysctl("net.ipv4.ip_forward", "1")?;
        phone.machine().sh(&format!(
            "iptables -t nat -A POSTROUTING -s {SUBNET} -o wlan0 -j MASQUERADE; \
             iptables -A FORWARD -i {BRIDGE} -o wlan0 -j ACCEPT; \
             iptables -A FORWARD -i wlan0 -o {BRIDGE} -m state --state RELATED,ESTABLISHED -j ACCEPT"
        ))?;
        scoped(phone, Uplink::Wlan0)?;
        phone.is_silent(Way::PingOut)?;
        accept(phone, Uplink::Wlan0)?; // the order was all that was wrong
        phone.answers(Way::PingOut)
    })
}

#[test]
fn s8_the_hotspot_that_goes_off_takes_forwarding_with_it() -> Result<()> {
    scenario("s8", Vpn::Off, |phone| {
        script_nat(phone)?;
        scoped(phone, Uplink::Wlan0)?;
        phone.answers(Way::PingOut)?;
        phone.hotspot_off()?;
        phone.is_silent(Way::PingOut)
    })
}

#[test]
fn s9_a_restart_of_netd_removes_everybodys_rules_and_chains() -> Result<()> {
    scenario("s9", Vpn::Off, |phone| {
        let clean = phone.foreign_state(|_| false)?;
        script_nat(phone)?;
        scoped(phone, Uplink::Wlan0)?;
        phone.answers(Way::PingOut)?;
        let ours = |line: &str| line.contains(&format!(" table {OWN} ")); // netd leaves routes alone
        ensure!(!clean.difference(&phone.foreign_state(ours)?).is_empty());
        phone.netd_restart()?;
        let rules = phone.machine().sh("ip rule show")?;
        ensure!(!rules.lines().any(|rule| rule.starts_with("90")), "{rules}");
        phone.is_silent(Way::PingOut)?;
        let left = clean.difference(&phone.foreign_state(ours)?);
        ensure!(left.is_empty(), "{left:#?}");
        phone.netd_iptables(Chains::WithOem)?;
        let forward = phone.machine().sh("iptables -S FORWARD")?;
        ensure!(
            forward.lines().nth(1) == Some("-A FORWARD -j oem_fwd"),
            "{forward}"
        );
        phone.netd_rules(Uplink::Rmnet1, Vpn::On)?;
        is(phone.route_of(APP), "tun1")?;
        phone.set_vpn(Vpn::Off)?;
        is(phone.route_of(APP), "rmnet1")
    })
}

#[test]
fn s10_what_accumulates_when_a_script_runs_twice() -> Result<()> {
    scenario("s10", Vpn::Off, |phone| {
        key_fix(phone)?;
        let again = ["ip", "rule", "add", "from", "all", "lookup", "main", "pref", "1"];
        let output = phone.machine().command(&again).output()?;
        ensure!(output.status.code() == Some(2), "{output:?}");
        let rules = phone.machine().sh("ip rule show")?;
        ensure!(
            rules.lines().filter(|rule| rule.starts_with("1:")).count() == 1,
            "{rules}"
        );

        let line = format!("iptables -t nat -A POSTROUTING -s {SUBNET} -o wlan0 -j MASQUERADE");
        let copies = || -> Result<usize> {
            let chain = phone.machine().sh("iptables -t nat -S POSTROUTING")?;
            Ok(chain.lines().filter(|rule| rule.contains("MASQUERADE")).count())
        };
        phone.machine().sh(&format!("{line}; {line}"))?;
        ensure!(copies()? == 2, "two -A");
        phone.machine().sh(&line.replace("-A", "-D")).context("one -D")?;
        ensure!(copies()? == 1, "one -D");
        Ok(())
    })
}

#[test]
fn nothing_of_a_phone_is_left() -> Result<()> {
    if !can_run("nothing_of_a_phone_is_left") {
        return Ok(());
    }
    let phone = phone(Vpn::Off)?;
    let spaces = [phone.machine(), phone.guest().space(), phone.internet()];
    let pids = spaces.map(sovereign_tests::space::Space::pid);
    let mut namespaces = Vec::new();
    for pid in pids {
        namespaces.push(namespace_of(pid)?);
    }
    ensure!(namespaces.iter().all(|namespace| !holders(namespace).is_empty()));
    ensure!(!namespaces.contains(&namespace_of(std::process::id())?));
    drop(phone);
    for (pid, namespace) in pids.into_iter().zip(namespaces) {
        ensure!(namespace_of(pid).is_err(), "process {pid} lives");
        ensure!(holders(&namespace).is_empty(), "{namespace} is held");
    }
    Ok(())
}
