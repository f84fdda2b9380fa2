use super::*;
use crate::simulated::{Simulated, default_route, phone, router};
use crate::uplink::{Uplink, Vpn, exit};
use proptest::prelude::*;
use sovereign_protocol::subnet::HostAddress;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn now(kernel: &Simulated, uplink: &Uplink, asked: Option<Hop>) -> Option<Way> {
    let exit = exit(&kernel.state, Family::V4, uplink, Vpn::Follow);
    Way::of(&kernel.state, Family::V4, &exit, asked)
}

fn auto(kernel: &Simulated) -> Option<Way> {
    now(kernel, &Uplink::Auto, None)
}

fn index(kernel: &Simulated, name: &str) -> u32 {
    kernel.index(&LinkName::parse(name).unwrap()).unwrap()
}

fn give(kernel: &mut Simulated, link: &str, address: &str, passed_over: bool) {
    let index = index(kernel, link);
    let address = HostAddress::parse(address).unwrap();
    kernel.add_address(index, address, false).unwrap();
    let mut given = Address {
        link: index,
        ip: address.ip(),
        prefix: address.prefix(),
        ours: false,
        passed_over: false,
    };
    kernel.state.addresses.remove(&given);
    given.passed_over = passed_over;
    kernel.state.addresses.insert(given);
}

/// Two uplinks with an address each.
fn addressed() -> Simulated {
    let mut kernel = router();
    give(&mut kernel, "eth0", "10.0.0.2/24", false);
    give(&mut kernel, "eth1", "10.1.0.2/24", false);
    kernel
}

/// What of a change makes it another way.
#[test]
fn a_way_is_link_gateway_and_the_addresses_that_packets_get() {
    let kernel = addressed();
    let before = auto(&kernel).unwrap();
    assert_eq!(before.link.as_str(), "eth0");
    assert_eq!(before.gateway, Some(ip("10.0.0.1")));
    assert_eq!(before.sources, [ip("10.0.0.2")].into());

    let after = |change: &dyn Fn(&mut Simulated)| {
        let mut kernel = kernel.clone();
        change(&mut kernel);
        auto(&kernel).map(|way| way.leaves(&before))
    };
    let link = |kernel: &mut Simulated, change: fn(&mut crate::observed::Link)| {
        let index = index(kernel, "eth0");
        kernel.link(index, change).unwrap();
    };
    assert_eq!(after(&|_| {}), Some(false));
    assert_eq!(
        after(&|kernel| link(kernel, |link| link.mtu = 1_280)),
        Some(false)
    );
    for (alias, why) in [
        ("10.0.0.77/24", "an alias"),
        ("10.9.0.2/24", "another subnet of the link"),
        ("169.254.1.2/16", "an address for the link only"),
    ] {
        let alias = |kernel: &mut Simulated| give(kernel, "eth0", alias, why == "an alias");
        assert_eq!(after(&alias), Some(false), "{why}");
    }
    assert_eq!(
        after(&|kernel| give(kernel, "eth0", "10.0.0.3/16", false)),
        Some(false),
        "one more that may be used ends nothing"
    );
    let readdressed = |kernel: &mut Simulated| {
        let index = index(kernel, "eth0");
        let old = HostAddress::parse("10.0.0.2/24").unwrap();
        kernel.remove_address(index, old).unwrap();
        give(kernel, "eth0", "10.0.0.3/24", false);
    };
    assert_eq!(after(&readdressed), Some(true));
    let other_gateway = |kernel: &mut Simulated| {
        let index = index(kernel, "eth0");
        kernel.state.routes.retain(|route| route.gateway.is_none());
        kernel.state.routes.insert(default_route(MAIN, index, "10.0.0.9"));
    };
    assert_eq!(after(&other_gateway), Some(true));
    let down = |kernel: &mut Simulated| link(kernel, |link| link.carrier = false);
    assert_eq!(after(&down), Some(true), "eth1 takes over");
    assert_eq!(after(&|kernel| kernel.state.routes.clear()), None);
    let bare = |kernel: &mut Simulated| {
        let index = index(kernel, "eth0");
        let old = HostAddress::parse("10.0.0.2/24").unwrap();
        kernel.remove_address(index, old).unwrap();
    };
    assert_eq!(after(&bare), None, "a link without an address sends nothing");
}

#[test]
fn the_kernels_own_answer_counts_where_main_decides_and_nowhere_else() {
    let kernel = addressed();
    let eth1 = Hop {
        link: index(&kernel, "eth1"),
        gateway: None,
        source: None,
    };
    let way = now(&kernel, &Uplink::Auto, Some(eth1)).unwrap();
    assert_eq!((way.link.as_str(), way.gateway), ("eth1", None));
    let unknown = Hop { link: 99, ..eth1 };
    assert_eq!(now(&kernel, &Uplink::Auto, Some(unknown)), auto(&kernel));
    let named = Uplink::Named(vec![LinkName::parse("eth0").unwrap()]);
    let way = now(&kernel, &named, Some(eth1)).unwrap();
    assert_eq!((way.link.as_str(), way.gateway), ("eth0", Some(ip("10.0.0.1"))));
}

