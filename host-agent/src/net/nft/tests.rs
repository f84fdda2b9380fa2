//! Our messages beside those of `nft` (golden/), and every table read back as it was written.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

use proptest::prelude::*;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::Subnet;
use sovereign_reconcile::answers::MASK;
use sovereign_reconcile::filter::{Filter, PortForward, Sender, WayOut};
use sovereign_reconcile::names::{LinkName, Mac};
use sovereign_reconcile::nft::{Expression, Standing, Table, differences, tables};

use super::attributes::messages;
use super::monitor::Folded;
use super::wire::NLM_F_ACK;
use super::*;

const TAG: &str = "svgold";

fn subnets() -> BTreeSet<Subnet> {
    ["10.9.0.0/23", "fd00:9::/64"]
        .map(|text| Subnet::parse(text).unwrap())
        .into()
}

fn closed() -> Filter {
    Filter {
        tag: TAG.to_owned(),
        bridge: LinkName::parse(TAG).unwrap(),
        subnets: subnets(),
        way_out: WayOut::None,
        forwards: BTreeSet::new(),
        answers: BTreeMap::new(),
        senders: BTreeMap::new(),
    }
}

fn masquerade() -> Filter {
    let forward = |transport, listen: Option<&str>, ports, to: &str, to_port| PortForward {
        transport,
        listen: listen.map(|text| text.parse().unwrap()),
        ports: Ports::parse(ports).unwrap(),
        to: to.parse().unwrap(),
        to_port,
    };
    let sender = Sender {
        mac: Mac([2, 0, 0, 0, 0, 10]),
        addresses: ["10.9.0.2", "10.9.0.4", "fd00:9::2"]
            .map(|text| text.parse().unwrap())
            .into(),
    };
    Filter {
        way_out: WayOut::Masquerade,
        forwards: [
            forward(Transport::Tcp, None, "8080-8082", "10.9.0.2", 8080),
            forward(Transport::Udp, None, "5000-5001", "10.9.0.2", 6000),
            forward(Transport::Tcp, Some("192.0.2.1"), "443", "10.9.0.3", 8443),
            forward(Transport::Tcp, None, "80", "fd00:9::2", 8000),
        ]
        .into(),
        answers: [("eth0", 0x0400_0000), ("wlan0", 0x1c00_0000)]
            .map(|(link, mark)| (LinkName::parse(link).unwrap(), mark))
            .into(),
        senders: [(LinkName::parse("svgold-a").unwrap(), sender)].into(),
        ..closed()
    }
}

fn hex(text: &str) -> Vec<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    text.lines()
        .map(|line| line.as_bytes().chunks(2).map(byte).collect())
        .collect()
}

/// The messages that make some tables.
fn written(wanted: &Tables) -> Vec<u8> {
    let mut script = Script::default();
    for table in wanted {
        script.make(1, table, Ownership::Plain);
    }
    script.writer.finish().unwrap()
}

fn read(bytes: &[u8]) -> Tables {
    let mut reading = Reading::new(TAG, Ownership::Plain, 7);
    for message in messages(bytes) {
        reading.take(&message.unwrap()).unwrap();
    }
    reading.finish()
}

/// A message without its number, its port and whether it is acknowledged, with every attribute as it lies.
fn shown(message: &Message<'_>) -> String {
    fn attributes(bytes: &[u8], into: &mut String) {
        for attribute in super::attributes::attributes(bytes) {
            let (kind, value) = attribute.unwrap();
            // The bits of the kind say whether there are others inside.
            let at = value.as_ptr() as usize - bytes.as_ptr() as usize;
            let nested = bytes[at - 1] & 0x80 != 0;
            let _ = match nested {
                true => write!(into, "{kind}{{"),
                false => write!(into, "{kind}={value:02x?} "),
            };
            if nested {
                attributes(value, into);
                into.push('}');
            }
        }
    }
    let (family, rest) = message.netfilter().unwrap();
    let mut text = format!("{:#x} {:#x} {family} ", message.kind, message.flags & !NLM_F_ACK);
    attributes(rest, &mut text);
    // `nft` tells some of its masks that they are masks, which is what they are without it.
    text.replace("6=[00, 00, 00, 00] ", "")
}

