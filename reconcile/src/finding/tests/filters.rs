//! Findings about packet filters of others.

use super::*;

/// What iptables may say, and what is found for it.
const FORWARDS: [(&str, &[Code]); 16] = [
    (":FORWARD DROP [0:0]\n", &[Code::ForwardDrop]),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -j DROP\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -j REJECT --reject-with icmp-port-unreachable\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n:tetherctrl_FORWARD - [0:0]\n-A FORWARD -j tetherctrl_FORWARD\n-A tetherctrl_FORWARD -j DROP\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD DROP [0:0]\n-A FORWARD -i sv5pkj -j ACCEPT\n-A FORWARD -o sv5pkj -j ACCEPT\n",
        &[],
    ),
    (
        ":FORWARD DROP [0:0]\n-A FORWARD -i sv+ -j ACCEPT\n-A FORWARD -d 192.168.100.0/24 -j ACCEPT\n",
        &[],
    ),
    (
        ":FORWARD DROP [0:0]\n-A FORWARD -i docker0 -j ACCEPT\n-A FORWARD -p udp -j ACCEPT\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD DROP [0:0]\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -m conntrack --ctstate INVALID -j DROP\n",
        &[],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -p tcp -m tcp --dport 25 -j DROP\n-A FORWARD -s 10.7.0.0/16 -j DROP\n",
        &[],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -m set --match-set bad src -j DROP\n",
        &[Code::ForwardMayDrop],
    ),
    (
        ":FORWARD DROP [0:0]\n-A FORWARD -m mark --mark 0x1/0x1 -j ACCEPT\n",
        &[Code::ForwardMayDrop],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD ! -i sv5pkj -o sv5pkj -m conntrack --ctstate NEW -m conntrack ! --ctstatus DNAT -j DROP\n",
        &[],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n:A - [0:0]\n-A FORWARD -j A\n-A FORWARD -j DROP\n-A A -i sv5pkj -j ACCEPT\n-A A -o sv5pkj -g B\n:B - [0:0]\n-A B -j ACCEPT\n",
        &[],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n:A - [0:0]\n-A FORWARD -j A\n-A A -i sv5pkj -j RETURN\n-A A -j LOG\n-A A -j DROP\n",
        &[Code::ForwardDrop],
    ),
    (
        ":FORWARD ACCEPT [0:0]\n-A FORWARD -j NFQUEUE --queue-num 1\n",
        &[Code::ForwardMayDrop],
    ),
];

#[test]
fn chains_of_iptables_are_followed() {
    for (text, codes) in FORWARDS {
        let mut host = Host::linux();
        host.save(&format!("*filter\n{text}COMMIT\n"));
        assert_eq!(host.codes(), codes, "{text}");
        for finding in host.found() {
            assert_eq!(finding.stops, finding.code == Code::ForwardDrop, "{text}");
            assert_eq!(finding.family, Some(Family::V4));
        }
    }
}

#[test]
fn docker_and_firewalld_have_their_own_way_to_let_guests_pass() {
    let mut host = Host::linux();
    host.save("*filter\n:FORWARD DROP [0:0]\n:DOCKER-USER - [0:0]\n-A FORWARD -j DOCKER-USER\nCOMMIT\n");
    let fix = host.only(Code::ForwardDrop).fix;
    assert_eq!(
        fix,
        "iptables -t filter -I DOCKER-USER -i sv5pkj -j ACCEPT && iptables -t filter -I DOCKER-USER -o sv5pkj -j ACCEPT"
    );
    let mut host = Host::linux();
    host.tables.push(table("firewalld", nft::Policy::Drop, vec![]));
    assert!(host.only(Code::ForwardDrop).fix.starts_with("firewall-cmd"));
}

