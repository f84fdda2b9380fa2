use std::collections::BTreeSet;

use proptest::prelude::*;
use sovereign_protocol::name::Name;

use sovereign_protocol::subnet::HostAddress;

use super::inverse::tests::undone;
use super::*;
use crate::names::{self, Mark};
use crate::observed::{Kind, Link};
use crate::simulated::Simulated;
use crate::wanted::{NetworkSpec, Switched};

fn instance() -> Name {
    Name::parse("default").unwrap()
}

fn address(text: &str) -> HostAddress {
    HostAddress::parse(text).unwrap()
}

fn wanted(guests: &[&str], address: &str, mtu: u32) -> Wanted {
    let spec = NetworkSpec {
        addresses: [HostAddress::parse(address).unwrap()].into(),
        mtu,
        guests: guests
            .iter()
            .map(|guest| (Name::parse(guest).unwrap(), BTreeSet::new()))
            .collect(),
        ..NetworkSpec::default()
    };
    Wanted::of(&instance(), &spec, &Switched::new(), &Observed::fresh()).unwrap()
}

fn lines(plan: &Plan) -> Vec<String> {
    plan.to_string().lines().map(str::to_owned).collect()
}

fn converge(kernel: &mut Simulated, wanted: &Wanted) -> Plan {
    let plan = plan(wanted, &kernel.state);
    undone(kernel, &plan);
    for step in &plan.steps {
        kernel
            .apply(step)
            .unwrap_or_else(|error| panic!("{step}: {error}\n{plan}"));
    }
    plan
}

#[test]
fn a_plan_for_a_namespace_that_is_not_there_yet_is_the_one_that_will_be_made_in_it() {
    let wanted = wanted(&["sql"], "192.168.100.1/24", 1500);
    let before = plan(&wanted, &Observed::fresh());
    assert_eq!(before, plan(&wanted, &Simulated::new().state));
    assert!(lines(&before).contains(&"link lo: set up".to_owned()));
    let json = serde_json::to_value(&before.steps).unwrap();
    assert_eq!(
        (&json[0]["change"], &json[0]["mac"]),
        (&"create_bridge".into(), &"02:87:bc:c5:a8:42".into())
    );
    let text = serde_json::to_string(&Simulated::new().state).unwrap();
    assert_eq!(
        serde_json::from_str::<Observed>(&text).unwrap(),
        Simulated::new().state
    );
}

#[test]
fn from_nothing_to_a_bridge_with_two_guests() {
    let mut kernel = Simulated::new();
    let wanted = wanted(&["sql", "web"], "192.168.100.1/24", 1400);
    let made = converge(&mut kernel, &wanted);
    assert_eq!(
        lines(&made),
        [
            "link sv5pkj: create bridge, address 02:87:bc:c5:a8:42, group 1315857411",
            "link sv5pkj-sql: create tap, group 1315857411",
            "link sv5pkj-web: create tap, group 1315857411",
            "link sv5pkj: set mtu 1400",
            "link sv5pkj-sql: set mtu 1400",
            "link sv5pkj-web: set mtu 1400",
            "link sv5pkj-sql: make port of sv5pkj",
            "link sv5pkj-web: make port of sv5pkj",
            "link lo: set up",
            "link sv5pkj: set up",
            "link sv5pkj-sql: set up",
            "link sv5pkj-web: set up",
            "address 192.168.100.1/24: add to sv5pkj",
        ]
    );
    assert!(plan(&wanted, &kernel.state).is_done());
}

#[test]
fn a_changed_spec_changes_only_what_differs() {
    let mut kernel = Simulated::new();
    converge(&mut kernel, &wanted(&["sql", "web"], "192.168.100.1/24", 1500));
    let changed = converge(&mut kernel, &wanted(&["sql", "forge"], "10.0.0.1/8", 1500));
    assert_eq!(
        lines(&changed),
        [
            "link sv5pkj-web: remove",
            "link sv5pkj-forge: create tap, group 1315857411",
            "link sv5pkj-forge: make port of sv5pkj",
            "link sv5pkj-forge: set up",
            "address 192.168.100.1/24: remove from sv5pkj",
            "address 10.0.0.1/8: add to sv5pkj",
        ]
    );
    let gone = converge(
        &mut kernel,
        &Wanted::nothing(&instance(), &Switched::new(), &Observed::fresh()),
    );
    assert_eq!(gone.steps.len(), 3);
    assert_eq!(kernel.state.links.len(), 1, "only lo is left");
}