/// Comments are compared, too: `nft` keeps them in the same way.
fn same_as_nft(filter: &Filter, sent: &str) {
    let ours = written(&tables(filter).unwrap());
    let ours: Vec<_> = messages(&ours).map(|message| shown(&message.unwrap())).collect();
    let sent = hex(sent);
    let batch = &sent[1..sent.len() - 1]; // without its begin and its end
    let theirs = batch
        .iter()
        .map(|bytes| shown(&messages(bytes).next().unwrap().unwrap()));
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(*ours, theirs);
    }
    assert_eq!(ours.len(), batch.len());
}

#[test]
fn every_message_is_what_nft_sends() {
    same_as_nft(&masquerade(), include_str!("golden/masquerade.sent"));
    same_as_nft(&closed(), include_str!("golden/closed.sent"));
}

#[test]
fn the_kernels_dump_reads_back_as_what_was_wanted() {
    for (filter, told) in [
        (masquerade(), include_str!("golden/masquerade.told")),
        (closed(), include_str!("golden/closed.told")),
    ] {
        let told: Vec<u8> = hex(told).concat();
        let (wanted, told) = (tables(&filter).unwrap(), read(&told));
        let said: Vec<_> = differences(&wanted, &told)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert!(said.is_empty(), "{said:#?}");
        assert_eq!(told, wanted);
    }
}

/// Any single bit of the kernel's answer that is not a handle, a counter or padding makes a difference.
#[test]
fn a_changed_dump_reads_as_something_else() {
    let wanted = tables(&closed()).unwrap();
    let sent = written(&wanted);
    let (mut same, mut other) = (0, 0);
    for at in 0..sent.len() {
        for bit in 0..8 {
            let mut changed = sent.clone();
            changed[at] ^= 1 << bit;
            let mut reading = Reading::new(TAG, Ownership::Plain, 7);
            let mut all = messages(&changed);
            let is_read = all.all(|message| message.is_ok_and(|message| reading.take(&message).is_ok()));
            match is_read && reading.finish() == wanted {
                true => same += 1,
                false => other += 1,
            }
        }
    }
    // Headers (flags, numbers, ports, versions) and padding may differ.
    assert!(
        same * 4 < other,
        "{same} changed bits make no difference, {other} do"
    );
}

#[test]
fn whose_a_table_is_shows_in_its_standing() {
    let standing = |flags: u32, owner: Option<u32>, ownership| {
        let mut writer = attributes::Writer::default();
        let head = attributes::Head {
            kind: wire::NEW_TABLE,
            flags: 0,
            sequence: 0,
            family: Family::Inet.number(),
            resource: 0,
        };
        writer.message(head, |writer| {
            writer.text(1, TAG);
            writer.u32(2, flags);
            if let Some(owner) = owner {
                writer.u32(7, owner);
            }
        });
        let bytes = writer.finish().unwrap();
        let mut reading = Reading::new(TAG, ownership, 7);
        reading.take(&messages(&bytes).next().unwrap().unwrap()).unwrap();
        reading.finish().first().unwrap().standing
    };
    use Ownership::{Owned, Plain};
    assert_eq!(standing(0, None, Plain), Standing::AsWanted);
    assert_eq!(standing(6, Some(7), Owned), Standing::AsWanted);
    assert_eq!(standing(1, None, Plain), Standing::Dormant);
    assert_eq!(standing(7, Some(7), Owned), Standing::Dormant);
    assert_eq!(standing(4, None, Owned), Standing::Unowned);
    assert_eq!(standing(0, None, Owned), Standing::Unowned);
    assert_eq!(standing(4, None, Plain), Standing::Persistent);
    assert_eq!(standing(6, Some(7), Plain), Standing::Persistent);
    assert_eq!(standing(6, Some(8), Owned), Standing::Held(8));
    assert_eq!(standing(6, Some(8), Plain), Standing::Held(8));
    assert_eq!(standing(8, None, Plain), Standing::Unknown(8));
}

