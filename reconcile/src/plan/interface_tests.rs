use std::collections::BTreeSet;
use std::net::IpAddr;

use proptest::prelude::*;
use sovereign_protocol::interface::Prefix;

use super::super::inverse::tests::undone;
use super::super::{Plan, Step};
use super::interface;
use crate::family::Family;
use crate::interface::Interface;
use crate::names::LinkName;
use crate::observed::{Kind, Observed};
use crate::route::{MAIN, OURS, Route, RouteKind};
use crate::simulated::{Simulated, default_route};

const CARD: u32 = 2;
const ADDRESSES: [&str; 5] = [
    "192.168.100.2/24",
    "192.168.100.3/24",
    "10.0.0.2/32",
    "fd00::2/64",
    "fd00:7::2/64",
];
const GATEWAYS: [&str; 4] = ["192.168.100.1", "192.168.100.254", "fd00::1", "fd00::ff"];

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// `lo`, the card and another one.
fn kernel() -> Simulated {
    let mut kernel = Simulated::new();
    assert_eq!(kernel.add("enp0s5", Kind::Other, 0), CARD);
    kernel.add("eth9", Kind::Other, 0);
    kernel
}

fn card(addresses: &[&str], gateways: &[&str]) -> Interface {
    Interface {
        up: true,
        addresses: addresses.iter().map(|text| prefix(text)).collect(),
        gateways: gateways.iter().map(|text| ip(text)).collect(),
        ..Interface::bare(LinkName::parse("enp0s5").unwrap())
    }
}

fn converge(kernel: &mut Simulated, wanted: &Interface) -> Vec<String> {
    let plan = interface(wanted, &kernel.state);
    undone(kernel, &plan);
    for step in &plan.steps {
        kernel
            .apply(step)
            .unwrap_or_else(|error| panic!("{step}: {error}\n{plan}"));
    }
    plan.to_string().lines().map(str::to_owned).collect()
}

fn route(link: u32, gateway: &str, ours: bool) -> Route {
    let ours = if ours { OURS } else { 4 };
    let metric = u32::from(gateway.contains(':')) * 512;
    Route {
        protocol: ours,
        metric,
        ..default_route(MAIN, link, gateway)
    }
}

#[test]
fn a_card_of_two_families_is_made_and_moved_in_order() {
    let mut kernel = kernel();
    let mut wanted = card(&["192.168.100.2/24", "fd00::2/64"], &["192.168.100.1", "fd00::1"]);
    wanted.mtu = Some(1400);
    assert_eq!(
        converge(&mut kernel, &wanted),
        [
            "link enp0s5: set mtu 1400",
            "link enp0s5: set up",
            "address 192.168.100.2/24: add to enp0s5",
            "address fd00::2/64: add to enp0s5",
            "route 0.0.0.0/0 via 192.168.100.1 dev enp0s5: add",
            "route ::/0 via fd00::1 dev enp0s5: add",
        ]
    );
    assert!(interface(&wanted, &kernel.state).is_done());
    assert_eq!(
        converge(&mut kernel, &card(&["192.168.100.3/24"], &["192.168.100.254"])),
        [
            "route 0.0.0.0/0 table 254: remove",
            "route ::/0 table 254: remove",
            "address 192.168.100.2/24: remove from enp0s5",
            "address fd00::2/64: remove from enp0s5",
            "address 192.168.100.3/24: add to enp0s5",
            "route 0.0.0.0/0 via 192.168.100.254 dev enp0s5: add",
        ],
        "the mtu of which nothing is said any more stays"
    );
    let bare = Interface::bare(wanted.name);
    assert_eq!(converge(&mut kernel, &bare).len(), 2);
    assert!(kernel.state.links[&CARD].up && kernel.state.routes.is_empty());
}

#[test]
fn what_somebody_else_added_will_do_and_stays() {
    let mut kernel = kernel();
    let wanted = card(&["192.168.100.2/24"], &["192.168.100.1"]);
    kernel.link(CARD, |link| link.up = true).unwrap();
    kernel
        .add_address(CARD, prefix("192.168.100.2/24"), false)
        .unwrap();
    kernel.state.routes.insert(route(CARD, "192.168.100.1", false));
    assert!(interface(&wanted, &kernel.state).is_done());
    kernel.add_address(CARD, prefix("10.9.9.9/24"), false).unwrap();
    kernel.state.routes.insert(route(CARD, "10.9.9.1", false));
    assert!(interface(&Interface::bare(wanted.name.clone()), &kernel.state).is_done());
    let elsewhere = Observed {
        addresses: BTreeSet::new(),
        routes: [route(3, "192.168.100.1", true)].into(),
        ..kernel.state
    };
    let plan = interface(&wanted, &elsewhere);
    assert_eq!(plan.steps.len(), 2, "of another card: {plan}");
}

#[test]
fn the_loopback_is_up_with_the_addresses_of_its_families() {
    let mut kernel = kernel();
    let both = Interface::loopback(true);
    assert_eq!(
        converge(&mut kernel, &both),
        [
            "link lo: set up",
            "address 127.0.0.1/8: add to lo",
            "address ::1/128: add to lo",
        ]
    );
    assert!(interface(&both, &kernel.state).is_done());
    assert_eq!(Interface::loopback(false).addresses.len(), 1);
}

