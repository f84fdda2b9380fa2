use super::*;
use proptest::prelude::*;
use sovereign_protocol::condition::Status;

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(index: u32, name: &str, driver: Option<&str>) -> Link {
    Link {
        index,
        name: name.into(),
        up: true,
        carrier: true,
        mtu: 1500,
        driver: driver.map(Into::into),
    }
}

fn address(index: u32, text: &str, ours: bool) -> Address {
    Address {
        index,
        prefix: prefix(text),
        ours,
        state: AddressState::Usable,
    }
}

fn spec() -> InterfaceSpec {
    InterfaceSpec {
        addresses: vec![prefix("192.168.100.2/24")],
        gateway: Some(ip("192.168.100.1")),
        dns: vec![ip("9.9.9.9"), ip("fd00::1")],
        search: Vec::new(),
        mtu: None,
    }
}

fn wanted() -> Wanted {
    Wanted::Spec(spec())
}

/// A tunnel comes before the interface, as in real guests.
fn fresh() -> Seen {
    Seen {
        links: vec![
            link(1, "lo", None),
            link(2, "tunl0", None),
            link(3, "enp0s5", Some(DRIVER)),
            link(4, "eth9", Some(DRIVER)),
        ],
        addresses: vec![address(1, "127.0.0.1/8", false)],
        ..Seen::default()
    }
}

/// What the kernel would do.
fn apply(seen: &mut Seen, action: &Action) {
    match action {
        Action::Up(index) => seen
            .links
            .iter_mut()
            .filter(|l| l.index == *index)
            .for_each(|l| l.up = true),
        Action::Mtu(index, mtu) => {
            seen.links
                .iter_mut()
                .filter(|l| l.index == *index)
                .for_each(|l| l.mtu = *mtu);
        }
        Action::RemoveRoute(index, gateway) => seen
            .routes
            .retain(|r| !(r.index == *index && r.gateway == *gateway && r.ours)),
        Action::RemoveAddress(index, prefix) => {
            seen.addresses
                .retain(|a| !(a.index == *index && a.prefix == *prefix));
        }
        Action::AddAddress(index, prefix) => seen.addresses.push(Address {
            index: *index,
            prefix: *prefix,
            ours: true,
            state: AddressState::Usable,
        }),
        Action::AddRoute(index, gateway) => seen.routes.push(Route {
            index: *index,
            gateway: *gateway,
            ours: true,
        }),
        Action::Resolver(text) => seen.resolver = Some(text.clone()),
    }
}

fn reached(wanted: &Wanted, mut seen: Seen) -> Seen {
    for action in plan(wanted, &seen) {
        apply(&mut seen, &action);
    }
    seen
}

#[test]
fn the_interface_is_chosen_by_driver() {
    assert_eq!(device(&fresh()).map(|link| link.name.as_str()), Some("enp0s5"));
    let mut without = fresh();
    without.links.truncate(2);
    assert_eq!(device(&without), None);
    assert_eq!(plan(&wanted(), &without), []);
    let verdict = judge(&wanted(), &without, &[]).unwrap();
    assert_eq!(
        (verdict.status, verdict.reason.as_str()),
        (Status::False, "NoDevice")
    );
    assert!(
        verdict.evidence.ends_with("there are: lo, tunl0"),
        "{}",
        verdict.evidence
    );
}

#[test]
fn a_plan_is_sorted_and_complete() {
    let mut seen = fresh();
    seen.links[2].up = false;
    let mut with_mtu = spec();
    with_mtu.mtu = Some(1400);
    assert_eq!(
        plan(&Wanted::Spec(with_mtu), &seen),
        [
            Action::Up(3),
            Action::Mtu(3, 1400),
            Action::AddAddress(3, prefix("192.168.100.2/24")),
            Action::AddRoute(3, ip("192.168.100.1")),
            Action::Resolver("nameserver 9.9.9.9\nnameserver fd00::1\n".into()),
        ]
    );
}