#[test]
fn settings_that_we_never_use_make_a_step_unknown() {
    let wanted = tables(&masquerade()).unwrap();
    let count = |tables: &Tables| {
        let chains = tables.iter().flat_map(|table| table.chains.values());
        let steps = chains
            .flat_map(|chain| &chain.rules)
            .flat_map(|rule| &rule.expressions);
        steps
            .filter(|step| matches!(step, Expression::Unknown { .. }))
            .count()
    };
    assert_eq!(count(&read(&written(&wanted))), 0);
    // masquerade to ports, at random, a step of another kind, and a list that is none
    for (name, bytes) in [
        ("masq", &[8, 0, 2, 0, 0, 0, 0, 1][..]),
        ("masq", &[8, 0, 1, 0, 0, 0, 0, 4]),
        ("limit", &[]),
        ("masq", &[1]),
    ] {
        let mut table: Table = wanted.last().unwrap().clone();
        let chain = table.chains.values_mut().next().unwrap();
        let (name, bytes) = (name.to_owned(), bytes.to_vec());
        let step = Expression::Unknown { name, bytes };
        chain.rules[0].expressions.push(step.clone());
        let back = read(&written(&[table.clone()].into()));
        assert_eq!(back, [table].into(), "{step}");
    }
}

/// The same words as `nft --debug=netlink` has for what it sends.
#[test]
fn a_step_is_shown_as_nft_shows_it() {
    let wanted = tables(&masquerade()).unwrap();
    let rule = |chain: &str, at: usize| {
        let table = wanted
            .iter()
            .find(|table| table.chains.contains_key(chain))
            .unwrap();
        let steps = &table.chains[chain].rules[at].expressions;
        steps.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        rule("forward", 0)[2..],
        [
            "[ meta load l4proto => reg 1 ]",
            "[ cmp eq reg 1 0x00000006 ]",
            "[ payload load 1b @ transport header + 13 => reg 1 ]",
            "[ bitwise reg 1 = ( reg 1 & 0x00000006 ) ^ 0x00000000 ]",
            "[ cmp eq reg 1 0x00000002 ]",
            "[ rt load tcpmss => reg 1 ]",
            "[ byteorder reg 1 = hton(reg 1, 2, 2) ]",
            "[ exthdr write tcpopt reg 1 => 2b @ 2 + 2 ]",
        ]
    );
    assert_eq!(
        rule("ports", 2)[8..],
        [
            "[ immediate reg 1 0x0300090a ]",
            "[ immediate reg 2 0x0000fb20 ]",
            "[ nat dnat ip addr_min reg 1 proto_min reg 2 flags 0x2 ]",
        ]
    );
    assert_eq!(
        rule("from-svgold-a", 6),
        ["[ immediate reg 0 jump -> any-guest ]"]
    );
}

#[test]
fn a_change_is_ours_by_its_socket_and_anothers_by_its_name() {
    let change = |port: u32, table: &str| {
        let mut writer = attributes::Writer::default();
        let head = |kind| attributes::Head {
            kind,
            flags: 0,
            sequence: 0,
            family: 1,
            resource: 0,
        };
        writer.message(head(wire::DELETE_TABLE), |writer| writer.text(1, table));
        writer.message(head(NEW_GENERATION), |writer| {
            writer.u32(1, 5);
            writer.u32(2, 4711);
            writer.text(3, "nft");
        });
        let mut bytes = writer.finish().unwrap();
        let second = u32::from_ne_bytes(*bytes.first_chunk().unwrap()) as usize;
        for at in [0, second] {
            bytes[at + 12..at + 16].copy_from_slice(&port.to_ne_bytes());
        }
        (bytes, second)
    };
    let mut folded = Folded::new(TAG, 7);
    let mut after = |(bytes, _): &(Vec<u8>, usize)| {
        folded.fold(bytes).unwrap();
        folded.take_changes()
    };
    assert_eq!(after(&change(7, TAG)), Changes::default());
    assert_eq!(after(&change(8, "foreign")), Changes::default());
    let by = Some(Other {
        pid: 4711,
        name: "nft".to_owned(),
    });
    let foreign = Changes {
        ours: true,
        families: [Family::Inet].into(),
        by,
        lost: false,
    };
    assert_eq!(after(&change(8, TAG)), foreign);
    assert_eq!(
        after(&change(8, "foreign")),
        Changes::default(),
        "the table of the last change is forgotten"
    );
    // A change whose end comes later is told at its end.
    let (bytes, second) = change(8, TAG);
    let mut folded = Folded::new(TAG, 7);
    folded.fold(&bytes[..second]).unwrap();
    assert_eq!(folded.take_changes(), Changes::default());
    folded.fold(&bytes[second..]).unwrap();
    assert_eq!(folded.take_changes(), foreign);
    assert!(folded.fold(&bytes[..30]).is_err());
}

