use std::collections::BTreeSet;

use proptest::prelude::*;
use sovereign_protocol::interface::Prefix;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::HostAddress;

use super::super::inverse::tests::undone;
use super::super::{Plan, Step, plan};
use crate::family::Family;
use crate::filter::PortForward;
use crate::names::{LinkName, Mark};
use crate::observed::{Kind, Observed};
use crate::route::{MAIN, OURS, Route};
use crate::rule::Rule;
use crate::simulated::{Simulated, default_route, phone, router};
use crate::sysctl::Sysctl;
use crate::uplink::{Exit, NoExit, Uplink, Vpn};
use crate::wanted::{NetworkSpec, Place, Prior, Switched, Wanted};

fn instance() -> Name {
    Name::parse("default").unwrap()
}

fn link(name: &str) -> LinkName {
    LinkName::parse(name).unwrap()
}

fn spec(uplink: Uplink, vpn: Vpn) -> NetworkSpec {
    NetworkSpec {
        place: Place::Host,
        addresses: [HostAddress::parse("192.168.100.1/24").unwrap()].into(),
        guests: [(
            Name::parse("sql").unwrap(),
            ["192.168.100.2".parse().unwrap()].into(),
        )]
        .into(),
        uplink,
        vpn,
        ..NetworkSpec::default()
    }
}

fn forward(to: &str) -> PortForward {
    PortForward {
        transport: Transport::Tcp,
        listen: None,
        ports: Ports::parse("15432").unwrap(),
        to: to.parse().unwrap(),
        to_port: 5432,
    }
}

/// A kernel with the switches that it has, and what of them was changed.
#[derive(Debug, Clone)]
struct Host {
    kernel: Simulated,
    switched: Switched,
}

impl Host {
    fn of(mut kernel: Simulated) -> Self {
        for (sysctl, value) in [(Sysctl::ForwardV4, 0), (Sysctl::ForwardV6, 0)] {
            kernel.state.sysctls.insert(sysctl, value);
        }
        let switched = Switched::new();
        Self { kernel, switched }
    }

    fn wanted(&self, spec: Option<&NetworkSpec>) -> Wanted {
        match spec {
            Some(spec) => Wanted::of(&instance(), spec, &self.switched, &self.kernel.state).unwrap(),
            None => Wanted::nothing(&instance(), &self.switched, &self.kernel.state),
        }
    }

    fn plan(&self, spec: Option<&NetworkSpec>) -> Plan {
        plan(&self.wanted(spec), &self.kernel.state)
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::SetSysctl { sysctl, from, to } if !sysctl.goes_with_our_link() => {
                let before = self.switched.get(sysctl).map_or(*from, |prior| prior.before);
                self.switched.insert(sysctl.clone(), Prior { before, set: *to });
            }
            Step::RestoreSysctl { sysctl, .. } => drop(self.switched.remove(sysctl)),
            _ => {}
        }
        self.kernel
            .apply(step)
            .unwrap_or_else(|error| panic!("{step}: {error}"));
    }

    fn converge(&mut self, spec: Option<&NetworkSpec>) -> Vec<String> {
        let plan = self.plan(spec);
        undone(&self.kernel, &plan);
        plan.steps.iter().for_each(|step| self.step(step));
        let routing = |line: &&str| !line.starts_with("link ") && !line.starts_with("address ");
        plan.to_string()
            .lines()
            .filter(routing)
            .map(str::to_owned)
            .collect()
    }
}

#[test]
fn plain_linux_needs_two_switches_and_no_rule() {
    let mut host = Host::of(router());
    let spec = spec(Uplink::Auto, Vpn::Follow);
    assert_eq!(
        host.converge(Some(&spec)),
        [
            "sysctl net.ipv4.conf.sv5pkj.rp_filter: set to 2 from 0",
            "sysctl net.ipv6.conf.sv5pkj.accept_ra: set to 0 from 1",
            "sysctl net.ipv4.ip_forward: set to 1 from 0",
        ]
    );
    assert!(host.plan(Some(&spec)).is_done());
    let gone = host.converge(None);
    assert_eq!(gone, ["sysctl net.ipv4.ip_forward: put back to 0"]);
    assert!(host.plan(None).is_done() && host.switched.is_empty());
}

