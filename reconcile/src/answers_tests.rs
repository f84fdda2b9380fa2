use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::HostAddress;

use super::*;
use crate::filter::PortForward;
use crate::simulated::{Simulated, default_route, phone, router};
use crate::uplink::Uplink;
use crate::wanted::{NetworkSpec, Place, Switched, Wanted};

const TABLE: u32 = 0x53e6_e640;

fn spec(uplink: Uplink) -> NetworkSpec {
    let forward = |to: &str| PortForward {
        transport: Transport::Tcp,
        listen: None,
        ports: Ports::parse("15432").unwrap(),
        to: to.parse().unwrap(),
        to_port: 5432,
    };
    NetworkSpec {
        place: Place::Host,
        addresses: ["192.168.100.1/24", "fd00:64::1/64"]
            .map(|text| HostAddress::parse(text).unwrap())
            .into(),
        uplink,
        forwards: [forward("192.168.100.2"), forward("fd00:64::2")].into(),
        ..NetworkSpec::default()
    }
}

fn named(links: &[&str]) -> Uplink {
    Uplink::Named(links.iter().map(|link| LinkName::parse(link).unwrap()).collect())
}

/// The rules for answers and the marks of links.
fn said(kernel: &Simulated, spec: &NetworkSpec) -> (Vec<String>, Vec<String>) {
    let instance = Name::parse("default").unwrap();
    let wanted = Wanted::of(&instance, spec, &Switched::new(), &kernel.state).unwrap();
    let rules = wanted
        .rules
        .iter()
        .filter(|rule| [ATTACHED, ANSWERS].contains(&rule.priority));
    let marks = wanted.filter.unwrap().answers;
    (
        rules.map(|rule| format!("{} {rule}", rule.family)).collect(),
        marks
            .iter()
            .map(|(link, mark)| format!("{link} {mark:#x}"))
            .collect(),
    )
}

fn rule(family: &str, number: u32, table: u32) -> String {
    format!(
        "{family} 9005: iif sv5pkj fwmark {:#x}/0x1c000000 lookup {table}",
        number << 26
    )
}

fn index(kernel: &Simulated, name: &str) -> u32 {
    kernel.state.link(name).unwrap().index
}

#[test]
fn on_a_phone_answers_leave_by_the_network_that_the_question_came_by() {
    for (vpn, order) in [
        (false, ["wlan0", "rmnet1", "tun1"]),
        (true, ["tun1", "wlan0", "rmnet1"]), // the way out, then the others
    ] {
        let kernel = phone("wlan0", vpn);
        let (rules, marks) = said(&kernel, &spec(Uplink::Auto));
        let table = |name| 1_000 + index(&kernel, name);
        let expected: Vec<_> = (1..)
            .zip(order)
            .map(|(n, name)| rule("IPv4", n, table(name)))
            .collect();
        assert_eq!(rules, expected);
        let mut expected: Vec<_> = (1_u32..)
            .zip(order)
            .map(|(n, name)| format!("{name} {:#x}", n << 26))
            .collect();
        expected.sort();
        assert_eq!(marks, expected);
    }
}

/// Who asked by the one that stays may still wait for his answer.
#[test]
fn a_link_keeps_its_number_whoever_comes_or_goes() {
    let mut kernel = phone("wlan0", false);
    let of = |kernel: &Simulated, name: &str| {
        let (_, marks) = said(kernel, &spec(Uplink::Auto));
        marks.into_iter().find(|mark| mark.starts_with(name))
    };
    let keep = |kernel: &mut Simulated| {
        let instance = Name::parse("default").unwrap();
        let wanted = Wanted::of(&instance, &spec(Uplink::Auto), &Switched::new(), &kernel.state).unwrap();
        kernel.state.rules.retain(|rule| rule.protocol != OURS);
        kernel.state.rules.extend(wanted.rules);
    };
    keep(&mut kernel);
    let before = [of(&kernel, "wlan0"), of(&kernel, "rmnet1"), of(&kernel, "tun1")];
    let wlan = index(&kernel, "wlan0");
    for carrier in [false, true, false, true] {
        kernel.link(wlan, |link| link.carrier = carrier).unwrap();
        keep(&mut kernel);
        assert_eq!([of(&kernel, "rmnet1"), of(&kernel, "tun1")], before[1..]);
        assert_eq!(of(&kernel, "wlan0"), before[0].clone().filter(|_| carrier));
    }
    // A VPN that takes everything becomes the way out, and no other number.
    kernel.state.rules.extend(phone("wlan0", true).state.rules);
    keep(&mut kernel);
    assert_eq!(
        [of(&kernel, "wlan0"), of(&kernel, "rmnet1"), of(&kernel, "tun1")],
        before
    );
}

/// Of several that are named the one that is the way out has our own table.
#[test]
fn a_link_keeps_its_number_when_it_becomes_the_way_out() {
    let mut kernel = router();
    let eth1 = index(&kernel, "eth1");
    let spec = spec(named(&["eth1", "eth0"]));
    let instance = Name::parse("default").unwrap();
    let mut wanted = Wanted::of(&instance, &spec, &Switched::new(), &kernel.state).unwrap();
    let of_eth0 = |wanted: &Wanted| {
        let answers = &wanted.filter.as_ref().unwrap().answers;
        answers[&LinkName::parse("eth0").unwrap()]
    };
    let before = of_eth0(&wanted);
    for carrier in [false, true, false, true] {
        kernel.state.rules.retain(|rule| rule.protocol != OURS);
        kernel.state.rules.extend(wanted.rules.clone());
        kernel.link(eth1, |link| link.carrier = carrier).unwrap();
        wanted.follow(&spec, &Switched::new(), &kernel.state);
        assert_eq!(of_eth0(&wanted), before);
    }
}

