use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use proptest::prelude::*;

use super::super::apply::rule_message;
use super::*;

fn link_message(index: u32, name: &str, up: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.link_layer_type = LinkLayerType::Ether;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(1500),
        LinkAttribute::Group(9),
        LinkAttribute::Carrier(1),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Tun)]),
    ];
    message
}

fn address_message(ip: [u8; 4], label: &str) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = 5;
    message.header.prefix_len = 24;
    message.attributes = vec![
        AddressAttribute::Address(ip.into()),
        AddressAttribute::Local(ip.into()),
        AddressAttribute::Label(label.to_owned()),
    ];
    message
}

fn route_message(table: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.table = table;
    message.header.kind = RouteType::Unicast;
    message.header.destination_prefix_length = 24;
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet([192, 168, 100, 0].into())),
        RouteAttribute::Oif(5),
    ];
    message
}

fn whole() -> Observed {
    let mut observed = Observed::default();
    observed.take(&RouteNetlinkMessage::NewLink(link_message(5, "t", true)));
    observed.take(&RouteNetlinkMessage::NewAddress(address_message(
        [192, 168, 100, 1],
        "t:sv",
    )));
    observed.take(&RouteNetlinkMessage::NewRoute(route_message(254)));
    observed
}

#[test]
fn messages_become_values() {
    let observed = whole();
    let link = observed.link("t").unwrap();
    assert_eq!(
        (link.kind.clone(), link.group, link.carrier),
        (Kind::Tap, 9, true)
    );
    assert_eq!(link.mac, Some(Mac([2, 0, 0, 0, 0, 1])));
    assert!(observed.addresses.iter().all(|a| a.ours) && observed.addresses.len() == 1);
    assert_eq!(observed.routes.len(), 1);
}

#[test]
fn a_tun_that_is_no_ethernet_is_no_tap() {
    let mut message = link_message(6, "tun0", true);
    message.header.link_layer_type = LinkLayerType::None;
    let mut observed = Observed::default();
    observed.take(&RouteNetlinkMessage::NewLink(message));
    assert_eq!(observed.link("tun0").unwrap().kind, Kind::Other);
}

#[test]
fn kinds_and_ports_are_told_apart() {
    let seen = |change: &dyn Fn(&mut LinkMessage)| {
        let mut message = link_message(6, "x", true);
        change(&mut message);
        let mut observed = Observed::default();
        observed.take(&RouteNetlinkMessage::NewLink(message));
        observed.link("x").cloned().unwrap()
    };
    let kind = |info: Option<InfoKind>, flags: LinkFlags| {
        seen(&|message| {
            message.header.flags = flags;
            message.attributes.truncate(5);
            let info = info
                .clone()
                .map(|info| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(info)]));
            message.attributes.extend(info);
        })
        .kind
    };
    assert_eq!(kind(Some(InfoKind::Bridge), LinkFlags::Up), Kind::Bridge);
    assert_eq!(kind(Some(InfoKind::Veth), LinkFlags::Up), Kind::Other);
    assert_eq!(kind(None, LinkFlags::Up), Kind::Other);
    assert_eq!(kind(None, LinkFlags::Up | LinkFlags::Loopback), Kind::Loopback);
    let port = |of| seen(&|message| message.attributes.push(LinkAttribute::Controller(of))).controller;
    assert_eq!((port(4), port(0)), (Some(4), None));
}

#[test]
fn of_an_address_the_near_end_counts() {
    let mut message = address_message([10, 0, 0, 2], "t");
    message
        .attributes
        .insert(0, AddressAttribute::Local([10, 0, 0, 1].into()));
    message.attributes.remove(2);
    let address = super::address(&message).unwrap();
    assert_eq!(address.ip, IpAddr::from([10, 0, 0, 1]));
    message.attributes.remove(0);
    assert_eq!(super::address(&message).unwrap().ip, IpAddr::from([10, 0, 0, 2]));
}

#[test]
fn only_connected_routes_of_the_main_table_are_kept() {
    let kept = |change: &dyn Fn(&mut RouteMessage)| {
        let mut message = route_message(254);
        change(&mut message);
        super::route(&message).is_some()
    };
    assert!(kept(&|_| {}));
    assert!(kept(&|route| {
        route.attributes[0] = RouteAttribute::Destination(RouteAddress::Inet6("fd00::".parse().unwrap()));
    }));
    assert!(!kept(&|route| route.header.kind = RouteType::Local));
    assert!(!kept(&|route| route.header.table = 97));
    let gateway = RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into()));
    assert!(!kept(&|route| route.attributes.push(gateway.clone())));
    assert!(!kept(&|route| route.attributes.truncate(1)));
}

#[test]
fn a_link_that_went_down_has_no_routes_though_nobody_said_so() {
    let mut observed = whole();
    observed.take(&RouteNetlinkMessage::NewLink(link_message(5, "t", false)));
    assert!(observed.routes.is_empty());
    assert_eq!(observed.addresses.len(), 1);
}

