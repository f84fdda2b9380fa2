//! Each code red and green, on machines and phones in memory, with a small FIB that answers as the kernel would.

use std::collections::BTreeSet;

use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::HostAddress;

use super::leftover::{Item, leftovers};
use super::probe::{Question, Refused, Reply, Way, is_about};
use super::question::{elsewhere, questions};
use super::*;
use crate::filter::PortForward;
use crate::names::LinkName;
use crate::nft;
use crate::plan::plan;
use crate::route::{KERNEL, MAIN, Route, RouteKind};
use crate::rule::{Rule, RuleAction};
use crate::simulated::{Simulated, default_route, phone, router};
use crate::uplink::Uplink;
use crate::wanted::{NetworkSpec, Place, Switched, Wanted};

mod filters;

const BRIDGE: &str = "sv5pkj";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn spec(uplink: Uplink) -> NetworkSpec {
    NetworkSpec {
        place: Place::Host,
        addresses: [HostAddress::parse("192.168.100.1/24").unwrap()].into(),
        guests: [(name("sql"), ["192.168.100.2".parse().unwrap()].into())].into(),
        uplink,
        forwards: [PortForward {
            transport: Transport::Tcp,
            listen: None,
            ports: Ports::parse("15432").unwrap(),
            to: "192.168.100.2".parse().unwrap(),
            to_port: 5432,
        }]
        .into(),
        ..NetworkSpec::default()
    }
}

fn named(link: &str) -> Uplink {
    Uplink::Named(vec![LinkName::parse(link).unwrap()])
}

/// A host with our network in it, to be disturbed.
struct Host {
    kernel: Simulated,
    spec: NetworkSpec,
    foreign: Vec<Rule>,
    routes: Vec<Route>,
    switches: Switches,
    tables: Vec<nft::Table>,
    saves: Vec<Saved>,
    cards: Cards,
    /// The kernel drops what comes by this link.
    strict: Option<(&'static str, Refused)>,
}

impl Host {
    fn of(mut kernel: Simulated, uplink: Uplink) -> Self {
        let spec = spec(uplink);
        for _ in 0..3 {
            let wanted = Self::wanted(&kernel, &spec);
            for step in plan(&wanted, &kernel.state).steps {
                let _ = kernel.apply(&step); // switches are not modelled
            }
        }
        let of_ours = nft::tables(Self::wanted(&kernel, &spec).filter.as_ref().unwrap()).unwrap();
        let bridge = kernel.index(&LinkName::parse(BRIDGE).unwrap()).unwrap();
        kernel.link(bridge, |link| link.carrier = true).unwrap();
        Self {
            kernel,
            spec,
            foreign: Vec::new(),
            routes: Vec::new(),
            switches: Switches::default(),
            tables: of_ours.into_iter().collect(),
            saves: Vec::new(),
            cards: Cards::default(),
            strict: None,
        }
    }

    fn linux() -> Self {
        Self::of(router(), Uplink::Auto)
    }

    fn phone() -> Self {
        Self::of(phone("wlan0", false), Uplink::Auto)
    }

    fn wanted(kernel: &Simulated, spec: &NetworkSpec) -> Wanted {
        Wanted::of(&name("default"), spec, &Switched::new(), &kernel.state).unwrap()
    }

    fn index(&self, link: &str) -> u32 {
        self.kernel.index(&LinkName::parse(link).unwrap()).unwrap()
    }

    fn look(&self) -> Look {
        let observed = self.kernel.state.clone();
        let mut rules: Vec<Rule> = observed.rules.iter().chain(&self.foreign).cloned().collect();
        rules.sort_by_key(|rule| (rule.family, rule.priority)); // the kernel's order, by when they were made among equals
        let mut look = Look {
            ours: Networked {
                wanted: Self::wanted(&self.kernel, &self.spec),
                guests: self.spec.guests.clone(),
                cards: self.cards.clone(),
            },
            observed,
            rules,
            routes: self.routes.clone(),
            switches: self.switches.clone(),
            probes: Vec::new(),
            tables: self.tables.clone(),
            saves: self.saves.clone(),
            unsettled: BTreeSet::new(),
        };
        let known: Vec<&Route> = look.observed.routes.iter().collect();
        let probe = |question: Question| {
            let (reply, rule) = self.answer(&look, &question);
            let probe = Probe::of(question, reply, &look.rules, &known, 0);
            let decided = probe.decided.as_ref().map(|decided| decided.rule.clone());
            assert_eq!(decided, rule, "worked out and walked: {}", probe.text);
            probe
        };
        let probes = questions(&look.ours, &look.observed).into_iter().map(probe);
        look.probes = probes.collect();
        look
    }

