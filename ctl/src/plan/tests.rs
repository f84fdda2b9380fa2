use super::*;
use crate::config;
use sovereign_protocol::spec::{HostNetwork, Image, TailscaleSpec};
use sovereign_reconcile::simulated::Simulated;
use sovereign_reconcile::view::{FilterLook, NetworkLook, NetworkMode, NetworkView};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn image(digest: &str) -> Image {
    Image {
        kernel: "k".into(),
        initramfs: "i".into(),
        root: "r".into(),
        agent: "a".into(),
        digest: digest.into(),
    }
}

fn spec() -> HostSpec {
    let path = std::path::Path::new("s.toml");
    config::parse(path, &config::template())
        .unwrap()
        .host_spec(&image("d").into(), None)
}

fn edited(edit: impl FnOnce(&mut GuestConfig)) -> HostSpec {
    let mut spec = spec();
    edit(spec.guests.get_mut(&name("sql")).unwrap());
    spec
}

fn missing(found: &Found) -> Vec<String> {
    match found.image {
        true => Vec::new(),
        false => vec!["r".to_owned()],
    }
}

/// The network as the plan itself makes it.
fn made(spec: &HostSpec) -> NetworkView {
    let mut kernel = Simulated::new();
    for step in plan(
        &name("default"),
        spec,
        &missing(&Found::default()),
        &Found::default(),
    )
    .unwrap()
    {
        if let Step::Network(step) = step {
            kernel.apply(&step).unwrap();
        }
    }
    NetworkView {
        mode: NetworkMode::Private,
        observed: kernel.state,
        cards: spec.guests.keys().cloned().collect(),
    }
}

fn up(running: &[&str]) -> Found {
    Found {
        outdated: false,
        network: FoundNetwork::Seen(made(&spec())),
        agent: true,
        image: true,
        spec: Some(spec()),
        running: running.iter().map(|text| name(text)).collect(),
        disks: BTreeSet::from([name("sql")]),
    }
}

fn lines(wanted: &HostSpec, found: &Found) -> Vec<String> {
    let steps = plan(&name("default"), wanted, &missing(found), found).unwrap();
    steps.iter().map(ToString::to_string).collect()
}

#[test]
fn from_nothing_everything_is_made_and_what_runs_as_wanted_needs_nothing() {
    assert_eq!(
        lines(&spec(), &Found::default()),
        [
            "build the image r",
            "start the host agent",
            "network: make a private network namespace where that works (auto), else guests get no card",
            "link sv5pkj: create bridge, address 02:87:bc:c5:a8:42, group 1315857411",
            "link sv5pkj-sql: create tap, group 1315857411",
            "link sv5pkj-sql: make port of sv5pkj",
            "link lo: set up",
            "link sv5pkj: set up",
            "link sv5pkj-sql: set up",
            "address 192.168.100.1/24: add to sv5pkj",
            "sql: make a data disk of 2048 MiB (sparse)",
            "sql: boot with 256 MiB, 192.168.100.127/24 (private)",
            "sql: forward postgres: 127.0.0.1:15432 to port 5432"
        ]
    );
    assert_eq!(lines(&spec(), &up(&["sql"])), [""; 0]);
}

#[test]
fn guests_come_go_and_are_taken_over() {
    let orphans = Found {
        agent: false,
        spec: None,
        network: FoundNetwork::Hidden,
        ..up(&["sql", "old"])
    };
    assert_eq!(
        lines(&spec(), &orphans),
        [
            "start the host agent",
            "old: stop in order (not in the configuration); its data stays",
            "network: take over what the last host agent left",
            "sql: runs without a host agent, take it over"
        ]
    );
    let outdated = Found {
        outdated: true,
        ..up(&["sql"])
    };
    assert_eq!(
        lines(&spec(), &outdated),
        ["replace the host agent by this version; guests run on"]
    );
}