#[test]
fn what_is_told_to_be_gone_is_gone() {
    let mut observed = whole();
    observed.take(&RouteNetlinkMessage::DelRoute(route_message(254)));
    assert!(observed.routes.is_empty());
    let others = address_message([192, 168, 100, 2], "t:sv");
    observed.take(&RouteNetlinkMessage::DelAddress(others));
    assert_eq!(observed.addresses.len(), 1);
    let ours = address_message([192, 168, 100, 1], "t:sv");
    observed.take(&RouteNetlinkMessage::DelAddress(ours));
    assert!(observed.addresses.is_empty());
}

#[test]
fn a_link_takes_all_of_its_own_with_it() {
    let mut observed = whole();
    observed.take(&RouteNetlinkMessage::DelLink(link_message(5, "t", false)));
    assert_eq!(observed, Observed::default());
}

#[test]
fn messages_of_the_bridge_family_and_partial_ones_tell_nothing() {
    let mut port = link_message(5, "t", true);
    port.header.interface_family = AddressFamily::Bridge;
    let mut partial = link_message(5, "t", false);
    partial.attributes.truncate(1);
    let mut observed = whole();
    for message in [
        RouteNetlinkMessage::DelLink(port.clone()),
        RouteNetlinkMessage::NewLink(port),
        RouteNetlinkMessage::NewLink(partial),
        RouteNetlinkMessage::NewRoute(route_message(255)),
    ] {
        observed.take(&message);
    }
    assert_eq!(observed, whole());
}

#[test]
fn an_address_without_the_mark_is_not_ours_and_replaces_the_marked_one() {
    let mut observed = whole();
    observed.take(&RouteNetlinkMessage::NewAddress(address_message(
        [192, 168, 100, 1],
        "t",
    )));
    assert_eq!(
        observed.addresses.iter().map(|a| a.ours).collect::<Vec<_>>(),
        [false]
    );
    let mut v6 = address_message([0; 4], "");
    v6.attributes = vec![
        AddressAttribute::Address("fd00::1".parse().unwrap()),
        AddressAttribute::Protocol(AddressProtocol::Other(ADDRESS_PROTOCOL)),
    ];
    observed.take(&RouteNetlinkMessage::NewAddress(v6));
    assert_eq!(observed.addresses.iter().filter(|a| a.ours).count(), 1);
}

#[test]
fn a_rule_reads_back_as_it_was_written() {
    let to = Prefix::new([192, 168, 100, 0].into(), 24);
    let plain = || Rule::ours(Family::V4, 9_005, RuleAction::Lookup(1_003));
    let iif = Some("sv5pkj".to_owned());
    for rule in [
        Rule { to, ..plain() },
        Rule { from: to, ..plain() },
        Rule {
            mark: Some((0x0400_0000, 0x1c00_0000)),
            iif: iif.clone(),
            ..plain()
        },
        Rule {
            mark: Some((0, 0x0001_0000)),
            ..plain()
        },
        Rule {
            iif,
            ..Rule::ours(Family::V6, 9_020, RuleAction::Unreachable)
        },
    ] {
        assert_eq!(any_rule(&rule_message(&rule)), Some(rule));
    }
}

proptest! {
    /// Notifications that a dump already shows do no harm: folding them again ends in the same state.
    #[test]
    fn late_notifications_end_in_the_same_state(ups in proptest::collection::vec(any::<bool>(), 1..8)) {
        let messages: Vec<_> = ups
            .iter()
            .flat_map(|up| {
                let link = RouteNetlinkMessage::NewLink(link_message(5, "t", *up));
                let route = RouteNetlinkMessage::NewRoute(route_message(254));
                if *up { vec![link, route] } else { vec![link] }
            })
            .collect();
        let fold = |mut observed: Observed| {
            messages.iter().for_each(|message| observed.take(message));
            observed
        };
        let dumped = fold(Observed::default());
        prop_assert_eq!(fold(dumped.clone()), dumped);
    }
}

#[test]
fn an_address_takes_the_routes_of_ours_that_name_it_with_it() {
    let mut observed = whole();
    let route = |table, protocol: u8| {
        let mut message = route_message(table);
        message.header.protocol = protocol.into();
        RouteNetlinkMessage::NewRoute(message)
    };
    observed.take(&route(100, OURS));
    observed.take(&route(254, 3)); // others' stay: the kernel tells when they go
    let before = observed.routes.len();
    let other = address_message([192, 168, 101, 1], "t:sv");
    observed.take(&RouteNetlinkMessage::DelAddress(other));
    assert_eq!(observed.routes.len(), before);
    let ours = address_message([192, 168, 100, 1], "t:sv");
    observed.take(&RouteNetlinkMessage::DelAddress(ours));
    assert_eq!(observed.routes.len(), before - 1);
    assert!(observed.routes.iter().all(|route| route.protocol != OURS));
}