#[test]
fn the_machines_own_way_is_what_its_kernel_says_of_its_own_packets() {
    let machine = |kernel: &Simulated, asked| Way::of_machine(&kernel.state, Family::V4, asked);
    let kernel = addressed();
    let hop = |kernel: &Simulated, link, gateway: Option<&str>, source: Option<&str>| Hop {
        link: index(kernel, link),
        gateway: gateway.map(ip),
        source: source.map(ip),
    };
    let eth1 = hop(&kernel, "eth1", Some("10.1.0.1"), Some("10.1.0.2"));
    let way = machine(&kernel, Some(eth1)).unwrap();
    assert_eq!((way.link.as_str(), way.gateway), ("eth1", Some(ip("10.1.0.1"))));
    assert_eq!(way.sources, [ip("10.1.0.2")].into());
    assert_eq!(machine(&kernel, None), auto(&kernel), "who is not told looks");

    // A VPN by rules, which no default route of the main table shows, and that has the only one.
    let mut bare = addressed();
    bare.state.routes.clear();
    assert_eq!(machine(&bare, None), None);
    assert_eq!(machine(&bare, Some(eth1)).unwrap().link.as_str(), "eth1");

    // A router whose address is on its loopback: another one there is another way.
    let mut router = router();
    let from = |source| hop(&kernel, "eth1", Some("169.254.0.1"), Some(source));
    give(&mut router, "eth1", "169.254.0.2/30", false);
    let one = machine(&router, Some(from("192.0.2.1"))).unwrap();
    assert_eq!(one.sources, [ip("192.0.2.1")].into());
    assert!(machine(&router, Some(from("192.0.2.2"))).unwrap().leaves(&one));
    for none in ["169.254.0.2", "127.0.0.1"] {
        assert_eq!(machine(&router, Some(from(none))), None, "{none}");
    }

    // Of a phone the kernel is asked, too: netd's ladder is about packets of its own.
    let mut phone = phone("wlan0", true);
    give(&mut phone, "tun1", "10.99.0.2/24", false);
    give(&mut phone, "wlan0", "10.0.0.2/24", false);
    assert_eq!(machine(&phone, None).unwrap().link.as_str(), "tun1");
    let wlan0 = hop(&phone, "wlan0", None, None);
    assert_eq!(machine(&phone, Some(wlan0)).unwrap().link.as_str(), "wlan0");
}

#[test]
fn a_phones_vpn_is_another_way_and_its_end_is_one_again() {
    let with_addresses = |vpn| {
        let mut kernel = phone("wlan0", vpn);
        for (link, address) in [("wlan0", "10.0.0.2/24"), ("tun1", "10.99.0.2/24")] {
            give(&mut kernel, link, address, false);
        }
        auto(&kernel).unwrap()
    };
    let (off, on) = (with_addresses(false), with_addresses(true));
    assert_eq!((off.link.as_str(), on.link.as_str()), ("wlan0", "tun1"));
    assert!(on.leaves(&off) && off.leaves(&on));
}

fn way(link: &str, sources: &[&str]) -> Way {
    Way {
        link: LinkName::parse(link).unwrap(),
        gateway: None,
        sources: sources.iter().map(|text| ip(text)).collect(),
    }
}

fn four(way: &Way) -> BTreeMap<Family, Way> {
    BTreeMap::from([(Family::V4, way.clone())])
}

/// Looks twice, far enough apart.
fn settle(told: &mut ToldWays, now: &BTreeMap<Family, Way>, at_ms: u64, wall_s: u64) -> Option<u64> {
    told.look(now.clone(), at_ms, wall_s);
    told.look(now.clone(), at_ms + LASTING_MS, wall_s);
    told.ways().v4
}

#[test]
fn a_way_is_told_when_it_has_lasted() {
    let (a, b) = (four(&way("a", &["10.0.0.1"])), four(&way("b", &["10.0.0.1"])));
    let mut told = ToldWays::default();
    assert!(!told.look(a.clone(), 1_000, 50));
    assert!(told.ways().is_empty());
    assert_eq!(told.due_ms(), Some(1_000 + LASTING_MS));
    assert!(!told.look(a.clone(), 999 + LASTING_MS, 50));
    assert!(told.look(a.clone(), 1_000 + LASTING_MS, 50));
    assert_eq!((told.ways().v4, told.ways().v6), (Some(50), None));
    assert_eq!(told.due_ms(), None);

    // Away, elsewhere for a moment, and back: nothing happened.
    assert!(!told.look(BTreeMap::new(), 2_000, 60));
    assert!(!told.look(b.clone(), 2_010, 60));
    assert!(!told.look(a.clone(), 2_020, 60));
    assert_eq!(told.due_ms(), None);
    assert!(!told.look(a.clone(), 9_000, 60));
    assert_eq!(told.ways().v4, Some(50));

    // Losing it for long is nothing that a guest could act on.
    assert!(!told.look(BTreeMap::new(), 10_000, 60));
    assert!(!told.look(BTreeMap::new(), 20_000, 60));
    assert_eq!(told.ways().v4, Some(50));
    assert_eq!(settle(&mut told, &b, 30_000, 10), Some(51), "whatever the clock");
    assert_eq!(settle(&mut told, &a, 40_000, 10), Some(52));
}