/// As Tailscale's app without an exit node.
#[test]
fn a_vpn_that_takes_some_addresses_only_is_a_way_back() {
    let mut kernel = phone("wlan0", true);
    let tunnel = index(&kernel, "tun1");
    kernel.state.routes.retain(|route| route.link != Some(tunnel));
    let (rules, marks) = said(&kernel, &spec(Uplink::Auto));
    assert_eq!(rules[1], rule("IPv4", 2, 1_000 + tunnel), "{rules:?}");
    assert!(marks.contains(&"tun1 0x8000000".to_owned()), "{marks:?}");
}

/// A hotspot's clients have no default route; those networks come after the ones that have.
#[test]
fn who_is_attached_to_a_phone_is_answered_by_the_main_table() {
    let mut kernel = phone("wlan0", false);
    for (name, subnet) in [("swlan0", "192.168.43.1"), ("rndis0", "192.168.42.1")] {
        let index = kernel.add(name, Kind::Other, 0);
        kernel
            .link(index, |link| (link.up, link.carrier) = (true, name == "swlan0"))
            .unwrap();
        let address = HostAddress::parse(&format!("{subnet}/24")).unwrap();
        kernel.add_address(index, address, false).unwrap();
    }
    let (rules, marks) = said(&kernel, &spec(Uplink::None));
    assert_eq!(rules.len(), 4, "{rules:?}");
    assert_eq!(rules[3], rule("IPv4", 4, MAIN));
    assert!(marks.contains(&"swlan0 0x10000000".to_owned()), "{marks:?}");
    let many = (0..9).map(|n| format!("dummy{n}"));
    for (n, name) in many.enumerate() {
        let index = kernel.add(&name, Kind::Other, 0);
        kernel
            .link(index, |link| (link.up, link.carrier) = (true, true))
            .unwrap();
        let address = HostAddress::parse(&format!("10.200.{n}.1/24")).unwrap();
        kernel.add_address(index, address, false).unwrap();
    }
    let (rules, marks) = said(&kernel, &spec(Uplink::Auto));
    assert_eq!((rules.len(), marks.len()), (7, 7), "as many as there are marks");
    assert_eq!(rules[2], rule("IPv4", 3, 1_000 + index(&kernel, "tun1")));
}

#[test]
fn where_the_main_table_decides_nothing_is_marked_without_need() {
    let mut kernel = router();
    let nothing: (Vec<String>, Vec<String>) = (vec![], vec![]);
    assert_eq!(said(&kernel, &spec(Uplink::Auto)), nothing);
    // Who keeps a table for his second uplink, or a VPN in one, has answers go by it.
    let eth1 = index(&kernel, "eth1");
    kernel.state.routes.insert(default_route(200, eth1, "10.1.0.1"));
    let (rules, marks) = said(&kernel, &spec(Uplink::Auto));
    assert_eq!(rules, [rule("IPv4", 1, MAIN), rule("IPv4", 2, 200)]);
    assert_eq!(marks, ["eth0 0x4000000", "eth1 0x8000000"]);
    // Its neighbours are not to be asked of its gateway.
    let address = HostAddress::parse("10.1.0.2/24").unwrap();
    kernel.add_address(eth1, address, false).unwrap();
    let (rules, _) = said(&kernel, &spec(Uplink::Auto));
    let near = "IPv4 9004: to 10.1.0.0/24 iif sv5pkj fwmark 0x8000000/0x1c000000 lookup 254";
    assert_eq!(rules[0], near, "{rules:?}");
    let without = NetworkSpec {
        forwards: BTreeSet::new(),
        ..spec(Uplink::Auto)
    };
    assert_eq!(said(&kernel, &without), nothing, "nobody can ask");
    kernel.link(eth1, |link| link.carrier = false).unwrap();
    assert_eq!(said(&kernel, &spec(Uplink::Auto)), nothing);
}

#[test]
fn with_a_named_uplink_the_machines_own_way_is_kept_for_who_came_by_it() {
    let mut kernel = router();
    let (rules, marks) = said(&kernel, &spec(named(&["eth1"])));
    assert_eq!(rules, [rule("IPv4", 1, TABLE), rule("IPv4", 2, MAIN)]);
    assert_eq!(marks, ["eth0 0x8000000", "eth1 0x4000000"]);
    // A tunnel with routes of its own in the main table, as wg-quick makes them.
    let tunnel = kernel.add("wg0", Kind::Other, 0);
    kernel
        .link(tunnel, |link| (link.up, link.carrier) = (true, true))
        .unwrap();
    kernel.state.routes.insert(Route {
        to: Prefix::new([10, 8, 0, 0].into(), 24).unwrap(),
        gateway: None,
        ..default_route(MAIN, tunnel, "10.8.0.1")
    });
    let (rules, marks) = said(&kernel, &spec(named(&["eth1"])));
    assert_eq!(rules[2], rule("IPv4", 3, MAIN), "{rules:?}");
    assert!(marks.contains(&"wg0 0xc000000".to_owned()), "{marks:?}");
}

#[test]
fn a_link_has_one_mark_for_both_families() {
    let mut kernel = phone("wlan0", false);
    let wlan = index(&kernel, "wlan0");
    let last = Rule {
        family: Family::V6,
        ..kernel.state.rules.iter().next_back().unwrap().clone()
    };
    kernel.state.rules.insert(last);
    kernel
        .state
        .routes
        .insert(default_route(1_000 + wlan, wlan, "fe80::1"));
    let (rules, _) = said(&kernel, &spec(Uplink::Auto));
    assert_eq!(rules.len(), 4, "{rules:?}");
    assert_eq!(rules[3], rule("IPv6", 1, 1_000 + wlan));
}