    /// What the kernel would answer, and the rule at which it stops.
    fn answer(&self, look: &Look, question: &Question) -> (Reply, Option<Rule>) {
        if let (Some((link, refused)), Some(iif)) = (self.strict, &question.iif)
            && link == iif
        {
            return (Reply::Refused(refused), None);
        }
        let all = || look.observed.routes.iter().chain(&self.routes);
        for rule in look
            .rules
            .iter()
            .filter(|rule| is_about(rule, question, 0) == Some(true))
        {
            let RuleAction::Lookup(table) = rule.action else {
                return (Reply::Refused(Refused::Unreachable), Some(rule.clone()));
            };
            let fits = |route: &&Route| route.table == table && route.to.contains(question.to);
            let best = all()
                .filter(fits)
                .max_by_key(|route| (route.to.length(), u32::MAX - route.metric));
            if let Some(route) = best {
                let link = look.link(route.link).map(|link| link.name.clone());
                let reply = Reply::Sent {
                    table,
                    route: Some(route.to),
                    link,
                    gateway: route.gateway,
                    mtu: None,
                };
                return (reply, Some(rule.clone()));
            }
        }
        (Reply::Refused(Refused::Unreachable), None)
    }

    fn found(&self) -> Vec<Finding> {
        judge(&self.look())
    }

    fn codes(&self) -> Vec<Code> {
        self.found().iter().map(|finding| finding.code).collect()
    }

    /// The only finding.
    fn only(&self, code: Code) -> Finding {
        let mut found = self.found();
        assert_eq!(self.codes(), [code]);
        let finding = found.remove(0);
        assert!(
            !finding.evidence.is_empty() && finding.what.ends_with('.'),
            "{finding:#?}"
        );
        finding
    }

