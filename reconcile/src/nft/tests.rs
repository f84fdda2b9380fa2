use std::collections::BTreeMap;
use std::net::IpAddr;

use proptest::prelude::*;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::Subnet;

use super::*;
use crate::filter::{Filter, PortForward, Sender, WayOut};
use crate::names::{LinkName, Mac};

fn filter(way_out: WayOut) -> Filter {
    Filter {
        tag: "svtest".to_owned(),
        bridge: LinkName::parse("svtest").unwrap(),
        subnets: ["10.0.0.0/24", "fd00::/64"]
            .map(|text| Subnet::parse(text).unwrap())
            .into(),
        way_out,
        forwards: BTreeSet::new(),
        answers: BTreeMap::new(),
        senders: BTreeMap::new(),
    }
}

fn forward(listen: Option<&str>, ports: &str, to: &str, to_port: u16) -> PortForward {
    PortForward {
        transport: Transport::Tcp,
        listen: listen.map(|text| text.parse().unwrap()),
        ports: Ports::parse(ports).unwrap(),
        to: to.parse().unwrap(),
        to_port,
    }
}

fn comments(filter: &Filter, family: Family, chain: &str) -> Vec<String> {
    let tables = tables(filter).unwrap();
    let table = tables.iter().find(|table| table.family == family).unwrap();
    let rules = &table
        .chains
        .get(chain)
        .unwrap_or_else(|| panic!("{chain} in {table:?}"))
        .rules;
    rules.iter().map(|rule| rule.comment.clone()).collect()
}

fn sender(count: u16) -> Sender {
    let addresses = (0..count)
        .map(|n| IpAddr::from([10, 0, 0, 2 + n as u8]))
        .collect();
    Sender {
        mac: Mac([2, 0, 0, 0, 0, 1]),
        addresses,
    }
}

#[test]
fn without_a_way_out_only_answers_pass_and_nothing_is_translated() {
    let filter = filter(WayOut::None);
    assert_eq!(
        comments(&filter, Family::Inet, "forward"),
        [
            "TCP segments fit the route's MTU, out",
            "TCP segments fit the route's MTU, in",
            "guest to guest",
            "answers to what was forwarded",
            "no way out",
            "answers",
            "forwarded ports",
            "nothing else comes in",
        ]
    );
    assert!(comments(&filter, Family::Inet, "postrouting").is_empty());
    let tables = tables(&filter).unwrap();
    assert_eq!(tables.len(), 1, "no bridge table without senders");
    let names: Vec<_> = tables.first().unwrap().chains.keys().collect();
    assert_eq!(names, ["forward", "postrouting"], "no hook without a forward");
}

#[test]
fn with_a_way_out_each_subnet_is_masqueraded_and_the_hairpin_only_where_a_forward_leads() {
    let mut filter = filter(WayOut::Masquerade);
    assert_eq!(
        comments(&filter, Family::Inet, "postrouting"),
        ["out as this host"; 2]
    );
    filter.forwards.insert(forward(None, "80", "fd00::2", 80));
    assert_eq!(
        comments(&filter, Family::Inet, "postrouting"),
        [
            "out as this host",
            "out as this host",
            "a sibling's answer comes back through here"
        ]
    );
}

#[test]
fn forwards_of_one_address_come_before_the_question_whether_it_is_this_host() {
    let mut filter = filter(WayOut::None);
    filter.forwards = [
        forward(None, "8080-8090", "10.0.0.2", 8080),
        forward(Some("192.0.2.1"), "443", "10.0.0.3", 8443),
        forward(None, "22-23", "10.0.0.4", 2222),
        forward(None, "80", "fd00::2", 8000),
    ]
    .into();
    assert_eq!(
        comments(&filter, Family::Inet, "ports"),
        [
            "not the loopback",
            "not the loopback",
            "tcp 443 to 10.0.0.3:8443",
            "only to this host",
            "tcp 22 to 10.0.0.4:2222",
            "tcp 23 to 10.0.0.4:2223",
            "tcp 80 to [fd00::2]:8000",
            "tcp 8080-8090 to 10.0.0.2:8080-8090",
        ]
    );
}