#[test]
fn another_address_of_the_network_and_a_guest_that_goes_change_what_is_there() {
    let mut wanted = spec();
    let moved = wanted.guests.remove(&name("sql")).unwrap();
    wanted.guests.insert(name("web"), moved);
    let address = "192.168.100.9/24".to_owned().try_into().unwrap();
    wanted.network.as_mut().unwrap().addresses = vec![address];
    let mut found = up(&["sql"]);
    found.disks.insert(name("web"));
    assert_eq!(
        lines(&wanted, &found),
        [
            "sql: stop in order (not in the configuration); its data stays",
            "link sv5pkj-sql: remove",
            "link sv5pkj-web: create tap, group 1315857411",
            "link sv5pkj-web: make port of sv5pkj",
            "link sv5pkj-web: set up",
            "address 192.168.100.1/24: remove from sv5pkj",
            "address 192.168.100.9/24: add to sv5pkj",
            "web: boot with 256 MiB, 192.168.100.127/24 (private)",
            "web: forward postgres: 127.0.0.1:15432 to port 5432"
        ]
    );
}

#[test]
fn a_running_guest_keeps_its_tap_until_it_ends_also_without_an_address() {
    let mut wanted = spec();
    wanted.network = None;
    wanted.guests.get_mut(&name("sql")).unwrap().interface = None;
    assert_eq!(
        lines(&wanted, &up(&["sql"])),
        [
            "address 192.168.100.1/24: remove from sv5pkj",
            "sql: interface: 192.168.100.127/24 via 192.168.100.1 (DNS not set) -> none"
        ]
    );
}

#[test]
fn a_guest_without_an_address_has_no_tap_unless_it_runs_with_one() {
    let mut wanted = spec();
    wanted.guests.get_mut(&name("sql")).unwrap().interface = None;
    let stopped = up(&[]);
    let mut without = up(&["sql"]);
    if let FoundNetwork::Seen(view) = &mut without.network {
        view.cards.clear();
    }
    for found in [stopped, without] {
        let lines = lines(&wanted, &found);
        assert!(
            lines
                .iter()
                .any(|line| line.starts_with("link sv5pkj-sql: remove")),
            "{lines:?}"
        );
    }
}

#[test]
fn where_no_network_works_none_is_planned_until_another_is_asked_for() {
    let off = |spec: &HostSpec| {
        let view = NetworkView {
            mode: NetworkMode::Off("unshare: EPERM".into()),
            observed: Default::default(),
            cards: BTreeSet::new(),
        };
        Found {
            network: FoundNetwork::Seen(view),
            spec: Some(spec.clone()),
            ..up(&[])
        }
    };
    assert_eq!(
        lines(&spec(), &off(&spec())),
        [
            "sql: boot with 256 MiB",
            "sql: forward postgres: 127.0.0.1:15432 to port 5432"
        ]
    );
    let mut insists = spec();
    let network = insists.network.as_mut().unwrap();
    network.namespace = Namespace::Private;
    let again = lines(&insists, &off(&spec()));
    assert_eq!(again[0], "network: make a private network namespace");
    assert!(again[1].starts_with("link sv5pkj: create bridge"), "{again:?}");
    let none: Option<HostNetwork> = None;
    insists.network = none;
    insists.guests.get_mut(&name("sql")).unwrap().interface = None;
    assert_eq!(
        lines(&insists, &Found::default())[2],
        "sql: make a data disk of 2048 MiB (sparse)"
    );
}

#[test]
fn a_link_of_somebody_else_is_named_and_left_alone() {
    let mut found = up(&["sql"]);
    let FoundNetwork::Seen(view) = &mut found.network else {
        panic!("up() has a network")
    };
    let tap = view
        .observed
        .links
        .values_mut()
        .find(|link| link.name == "sv5pkj-sql");
    tap.unwrap().group = 0;
    assert_eq!(
        lines(&spec(), &found),
        ["link sv5pkj-sql: conflict, a link of this name is there but not ours: group 0, ours is 1315857411"]
    );
    let steps = plan(&name("default"), &spec(), &missing(&found), &found).unwrap();
    let json = serde_json::to_value(steps).unwrap();
    assert_eq!(
        (&json[0]["action"], &json[0]["on"]),
        (&"conflict".into(), &"link sv5pkj-sql".into())
    );
}