#[test]
fn a_switch_that_somebody_else_set_since_is_left_alone() {
    let mut host = Host::of(router());
    host.converge(Some(&spec(Uplink::Auto, Vpn::Follow)));
    host.kernel.state.sysctls.insert(Sysctl::ForwardV4, 7);
    assert!(host.converge(None).is_empty());
    let mut host = Host::of(router());
    host.kernel.state.sysctls.insert(Sysctl::ForwardV4, 1);
    host.converge(Some(&spec(Uplink::Auto, Vpn::Follow)));
    assert!(host.converge(None).is_empty(), "it was so before us");
}

#[test]
fn a_phone_gets_three_rules_below_netds_ladder() {
    let mut host = Host::of(phone("wlan0", false));
    let spec = spec(Uplink::Auto, Vpn::Follow);
    let table = Mark::of(&instance()).table;
    let wlan = 1_000 + host.kernel.index(&link("wlan0")).unwrap();
    assert_eq!(
        host.converge(Some(&spec)),
        [
            format!("route 192.168.100.0/24 dev sv5pkj table {table}: add"),
            format!("rule IPv4 9000: to 192.168.100.0/24 lookup {table}: add"),
            format!("rule IPv4 9010: iif sv5pkj lookup {wlan}: add"),
            "rule IPv4 9020: iif sv5pkj unreachable: add".to_owned(),
            "sysctl net.ipv4.conf.sv5pkj.rp_filter: set to 2 from 0".to_owned(),
            "sysctl net.ipv6.conf.sv5pkj.accept_ra: set to 0 from 1".to_owned(),
            "sysctl net.ipv4.ip_forward: set to 1 from 0".to_owned(),
        ]
    );
    assert!(host.plan(Some(&spec)).is_done());
    // netd restarts: every rule goes, its own come back, forwarding is off.
    host.kernel.state.rules = phone("wlan0", false).state.rules;
    host.kernel.state.sysctls.insert(Sysctl::ForwardV4, 0);
    assert_eq!(host.converge(Some(&spec)).len(), 4);
    assert!(host.plan(Some(&spec)).is_done());
    host.converge(None);
    assert_eq!(host.kernel.state.rules, phone("wlan0", false).state.rules);
}

#[test]
fn another_default_network_moves_one_rule_the_new_one_first() {
    let mut host = Host::of(phone("wlan0", false));
    let spec = spec(Uplink::Auto, Vpn::Follow);
    host.converge(Some(&spec));
    host.kernel.state.rules.retain(|rule| rule.protocol == OURS);
    host.kernel.state.rules.extend(phone("rmnet1", false).state.rules);
    let [wlan, rmnet] = ["wlan0", "rmnet1"].map(|name| 1_000 + host.kernel.index(&link(name)).unwrap());
    assert_eq!(
        host.converge(Some(&spec)),
        [
            format!("rule IPv4 9010: iif sv5pkj lookup {rmnet}: add"),
            format!("rule IPv4 9010: iif sv5pkj lookup {wlan}: remove"),
        ]
    );
}

#[test]
fn a_blocked_vpn_leaves_no_way() {
    let mut host = Host::of(phone("wlan0", true));
    let spec = spec(Uplink::Auto, Vpn::Block);
    let made = host.converge(Some(&spec));
    assert!(made.iter().all(|line| !line.contains("9010")), "{made:?}");
    assert!(made.contains(&"rule IPv4 9020: iif sv5pkj unreachable: add".to_owned()));
    let exits = host.wanted(Some(&spec)).exits;
    assert_eq!(exits[&Family::V4], Exit::None(NoExit::Blocked));
}

#[test]
fn a_named_uplink_of_plain_linux_has_its_default_route_in_our_table() {
    let mut host = Host::of(router());
    let spec = spec(Uplink::Named(vec![link("eth1"), link("eth0")]), Vpn::Follow);
    let table = Mark::of(&instance()).table;
    let made = host.converge(Some(&spec));
    assert!(
        made.contains(&format!(
            "route 0.0.0.0/0 via 10.1.0.1 dev eth1 table {table}: add"
        )),
        "{made:?}"
    );
    let eth1 = host.kernel.index(&link("eth1")).unwrap();
    host.kernel.link(eth1, |link| link.carrier = false).unwrap();
    assert_eq!(
        host.converge(Some(&spec)),
        [format!(
            "route 0.0.0.0/0 via 10.0.0.1 dev eth0 table {table}: add"
        )],
        "replaced, never absent"
    );
    host.kernel.link(eth1, |link| link.carrier = true).unwrap();
    host.converge(Some(&spec));
    host.kernel.state.routes.retain(|route| route.protocol == OURS); // all uplinks gone
    let gone = host.converge(Some(&spec));
    assert_eq!(gone.len(), 3, "{gone:?}"); // the bridge's own in the main table comes back
    assert!(
        gone[0].ends_with("remove") && gone[2].contains("9010"),
        "{gone:?}"
    );
}