#[test]
fn a_candidate_that_changes_begins_anew() {
    let mut told = ToldWays::default();
    for n in 0..10 {
        let address = format!("10.0.0.{n}");
        assert!(!told.look(four(&way("a", &[&address])), 90 * n, 1), "{n}");
    }
    assert_eq!(told.due_ms(), Some(810 + LASTING_MS));
}

#[test]
fn a_further_address_is_kept_in_mind_and_not_told() {
    let one = four(&way("a", &["10.0.0.1"]));
    let both = four(&way("a", &["10.0.0.1", "10.0.0.2"]));
    let other = four(&way("a", &["10.0.0.2"]));
    let mut told = ToldWays::default();
    assert_eq!(settle(&mut told, &one, 0, 1), Some(1));
    assert_eq!(settle(&mut told, &both, 1_000, 1), Some(1));
    assert_eq!(settle(&mut told, &other, 2_000, 1), Some(2), "the first has gone");
}

#[test]
fn another_agent_goes_on_with_the_same_numbers() {
    let (a, b) = (four(&way("a", &["10.0.0.1"])), four(&way("b", &["10.0.0.1"])));
    let mut told = ToldWays::default();
    settle(&mut told, &a, 0, 100);
    told.look(b.clone(), 500, 100); // not told yet, and so not kept
    let text = serde_json::to_string(&told).unwrap();
    let again = || serde_json::from_str::<ToldWays>(&text).unwrap();
    assert_eq!(again().ways().v4, Some(100), "told at once");
    assert_eq!(settle(&mut again(), &a, 0, 200), Some(100), "no move");
    assert_eq!(
        settle(&mut again(), &b, 0, 200),
        Some(200),
        "one while nobody looked"
    );
    // A lost record looks like a move, and never hides one.
    assert_eq!(settle(&mut ToldWays::default(), &b, 0, 101), Some(101));
}

proptest! {
    /// Whatever happens: numbers only grow, and grow only for ways that lasted and that end something.
    #[test]
    fn numbers_grow_only_for_a_way_that_lasted(
        looks in prop::collection::vec((0u64..150, prop::option::of((0u8..3, 1u8..4))), 1..40),
        wall_s in 0u64..100,
    ) {
        let mut told = ToldWays::default();
        let (mut at_ms, mut same_since, mut last) = (0, 0, None);
        let mut kept: Option<Way> = None;
        for (pause, there) in looks {
            at_ms += pause;
            let now = there.map(|(link, sources)| {
                let sources: Vec<String> = (0..sources).map(|n| format!("10.0.0.{n}")).collect();
                let sources: Vec<&str> = sources.iter().map(String::as_str).collect();
                way(&format!("l{link}"), &sources)
            });
            if now != last {
                same_since = at_ms;
                last.clone_from(&now);
            }
            let before = told.ways().v4;
            let news = told.look(now.iter().flat_map(four).collect(), at_ms, wall_s);
            let after = told.ways().v4;
            prop_assert!(before <= after);
            if before != after {
                prop_assert!(news && at_ms - same_since >= LASTING_MS);
                prop_assert!(kept.as_ref().is_none_or(|kept| now.as_ref().unwrap().leaves(kept)));
            }
            if news {
                kept.clone_from(&now);
            }
            if at_ms - same_since >= LASTING_MS && now.is_some() {
                prop_assert_eq!(&now, &kept, "what lasts is known");
            }
            let text = serde_json::to_string(&told).unwrap();
            prop_assert_eq!(serde_json::from_str::<ToldWays>(&text).unwrap().ways(), told.ways());
        }
    }
}

/// pasta has the same link, gateway and addresses each time, and knows nothing of the connections of the one before.
#[test]
fn what_leads_out_anew_is_another_way_that_looks_the_same() {
    let ways = four(&way("pasta", &["192.0.0.2"]));
    let mut told = ToldWays::default();
    told.renew(5);
    assert!(told.ways().is_empty(), "nobody was told of any");
    let first = settle(&mut told, &ways, 0, 5).unwrap();
    told.renew(5);
    assert!(told.ways().v4.unwrap() > first);
    assert!(!told.look(ways, 2 * LASTING_MS, 5), "it was counted");
}