#[test]
fn each_kind_of_harm_has_its_step() {
    let wanted = wanted(&["sql"], "192.168.100.1/24", 1500);
    let mut whole = Simulated::new();
    converge(&mut whole, &wanted);
    let bridge = whole.index(&names::bridge(&instance())).unwrap();
    let tap = whole.state.link("sv5pkj-sql").unwrap().index;
    let after = |harm: &dyn Fn(&mut Simulated)| {
        let mut kernel = whole.clone();
        harm(&mut kernel);
        let repair = converge(&mut kernel, &wanted);
        assert!(plan(&wanted, &kernel.state).is_done());
        lines(&repair)
    };
    assert_eq!(after(&|k| k.set_down(bridge)), ["link sv5pkj: set up"]);
    assert_eq!(after(&|k| k.set_down(1)), ["link lo: set up"]);
    assert_eq!(
        after(&|k| k.state.routes.clear()),
        ["route 192.168.100.0/24 dev sv5pkj: add"]
    );
    assert_eq!(
        after(&|k| k.remove_address(bridge, address("192.168.100.1/24")).unwrap()),
        ["address 192.168.100.1/24: add to sv5pkj"]
    );
    assert_eq!(
        after(&|k| k.link(tap, |l| l.controller = None).unwrap()),
        ["link sv5pkj-sql: make port of sv5pkj"]
    );
    assert_eq!(
        after(&|k| k.link(bridge, |l| l.mac = None).unwrap()),
        ["link sv5pkj: set address 02:87:bc:c5:a8:42"]
    );
    assert_eq!(
        after(&|k| k.link(tap, |l| l.mtu = 9000).unwrap()),
        ["link sv5pkj-sql: set mtu 1500"]
    );
    assert_eq!(after(&|k| k.remove(bridge).unwrap()).len(), 4);
    assert_eq!(after(&|k| k.remove(tap).unwrap()).len(), 3);
    let wrong_kind = after(&|k| k.link(tap, |l| l.kind = Kind::Bridge).unwrap());
    assert_eq!(wrong_kind[0], "link sv5pkj-sql: remove");
}

#[test]
fn a_foreign_link_in_our_place_is_a_conflict_and_stays() {
    let wanted = wanted(&["sql"], "192.168.100.1/24", 1500);
    let mut kernel = Simulated::new();
    kernel.add("sv5pkj", Kind::Bridge, 0);
    let before = kernel.state.clone();
    let made = converge(&mut kernel, &wanted);
    let conflict =
        "link sv5pkj: conflict, a link of this name is there but not ours: group 0, ours is 1315857411";
    assert_eq!(lines(&made).last().unwrap(), conflict);
    assert_eq!(kernel.state.links[&2], before.links[&2]);
    assert!(kernel.state.addresses.is_empty());
    let left = plan(&wanted, &kernel.state);
    assert!(left.steps.is_empty() && !left.is_done());
}

#[test]
fn an_unmarked_address_on_our_bridge_stays() {
    let mut kernel = Simulated::new();
    let wanted = wanted(&[], "192.168.100.1/24", 1500);
    converge(&mut kernel, &wanted);
    let bridge = kernel.index(&names::bridge(&instance())).unwrap();
    kernel.add_address(bridge, address("10.9.9.9/24"), false).unwrap();
    assert!(plan(&wanted, &kernel.state).is_done());
    kernel.add_address(bridge, address("10.8.8.8/24"), true).unwrap();
    assert_eq!(
        lines(&plan(&wanted, &kernel.state)),
        ["address 10.8.8.8/24: remove from sv5pkj"]
    );
}

/// What others do to a namespace, by small numbers.
#[derive(Debug, Clone)]
enum Deed {
    Add(usize, usize, usize),
    Remove(usize),
    Down(usize),
    Change(usize, u32),
    Address(usize, usize, bool),
    Routes,
}