#[test]
fn our_table_knows_what_the_host_reaches_without_a_gateway() {
    let mut host = Host::of(router());
    let eth0 = host.kernel.index(&link("eth0")).unwrap();
    let near = |to: &str, protocol| {
        let (ip, length) = to.split_once('/').unwrap();
        Route {
            to: Prefix::new(ip.parse().unwrap(), length.parse().unwrap()).unwrap(),
            gateway: None,
            protocol,
            ..default_route(MAIN, eth0, "10.0.0.1")
        }
    };
    let foreign = [
        near("10.0.0.0/24", 2),
        near("169.254.0.0/16", 2),
        near("10.5.0.0/24", 3),
    ];
    host.kernel.state.routes.extend(foreign);
    let spec = spec(Uplink::Named(vec![link("eth1")]), Vpn::Follow);
    let table = Mark::of(&instance()).table;
    let made = host.converge(Some(&spec));
    let of_eth0: Vec<_> = made.iter().filter(|line| line.contains("dev eth0")).collect();
    assert_eq!(
        of_eth0,
        [&format!("route 10.0.0.0/24 dev eth0 table {table}: add")]
    );
    host.kernel.link(eth0, |link| link.carrier = false).unwrap();
    let made = host.converge(Some(&spec));
    assert_eq!(made, [format!("route 10.0.0.0/24 table {table}: remove")]);
}

#[test]
fn a_subnet_of_the_hosts_own_is_a_conflict_and_nothing_of_it_is_made() {
    let mut host = Host::of(phone("wlan0", false));
    let wlan = host.kernel.index(&link("wlan0")).unwrap();
    let theirs = HostAddress::parse("192.168.100.77/24").unwrap();
    host.kernel.add_address(wlan, theirs, false).unwrap();
    let spec = spec(Uplink::Auto, Vpn::Follow);
    let plan = host.plan(Some(&spec));
    let text = plan.to_string();
    assert!(text.ends_with(
        "subnet 192.168.100.0/24: conflict, link wlan0 has 192.168.100.77/24 in it: choose another [network] address\n"
    ), "{text}");
    assert!(
        !text.contains("rule ") && !text.contains("route ") && !text.contains("address 192"),
        "{text}"
    );
    host.kernel.remove_address(wlan, theirs).unwrap();
    assert!(host.plan(Some(&spec)).conflicts.is_empty());
}

#[test]
fn advertisements_are_kept_before_ipv6_is_forwarded() {
    let mut host = Host::of(router());
    let eth0 = host.kernel.index(&link("eth0")).unwrap();
    host.kernel
        .state
        .routes
        .insert(default_route(254, eth0, "fe80::1"));
    let accepts = Sysctl::AcceptAdvertisements(link("eth0"));
    host.kernel.state.sysctls.insert(accepts.clone(), 1);
    let mut spec = spec(Uplink::Auto, Vpn::Follow);
    spec.addresses = [HostAddress::parse("fd00:5::1/64").unwrap()].into();
    assert!(Wanted::watched(&instance(), &spec, &host.switched, &host.kernel.state).contains(&accepts));
    assert_eq!(
        host.converge(Some(&spec)),
        [
            "sysctl net.ipv4.conf.sv5pkj.rp_filter: set to 2 from 0",
            "sysctl net.ipv6.conf.sv5pkj.accept_ra: set to 0 from 1",
            "sysctl net.ipv6.conf.eth0.accept_ra: set to 2 from 1",
            "sysctl net.ipv6.conf.all.forwarding: set to 1 from 0",
        ]
    );
    host.converge(None);
    assert_eq!(host.kernel.state.sysctls[&accepts], 1);
    host.kernel.state.sysctls.insert(accepts, 0);
    let made = host.converge(Some(&spec));
    assert!(
        !made.iter().any(|line| line.contains("eth0.accept_ra")),
        "nobody wants them there: {made:?}"
    );
}

