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
    let rules = wanted.rules.iter().filter(|rule| rule.priority == ANSWERS);
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
    for vpn in [false, true] {
        let kernel = phone("wlan0", vpn);
        let (rules, marks) = said(&kernel, &spec(Uplink::Auto));
        let table = |name| 1_000 + index(&kernel, name);
        assert_eq!(
            rules,
            [
                rule("IPv4", 1, table("wlan0")),
                rule("IPv4", 2, table("rmnet1")),
                rule("IPv4", 3, table("tun1"))
            ]
        );
        assert_eq!(marks, ["rmnet1 0x8000000", "tun1 0xc000000", "wlan0 0x4000000"]);
    }
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
    let kernel = router();
    let (rules, marks) = said(&kernel, &spec(named(&["eth1"])));
    assert_eq!(rules, [rule("IPv4", 1, MAIN), rule("IPv4", 2, TABLE)]);
    assert_eq!(marks, ["eth0 0x4000000", "eth1 0x8000000"]);
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
