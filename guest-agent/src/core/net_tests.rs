use super::*;
use proptest::prelude::*;
use sovereign_protocol::condition::Status;
use sovereign_protocol::interface::Prefix;
use sovereign_reconcile::observed::Kind;
use sovereign_reconcile::route::{MAIN, OURS, Route};
use sovereign_reconcile::simulated::{Simulated, default_route};

/// The index of the card in [`fresh`].
const CARD: u32 = 3;

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn spec() -> InterfaceSpec {
    InterfaceSpec {
        addresses: vec![prefix("192.168.100.2/24")],
        gateways: vec![ip("192.168.100.1")],
        dns: vec![ip("9.9.9.9"), ip("fd00::1")],
        search: Vec::new(),
        mtu: None,
        ..InterfaceSpec::default()
    }
}

fn wanted() -> Wanted {
    Wanted::Spec(spec())
}

/// A guest's kernel and files.
#[derive(Debug, Clone)]
struct Guest {
    kernel: Simulated,
    seen: Seen,
}

/// A tunnel comes before the interface, as in real guests.
fn fresh() -> Guest {
    let mut kernel = Simulated::new();
    for name in ["tunl0", "enp0s5", "eth9"] {
        kernel.add(name, Kind::Other, 0);
    }
    for link in kernel.state.links.values_mut() {
        (link.up, link.carrier) = (true, true);
    }
    kernel.add_address(LO, prefix("127.0.0.1/8"), false).unwrap();
    let driver = DRIVER.to_owned();
    let seen = Seen {
        drivers: [(CARD, driver.clone()), (4, driver)].into(),
        ..Seen::default()
    };
    Guest { kernel, seen }
}

impl Guest {
    fn look(&self) -> Seen {
        Seen {
            network: self.kernel.state.clone(),
            ..self.seen.clone()
        }
    }

    fn plan(&self, wanted: &Wanted) -> Vec<Change> {
        plan(wanted, &self.look())
    }

    fn judge(&self, wanted: &Wanted, errors: &[String]) -> Option<Verdict> {
        judge(wanted, &self.look(), errors)
    }

    fn act(&mut self, change: &Change) {
        match change {
            Change::Network(step) => self
                .kernel
                .apply(step)
                .unwrap_or_else(|error| panic!("{step}: {error}")),
            Change::Resolver(text) => self.seen.resolver = Some(text.clone()),
        }
    }

    fn reach(&mut self, wanted: &Wanted) -> Vec<String> {
        let plan = self.plan(wanted);
        plan.iter().for_each(|change| self.act(change));
        plan.iter().map(ToString::to_string).collect()
    }

    fn foreign_route(&mut self, gateway: &str) {
        let route = default_route(MAIN, CARD, gateway);
        self.kernel.state.routes.insert(route);
    }
}

fn reached(wanted: &Wanted) -> Guest {
    let mut guest = fresh();
    guest.reach(wanted);
    guest
}

#[test]
fn the_interface_is_chosen_by_driver() {
    assert_eq!(
        device(&fresh().look()).map(|link| link.name.as_str()),
        Some("enp0s5")
    );
    let mut without = fresh();
    without.kernel.remove(CARD).unwrap();
    without.kernel.remove(4).unwrap();
    without.seen.drivers.clear();
    assert_eq!(device(&without.look()), None);
    assert_eq!(without.plan(&wanted()), []);
    let verdict = without.judge(&wanted(), &[]).unwrap();
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
    let mut guest = fresh();
    guest.kernel.set_down(CARD);
    let mut with_mtu = spec();
    with_mtu.mtu = Some(1400);
    assert_eq!(
        guest.reach(&Wanted::Spec(with_mtu)),
        [
            "link enp0s5: set mtu 1400",
            "link enp0s5: set up",
            "address 192.168.100.2/24: add to enp0s5",
            "route 0.0.0.0/0 via 192.168.100.1 dev enp0s5: add",
            "resolv.conf: write",
        ]
    );
    assert_eq!(
        guest.seen.resolver.as_deref(),
        Some("nameserver 9.9.9.9\nnameserver fd00::1\n")
    );
}

