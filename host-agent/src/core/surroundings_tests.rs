use std::collections::BTreeMap;

use sovereign_protocol::condition::Status;
use sovereign_protocol::spec::{HostNetwork, HostSpec, Namespace, VERSION, Vpn};
use sovereign_protocol::status::VmmStatus;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::names::LinkName;
use sovereign_reconcile::resolver::ResolvConf;
use sovereign_reconcile::uplink::{Exit, NoExit};

use super::super::event::Event;
use super::super::world::tests::config;
use super::*;
use crate::net::NetworkEvent;
use crate::shim::contract::Machine;

fn sql() -> Name {
    Name::parse("sql").unwrap()
}

fn spec(uplink: Uplink, interface: &str) -> HostSpec {
    let mut guest = config(5432);
    guest.interface = serde_json::from_str(interface).unwrap();
    HostSpec {
        version: VERSION,
        network: Some(HostNetwork {
            namespace: Namespace::Private,
            addresses: vec![sovereign_protocol::subnet::HostAddress::parse("10.0.0.1/24").unwrap()],
            uplink,
            vpn: Vpn::default(),
            isolated: false,
        }),
        guests: BTreeMap::from([(sql(), guest)]),
    }
}

const PLAIN: &str = r#"{"addresses":["10.0.0.2/24"]}"#;

fn asks(text: &str) -> HostResolver {
    HostResolver {
        own: Some(ResolvConf::parse(text.as_bytes())),
        upstream: None,
    }
}

fn exits(mtu: u32) -> Event {
    let link = LinkName::parse("sv5pkj_pasta").unwrap();
    Event::Network(NetworkEvent::Exits {
        exits: BTreeMap::from([(Family::V4, Exit::Main(link))]),
        mtu: Some(mtu),
    })
}