fn any_filter() -> impl Strategy<Value = Filter> {
    let ip = prop_oneof![
        any::<u32>().prop_map(|ip| IpAddr::from((ip | 1).to_be_bytes())),
        any::<u128>().prop_map(|ip| IpAddr::from((ip | 1).to_be_bytes())),
    ];
    let forward = (
        any::<bool>(),
        any::<u16>(),
        0..40_u16,
        ip.clone(),
        any::<u16>(),
        any::<Option<u8>>(),
    );
    let forwards = proptest::collection::vec(forward, 0..20);
    let sender = (any::<[u8; 6]>(), proptest::collection::btree_set(ip, 0..20));
    let senders = proptest::collection::btree_map("[a-z][a-z0-9.-]{0,14}", sender, 0..5);
    let subnet = prop_oneof![
        (any::<[u8; 3]>(), 8..=30_u8).prop_map(|([a, b, c], prefix)| (IpAddr::from([10, a, b, c]), prefix)),
        (any::<u64>(), 8..=126_u8).prop_map(|(low, prefix)| (
            IpAddr::from((0xfd00_u128 << 112 | u128::from(low)).to_be_bytes()),
            prefix
        )),
    ];
    let subnets = proptest::collection::vec(subnet, 0..4);
    let answers = proptest::collection::btree_map("[a-z][a-z0-9.-]{0,14}", 1..8_u32, 0..8);
    (any::<bool>(), subnets, forwards, answers, senders).prop_map(
        |(out, subnets, forwards, answers, senders)| Filter {
            tag: TAG.to_owned(),
            bridge: LinkName::parse(TAG).unwrap(),
            way_out: if out { WayOut::Masquerade } else { WayOut::None },
            subnets: subnets
                .into_iter()
                .filter_map(|(ip, prefix)| {
                    Some(
                        sovereign_protocol::subnet::HostAddress::parse(&format!("{ip}/{prefix}"))
                            .ok()?
                            .subnet(),
                    )
                })
                .collect(),
            forwards: forwards
                .into_iter()
                .filter_map(|(udp, first, span, to, to_port, listen)| {
                    let ports = Ports::range(first, first.checked_add(span)?)?;
                    ports.moved_to(to_port)?;
                    Some(PortForward {
                        transport: if udp { Transport::Udp } else { Transport::Tcp },
                        listen: listen
                            .filter(|_| to.is_ipv4())
                            .map(|last| [192, 0, 2, last].into()),
                        ports,
                        to,
                        to_port,
                    })
                })
                .collect(),
            answers: answers
                .into_iter()
                .filter_map(|(link, number)| Some((LinkName::parse(&link)?, number << MASK.trailing_zeros())))
                .collect(),
            senders: senders
                .into_iter()
                .filter_map(|(link, (mac, addresses))| {
                    let mac = Mac(mac);
                    Some((LinkName::parse(&link)?, Sender { mac, addresses }))
                })
                .collect(),
        },
    )
}

proptest! {
    #[test]
    fn what_was_written_is_read(filter in any_filter()) {
        let wanted = tables(&filter).unwrap();
        prop_assert_eq!(read(&written(&wanted)), wanted);
    }

    #[test]
    fn another_filter_is_other_tables(filter in any_filter()) {
        let made = tables(&filter).unwrap();
        let without = |change: &dyn Fn(&mut Filter)| {
            let mut filter = filter.clone();
            change(&mut filter);
            tables(&filter).unwrap()
        };
        prop_assert_ne!(&made, &without(&|filter| filter.way_out = match filter.way_out {
            WayOut::None => WayOut::Masquerade,
            WayOut::Masquerade => WayOut::None,
        }));
        if !filter.forwards.is_empty() {
            prop_assert_ne!(&made, &without(&|filter| { filter.forwards.pop_first(); }));
        }
        if !filter.senders.is_empty() {
            prop_assert_ne!(&made, &without(&|filter| { filter.senders.pop_first(); }));
        }
    }

    #[test]
    fn nothing_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut reading = Reading::new(TAG, Ownership::Owned, 7);
        for message in messages(&bytes).flatten() {
            let _ = reading.take(&message);
        }
        let _ = reading.finish();
        let _ = Folded::new(TAG, 7).fold(&bytes);
    }
}