const NAMES: [&str; 8] = [
    "sv5pkj", "sv5pkj-a", "sv5pkj-b", "sv5pkj-x", "sv5pkk", "eth0", "docker0", "sv5pk",
];
const ADDRESSES: [&str; 3] = ["192.168.100.1/24", "10.0.0.1/8", "192.168.100.7/16"];

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        (0..NAMES.len(), 0..3usize, 0..3usize).prop_map(|(n, g, k)| Deed::Add(n, g, k)),
        (0..12usize).prop_map(Deed::Remove),
        (0..12usize).prop_map(Deed::Down),
        (0..12usize, 0..4u32).prop_map(|(l, v)| Deed::Change(l, v)),
        (0..12usize, 0..ADDRESSES.len(), any::<bool>()).prop_map(|(l, a, o)| Deed::Address(l, a, o)),
        Just(Deed::Routes),
    ]
}

fn harm(kernel: &mut Simulated, deed: &Deed) {
    let indices: Vec<u32> = kernel.state.links.keys().copied().collect();
    let pick = |n: usize| indices[n % indices.len()];
    match *deed {
        Deed::Add(name, group, kind) => {
            let group = [0, 7, Mark::of(&instance()).group][group];
            let kind = [Kind::Bridge, Kind::Tap, Kind::Other][kind].clone();
            if kernel.state.link(NAMES[name]).is_none() {
                kernel.add(NAMES[name], kind, group);
            }
        }
        Deed::Remove(n) if pick(n) != 1 => kernel.remove(pick(n)).unwrap(),
        Deed::Remove(_) => {} // lo cannot be removed
        Deed::Down(n) => kernel.set_down(pick(n)),
        Deed::Change(n, value) => kernel
            .link(pick(n), |link| match value {
                0 => link.mtu = 9000,
                1 => link.mac = None,
                2 => link.controller = None,
                _ => link.group = 7,
            })
            .unwrap(),
        Deed::Address(n, a, ours) => {
            let _ = kernel.add_address(pick(n), address(ADDRESSES[a]), ours); // there already: nothing done
        }
        Deed::Routes => kernel.state.routes.clear(),
    }
}

fn any_wanted() -> impl Strategy<Value = Wanted> {
    let guests = proptest::sample::subsequence(vec!["a", "b", "c"], 0..=3);
    let spec = (guests, 0..ADDRESSES.len(), 0..2usize, 0..8u8);
    spec.prop_map(|(guests, a, mtu, none)| match none {
        0 => Wanted::nothing(&instance(), &Switched::new(), &Observed::fresh()),
        _ => wanted(&guests, ADDRESSES[a], [1500, 1400][mtu]),
    })
}

/// What is not ours, as it is: links, their addresses.
fn foreign(state: &Observed) -> (Vec<Link>, BTreeSet<super::super::observed::Address>) {
    // Said once more in other words, so that a mistake in `Mark` shows.
    let is_ours = |link: &Link| link.group == 1_315_857_411 && link.name.starts_with("sv5pkj");
    let is_foreign = |link: &&Link| !is_ours(link) && link.kind != Kind::Loopback;
    let links: Vec<Link> = state.links.values().filter(is_foreign).cloned().collect();
    let of_them = |a: &&super::super::observed::Address| links.iter().any(|l| l.index == a.link);
    let addresses = state.addresses.iter().filter(of_them).cloned().collect();
    // A foreign port loses its controller when our bridge goes: the kernel does that.
    let links = links.into_iter().map(|l| Link {
        controller: None,
        ..l
    });
    (links.collect(), addresses)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn one_plan_is_enough_and_nothing_foreign_is_in_it(
        first in any_wanted(),
        deeds in proptest::collection::vec(deed(), 0..12),
        then in any_wanted(),
    ) {
        let mut kernel = Simulated::new();
        converge(&mut kernel, &first);
        for deed in &deeds {
            harm(&mut kernel, deed);
        }
        let before = foreign(&kernel.state);
        converge(&mut kernel, &then);
        let again = plan(&then, &kernel.state);
        prop_assert!(again.steps.is_empty(), "{}", again);
        prop_assert_eq!(before, foreign(&kernel.state));
    }

    /// Killed after any step, another agent that plans anew comes to the same end.
    #[test]
    fn a_plan_cut_short_is_taken_up_by_the_next(first in any_wanted(), then in any_wanted(), cut in 0..20usize) {
        let mut kernel = Simulated::new();
        converge(&mut kernel, &first);
        for step in plan(&then, &kernel.state).steps.iter().take(cut) {
            kernel.apply(step).unwrap();
        }
        converge(&mut kernel, &then);
        prop_assert!(plan(&then, &kernel.state).is_done());
    }
}