#[test]
fn what_is_ours_and_not_wanted_goes_and_what_is_foreign_stays() {
    let mut seen = reached(&wanted(), fresh());
    seen.addresses.push(address(3, "10.9.9.9/24", false));
    seen.addresses.push(address(4, "192.168.100.7/24", true));
    seen.routes.push(Route {
        index: 3,
        gateway: ip("10.9.9.1"),
        ours: false,
    });
    assert_eq!(plan(&wanted(), &seen), [], "foreign things are no difference");
    let mut moved = spec();
    moved.addresses = vec![prefix("192.168.100.3/24")];
    moved.gateway = Some(ip("192.168.100.254"));
    assert_eq!(
        plan(&Wanted::Spec(moved), &seen),
        [
            Action::RemoveRoute(3, ip("192.168.100.1")),
            Action::RemoveAddress(3, prefix("192.168.100.2/24")),
            Action::AddAddress(3, prefix("192.168.100.3/24")),
            Action::AddRoute(3, ip("192.168.100.254")),
        ]
    );
    assert_eq!(
        plan(&Wanted::Nothing, &seen),
        [
            Action::RemoveRoute(3, ip("192.168.100.1")),
            Action::RemoveAddress(3, prefix("192.168.100.2/24")),
        ]
    );
    assert_eq!(plan(&Wanted::Untold, &seen), [], "before the host has spoken");
}

#[test]
fn an_address_that_somebody_else_added_will_do() {
    let mut seen = reached(&wanted(), fresh());
    seen.addresses.iter_mut().for_each(|address| address.ours = false);
    assert_eq!(plan(&wanted(), &seen), []);
    seen.addresses.iter_mut().for_each(|address| address.index += 1);
    assert!(plan(&wanted(), &seen).contains(&Action::AddAddress(3, prefix("192.168.100.2/24"))));
}

#[test]
fn each_lack_is_named_and_the_worst_names_the_condition() {
    type Break = fn(&mut Seen);
    let cases: [(Break, &str); 6] = [
        (|seen| seen.links[2].up = false, "Down"),
        (|seen| seen.addresses.retain(|a| a.index != 3), "AddressMissing"),
        (|seen| seen.routes.clear(), "RouteMissing"),
        (|seen| seen.resolver = None, "ResolverMissing"),
        (
            |seen| seen.addresses.push(address(3, "10.0.0.2/8", true)),
            "Outdated",
        ),
        (
            |seen| {
                seen.routes.clear();
                seen.addresses.clear();
            },
            "AddressMissing",
        ),
    ];
    for (hurt, reason) in cases {
        let mut seen = reached(&wanted(), fresh());
        hurt(&mut seen);
        let verdict = judge(&wanted(), &seen, &["because".into()]).unwrap();
        assert_eq!((verdict.status, verdict.reason.as_str()), (Status::False, reason));
        assert!(verdict.evidence.ends_with("; because"), "{}", verdict.evidence);
    }
}

#[test]
fn a_configured_interface_needs_somebody_at_its_other_end_and_an_address_of_its_own() {
    let seen = reached(&wanted(), fresh());
    let verdict = judge(&wanted(), &seen, &[]).unwrap();
    assert_eq!(
        (verdict.status, verdict.evidence.as_str()),
        (
            Status::True,
            "enp0s5 (virtio_net): 192.168.100.2/24, default route via 192.168.100.1, DNS 9.9.9.9, fd00::1, mtu 1500"
        )
    );
    let mut alone = seen.clone();
    alone.links[2].carrier = false;
    assert_eq!(judge(&wanted(), &alone, &[]).unwrap().reason, "NoCarrier");
    for (state, status, reason) in [
        (AddressState::Tentative, Status::Unknown, "AddressTentative"),
        (AddressState::Duplicate, Status::False, "AddressConflict"),
    ] {
        let mut other = seen.clone();
        other.addresses.last_mut().unwrap().state = state;
        let verdict = judge(&wanted(), &other, &[]).unwrap();
        assert_eq!((verdict.status, verdict.reason.as_str()), (status, reason));
    }
    assert_eq!(judge(&Wanted::Nothing, &seen, &[]), None);
    assert_eq!(judge(&Wanted::Untold, &seen, &[]), None);
}

#[test]
fn the_loopback_is_up_with_both_addresses_where_there_are_two_families() {
    let mut seen = fresh();
    assert_eq!(plan_loopback(&seen), []);
    seen.ipv6 = true;
    assert_eq!(plan_loopback(&seen), [Action::AddAddress(LO, prefix("::1/128"))]);
    seen.addresses.clear();
    seen.links[0].up = false;
    assert_eq!(
        plan_loopback(&seen),
        [
            Action::Up(LO),
            Action::AddAddress(LO, prefix("127.0.0.1/8")),
            Action::AddAddress(LO, prefix("::1/128")),
        ]
    );
    assert_eq!(lacking(&plan_loopback(&seen)).unwrap().0, "Down");
}

fn any_prefix() -> impl Strategy<Value = Prefix> {
    (0u8..3, 1u8..4, 8u8..31)
        .prop_map(|(net, host, length)| Prefix::new(IpAddr::from([10, net, 0, host]), length).unwrap())
}