#[test]
fn what_the_kernel_cannot_do_is_refused_by_name() {
    let refused = |forwards: Vec<PortForward>| {
        let mut filter = filter(WayOut::None);
        filter.forwards = forwards.into_iter().collect();
        tables(&filter).unwrap_err()
    };
    assert_eq!(
        refused(vec![forward(Some("127.0.0.1"), "80", "10.0.0.2", 80)]),
        FilterError::Loopback([127, 0, 0, 1].into())
    );
    assert!(matches!(
        refused(vec![forward(Some("192.0.2.1"), "80", "fd00::2", 80)]),
        FilterError::Families { .. }
    ));
    assert!(matches!(
        refused(vec![forward(None, "80-90", "10.0.0.2", 65_530)]),
        FilterError::Beyond { .. }
    ));
    // Up to the last port there is.
    let mut last = filter(WayOut::None);
    last.forwards.insert(forward(None, "80-90", "10.0.0.2", 65_525));
    assert_eq!(
        comments(&last, Family::Inet, "ports").last().unwrap(),
        "tcp 90 to 10.0.0.2:65535"
    );
    // As many as there may be, and one more; a single port or an unmoved range is free.
    let free = [
        forward(None, "9", "10.0.0.2", 8),
        forward(None, "10000-20000", "10.0.0.2", 10_000),
    ];
    let moved = |last: usize| forward(None, &format!("20001-{}", 20_000 + last), "10.0.0.2", 1);
    let mut most = filter(WayOut::None);
    most.forwards = free.iter().cloned().chain([moved(SHIFTED_PORTS)]).collect();
    tables(&most).unwrap();
    assert_eq!(
        refused(free.into_iter().chain([moved(SHIFTED_PORTS + 1)]).collect()),
        FilterError::Shifted(SHIFTED_PORTS + 1)
    );
}

#[test]
fn forwards_that_cannot_be_made_are_named_and_the_others_are_made() {
    let good = forward(None, "80", "10.0.0.2", 80);
    let bad = [
        forward(Some("127.0.0.1"), "81", "10.0.0.2", 80),
        forward(Some("fd00::1"), "82", "10.0.0.2", 80),
        forward(None, "1000-2000", "10.0.0.2", 65_000),
    ];
    let mut filter = filter(WayOut::None);
    filter.forwards = bad.iter().chain([&good]).cloned().collect();
    let refused = impossible(&filter);
    assert_eq!(refused.keys().collect::<BTreeSet<_>>(), bad.iter().collect());
    assert!(matches!(refused[&bad[0]], FilterError::Loopback(_)));
    filter.forwards.retain(|forward| !refused.contains_key(forward));
    assert_eq!(impossible(&filter), BTreeMap::new());
    assert_eq!(
        comments(&filter, Family::Inet, "ports").last().unwrap(),
        "tcp 80 to 10.0.0.2:80"
    );
    // What there is room for is made, in their order.
    let moved = |first: usize, count: usize, to| {
        forward(None, &format!("{first}-{}", first + count - 1), "10.0.0.2", to)
    };
    let (large, small) = (moved(1, SHIFTED_PORTS - 1, 2), moved(30_000, 2, 1));
    filter.forwards = [large, small.clone()].into();
    let refused = impossible(&filter);
    assert_eq!(
        refused,
        BTreeMap::from([(small, FilterError::Shifted(SHIFTED_PORTS + 1))])
    );
}

#[test]
fn every_guest_has_a_chain_and_no_rule_is_longer_than_the_kernel_takes() {
    let mut filter = filter(WayOut::None);
    let link = LinkName::parse("prerouting").unwrap();
    let mut full = sender(SENDER_ADDRESSES as u16);
    full.addresses
        .extend((0..SENDER_ADDRESSES as u16).map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2 + n])));
    filter.senders.insert(link.clone(), full);
    let made = tables(&filter).unwrap();
    let bridge = made.iter().find(|table| table.family == Family::Bridge).unwrap();
    let names: Vec<_> = bridge.chains.keys().map(String::as_str).collect();
    assert_eq!(names, ["any-guest", "from-prerouting", "prerouting"]);
    let longest = bridge.chains.values().flat_map(|chain| &chain.rules);
    assert!(longest.map(|rule| rule.expressions.len()).max() <= Some(128)); // NFT_RULE_MAXEXPRS
    filter.senders.insert(link, sender(SENDER_ADDRESSES as u16 + 1));
    assert!(matches!(tables(&filter), Err(FilterError::Addresses { .. })));
}