#[test]
fn every_link_that_hears_routers_goes_on_hearing_them_before_the_first_is_heard() {
    let mut host = Host::of(router());
    let group = Mark::of(&instance()).group;
    let theirs = host.kernel.add("br0", Kind::Bridge, 0);
    let veth = host.kernel.add("veth0", Kind::Other, 0);
    host.kernel
        .link(veth, |link| link.controller = Some(theirs))
        .unwrap();
    host.kernel.add("wlan0", Kind::Other, 0);
    host.kernel.add("usb0", Kind::Other, 0);
    host.kernel.add("sv5pkj-old", Kind::Tap, group);
    let accepts = |name: &str| Sysctl::AcceptAdvertisements(link(name));
    let values = [
        ("eth0", 1),
        ("eth1", 2),
        ("br0", 1),
        ("veth0", 1),
        ("wlan0", 1),
        ("usb0", 0),
        ("sv5pkj-old", 1),
        ("lo", 1),
    ];
    for (name, value) in values {
        host.kernel.state.sysctls.insert(accepts(name), value);
    }
    let before = host.kernel.state.sysctls.clone();
    let mut spec = spec(Uplink::Auto, Vpn::Follow);
    spec.addresses.insert(HostAddress::parse("fd00:5::1/64").unwrap());
    let watched = Wanted::watched(&instance(), &spec, &host.switched, &host.kernel.state);
    for (name, _) in values {
        let listens = ["eth0", "eth1", "wlan0", "usb0"].contains(&name);
        assert_eq!(watched.contains(&accepts(name)), listens, "{name}");
    }
    let made = host.converge(Some(&spec));
    let at = |text: &str| made.iter().position(|line| line.contains(text));
    for name in ["eth0", "wlan0"] {
        let heard = at(&format!("{name}.accept_ra: set to 2 from 1"));
        assert!(
            heard.is_some() && heard < at("all.forwarding"),
            "{name}: {made:#?}"
        );
    }
    assert_eq!(
        made.iter().filter(|line| line.contains("accept_ra")).count(),
        3,
        "{made:#?}"
    );
    // It is given to a bridge: what is heard there is others' business again.
    let wlan = host.kernel.index(&link("wlan0")).unwrap();
    host.kernel
        .link(wlan, |link| link.controller = Some(theirs))
        .unwrap();
    let again = host.converge(Some(&spec));
    assert_eq!(again, ["sysctl net.ipv6.conf.wlan0.accept_ra: put back to 1"]);
    host.converge(None);
    let mut after = host.kernel.state.sysctls.clone();
    after.insert(accepts("sv5pkj-old"), 1); // went with its link
    assert_eq!(after, before);
}

/// What others do, by small numbers.
#[derive(Debug, Clone)]
enum Deed {
    FlushRules(bool),
    FlushRoutes,
    ForeignRule(usize, bool),
    ForeignRoute(usize, bool),
    Down(usize),
    Carrier(usize, bool),
    Forward(i64),
    Default(bool, bool),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        any::<bool>().prop_map(Deed::FlushRules),
        Just(Deed::FlushRoutes),
        (0..3usize, any::<bool>()).prop_map(|(n, o)| Deed::ForeignRule(n, o)),
        (0..3usize, any::<bool>()).prop_map(|(n, o)| Deed::ForeignRoute(n, o)),
        (0..6usize).prop_map(Deed::Down),
        (0..6usize, any::<bool>()).prop_map(|(n, c)| Deed::Carrier(n, c)),
        (0..2i64).prop_map(Deed::Forward),
        any::<(bool, bool)>().prop_map(|(d, v)| Deed::Default(d, v)),
    ]
}

fn harm(host: &mut Host, deed: &Deed, is_phone: bool) {
    let state = &mut host.kernel.state;
    let foreign = |rule: &Rule| rule.protocol != OURS;
    let mark = Mark::of(&instance());
    let pick = |state: &Observed, n: usize| *state.links.keys().nth(n % state.links.len()).unwrap();
    match *deed {
        Deed::FlushRules(all) => state.rules.retain(|rule| !all && foreign(rule)),
        Deed::FlushRoutes => state.routes.retain(|route| route.protocol != OURS),
        Deed::ForeignRule(n, ours) => {
            let action = crate::rule::RuleAction::Lookup([mark.table, 254, 7][n]);
            let protocol = if ours { OURS } else { 3 };
            state.rules.insert(Rule {
                protocol,
                ..Rule::ours(Family::V4, [9_000, 1, 9_010][n], action)
            });
        }
        Deed::ForeignRoute(n, ours) => {
            let mut route = default_route([mark.table, 254, 7][n], pick(state, n), "10.5.0.1");
            route.protocol = if ours { OURS } else { 3 };
            route.metric = 5;
            state.routes.insert(route);
        }
        Deed::Down(n) => {
            let index = pick(state, n);
            host.kernel.set_down(index);
        }
        Deed::Carrier(n, carrier) => {
            let index = pick(state, n);
            host.kernel.link(index, |link| link.carrier = carrier).unwrap();
        }
        Deed::Forward(value) => drop(state.sysctls.insert(Sysctl::ForwardV4, value)),
        Deed::Default(wifi, vpn) if is_phone => {
            state.rules.retain(|rule| !foreign(rule));
            state
                .rules
                .extend(phone(if wifi { "wlan0" } else { "rmnet1" }, vpn).state.rules);
        }
        Deed::Default(..) => {}
    }
}