#[test]
fn programs_see_each_step_as_one_flat_object() {
    let steps = plan(
        &name("default"),
        &spec(),
        &missing(&Found::default()),
        &Found::default(),
    )
    .unwrap();
    let json = serde_json::to_value(steps).unwrap();
    let address = serde_json::json!(
        {"action": "network", "change": "add_address", "link": "sv5pkj", "address": "192.168.100.1/24"}
    );
    assert!(json.as_array().unwrap().contains(&address), "{json}");
}

#[test]
fn limits_and_tailscale_change_a_running_guest() {
    let wanted = edited(|guest| {
        guest.tailscale = Some(TailscaleSpec {});
        guest.services[0].limits = Some(Limits {
            memory_max_mib: Some(128),
            cpu_percent: Some(150),
            pids_max: Some(99),
        });
    });
    let mut found = up(&["sql"]);
    assert_eq!(
        lines(&wanted, &found),
        [
            "sql: postgres: limits none -> memory 128 MiB, cpu 150%, tasks 99",
            "sql: watch tailscale"
        ]
    );
    found.spec = Some(wanted);
    assert_eq!(
        lines(&spec(), &found),
        [
            "sql: postgres: limits memory 128 MiB, cpu 150%, tasks 99 -> none",
            "sql: watch tailscale no more"
        ]
    );
}

#[test]
fn a_running_guest_is_changed_or_waits_for_its_next_boot() {
    let wanted = edited(|guest| {
        guest.memory_mib = 512;
        guest.image = image("e");
        guest.forwards[0].listen = "127.0.0.1:9".parse().unwrap();
        let ServiceKind::Postgres { settings, port } = &mut guest.services[0].kind else {
            panic!()
        };
        settings.clear();
        settings.insert("work_mem".into(), "5MB".into());
        *port = 5433;
    });
    let mut found = up(&["sql"]);
    let old = found.spec.as_mut().unwrap().guests.get_mut(&name("sql")).unwrap();
    let ServiceKind::Postgres { settings, .. } = &mut old.services[0].kind else {
        panic!()
    };
    *settings = BTreeMap::from([("jit".into(), "off".into())]);
    assert_eq!(
        lines(&wanted, &found),
        [
            "sql: postgres: port 5432 -> 5433",
            "sql: postgres: set work_mem = 5MB",
            "sql: postgres: jit back to its default",
            "sql: forward postgres: 127.0.0.1:15432 to port 5432 -> 127.0.0.1:9 to port 5432",
            "sql: memory in MiB 256 -> 512; in force after `sovereign down sql` and `sovereign up`",
            "sql: another image; in force after `sovereign down sql` and `sovereign up`"
        ]
    );
}

#[test]
fn a_network_of_this_machine_is_planned_from_what_is_there() {
    let mut wanted = spec();
    wanted.network.as_mut().unwrap().namespace = Namespace::Host;
    let look = |kernel: &Simulated, filter| {
        FoundNetwork::Looked(NetworkLook {
            observed: kernel.state.clone(),
            switched: Vec::new(),
            filter,
        })
    };
    let steps = |network| {
        let found = Found {
            network,
            image: true,
            ..Found::default()
        };
        plan(&name("default"), &wanted, &[], &found).unwrap()
    };
    let mut kernel = Simulated::new();
    let first = steps(look(&kernel, FilterLook::Differs));
    assert!(first.contains(&Step::MakeNetwork {
        namespace: Namespace::Host
    }));
    let mut filters = 0;
    for step in &first {
        match step {
            Step::Network(reconcile::Step::SetFilter { .. }) => filters += 1,
            Step::Network(step) => kernel.apply(step).unwrap(),
            _ => {}
        }
    }
    assert_eq!(filters, 1);
    let again = steps(look(&kernel, FilterLook::AsWanted));
    let is_network = |step: &&Step| matches!(step, Step::MakeNetwork { .. } | Step::Network(_));
    assert_eq!(
        again.iter().find(is_network),
        None,
        "a killed agent left all of it"
    );
    let blocked = steps(look(&kernel, FilterLook::Blocked("a table of others".to_owned())));
    assert!(blocked.iter().any(|step| matches!(step, Step::Conflict(_))));
}