/// A table `inet NAME` with one chain where packets are forwarded.
fn table(name: &str, policy: nft::Policy, rules: Vec<Vec<nft::Expression>>) -> nft::Table {
    let mut chain = nft::Chain::at("filter", nft::Point::Forward, 10);
    if let Some(hook) = &mut chain.hook {
        hook.policy = policy;
    }
    chain.rules = rules
        .into_iter()
        .map(|expressions| nft::Rule {
            comment: String::new(),
            expressions,
        })
        .collect();
    nft::Table {
        comment: String::new(),
        chains: [("fwd".to_owned(), chain)].into(),
        ..nft::Table::new(nft::Family::Inet, name)
    }
}

#[test]
fn chains_of_nf_tables_are_followed() {
    use nft::{Comparison, CtKey, Expression, MetaKey, Policy, Register, Verdict};
    let unknown = |name: &str| Expression::Unknown {
        name: name.to_owned(),
        bytes: Vec::new(),
    };
    let comes_by = |link: &str, how| {
        let mut value = link.as_bytes().to_vec();
        value.resize(16, 0);
        let (key, to) = (MetaKey::InName, Register::One);
        let load = Expression::Meta { key, to };
        vec![
            load,
            Expression::Compare {
                register: to,
                how,
                value,
            },
        ]
    };
    let established = || {
        let register = Register::One;
        let load = Expression::Ct {
            key: CtKey::State,
            to: register,
        };
        let mask = Expression::Mask {
            register,
            mask: 6u32.to_ne_bytes().to_vec(), // established, related
        };
        let compare = Expression::Compare {
            register,
            how: Comparison::NotEqual,
            value: vec![0; 4],
        };
        vec![load, mask, compare]
    };
    let ends = |mut steps: Vec<Expression>, verdict| {
        steps.push(Expression::Verdict(verdict));
        steps
    };
    let accept = |steps| ends(steps, Verdict::Accept);
    let drop = |steps| ends(steps, Verdict::Drop);
    let guests = || accept(comes_by("sv5pkj", Comparison::Equal));
    for (what, policy, rules, code) in [
        ("policy", Policy::Drop, vec![], Some(Code::ForwardDrop)),
        (
            "all refused",
            Policy::Accept,
            vec![vec![unknown("reject")]],
            Some(Code::ForwardDrop),
        ),
        (
            "answers only",
            Policy::Drop,
            vec![accept(established())],
            Some(Code::ForwardDrop),
        ),
        (
            "guests and answers",
            Policy::Accept,
            vec![accept(established()), guests(), drop(vec![])],
            Some(Code::ForwardDrop),
        ),
        (
            "not eth0's",
            Policy::Accept,
            vec![
                accept(comes_by("eth0", Comparison::Equal)),
                guests(),
                drop(vec![]),
            ],
            None,
        ),
        (
            "others",
            Policy::Accept,
            vec![drop(comes_by("wlan7", Comparison::Equal))],
            None,
        ),
        (
            "counted",
            Policy::Accept,
            vec![vec![unknown("counter"), unknown("log")]],
            None,
        ),
        (
            "a set",
            Policy::Accept,
            vec![drop(vec![unknown("lookup")])],
            Some(Code::ForwardMayDrop),
        ),
        (
            "a map of verdicts",
            Policy::Accept,
            vec![vec![unknown("lookup")]],
            Some(Code::ForwardMayDrop),
        ),
        (
            "a set that may accept",
            Policy::Drop,
            vec![accept(vec![unknown("lookup")])],
            Some(Code::ForwardMayDrop),
        ),
        (
            "rules of iptables",
            Policy::Accept,
            vec![vec![unknown("match"), unknown("target")]],
            Some(Code::ForwardMayDrop),
        ),
        (
            "nobody there",
            Policy::Accept,
            vec![ends(vec![], Verdict::Jump("gone".to_owned()))],
            Some(Code::ForwardMayDrop),
        ),
    ] {
        let mut host = Host::linux();
        host.tables.push(table("admin", policy, rules));
        assert_eq!(host.codes(), code.into_iter().collect::<Vec<_>>(), "{what}");
    }
    let mut host = Host::linux();
    let mut six = table("admin", Policy::Drop, vec![]);
    six.family = nft::Family::Ip6;
    host.tables.push(six);
    assert_eq!(host.codes(), [], "of another family");
}