#[test]
fn what_is_ours_and_not_wanted_goes_and_what_is_foreign_stays() {
    let mut guest = reached(&wanted());
    guest
        .kernel
        .add_address(CARD, prefix("10.9.9.9/24"), false)
        .unwrap();
    guest
        .kernel
        .add_address(4, prefix("192.168.100.7/24"), true)
        .unwrap();
    guest.foreign_route("10.9.9.1");
    assert_eq!(guest.plan(&wanted()), [], "foreign things are no difference");
    assert_eq!(guest.plan(&Wanted::Untold), [], "before the host has spoken");
    let mut moved = spec();
    moved.addresses = vec![prefix("192.168.100.3/24")];
    moved.gateways = vec![ip("192.168.100.254")];
    let mut other = guest.clone();
    assert_eq!(
        other.reach(&Wanted::Spec(moved)),
        [
            "route 0.0.0.0/0 table 254: remove",
            "address 192.168.100.2/24: remove from enp0s5",
            "address 192.168.100.3/24: add to enp0s5",
            "route 0.0.0.0/0 via 192.168.100.254 dev enp0s5: add",
        ]
    );
    assert_eq!(
        guest.reach(&Wanted::Nothing),
        [
            "route 0.0.0.0/0 table 254: remove",
            "address 192.168.100.2/24: remove from enp0s5",
        ]
    );
}

#[test]
fn each_lack_is_named_and_the_worst_names_the_condition() {
    type Break = fn(&mut Guest);
    let off = |guest: &mut Guest| {
        guest
            .kernel
            .remove_address(CARD, prefix("192.168.100.2/24"))
            .unwrap();
    };
    let cases: [(Break, &str, &str); 7] = [
        (
            |guest| guest.kernel.set_down(CARD),
            "Down",
            "the interface is down",
        ),
        (off, "AddressMissing", "192.168.100.2/24 is missing"),
        (
            |guest| guest.kernel.state.routes.clear(),
            "RouteMissing",
            "the default route via 192.168.100.1 is missing",
        ),
        (
            |guest| guest.seen.resolver = None,
            "ResolverMissing",
            "resolv.conf is another",
        ),
        (
            |guest| guest.kernel.link(CARD, |link| link.mtu = 9000).unwrap(),
            "OtherMtu",
            "the mtu is not 1500",
        ),
        (
            |guest| {
                guest
                    .kernel
                    .add_address(CARD, prefix("10.0.0.2/8"), true)
                    .unwrap()
            },
            "Outdated",
            "10.0.0.2/8 is not wanted any more",
        ),
        (
            |guest| {
                guest.kernel.state.routes.insert(Route {
                    protocol: OURS,
                    ..default_route(MAIN, CARD, "10.0.0.1")
                });
            },
            "Outdated",
            "the default route via 10.0.0.1 is not wanted any more",
        ),
    ];
    let wanted = Wanted::Spec(InterfaceSpec {
        mtu: Some(1500),
        ..spec()
    });
    for (at, (hurt, reason, lack)) in cases.iter().enumerate() {
        let mut guest = reached(&wanted);
        hurt(&mut guest);
        let verdict = guest.judge(&wanted, &["because".into()]).unwrap();
        assert_eq!(
            (verdict.status, verdict.reason.as_str()),
            (Status::False, *reason)
        );
        assert!(verdict.evidence.contains(lack), "{}", verdict.evidence);
        assert!(verdict.evidence.ends_with("; because"), "{}", verdict.evidence);
        // Whatever else is wrong as well, the first of the list names it.
        for (lesser, ..) in &cases[at + 1..] {
            let mut both = guest.clone();
            lesser(&mut both);
            assert_eq!(both.judge(&wanted, &[]).unwrap().reason, *reason);
        }
    }
    assert_eq!(lacking(&[]), None);
}

#[test]
fn a_configured_interface_needs_somebody_at_its_other_end_and_an_address_of_its_own() {
    let guest = reached(&wanted());
    let verdict = guest.judge(&wanted(), &[]).unwrap();
    assert_eq!(
        (verdict.status, verdict.evidence.as_str()),
        (
            Status::True,
            "enp0s5 (virtio_net): 192.168.100.2/24, default route via 192.168.100.1, DNS 9.9.9.9, fd00::1, mtu 1500"
        )
    );
    let mut alone = guest.clone();
    alone.kernel.link(CARD, |link| link.carrier = false).unwrap();
    assert_eq!(alone.judge(&wanted(), &[]).unwrap().reason, "NoCarrier");
    for (state, status, reason) in [
        (Unusable::Tentative, Status::Unknown, "AddressTentative"),
        (Unusable::Duplicate, Status::False, "AddressConflict"),
    ] {
        let mut other = guest.clone();
        other.seen.unusable.insert((CARD, ip("192.168.100.2")), state);
        let verdict = other.judge(&wanted(), &[]).unwrap();
        assert_eq!((verdict.status, verdict.reason.as_str()), (status, reason));
        other.seen.unusable = [((4, ip("192.168.100.2")), state)].into();
        assert_eq!(other.judge(&wanted(), &[]).unwrap().status, Status::True);
    }
    assert_eq!(guest.judge(&Wanted::Nothing, &[]), None);
    assert_eq!(guest.judge(&Wanted::Untold, &[]), None);
}