prop_compose! {
    fn any_spec()(
        addresses in prop::collection::vec(any_prefix(), 1..4),
        gateway in prop::option::of((0u8..3).prop_map(|n| IpAddr::from([10, n, 0, 9]))),
        mtu in prop::option::of(1400u32..1402),
    ) -> InterfaceSpec {
        InterfaceSpec { addresses, gateway, dns: Vec::new(), search: Vec::new(), mtu }
    }
}

prop_compose! {
    fn any_seen()(
        addresses in prop::collection::vec((1u32..5, any_prefix(), any::<bool>()), 0..6),
        routes in prop::collection::vec((2u32..5, 0u8..3, any::<bool>()), 0..4),
        up: bool,
        resolver in prop::option::of("[a-z]{0,3}"),
    ) -> Seen {
        let mut seen = fresh();
        seen.links[2].up = up;
        seen.resolver = resolver;
        seen.addresses = addresses
            .into_iter()
            .map(|(index, prefix, ours)| Address { index, prefix, ours, state: AddressState::Usable })
            .collect();
        seen.routes = routes
            .into_iter()
            .map(|(index, n, ours)| Route { index, gateway: IpAddr::from([10, n, 0, 9]), ours })
            .collect();
        seen
    }
}

proptest! {
    #[test]
    fn after_a_plan_there_is_nothing_left_to_plan(spec in any_spec(), seen in any_seen()) {
        let wanted = Wanted::Spec(spec);
        let reached = reached(&wanted, seen);
        prop_assert_eq!(plan(&wanted, &reached), vec![]);
        prop_assert_eq!(judge(&wanted, &reached, &[]).unwrap().status, Status::True);
        let left = self::reached(&Wanted::Nothing, reached);
        prop_assert_eq!(plan(&Wanted::Nothing, &left), vec![]);
    }

    #[test]
    fn nothing_foreign_is_ever_removed(spec in any_spec(), seen in any_seen()) {
        for wanted in [Wanted::Spec(spec), Wanted::Nothing] {
            for action in plan(&wanted, &seen) {
                match action {
                    Action::RemoveAddress(index, prefix) => prop_assert!(
                        seen.addresses.iter().any(|a| a.index == index && a.prefix == prefix && a.ours)
                    ),
                    Action::RemoveRoute(index, gateway) => prop_assert!(
                        seen.routes.iter().any(|r| r.index == index && r.gateway == gateway && r.ours)
                    ),
                    Action::Up(index) | Action::Mtu(index, _) | Action::AddAddress(index, _)
                    | Action::AddRoute(index, _) => prop_assert_eq!(index, 3),
                    Action::Resolver(_) => {}
                }
            }
        }
    }
}

#[test]
fn the_worst_lack_names_the_condition_and_each_action_says_what_it_does() {
    let worst_first = [
        (Action::Up(2), "Down", "bring interface 2 up"),
        (
            Action::AddAddress(2, prefix("10.0.0.2/24")),
            "AddressMissing",
            "add 10.0.0.2/24",
        ),
        (
            Action::AddRoute(2, ip("10.0.0.1")),
            "RouteMissing",
            "add the default route via 10.0.0.1",
        ),
        (
            Action::Resolver(String::new()),
            "ResolverMissing",
            "write resolv.conf",
        ),
        (Action::Mtu(2, 1400), "OtherMtu", "set mtu 1400"),
        (
            Action::RemoveAddress(2, prefix("10.0.0.3/24")),
            "Outdated",
            "remove 10.0.0.3/24",
        ),
    ];
    for (at, (action, reason, text)) in worst_first.iter().enumerate() {
        assert_eq!(action.to_string(), *text);
        for (lesser, ..) in &worst_first[at..] {
            for plan in [[action.clone(), lesser.clone()], [lesser.clone(), action.clone()]] {
                assert_eq!(lacking(&plan).unwrap().0, *reason, "{plan:?}");
            }
        }
    }
    let route = Action::RemoveRoute(2, ip("10.0.0.9"));
    assert_eq!(route.to_string(), "remove the default route via 10.0.0.9");
    assert_eq!(lacking(&[]), None);
}

#[test]
fn the_search_list_follows_the_servers() {
    let mut spec = spec();
    spec.search = ["lan.example", "home.arpa"]
        .map(|name| Domain::parse(name).unwrap())
        .to_vec();
    assert_eq!(
        resolver(&spec),
        "nameserver 9.9.9.9\nnameserver fd00::1\nsearch lan.example home.arpa\n"
    );
}