#[test]
fn frames_between_guests_are_told_where_the_bridge_asks_the_filter() {
    let mut host = Host::linux();
    host.save("*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -i sv5pkj -o sv5pkj -j DROP\nCOMMIT\n");
    assert_eq!(host.codes(), []);
    host.switches.bridge_calls = [(Family::V4, true)].into();
    assert_eq!(
        host.only(Code::BridgeFiltered).fix,
        "sysctl -w net.bridge.bridge-nf-call-iptables=0"
    );
    host.spec.isolated = true;
    assert_eq!(host.codes(), [], "no frame goes from port to port");
    host.spec.isolated = false;
    host.switches.bridge_calls = [(Family::V6, true)].into();
    assert_eq!(host.codes(), []);
}

#[test]
fn copies_and_taken_ports_are_told_of_rules_that_are_about_guests() {
    let nat =
        |rules: &str| format!("*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n{rules}COMMIT\n");
    let hide = "-A POSTROUTING -s 192.168.100.0/24 -j MASQUERADE\n";
    let mut host = Host::linux();
    host.save(&nat(hide));
    assert_eq!(host.codes(), []);
    host.save(&nat(&hide.repeat(3)));
    let finding = host.only(Code::DuplicateRules);
    assert_eq!(finding.leftover, Some(LeftoverName::DuplicateRules));
    let there = leftovers(&host.look());
    let Item::Copies(copies) = &there[0].items[0].0 else {
        panic!("{there:#?}");
    };
    assert_eq!((copies.count, copies.first, copies.removable), (3, 1, true));
    // A copy behind a rule that counts packets may still meet one.
    let limited = "-A POSTROUTING -s 192.168.100.0/24 -m limit --limit 1/sec -j MASQUERADE\n";
    host.save(&nat(&limited.repeat(2)));
    assert_eq!(host.only(Code::DuplicateRules).leftover, None);
    assert!(leftovers(&host.look()).is_empty());
    for others in [
        "-A POSTROUTING -s 10.7.0.0/16 -j SNAT --to-source 10.0.0.2\n",
        "-A POSTROUTING -m comment --comment sv5pkj -j MASQUERADE\n",
    ] {
        host.save(&nat(&others.repeat(2)));
        assert_eq!(host.codes(), [], "{others}");
    }
    for (rule, code) in [
        (
            "-A PREROUTING -p tcp -m tcp --dport 15432 -j DNAT --to-destination 172.17.0.2:80\n",
            Some(Code::PortTaken),
        ),
        (
            "-A PREROUTING -p tcp -m tcp --dport 15000:16000 -j REDIRECT --to-ports 80\n",
            Some(Code::PortTaken),
        ),
        (
            "-A PREROUTING -p udp -m udp --dport 15432 -j DNAT --to-destination 172.17.0.2:80\n",
            None,
        ),
        (
            "-A PREROUTING -p tcp -m tcp --dport 15433 -j DNAT --to-destination 172.17.0.2:80\n",
            None,
        ),
        (
            "-A PREROUTING -p tcp -m tcp --dport 15432 -m comment --comment sv5pkj -j DNAT --to-destination 192.168.100.2:5432\n",
            None,
        ),
    ] {
        host.save(&nat(rule));
        assert_eq!(host.codes(), code.into_iter().collect::<Vec<_>>(), "{rule}");
    }
}

proptest::proptest! {
    /// Whatever iptables prints, following it ends and says something.
    #[test]
    fn no_text_of_iptables_panics(text in "(\\*(filter|nat|mangle)\n|:(FORWARD|A|B) (DROP|ACCEPT|-) \\[0:0\\]\n|-A (FORWARD|A|B|POSTROUTING)( -j (A|B|DROP|ACCEPT|RETURN)| -g (A|B)| ! -i [a-z]{1,3}| -s [0-9./]{1,12}| \"|[ -~]{0,9})*\n|COMMIT\n){0,30}") {
        let mut host = Host::linux();
        host.save(&text);
        let _ = host.found();
    }
}