#[test]
fn the_loopback_is_up_with_both_addresses_where_there_are_two_families() {
    let mut guest = fresh();
    assert_eq!(plan_loopback(&guest.look()), []);
    guest.seen.ipv6 = true;
    let plan = plan_loopback(&guest.look());
    assert_eq!(
        lacking(&plan),
        Some(("AddressMissing", "::1/128 is missing".to_owned()))
    );
    guest.kernel.set_down(LO);
    let plan = plan_loopback(&guest.look());
    let (reason, lacks) = lacking(&plan).unwrap();
    assert_eq!(
        (reason, lacks.as_str()),
        ("Down", "lo is down, ::1/128 is missing")
    );
}

/// Made and undone, the last change first, all is as it was: also what the old document said nothing about.
#[test]
fn changes_are_undone_by_their_inverses() {
    let mut guest = reached(&wanted());
    let before = guest.look();
    let other = Wanted::Spec(InterfaceSpec {
        addresses: vec![prefix("192.168.100.3/24"), prefix("fd00::3/64")],
        gateways: vec![ip("192.168.100.254"), ip("fd00::ff")],
        mtu: Some(1280),
        ..InterfaceSpec::default()
    });
    let mut undo = Vec::new();
    for change in guest.plan(&other) {
        let before = guest.look();
        guest.act(&change);
        undo.splice(0..0, change.inverse(&before, &guest.look()));
    }
    assert_eq!(guest.plan(&other), []);
    assert_ne!(guest.look(), before);
    undo.iter().for_each(|change| guest.act(change));
    assert_eq!(guest.look(), before);
}

const PREFIXES: [&str; 4] = ["10.0.0.2/24", "10.1.0.2/16", "fd00::2/64", "fd00:1::2/64"];
const GATEWAYS: [&str; 3] = ["10.0.0.9", "10.1.0.9", "fd00::9"];

prop_compose! {
    fn any_spec()(
        addresses in prop::sample::subsequence(PREFIXES.to_vec(), 1..=PREFIXES.len()),
        v4 in prop::option::of(0..2usize),
        v6 in prop::option::of(Just(2usize)),
        mtu in prop::option::of(1400u32..1402),
    ) -> InterfaceSpec {
        InterfaceSpec {
            addresses: addresses.into_iter().map(prefix).collect(),
            gateways: v4.into_iter().chain(v6).map(|at| ip(GATEWAYS[at])).collect(),
            mtu,
            ..InterfaceSpec::default()
        }
    }
}

prop_compose! {
    fn any_guest()(
        addresses in prop::collection::vec((1u32..5, 0..PREFIXES.len(), any::<bool>()), 0..6),
        routes in prop::collection::vec((2u32..5, 0..GATEWAYS.len(), any::<bool>()), 0..4),
        up: bool,
        resolver in prop::option::of("[a-z]{0,3}"),
    ) -> Guest {
        let mut guest = fresh();
        guest.seen.resolver = resolver;
        for (link, at, ours) in addresses {
            let _ = guest.kernel.add_address(link, prefix(PREFIXES[at]), ours); // there already: nothing done
        }
        for (link, at, ours) in routes {
            let route = default_route(MAIN, link, GATEWAYS[at]);
            let protocol = if ours { OURS } else { route.protocol };
            guest.kernel.state.routes.insert(Route { protocol, ..route });
        }
        if !up {
            guest.kernel.set_down(CARD);
        }
        guest
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn after_a_plan_there_is_nothing_left_to_plan(spec in any_spec(), mut guest in any_guest()) {
        let wanted = Wanted::Spec(spec);
        guest.reach(&wanted);
        prop_assert_eq!(guest.plan(&wanted), vec![]);
        prop_assert_eq!(guest.judge(&wanted, &[]).unwrap().status, Status::True);
        guest.reach(&Wanted::Nothing);
        prop_assert_eq!(guest.plan(&Wanted::Nothing), vec![]);
    }

    #[test]
    fn nothing_foreign_is_ever_in_a_plan(spec in any_spec(), guest in any_guest()) {
        let foreign = |guest: &Guest| {
            let mut state = guest.kernel.state.clone();
            state.links.remove(&CARD);
            state.addresses.retain(|address| address.link != CARD || !address.ours);
            // Routes to subnets are the kernel's doing.
            state.routes.retain(|r| r.link != Some(CARD) || (r.protocol != OURS && r.gateway.is_some()));
            state
        };
        for wanted in [Wanted::Spec(spec), Wanted::Nothing] {
            let mut guest = guest.clone();
            let before = foreign(&guest);
            guest.reach(&wanted);
            prop_assert_eq!(&before, &foreign(&guest));
        }
    }
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
