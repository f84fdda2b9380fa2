use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;

use super::super::{Plan, Step};
use crate::names::{LinkName, Mac};
use crate::observed::{Kind, Link, Observed};
use crate::route::{KERNEL, OURS, Route};
use crate::rule::Rule;
use crate::simulated::Simulated;
use crate::sysctl::Sysctl;

/// A namespace by names, as a link that is made again has another number.
#[derive(Debug, PartialEq)]
struct Picture {
    /// With the name of its bridge.
    links: BTreeMap<String, (Link, Option<String>)>,
    addresses: BTreeSet<(String, IpAddr, u8, bool)>,
    routes: BTreeSet<(Option<String>, Route)>,
    rules: BTreeSet<Rule>,
    sysctls: BTreeMap<Sysctl, i64>,
}

/// Without what cannot be put back: see [`Step::inverse`]. Routes to links' own subnets are the kernel's doing.
fn picture(state: &Observed, removed: &BTreeSet<String>, lost: &BTreeSet<String>) -> Picture {
    let name = |index: u32| state.links.get(&index).map(|link| link.name.clone());
    let links = state.links.values().filter(|link| !lost.contains(&link.name));
    let links = links.map(|link| {
        let bridge = link.controller.and_then(name).filter(|name| !lost.contains(name));
        let isolated = link.isolated && bridge.is_some();
        let link = Link {
            index: 0,
            controller: None,
            carrier: false, // a process's doing
            isolated,
            ..link.clone()
        };
        (link.name.clone(), (link, bridge))
    });
    let addresses = state.addresses.iter().filter_map(|address| {
        let name = name(address.link)?;
        let stays = !lost.contains(&name) && (address.ours || !removed.contains(&name));
        stays.then_some((name, address.ip, address.prefix, address.ours))
    });
    let routes = state.routes.iter().filter_map(|route| {
        let name = route.link.and_then(name);
        let on = |names: &BTreeSet<String>| name.as_ref().is_some_and(|name| names.contains(name));
        let stays = match route.protocol {
            KERNEL => false,
            OURS => !on(lost) && [0, 512, 1_024].contains(&route.metric), // no other is of our making
            _ => !on(removed),
        };
        let route = Route {
            link: None,
            ..route.clone()
        };
        stays.then_some((name, route))
    });
    // Those of links that are lost go with them, and of others not all have been looked at.
    let seen = |(sysctl, value): &(&Sysctl, &i64)| {
        let of_lost = sysctl.link().is_some_and(|link| lost.contains(link.as_str()));
        !(of_lost || sysctl.goes_with_our_link() && **value == sysctl.fresh())
    };
    let sysctls = state.sysctls.iter().filter(seen);
    Picture {
        links: links.collect(),
        addresses: addresses.collect(),
        routes: routes.collect(),
        rules: state.rules.clone(),
        sysctls: sysctls.map(|(sysctl, value)| (sysctl.clone(), *value)).collect(),
    }
}

/// Makes a plan's steps and undoes them, the last one first: all is as it was.
pub(in super::super) fn undone(kernel: &Simulated, plan: &Plan) {
    let mut kernel = kernel.clone();
    for link in kernel.state.links.values_mut() {
        link.mac.get_or_insert(Mac([2, 9, 9, 9, 9, 9])); // no real one is without
    }
    let (mut removed, mut lost) = (BTreeSet::new(), BTreeSet::new());
    for step in &plan.steps {
        if let Step::RemoveLink { name, index } = step {
            removed.insert(name.clone());
            let link = &kernel.state.links[index];
            let known = [Kind::Tap, Kind::Bridge].contains(&link.kind);
            lost.extend((!known).then(|| name.clone()));
        }
    }
    let mut trial = kernel.clone();
    let mut inverses = Vec::new();
    for step in &plan.steps {
        let before = trial.state.clone();
        trial
            .apply(step)
            .unwrap_or_else(|error| panic!("{step}: {error}"));
        inverses.push((step, step.inverse(&before, &trial.state)));
    }
    for (step, inverse) in inverses.iter().rev() {
        for back in inverse {
            let back_again = trial.apply(back);
            back_again.unwrap_or_else(|error| panic!("{step}, undone by {back}: {error}"));
        }
    }
    assert_eq!(
        picture(&trial.state, &removed, &lost),
        picture(&kernel.state, &removed, &lost),
        "{plan}"
    );
}

fn link(name: &str) -> LinkName {
    LinkName::parse(name).unwrap()
}

#[test]
fn a_step_that_changes_nothing_has_no_inverse() {
    let mut kernel = Simulated::new();
    let port = kernel.add("eth0", Kind::Other, 0);
    kernel.link(port, |link| link.up = true).unwrap();
    let address: Prefix = "10.0.0.2/24".parse().unwrap();
    kernel.add_address(port, address, false).unwrap();
    let filter = Step::SetFilter {
        tag: "sv5pkj".to_owned(),
    };
    let steps = [
        Step::SetUp { name: link("eth0") },
        Step::AddAddress {
            link: link("eth0"),
            address,
        },
        filter,
    ];
    for step in steps {
        assert!(step.inverse(&kernel.state, &kernel.state).is_empty(), "{step}");
    }
    let down = Step::SetDown { name: link("eth0") };
    let lines: Vec<String> = down
        .inverse(&kernel.state, &kernel.state)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(lines, ["link eth0: set up"]);
}