fn any_spec() -> impl Strategy<Value = Option<NetworkSpec>> {
    let vpn = prop_oneof![Just(Vpn::Follow), Just(Vpn::Block), Just(Vpn::Bypass)];
    let uplink = prop_oneof![
        Just(Uplink::None),
        Just(Uplink::Auto),
        Just(Uplink::Named(vec![link("rmnet1"), link("eth1"), link("wlan0")])),
    ];
    let spec = (uplink, vpn, any::<bool>()).prop_map(|(uplink, vpn, forwards)| NetworkSpec {
        forwards: forwards.then(|| forward("192.168.100.2")).into_iter().collect(),
        ..spec(uplink, vpn)
    });
    proptest::option::weighted(0.8, spec)
}

/// What is not ours, said in other words than those of the code.
fn foreign(state: &Observed) -> (BTreeSet<Rule>, BTreeSet<Route>) {
    let table = 0x53e6_e640;
    let bridge = state.links.values().find(|l| l.name == "sv5pkj").map(|l| l.index);
    let rules = state.rules.iter().filter(|rule| {
        let leads = rule.action == crate::rule::RuleAction::Lookup(table);
        rule.protocol != b'S' || !(leads || rule.iif.as_deref() == Some("sv5pkj"))
    });
    let routes = state.routes.iter().filter(|route| {
        let ours = route.protocol == b'S' && route.table == table;
        !ours && (route.link.is_none() || route.link != bridge)
    });
    (rules.cloned().collect(), routes.cloned().collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn one_plan_is_enough_and_nothing_foreign_is_in_it(
        is_phone in any::<bool>(),
        first in any_spec(),
        deeds in proptest::collection::vec(deed(), 0..8),
        then in any_spec(),
        cut in 0..12usize,
    ) {
        let mut host = Host::of(if is_phone { phone("wlan0", false) } else { router() });
        host.converge(first.as_ref());
        for deed in &deeds {
            harm(&mut host, deed, is_phone);
        }
        let before = foreign(&host.kernel.state);
        // Killed after any step, another agent that plans anew comes to the same end.
        for step in host.plan(then.as_ref()).steps.iter().take(cut) {
            host.step(step);
        }
        host.converge(then.as_ref());
        let again = host.plan(then.as_ref());
        prop_assert!(again.steps.is_empty(), "{}", again);
        prop_assert_eq!(before, foreign(&host.kernel.state));
    }

    #[test]
    fn down_leaves_a_host_as_it_was(is_phone in any::<bool>(), specs in proptest::collection::vec(any_spec(), 1..4)) {
        let mut host = Host::of(if is_phone { phone("wlan0", true) } else { router() });
        let before = host.kernel.state.clone();
        for spec in &specs {
            host.converge(spec.as_ref());
        }
        host.converge(None);
        prop_assert_eq!(before, Observed { sysctls: host.kernel.state.sysctls.iter()
            .filter(|(sysctl, _)| !sysctl.goes_with_our_link()).map(|(s, v)| (s.clone(), *v)).collect(), ..host.kernel.state.clone() });
    }
}

#[test]
fn a_link_of_ours_that_is_no_bridge_is_made_anew_with_all_on_it() {
    let mut host = Host::of(phone("wlan0", false));
    let spec = spec(Uplink::Auto, Vpn::Follow);
    host.kernel.add("sv5pkj", Kind::Tap, Mark::of(&instance()).group);
    host.converge(Some(&spec));
    assert!(host.plan(Some(&spec)).is_done(), "{}", host.plan(Some(&spec)));
}