#[test]
fn an_interface_that_is_not_there_has_no_plan() {
    let mut wanted = card(&["192.168.100.2/24"], &[]);
    wanted.name = LinkName::parse("eth5").unwrap();
    assert_eq!(interface(&wanted, &kernel().state), Plan::default());
}

prop_compose! {
    fn any_card()(
        up in any::<bool>(),
        mtu in proptest::option::of(1400u32..1402),
        addresses in proptest::sample::subsequence(ADDRESSES.to_vec(), 0..=ADDRESSES.len()),
        v4 in proptest::option::of(0..2usize),
        v6 in proptest::option::of(2..4usize),
    ) -> Interface {
        let gateways: Vec<&str> = v4.into_iter().chain(v6).map(|at| GATEWAYS[at]).collect();
        Interface { up: up || !gateways.is_empty(), mtu, ..card(&addresses, &gateways) }
    }
}

#[derive(Debug, Clone)]
enum Deed {
    Up(u32, bool),
    Mtu(u32, u32),
    Address(u32, usize, bool),
    Gone(usize),
    Route(u32, usize, bool),
    Routes,
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        (1..4u32, any::<bool>()).prop_map(|(link, up)| Deed::Up(link, up)),
        (1..4u32, 1400..1402u32).prop_map(|(link, mtu)| Deed::Mtu(link, mtu)),
        (1..4u32, 0..ADDRESSES.len(), any::<bool>()).prop_map(|(l, a, ours)| Deed::Address(l, a, ours)),
        (0..8usize).prop_map(Deed::Gone),
        (2..4u32, 0..GATEWAYS.len(), any::<bool>()).prop_map(|(l, g, ours)| Deed::Route(l, g, ours)),
        Just(Deed::Routes),
    ]
}

fn harm(kernel: &mut Simulated, deed: &Deed) {
    match *deed {
        Deed::Up(link, true) => kernel.link(link, |link| link.up = true).unwrap(),
        Deed::Up(link, false) => kernel.set_down(link),
        Deed::Mtu(link, mtu) => kernel.link(link, |link| link.mtu = mtu).unwrap(),
        Deed::Address(link, at, ours) => {
            let _ = kernel.add_address(link, prefix(ADDRESSES[at]), ours); // there already: nothing done
        }
        Deed::Gone(at) => {
            let gone = kernel.state.addresses.iter().nth(at).cloned();
            if let Some((link, place)) = gone.and_then(|a| Some((a.link, a.place()?))) {
                kernel.remove_address(link, place).unwrap();
            }
        }
        Deed::Route(link, at, ours) => {
            if kernel.state.links[&link].up {
                kernel.state.routes.insert(route(link, GATEWAYS[at], ours));
            }
        }
        Deed::Routes => kernel.state.routes.clear(),
    }
}

/// What is not ours on the card, and everything elsewhere.
fn foreign(state: &Observed) -> Observed {
    let mut left = state.clone();
    let gone = left.links.remove(&CARD);
    left.addresses.retain(|a| a.link != CARD || !a.ours);
    // Routes to subnets come and go with addresses, which the kernel does.
    let connected = |route: &Route| route.gateway.is_none() && route.kind == RouteKind::Unicast;
    left.routes
        .retain(|route| route.link != Some(CARD) || (route.protocol != OURS && !connected(route)));
    assert!(gone.is_some(), "nobody takes the card away");
    left
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// The inverses are tried at each step on the way: see `undone`.
    #[test]
    fn one_plan_is_enough_for_a_card_and_nothing_foreign_is_in_it(
        first in any_card(),
        deeds in proptest::collection::vec(deed(), 0..12),
        then in any_card(),
    ) {
        let mut kernel = kernel();
        converge(&mut kernel, &first);
        for deed in &deeds {
            harm(&mut kernel, deed);
        }
        let before = kernel.state.clone();
        let plan = interface(&then, &kernel.state);
        for step in &plan.steps {
            let fine = match step {
                Step::SetUp { name } | Step::SetMtu { name, .. } => *name == then.name,
                Step::RemoveAddress { link, address } => {
                    let ours = before.addresses_of(CARD).find(|a| a.place() == Some(*address));
                    *link == then.name && ours.is_some_and(|address| address.ours)
                }
                Step::AddAddress { link, .. } => *link == then.name,
                Step::RemoveRoute { route } => route.protocol == OURS && route.link == Some(CARD),
                Step::AddRoute { route } => route.link == then.name && route.ours,
                _ => false,
            };
            prop_assert!(fine, "{}", step);
        }
        converge(&mut kernel, &then);
        let again = interface(&then, &kernel.state);
        prop_assert!(again.is_done(), "{}", again);
        prop_assert_eq!(foreign(&before), foreign(&kernel.state));
        for gateway in &then.gateways {
            let way = |route: &&Route| route.is_default(Family::of(*gateway)) && route.gateway == Some(*gateway);
            prop_assert!(kernel.state.routes.iter().filter(|r| r.link == Some(CARD)).any(|r| way(&r)));
        }
    }
}
