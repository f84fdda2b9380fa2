use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};

use super::model::Model;
use super::*;
use crate::filter::{Filter, PortForward, Sender, WayOut};
use crate::names::{LinkName, Mac, Mark};

const TAG: &str = "sv5pkj";

fn forward(transport: Transport, listen: Option<&str>, ports: &str, to: &str, to_port: u16) -> PortForward {
    PortForward {
        transport,
        listen: listen.map(|text| text.parse().unwrap()),
        ports: Ports::parse(ports).unwrap(),
        to: to.parse().unwrap(),
        to_port,
    }
}

fn filter() -> Filter {
    use Transport::{Tcp, Udp};
    Filter {
        tag: TAG.to_owned(),
        bridge: LinkName::parse("sv5pkj").unwrap(),
        subnets: ["192.168.100.0/24", "fd00:1::/64"]
            .map(|text| text.parse().unwrap())
            .into(),
        way_out: WayOut::Masquerade,
        forwards: [
            forward(Tcp, None, "15432", "192.168.100.2", 5432),
            forward(Udp, None, "5000-5010", "192.168.100.2", 6000),
            forward(Tcp, Some("10.0.0.5"), "80-89", "192.168.100.3", 80),
            forward(Tcp, None, "443", "fd00:1::3", 8443),
            forward(Udp, Some("fd01::5"), "7-9", "fd00:1::3", 17),
        ]
        .into(),
        answers: BTreeMap::new(),
        senders: [].into(),
    }
}

fn all() -> Able {
    able(Table::ALL)
}

fn able(tables: impl Into<BTreeSet<Table>>) -> Able {
    let tables = tables.into();
    Able { tables, marks: true }
}

fn wanted4(filter: &Filter) -> Wanted {
    wanted(filter, Family::V4, &all()).unwrap()
}

fn observe(model: &Model) -> Observed {
    parse(TAG, &model.to_string())
}

fn fresh(wanted: &Wanted) -> String {
    plan(wanted, &observe(&Model::new())).unwrap().to_string()
}

#[test]
fn the_text_for_empty_tables_is_this() {
    let expected = "\
*filter
:sv5pkj-forward - [0:0]
-A sv5pkj-forward -o sv5pkj -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment sv5pkj -j ACCEPT
-A sv5pkj-forward -o sv5pkj -m conntrack --ctstate DNAT -m comment --comment sv5pkj -j ACCEPT
-A sv5pkj-forward -i sv5pkj -m conntrack --ctstate DNAT --ctdir REPLY -m comment --comment sv5pkj -j ACCEPT
-A sv5pkj-forward -i sv5pkj -o sv5pkj -m comment --comment sv5pkj -j ACCEPT
-A sv5pkj-forward -i sv5pkj -m conntrack --ctstate INVALID -m comment --comment sv5pkj -j DROP
-A sv5pkj-forward -s 192.168.100.0/24 -i sv5pkj -m comment --comment sv5pkj -j ACCEPT
-A sv5pkj-forward -i sv5pkj -m comment --comment sv5pkj -j REJECT --reject-with icmp-admin-prohibited
-A sv5pkj-forward -o sv5pkj -m comment --comment sv5pkj -j DROP
-I FORWARD -m comment --comment sv5pkj -j sv5pkj-forward
COMMIT
*mangle
:sv5pkj-clamp - [0:0]
-A sv5pkj-clamp -i sv5pkj -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment sv5pkj -j TCPMSS --clamp-mss-to-pmtu
-A sv5pkj-clamp -o sv5pkj -p tcp -m tcp --tcp-flags SYN,RST SYN -m comment --comment sv5pkj -j TCPMSS --clamp-mss-to-pmtu
-I FORWARD -m comment --comment sv5pkj -j sv5pkj-clamp
COMMIT
*nat
:sv5pkj-out - [0:0]
-A sv5pkj-out ! -d 127.0.0.0/8 -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 15432 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.2:5432
-A sv5pkj-out -d 10.0.0.5/32 -p tcp -m tcp --dport 80:89 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.3
-A sv5pkj-out ! -d 127.0.0.0/8 -p udp -m addrtype --dst-type LOCAL -m udp --dport 5000:5010 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.2:6000-6010/5000
:sv5pkj-post - [0:0]
-A sv5pkj-post -s 192.168.100.0/24 ! -o sv5pkj -m comment --comment sv5pkj -j MASQUERADE
-A sv5pkj-post -s 192.168.100.0/24 -d 192.168.100.0/24 -o sv5pkj -m conntrack --ctstate DNAT -m comment --comment sv5pkj -j MASQUERADE
:sv5pkj-pre - [0:0]
-A sv5pkj-pre ! -d 127.0.0.0/8 -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 15432 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.2:5432
-A sv5pkj-pre -d 10.0.0.5/32 -p tcp -m tcp --dport 80:89 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.3
-A sv5pkj-pre ! -d 127.0.0.0/8 -p udp -m addrtype --dst-type LOCAL -m udp --dport 5000:5010 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.2:6000-6010/5000
-I OUTPUT -m comment --comment sv5pkj -j sv5pkj-out
-I POSTROUTING -m comment --comment sv5pkj -j sv5pkj-post
-I PREROUTING -m comment --comment sv5pkj -j sv5pkj-pre
COMMIT
";
    assert_eq!(fresh(&wanted4(&filter())), expected);
    let six = fresh(&wanted(&filter(), Family::V6, &all()).unwrap());
    for line in [
        "-A sv5pkj-forward -i sv5pkj -m comment --comment sv5pkj -j REJECT --reject-with icmp6-adm-prohibited",
        "-A sv5pkj-pre ! -d ::1/128 -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 443 -m comment --comment sv5pkj -j DNAT --to-destination [fd00:1::3]:8443",
        "-A sv5pkj-out -d fd01::5/128 -p udp -m udp --dport 7:9 -m comment --comment sv5pkj -j DNAT --to-destination [fd00:1::3]:17-19/7",
        "-A sv5pkj-post -s fd00:1::/64 ! -o sv5pkj -m comment --comment sv5pkj -j MASQUERADE",
    ] {
        assert!(six.lines().any(|there| there == line), "{line}\n{six}");
    }
}