#[test]
fn our_mark_is_read_in_any_version_and_in_nothing_else() {
    assert_eq!(marked(&mark("sv5pkj")), Some("sv5pkj"));
    assert_eq!(marked("sovereign sv5pkj v12"), Some("sv5pkj"));
    for other in [
        "",
        "sovereign",
        "sovereign a b v1",
        "sovereign  v1",
        "sovereign a v",
        "sovereign a vx",
        "a sovereign b v1",
    ] {
        assert_eq!(marked(other), None, "{other:?}");
    }
}

#[test]
fn differences_name_what_is_missing_and_what_is_foreign() {
    let wanted = tables(&filter(WayOut::None)).unwrap();
    let says = |change: &dyn Fn(&mut Table)| {
        let mut table = wanted.first().unwrap().clone();
        change(&mut table);
        let found = differences(&wanted, &[table].into());
        found.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(says(&|_| ()).is_empty());
    assert_eq!(
        differences(&wanted, &Tables::new())[0].to_string(),
        "inet svtest: missing"
    );
    assert_eq!(
        differences(&Tables::new(), &wanted)[0].to_string(),
        "inet svtest: not wanted any more"
    );
    assert_eq!(
        says(&|table| table.standing = Standing::Dormant),
        ["inet svtest: switched off"]
    );
    assert_eq!(
        says(&|table| table.strangers = 2),
        ["inet svtest: 2 objects of others"]
    );
    let rules = |change: &dyn Fn(&mut Vec<Rule>)| {
        says(&|table| change(&mut table.chains.get_mut("forward").unwrap().rules))
    };
    let foreign = Rule {
        comment: String::new(),
        expressions: vec![Expression::Verdict(Verdict::Drop)],
    };
    assert_eq!(
        rules(&|rules| rules.push(foreign.clone())),
        ["inet svtest forward: a rule without a name is not ours"]
    );
    assert_eq!(
        rules(&|rules| drop(rules.remove(4))),
        ["inet svtest forward: \"no way out\" is missing"]
    );
    assert_eq!(
        rules(&|rules| rules.swap(0, 1)),
        ["inet svtest forward: rules in another order, or twice"]
    );
    assert_eq!(
        says(&|table| table
            .chains
            .get_mut("forward")
            .unwrap()
            .hook
            .as_mut()
            .unwrap()
            .policy = Policy::Drop),
        ["inet svtest forward: hooked in another way"]
    );
    assert_eq!(
        says(&|table| drop(table.chains.insert("x\n".to_owned(), Chain::default()))),
        ["inet svtest x\\n: not ours"]
    );
}

proptest! {
    /// A subnet's match keeps the address' bits up to the prefix and none beyond.
    #[test]
    fn a_match_of_a_prefix_compares_just_its_bits(ip in any::<[u8; 4]>(), prefix in 1_u8..=32) {
        let network = u32::from_be_bytes(ip) & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let ip = IpAddr::from(network.to_be_bytes());
        let steps = super::matches::address_in(super::matches::End::Source, Comparison::Equal, ip, prefix);
        let loaded = match steps[0] {
            Expression::Payload { length, .. } => length as usize,
            _ => unreachable!("{steps:?}"),
        };
        let mask = match &steps[1] {
            Expression::Mask { mask, .. } => mask.clone(),
            _ => vec![0xff; loaded],
        };
        let Some(Expression::Compare { value, .. }) = steps.last() else { unreachable!("{steps:?}") };
        prop_assert_eq!(mask.iter().map(|byte| byte.count_ones()).sum::<u32>(), u32::from(prefix));
        prop_assert!(mask.windows(2).all(|pair| pair[0] >= pair[1]));
        prop_assert_eq!(value.as_slice(), &network.to_be_bytes()[..loaded]);
    }
}