/// A guest that runs and has taken over its document.
fn running(uplink: Uplink, interface: &str) -> World {
    let mut world = World::new(1);
    world.know_resolver(asks("nameserver 9.9.9.9\nsearch lan.example"));
    let spec = spec(uplink, interface);
    let machine = Machine::wanted(&spec.guests[&sql()], true);
    world.step(Event::Applied(spec), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    world.step(
        Event::Network(NetworkEvent::Ready {
            guests: [sql()].into(),
            lacking: BTreeMap::new(),
        }),
        0,
    );
    let vmm = VmmStatus {
        kind: "qemu".into(),
        accel: "tcg".into(),
        why: "x".into(),
        pid: 7,
    };
    let booted = Event::Booted {
        guest: sql(),
        boot_id: "b".into(),
        vmm,
        machine,
    };
    world.step(booted, 0);
    let edition = world.edition(&sql());
    world.step(Event::SpecApplied(sql(), edition), 0);
    world
}

fn told(world: &World) -> String {
    let interface = world.interface(&world.guests[&sql()].config).unwrap();
    let servers: Vec<String> = interface.dns.iter().map(ToString::to_string).collect();
    let search: Vec<&str> = interface.search.iter().map(|domain| domain.as_str()).collect();
    format!(
        "{} | {} | {:?}",
        servers.join(" "),
        search.join(" "),
        interface.mtu
    )
}

fn pushes(effects: &[Effect]) -> bool {
    effects
        .iter()
        .any(|effect| matches!(effect, Effect::Push(name, _) if *name == sql()))
}

fn resolver(world: &World) -> Option<(Status, String)> {
    let verdict = world.feed.verdict(&Key::new(Layer::Routing, RESOLVER))?;
    Some((
        verdict.status,
        format!("{}: {}", verdict.reason, verdict.evidence),
    ))
}

#[test]
fn a_guest_is_told_what_changed_around_the_host_and_nothing_else() {
    let mut world = running(Uplink::Auto, PLAIN);
    assert_eq!(told(&world), "9.9.9.9 | lan.example | Some(1500)");
    let before = world.edition(&sql());
    let same = asks("# rewritten\nnameserver 9.9.9.9\nsearch lan.example");
    assert!(!pushes(&world.step(Event::Resolver(same), 0)));
    assert!(!pushes(&world.step(Event::Tick, 0)));
    assert_eq!(world.edition(&sql()), before);

    assert!(pushes(
        &world.step(Event::Resolver(asks("nameserver 10.9.9.9")), 0)
    ));
    assert_eq!(told(&world), "10.9.9.9 |  | Some(1500)");
    assert_eq!(world.edition(&sql()), before, "it is as ready as it was");
    assert!(!pushes(&world.step(exits(65_520), 0)), "its card takes no more");
    assert!(pushes(&world.step(exits(1400), 0)));
    assert_eq!(told(&world), "10.9.9.9 |  | Some(1400)");
    assert!(pushes(&world.step(exits(576), 0)));
    assert_eq!(told(&world), "10.9.9.9 |  | Some(1280)", "IPv6 needs so much");
    assert!(pushes(&world.step(exits(1500), 0)));
    assert_eq!(told(&world), "10.9.9.9 |  | Some(1500)", "back to the card's own");
}

/// What `doctor` judges a narrow way out by.
#[test]
fn a_guest_is_known_to_keep_to_its_mtu_while_its_agent_is_heard_and_follows() {
    let up = |world: &mut World| drop(world.step(Event::SessionUp(sql(), "hello".to_owned()), 0));
    let mut world = running(Uplink::Auto, PLAIN);
    assert_eq!(world.cards().held, [sql()].into());
    assert!(world.cards().mtu.is_empty(), "nobody has heard of it");
    up(&mut world);
    world.step(exits(1400), 0);
    assert_eq!(world.cards().mtu, [(sql(), 1400)].into());
    world.step(Event::SpecRefused(sql(), "no such key".to_owned()), 0);
    assert!(world.cards().mtu.is_empty(), "it goes on as before");
    up(&mut world);
    world.step(Event::SessionLost(sql(), "gone".to_owned()), 0);
    assert!(world.cards().mtu.is_empty());

    let own = r#"{"addresses":["10.0.0.2/24"],"mtu":1450}"#;
    let mut world = running(Uplink::Auto, own);
    up(&mut world);
    world.step(exits(1400), 0);
    assert_eq!(world.cards().mtu, [(sql(), 1450)].into(), "as it is configured");
    let mut stopped = World::new(1);
    stopped.step(Event::Applied(spec(Uplink::Auto, PLAIN)), 0);
    stopped.step(exits(1400), 0);
    assert_eq!(stopped.cards().mtu, [(sql(), 1400)].into(), "it will be told so");
}

#[test]
fn what_is_configured_is_not_the_hosts_to_say() {
    let own = r#"{"addresses":["10.0.0.2/24"],"dns":["10.0.0.1"],"search":["own.example"],"mtu":1300}"#;
    let mut world = running(Uplink::Auto, own);
    assert!(!pushes(&world.step(Event::Resolver(asks("")), 0)));
    assert!(!pushes(&world.step(exits(1400), 0)));
    assert_eq!(told(&world), "10.0.0.1 | own.example | Some(1300)");
    assert_eq!(resolver(&world), None, "nobody asks");
}

#[test]
fn without_a_way_out_nothing_of_the_host_is_told() {
    let mut world = running(Uplink::None, PLAIN);
    assert_eq!(told(&world), " |  | Some(1500)");
    assert!(!pushes(
        &world.step(Event::Resolver(asks("nameserver 10.9.9.9")), 0)
    ));
    assert_eq!(resolver(&world), None);
    let none = Event::Network(NetworkEvent::Exits {
        exits: BTreeMap::from([(Family::V4, Exit::None(NoExit::Unwanted))]),
        mtu: None,
    });
    world.step(none, 0);
    let told = world.feed.verdict(&Key::new(Layer::Routing, "network")).unwrap();
    assert_eq!((told.status, told.reason.as_str()), (Status::True, "NoUplink"));
}

#[test]
fn the_loopbacks_server_is_asked_by_pasta_or_it_is_said_that_there_is_none() {
    let mut world = running(Uplink::Auto, PLAIN);
    assert_eq!(
        resolver(&world),
        Some((Status::True, "Advised: guests ask 9.9.9.9".to_owned()))
    );
    assert!(pushes(
        &world.step(Event::Resolver(asks("nameserver 127.0.0.53")), 0)
    ));
    assert!(told(&world).starts_with("192.0.0.3 "), "{}", told(&world));
    assert_eq!(world.advice().unwrap().forwarded.len(), 1);
    let (status, said) = resolver(&world).unwrap();
    assert_eq!(status, Status::True);
    assert!(said.ends_with("for which pasta asks 127.0.0.53"), "{said}");
    let before = told(&world);
    assert!(!pushes(&world.step(Event::Resolver(HostResolver::default()), 0)));
    assert_eq!(told(&world), before, "a file that is gone takes nothing away");
    let (status, said) = resolver(&world).unwrap();
    assert_eq!(status, Status::False);
    assert!(said.starts_with("NoResolver: "), "{said}");
}