#[test]
fn without_a_way_out_guests_are_refused_and_forwards_work() {
    let mut filter = filter();
    filter.way_out = WayOut::None;
    let text = fresh(&wanted4(&filter));
    assert!(!text.contains("-s 192.168.100.0/24 -i sv5pkj"), "{text}");
    assert!(!text.contains("! -o sv5pkj"), "{text}");
    assert!(
        text.contains("-j DNAT") && text.contains("-d 192.168.100.0/24 -o sv5pkj"),
        "{text}"
    );
    filter.forwards.clear();
    let wanted = wanted4(&filter);
    assert_eq!(wanted.chains.keys().collect::<Vec<_>>(), [&Table::Filter]);
    assert_eq!(wanted.jumps.len(), 1);
}

#[test]
fn who_asks_by_a_link_is_answered_there() {
    let mut filter = filter();
    filter.answers = [("tun1", 0x0400_0000), ("wlan0", 0x0800_0000)]
        .map(|(link, mark)| (LinkName::parse(link).unwrap(), mark))
        .into();
    let expected = "\
-A sv5pkj-answers -i sv5pkj -m conntrack --ctstate DNAT --ctdir REPLY -m comment --comment sv5pkj -j CONNMARK --restore-mark --nfmask 0x1c000000 --ctmask 0x1c000000
-A sv5pkj-asked -i tun1 -o sv5pkj -m conntrack --ctstate DNAT --ctdir ORIGINAL -m comment --comment sv5pkj -j CONNMARK --set-xmark 0x4000000/0x1c000000
-A sv5pkj-asked -i wlan0 -o sv5pkj -m conntrack --ctstate DNAT --ctdir ORIGINAL -m comment --comment sv5pkj -j CONNMARK --set-xmark 0x8000000/0x1c000000
";
    let text = fresh(&wanted4(&filter));
    let lines: Vec<_> = text.lines().filter(|line| line.contains("CONNMARK")).collect();
    assert_eq!(lines, expected.lines().collect::<Vec<_>>());
    assert!(
        text.contains("-I PREROUTING -m comment --comment sv5pkj -j sv5pkj-answers"),
        "{text}"
    );
    assert!(
        text.contains("-I FORWARD -m comment --comment sv5pkj -j sv5pkj-asked"),
        "{text}"
    );

    let family = Family::V4;
    let (tables, marks) = (Table::ALL.into(), false);
    let without = wanted(&filter, family, &Able { tables, marks }).unwrap();
    assert_eq!(without.lacks, [Lack::Answers { family }].into());
    assert!(!fresh(&without).contains("CONNMARK"));
    filter.forwards.clear();
    assert!(!fresh(&wanted4(&filter)).contains("CONNMARK"), "nobody can ask");
}