    fn save(&mut self, text: &str) {
        let save = |family| Saved {
            program: "iptables-save".to_owned(),
            family,
            text: format!("# Generated by iptables-save v1.8.9 (nf_tables) on\n{text}"),
        };
        self.saves = vec![save(Family::V4)];
    }
}

fn lookup(priority: u32, table: u32) -> Rule {
    Rule {
        protocol: 3,
        ..Rule::ours(Family::V4, priority, RuleAction::Lookup(table))
    }
}

#[test]
fn where_all_is_well_nothing_is_found_and_each_way_has_its_rule() {
    for host in [Host::linux(), Host::phone(), Host::of(router(), named("eth1"))] {
        assert_eq!(host.found(), []);
        let look = host.look();
        assert!(look.probes.len() >= 3);
        let ways: BTreeSet<Way> = look.probes.iter().map(|probe| probe.question.way).collect();
        assert_eq!(ways.len(), 3);
        for probe in &look.probes {
            let decided = probe.decided.as_ref().expect(&probe.text);
            assert!(decided.surely, "{}", probe.text);
        }
        assert!(leftovers(&look).is_empty());
    }
    let phone = Host::phone();
    let table = 1_000 + phone.index("wlan0");
    let expected = format!(
        "ip route get 1.1.1.1 from 192.168.100.2 iif {BRIDGE}: default via 10.0.0.1 dev wlan0 table {table}, \
         by rule 9010: from all iif {BRIDGE} lookup {table}"
    );
    assert_eq!(phone.look().probes[0].text, expected);
}

#[test]
fn elsewhere_is_nobodys_neighbour() {
    let mut kernel = router();
    let show = |kernel: &Simulated, family| elsewhere(&kernel.state, family).to_string();
    assert_eq!(show(&kernel, Family::V4), "1.1.1.1");
    assert_eq!(show(&kernel, Family::V6), "2606:4700:4700::1111");
    let eth0 = kernel.index(&LinkName::parse("eth0").unwrap()).unwrap();
    let near = HostAddress::parse("1.1.1.9/24").unwrap();
    kernel.add_address(eth0, near, false).unwrap();
    assert_eq!(show(&kernel, Family::V4), "9.9.9.9");
}

#[test]
fn a_rule_that_looks_up_main_is_a_leftover_where_nobody_else_makes_one() {
    let mut phone = Host::phone();
    phone.foreign.push(lookup(1, MAIN));
    let finding = phone.only(Code::LookupMain);
    assert!(!finding.stops, "main has no default route");
    assert_eq!(finding.leftover, Some(LeftoverName::RuleLookupMain));

    let rmnet = phone.index("rmnet1");
    phone
        .kernel
        .state
        .routes
        .insert(default_route(MAIN, rmnet, "10.64.0.1"));
    assert_eq!(phone.codes(), [Code::LookupMain, Code::DefaultInMain]);
    assert!(phone.found()[0].stops, "guests leave by rmnet1");
    let there = leftovers(&phone.look());
    let items: Vec<&Item> = there
        .iter()
        .flat_map(|leftover| &leftover.items)
        .map(|(item, _)| item)
        .collect();
    assert!(
        matches!(items[..], [Item::Rule(rule), Item::Route(route)] if rule.priority == 1 && route.table == MAIN),
        "{there:#?}"
    );

    // On plain Linux main decides anyway; with rules of ours it must not be asked before them.
    let mut linux = Host::linux();
    linux.foreign.push(lookup(1, MAIN));
    assert_eq!(linux.codes(), []);
    let mut scoped = Host::of(router(), named("eth1"));
    scoped.foreign.push(lookup(1, MAIN));
    assert!(scoped.only(Code::LookupMain).stops);
    scoped.foreign = vec![lookup(9_500, MAIN)];
    assert_eq!(scoped.codes(), [], "after ours");
    scoped.foreign = vec![Rule {
        from: Some(prefix("10.7.0.0/16")),
        ..lookup(1, MAIN)
    }];
    assert_eq!(scoped.codes(), [], "about others");
}

#[test]
fn default_routes_in_main_are_copies_where_netd_rules_and_not_elsewhere() {
    let mut phone = Host::phone();
    let wlan = phone.index("wlan0");
    phone
        .kernel
        .state
        .routes
        .insert(default_route(MAIN, wlan, "10.0.0.1"));
    assert!(!phone.only(Code::DefaultInMain).stops);
    for protocol in [KERNEL, 9] {
        let mut phone = Host::phone();
        let route = default_route(MAIN, wlan, "10.0.0.1");
        phone.kernel.state.routes.insert(Route { protocol, ..route });
        assert_eq!(phone.codes(), [], "made by kernel or router");
    }
    assert_eq!(Host::linux().codes(), [], "the machine's own");
}

#[test]
fn another_foreign_rule_that_leads_guests_astray_is_named() {
    let mut host = Host::of(router(), named("eth1"));
    let from = Rule {
        from: Some(prefix("192.168.0.0/16")),
        ..lookup(500, MAIN)
    };
    host.foreign = vec![from.clone()];
    let finding = host.only(Code::ForeignRule);
    assert!(finding.stops && finding.what.contains("500"), "{finding:#?}");
    host.foreign = vec![Rule {
        narrower: true,
        ..from.clone()
    }];
    assert_eq!(
        host.codes(),
        [],
        "what it asks is not known, and the kernel did not take it"
    );
    let mut main = Host::linux();
    main.foreign = vec![from];
    assert_eq!(main.codes(), [], "who rules main means guests as well");
}

#[test]
fn a_way_that_is_not_as_meant_is_told_unless_ours_are_not_yet_made() {
    let mut host = Host::linux();
    host.foreign = vec![Rule {
        action: RuleAction::Unreachable,
        ..lookup(700, 0)
    }];
    assert!(host.only(Code::WrongWay).stops);
    let mut look = host.look();
    look.unsettled = [Family::V6].into();
    assert!(!judge(&look).is_empty(), "the other family is as wanted");
    look.unsettled = [Family::V4].into();
    assert_eq!(judge(&look), []);
}

#[test]
fn strict_reverse_path_is_told_where_the_kernel_refuses_for_it() {
    for refused in [Refused::WrongLink, Refused::Dropped] {
        let mut host = Host::linux();
        let eth1 = host.index("eth1");
        host.kernel.state.addresses.insert(crate::observed::Address {
            link: eth1,
            ip: "10.1.0.2".parse().unwrap(),
            prefix: 24,
            ours: false,
            passed_over: false,
        });
        host.strict = Some(("eth1", refused));
        assert_eq!(
            host.codes(),
            [],
            "not strict: refused for something else, and guests do not need it"
        );
        for (all, own) in [(1, 0), (0, 1), (1, 1)] {
            host.switches.reverse_path = [("all".to_owned(), all), ("eth1".to_owned(), own)].into();
            let finding = host.only(Code::StrictReversePath);
            assert!(!finding.stops && finding.fix.contains("eth1"), "{finding:#?}");
        }
        host.switches.reverse_path = [("all".to_owned(), 1), ("eth1".to_owned(), 2)].into();
        assert_eq!(host.codes(), [], "the larger counts, and 2 is loose");
        host.switches.reverse_path = [("all".to_owned(), 1)].into();
        host.spec.forwards.clear();
        assert_eq!(host.codes(), [], "nothing comes by that link");
    }
}

#[test]
fn a_narrow_way_out_is_told_without_a_clamp() {
    let mut host = Host::linux();
    let eth0 = host.index("eth0");
    host.kernel.link(eth0, |link| link.mtu = 1_400).unwrap();
    assert_eq!(host.codes(), [], "our table clamps");
    host.tables.clear();
    let finding = host.only(Code::MtuBlackHole);
    assert!(finding.evidence[0].contains("mtu 1400"), "{finding:#?}");
    // A guest that keeps to what it is told sends what fits; one that does not, or says otherwise itself, does not.
    for (mtu, told) in [(1_400, 0), (1_280, 0), (1_450, 1)] {
        host.cards.mtu = [(name("sql"), mtu)].into();
        assert_eq!(host.codes().len(), told, "{mtu}");
    }
    let finding = host.only(Code::MtuBlackHole);
    assert!(
        finding
            .evidence
            .contains(&"guest sql sends up to 1450 bytes".to_owned()),
        "{finding:#?}"
    );
    let web = ["192.168.100.3".parse().unwrap()].into();
    host.spec.guests.insert(name("web"), web);
    host.cards.mtu = [(name("sql"), 1_400)].into();
    let finding = host.only(Code::MtuBlackHole);
    let named = finding.evidence.iter().filter(|line| line.starts_with("guest "));
    assert_eq!(named.collect::<Vec<_>>(), ["guest web sends up to 1500 bytes"]);
    host.spec.guests.remove(&name("web"));
    host.cards = Cards::default();
    host.save("*mangle\n:FORWARD ACCEPT [0:0]\n:sv5pkj-clamp - [0:0]\n-A sv5pkj-clamp -o sv5pkj -p tcp -j TCPMSS --clamp-mss-to-pmtu\nCOMMIT\n");
    assert_eq!(host.codes(), [], "our chain clamps");
    host.saves.clear();
    host.kernel.link(eth0, |link| link.mtu = 1_500).unwrap();
    assert_eq!(host.codes(), []);
}

#[test]
fn others_in_the_subnet_are_told() {
    let mut host = Host::linux();
    let eth1 = host.index("eth1");
    let route = |to: &str, protocol| Route {
        table: MAIN,
        to: prefix(to),
        metric: 0,
        link: Some(eth1),
        gateway: None,
        kind: RouteKind::Unicast,
        protocol,
    };
    host.routes = vec![route("192.168.100.2/32", 3)];
    assert_eq!(host.only(Code::RouteConflict).family, Some(Family::V4));
    host.routes = vec![route("192.168.0.0/16", 3)];
    assert_eq!(host.codes(), [], "ours is more specific");
    let mut host = Host::linux();
    let theirs = HostAddress::parse("192.168.100.77/24").unwrap();
    host.kernel.add_address(eth1, theirs, false).unwrap();
    assert!(
        host.codes().contains(&Code::AddressConflict),
        "{:?}",
        host.codes()
    );
}

#[test]
fn a_tap_without_carrier_is_told_of_guests_that_hold_a_card() {
    let mut host = Host::linux();
    assert_eq!(host.codes(), []);
    host.cards.held.insert(name("sql"));
    assert_eq!(host.only(Code::NoCarrier).subject, "sql");
    let tap = host.index("sv5pkj-sql");
    host.kernel.link(tap, |link| link.carrier = true).unwrap();
    assert_eq!(host.codes(), []);
}

#[test]
fn a_view_survives_the_way_to_ctl_and_every_code_is_in_the_list_once() {
    let mut host = Host::phone();
    host.foreign.push(lookup(1, MAIN));
    let look = host.look();
    let view = FindingsView {
        findings: judge(&look),
        leftovers: leftovers(&look),
        probes: look.probes,
        unseen: vec!["x".to_owned()],
        took_ms: 1,
    };
    let text = serde_json::to_string(&view).unwrap();
    assert_eq!(serde_json::from_str::<FindingsView>(&text).unwrap(), view);
    for code in Code::ALL {
        assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
    }
    let all: BTreeSet<Code> = Code::ALL.into();
    assert_eq!(all.len(), Code::ALL.len());
    for name in LeftoverName::ALL {
        assert_eq!(serde_json::to_value(name).unwrap(), name.as_str());
        assert_eq!(LeftoverName::named(name.as_str()), Some(name));
    }
}
