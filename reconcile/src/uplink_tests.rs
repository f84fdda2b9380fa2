use super::*;
use crate::observed::Kind;
use crate::simulated::{Simulated, default_route, phone, router};

fn named(names: &[&str]) -> Uplink {
    Uplink::Named(names.iter().map(|name| LinkName::parse(name).unwrap()).collect())
}

fn leaves(kernel: &Simulated, uplink: &Uplink, vpn: Vpn) -> Exit {
    exit(&kernel.state, Family::V4, uplink, vpn)
}

fn link(name: &str) -> LinkName {
    LinkName::parse(name).unwrap()
}

#[test]
fn plain_linux_leaves_by_its_lowest_default_route() {
    let mut kernel = router();
    assert_eq!(platform(&kernel.state, Family::V4), Platform::Linux);
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        Exit::Main(link("eth0"))
    );
    assert_eq!(
        leaves(&kernel, &Uplink::None, Vpn::Follow),
        Exit::None(NoExit::Unwanted)
    );
    let gateway = Some("10.1.0.1".parse().unwrap());
    assert_eq!(
        leaves(&kernel, &named(&["wlan9", "eth1", "eth0"]), Vpn::Follow),
        Exit::Own(link("eth1"), gateway),
        "the first that is there"
    );
    assert_eq!(
        leaves(&kernel, &named(&["lo"]), Vpn::Follow),
        Exit::None(NoExit::NoNamed)
    );
    let eth0 = kernel.index(&link("eth0")).unwrap();
    kernel.link(eth0, |link| link.carrier = false).unwrap();
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        Exit::Main(link("eth1")),
        "a link without carrier is none"
    );
    kernel.state.routes.clear();
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        Exit::None(NoExit::NoDefault)
    );
    assert_eq!(
        exit(&router().state, Family::V6, &Uplink::Auto, Vpn::Follow),
        Exit::None(NoExit::NoDefault)
    );
}

#[test]
fn netd_says_which_network_is_the_default() {
    let mut kernel = phone("wlan0", false);
    let table = |kernel: &Simulated, name: &str| 1_000 + kernel.index(&link(name)).unwrap();
    let through = |kernel: &Simulated, name: &str| Exit::Table(table(kernel, name), link(name));
    assert_eq!(platform(&kernel.state, Family::V4), Platform::Netd);
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        through(&kernel, "wlan0")
    );
    assert_eq!(
        leaves(&kernel, &named(&["rmnet1"]), Vpn::Follow),
        through(&kernel, "rmnet1")
    );
    assert_eq!(
        leaves(&kernel, &named(&["rmnet9"]), Vpn::Follow),
        Exit::None(NoExit::NoNamed)
    );
    let other = phone("rmnet1", false);
    assert_eq!(
        leaves(&other, &Uplink::Auto, Vpn::Follow),
        through(&other, "rmnet1")
    );
    let wlan = kernel.index(&link("wlan0")).unwrap();
    kernel.set_down(wlan);
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        Exit::None(NoExit::NoDefault)
    );
}

#[test]
fn a_vpn_is_followed_blocked_or_passed() {
    let kernel = phone("wlan0", true);
    let table = |name: &str| 1_000 + kernel.index(&link(name)).unwrap();
    let tunnel = Exit::Table(table("tun1"), link("tun1"));
    assert_eq!(leaves(&kernel, &Uplink::Auto, Vpn::Follow), tunnel);
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Block),
        Exit::None(NoExit::Blocked)
    );
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Bypass),
        Exit::Table(table("wlan0"), link("wlan0"))
    );
    assert_eq!(
        leaves(&kernel, &named(&["rmnet1"]), Vpn::Follow),
        tunnel,
        "the VPN's policy comes first"
    );
    let without = phone("wlan0", false);
    assert!(matches!(
        leaves(&without, &Uplink::Auto, Vpn::Block),
        Exit::Table(..)
    ));
}

#[test]
fn a_ladder_beside_the_kernels_own_rules_is_not_netds() {
    let mut kernel = phone("wlan0", false);
    let main = Rule {
        protocol: 2,
        ..Rule::ours(Family::V4, KERNEL_MAIN, RuleAction::Lookup(MAIN))
    };
    kernel.state.rules.insert(main);
    assert_eq!(platform(&kernel.state, Family::V4), Platform::Linux);
    let eth = kernel.add("eth7", Kind::Other, 0);
    kernel
        .link(eth, |link| (link.up, link.carrier) = (true, true))
        .unwrap();
    kernel.state.routes.insert(default_route(MAIN, eth, "10.7.0.1"));
    assert_eq!(
        leaves(&kernel, &Uplink::Auto, Vpn::Follow),
        Exit::Main(link("eth7"))
    );
}

#[test]
fn netd_rules_one_family_whatever_the_other_looks_like() {
    let mut kernel = phone("wlan0", false);
    // As the kernel made it at boot.
    let lookup = Rule::ours(Family::V6, KERNEL_MAIN, RuleAction::Lookup(MAIN));
    kernel.state.rules.insert(Rule {
        protocol: 2,
        ..lookup
    });
    assert_eq!(platform(&kernel.state, Family::V4), Platform::Netd);
    assert_eq!(platform(&kernel.state, Family::V6), Platform::Linux);
    let exit = leaves(&kernel, &Uplink::Auto, Vpn::Follow);
    assert!(matches!(exit, Exit::Table(_, name) if name == link("wlan0")));
}