#[test]
fn what_cannot_be_done_is_said() {
    let mut filter = filter();
    let tap = LinkName::parse("sv5pkj-sql").unwrap();
    let sender = Sender {
        mac: Mac([2; 6]),
        addresses: [].into(),
    };
    filter.senders = [(tap.clone(), sender)].into();
    let links = BTreeSet::from([tap]);
    assert_eq!(
        wanted4(&filter).lacks,
        [Lack::Senders { links: links.clone() }].into()
    );

    let family = Family::V6;
    let six = wanted(&filter, family, &able([Table::Filter])).unwrap();
    let mut said = BTreeSet::from([Lack::Senders { links }, Lack::WayOut { family }]);
    for forward in filter.forwards.iter().filter(|forward| forward.to.is_ipv6()) {
        let (forward, why) = (forward.clone(), ForwardLack::NoNat);
        said.insert(Lack::Forward { forward, why });
    }
    assert_eq!(six.lacks, said);
    assert_eq!(six.chains.keys().collect::<Vec<_>>(), [&Table::Filter]);
    let text = fresh(&six);
    assert!(
        !text.contains("-s fd00:1::/64 -i"),
        "what is not translated is refused: {text}"
    );

    let none = wanted(&filter, Family::V4, &able([Table::Nat])).unwrap();
    let family = Family::V4;
    assert!(none.lacks.contains(&Lack::Filtering { family }));
    assert!(none.lacks.contains(&Lack::Clamp { family }));

    let bad = |listen, ports: &str, to_port, why| {
        let forward = forward(Transport::Tcp, Some(listen), ports, "192.168.100.2", to_port);
        filter.forwards = [forward.clone()].into();
        let wanted = wanted4(&filter);
        assert!(
            wanted.lacks.contains(&Lack::Forward { forward, why }),
            "{:?}",
            wanted.lacks
        );
        assert!(!fresh(&wanted).contains("DNAT --to"));
        wanted.lacks.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let mut bad = bad;
    assert!(
        bad("127.0.0.1", "80", 80, ForwardLack::Loopback)
            .concat()
            .contains("tcp 80 to 192.168.100.2")
    );
    bad("fd00::1", "80", 80, ForwardLack::Families);
    bad("10.0.0.5", "80-90", 65_530, ForwardLack::Ports);
}

#[test]
fn a_tag_begins_the_names_of_chains_or_is_refused() {
    let tag = Mark::of(&Name::parse("default").unwrap()).prefix;
    assert_eq!(tag, TAG);
    let longest = "a".repeat(CHAIN_BYTES - "-forward".len());
    for good in [tag.as_str(), &longest] {
        let filter = Filter {
            tag: good.to_owned(),
            ..filter()
        };
        let wanted = wanted4(&filter);
        let names = wanted.chains.values().flat_map(|chains| chains.keys());
        assert!(names.into_iter().all(|name| name.len() <= CHAIN_BYTES));
    }
    for bad in ["", "a b", "a\nCOMMIT", "-x", &format!("{longest}a"), "ä"] {
        assert!(Wanted::nothing(bad).is_err(), "{bad:?}");
    }
}

/// netd's chains: a vendor's chain first, a DROP last.
const ANDROID: &str = "*filter
:oem_fwd - [0:0]
:fw_FORWARD - [0:0]
:tetherctrl_FORWARD - [0:0]
-A FORWARD -j oem_fwd
-A FORWARD -j fw_FORWARD
-A FORWARD -j tetherctrl_FORWARD
-A tetherctrl_FORWARD -j DROP
COMMIT
";

#[test]
fn on_android_the_vendors_chain_leads_to_ours() {
    let mut model = Model::new();
    let wanted = wanted4(&filter());
    model
        .restore(&plan(&wanted, &observe(&model)).unwrap().to_string())
        .unwrap();
    let android = ANDROID.replace("-A FORWARD -j oem", "-I FORWARD -j oem");
    model.restore(&android).unwrap(); // netd came later: our jump is in FORWARD
    let moved = plan(&wanted, &observe(&model)).unwrap().to_string();
    let expected = "\
*filter
-D FORWARD -m comment --comment sv5pkj -j sv5pkj-forward
-I oem_fwd -m comment --comment sv5pkj -j sv5pkj-forward
COMMIT
";
    assert_eq!(moved, expected);
    model.restore(&moved).unwrap();
    assert_eq!(plan(&wanted, &observe(&model)), None);

    // Where something comes before the vendor's chain, that is not early enough any more.
    model.restore("*filter\n-I FORWARD -j DROP\nCOMMIT\n").unwrap();
    let back = plan(&wanted, &observe(&model)).unwrap().to_string();
    assert!(
        back.contains("-D oem_fwd") && back.contains("-I FORWARD"),
        "{back}"
    );
    // A chain of that name which FORWARD does not lead to, or only sometimes, is none.
    for text in ["-A FORWARD -j DROP", "-A FORWARD -i wlan0 -j oem_fwd"] {
        let save = format!("*filter\n:oem_fwd - [0:0]\n{text}\nCOMMIT\n");
        assert!(!parse(TAG, &save).oem, "{text}");
    }
}

#[test]
fn other_instances_may_be_first_as_well_and_nobody_else() {
    let mut model = Model::new();
    let wanted = wanted4(&filter());
    model.restore(&fresh(&wanted)).unwrap();
    let other = Filter {
        tag: "svabcd".to_owned(),
        ..filter()
    };
    let theirs = parse("svabcd", &model.to_string());
    model
        .restore(&plan(&wanted4(&other), &theirs).unwrap().to_string())
        .unwrap();
    assert_eq!(
        plan(&wanted, &observe(&model)),
        None,
        "two instances do not fight for the first place"
    );
    assert_eq!(
        tags(&model.to_string()),
        [TAG, "svabcd"].map(str::to_owned).into()
    );

    model.restore("*nat\n-I POSTROUTING -j RETURN\nCOMMIT\n").unwrap();
    let repair = plan(&wanted, &observe(&model)).unwrap();
    assert_eq!(repair.tables.keys().collect::<Vec<_>>(), [&Table::Nat]);
    assert_eq!(repair.tables[&Table::Nat].len(), 2);
    model.restore(&repair.to_string()).unwrap();
    assert_eq!(plan(&wanted, &observe(&model)), None);
    assert_eq!(
        plan(&wanted4(&other), &parse("svabcd", &model.to_string()))
            .unwrap()
            .tables
            .len(),
        1
    );
}

#[test]
fn only_what_differs_is_repaired() {
    let mut model = Model::new();
    let wanted = wanted4(&filter());
    model.restore(&fresh(&wanted)).unwrap();
    model
        .restore("*mangle\n-A sv5pkj-clamp -j RETURN\nCOMMIT\n")
        .unwrap();
    let repair = plan(&wanted, &observe(&model)).unwrap();
    let changes = &repair.tables[&Table::Mangle];
    assert_eq!((repair.tables.len(), changes.len()), (1, 3));
    assert_eq!(changes[0], Change::Empty("sv5pkj-clamp".to_owned()));

    let gone = remove(&observe(&model)).unwrap().to_string();
    model.restore(&gone).unwrap();
    assert_eq!(model, Model::new());
    assert_eq!(remove(&observe(&model)), None);
}

#[test]
fn counters_warnings_other_tables_and_line_ends_in_quotes_are_read_over() {
    let save = "# Warning: iptables-legacy tables present, use \"iptables-legacy-save\n*raw\n:sv5pkj-x - [0:0]\n\
        -A PREROUTING -j sv5pkj-pre\nCOMMIT\n*nat\n:sv5pkj-pre - [1:2]\n[3:4] -A PREROUTING -j sv5pkj-pre\n\
        -A PREROUTING -m comment --comment \"a\n-A PREROUTING -j sv5pkj-pre\n\" -j RETURN\n\
        -A sv5pkj-pre -m comment --comment \"a\nb\" -j RETURN\n-A PREROUTING -j sv5pkj-post\nCOMMIT";
    let seen = parse(TAG, save);
    let jumps: Vec<_> = seen
        .guides
        .iter()
        .map(|jump| (jump.rule.to_string(), jump.leads))
        .collect();
    assert_eq!(
        jumps,
        [
            ("-j sv5pkj-pre".to_owned(), true),
            ("-j sv5pkj-post".to_owned(), false)
        ]
    );
    assert_eq!(seen.chains[&Table::Nat]["sv5pkj-pre"].len(), 1);
    assert_eq!(seen.chains.len(), 1);
    // Found by fuzzing: the name of a chain is written as it is.
    for chain in [
        "sv5pkj-a\"\n-A FORWARD\"",
        "sv5pkj-\\",
        "sv5pkj-\u{1b}[1m",
        "FOR\"\nCOMMIT\"",
    ] {
        let save = format!("*filter\n:{chain} - [0:0]\n-A {chain} -j sv5pkj-forward\n");
        let seen = parse(TAG, &save);
        assert!(seen.chains.is_empty() && seen.guides.is_empty(), "{seen:?}");
    }
    // A quote that is never closed ends with its line.
    let open = format!(
        "*nat\n-A x -m comment --comment \"{}\n-A OUTPUT -j sv5pkj-out\n",
        "x\n".repeat(9000)
    );
    assert_eq!(parse(TAG, &open).guides.len(), 1);
}

/// A line of tables that others, siblings and our own older versions changed.
fn line() -> impl Strategy<Value = (usize, String)> {
    let chain = prop_oneof![
        "FORWARD",
        "OUTPUT",
        "POSTROUTING",
        "PREROUTING",
        "oem_fwd",
        "sv5pkj-forward",
        "sv5pkj-pre",
        "sv5pkj-old",
        "svother"
    ];
    let rule = prop_oneof![
        4 => "-s 10\\.0\\.0\\.[0-9]/32 -j (ACCEPT|DROP|RETURN)",
        1 => Just("-j oem_fwd".to_owned()),
        1 => Just("-m comment --comment svabcd -j svabcd-forward".to_owned()),
        1 => Just("-m comment --comment \"not sv5pkj-forward\" -j DROP".to_owned()),
        1 => Just("-m comment --comment sv5pkj -j DROP".to_owned()),
        1 => Just("-p tcp -j sv5pkj-old".to_owned()),
        4 => "(forward|pre|post|out|clamp)".prop_map(|role| format!("-m comment --comment sv5pkj -j sv5pkj-{role}")),
    ];
    (0..3usize, "[AI]", chain, rule)
        .prop_map(|(table, how, chain, rule)| (table, format!("-{how} {chain} {rule}")))
}

fn is_ours(chain: &str, rule: &str) -> bool {
    let ours = ["--comment sv5pkj ", "-j sv5pkj-"];
    chain.starts_with("sv5pkj-") || ours.iter().any(|mark| rule.contains(mark))
}

fn disturbed(lines: &[(usize, String)]) -> Model {
    let mut model = Model::new();
    for table in Table::ALL {
        let ours =
            ["forward", "pre", "post", "out", "clamp", "old"].map(|role| format!(":sv5pkj-{role} - [0:0]\n"));
        let chains = format!(
            "{}:oem_fwd - [0:0]\n:svabcd-forward - [0:0]\n:svother - [0:0]\n",
            ours.concat()
        );
        model.restore(&format!("*{table}\n{chains}COMMIT\n")).unwrap();
    }
    for (table, line) in lines {
        let table = Table::ALL[*table];
        let _ = model.restore(&format!("*{table}\n{line}\nCOMMIT\n")); // not every chain is in every table
    }
    model
}

proptest! {
    #[test]
    fn a_plan_leaves_nothing_to_plan_and_touches_nothing_foreign(
        lines in proptest::collection::vec(line(), 0..40),
        way_out in any::<bool>(),
        forwards in any::<bool>(),
        up in any::<bool>(),
    ) {
        let mut model = disturbed(&lines);
        let foreign = model.without(is_ours);
        let mut filter = filter();
        filter.way_out = if way_out { WayOut::Masquerade } else { WayOut::None };
        if !forwards {
            filter.forwards.clear();
        }
        let wanted = if up { wanted4(&filter) } else { Wanted::nothing(TAG).unwrap() };
        let text = plan(&wanted, &observe(&model)).map(|plan| plan.to_string()).unwrap_or_default();
        for line in text.lines().filter(|line| line.starts_with("-D")) {
            prop_assert!(line.contains("sv5pkj"), "{line}");
        }
        if let Err(line) = model.restore(&text) {
            return Err(TestCaseError::fail(format!("refused: {line}\n{text}\n{model}")));
        }
        prop_assert_eq!(plan(&wanted, &observe(&model)), None, "{}\n{}", text, model);
        prop_assert_eq!(model.without(is_ours), foreign);
        if !up {
            prop_assert!(!model.to_string().contains("sv5pkj-forward -"));
            prop_assert_eq!(remove(&observe(&model)), None);
        }
    }

    #[test]
    fn no_text_is_too_odd(text in "(\\*nat\n|\\*filter\n|:sv5pkj-pre - \\[0:0\\]\n|-A FORWARD |-A sv5pkj-pre |-j sv5pkj-pre|sv5pkj|\"|\\\\|\n|[a-zä ]){0,60}") {
        let seen = parse(TAG, &text);
        let wanted = wanted4(&filter());
        let printed = plan(&wanted, &seen).map(|plan| plan.to_string()).unwrap_or_default();
        for line in printed.lines() {
            prop_assert!(line.starts_with("*") || line == "COMMIT" || line.contains("sv5pkj"), "{line:?}");
        }
        let _ = tags(&text);
    }
}
