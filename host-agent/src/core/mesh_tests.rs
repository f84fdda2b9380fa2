use sovereign_protocol::condition::Condition;
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::status::VmmStatus;

use super::super::Event;
use super::*;
use crate::shim::contract::{ExitReason, ExitRecord, Machine};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// `sql` with PostgreSQL at this address, `web` with what needs it.
fn spec(sql: &str) -> HostSpec {
    let image = r#"{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"}"#;
    let guest = |service: &str, address: &str| {
        format!(
            r#"{{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{image},"services":[{service}],"forwards":[],
            "interface":{{"addresses":["{address}/24"]}}}}"#
        )
    };
    let text = format!(
        r#"{{"version":1,"network":{{"namespace":"auto","address":"10.0.0.1/24"}},"guests":{{"sql":{},"web":{}}}}}"#,
        guest(
            r#"{"name":"postgres","kind":{"postgres":{"settings":{},"port":5432}}}"#,
            sql
        ),
        guest(
            r#"{"name":"miniflux","kind":{"miniflux":{"port":8080}},"requires":"sql/postgres"}"#,
            "10.0.0.3"
        ),
    );
    HostSpec::parse(text.as_bytes()).unwrap()
}

fn boots(world: &mut World, guest: &str, spec: &HostSpec) -> Vec<Effect> {
    let guest = name(guest);
    let vmm = VmmStatus {
        kind: "qemu".into(),
        accel: "tcg".into(),
        why: "x".into(),
        pid: 7,
    };
    let machine = Machine::wanted(&spec.guests[&guest], true);
    let booted = Event::Booted {
        guest: guest.clone(),
        boot_id: "b".into(),
        vmm,
        machine,
    };
    let mut effects = world.step(booted, 0);
    effects.extend(world.step(Event::SessionUp(guest, "hello".into()), 0));
    effects
}

fn tells(world: &mut World, guest: &str, subject: &str, status: Status, reason: &str) -> Vec<Effect> {
    let condition = Condition {
        key: Key::new(Layer::Service, subject),
        verdict: Verdict::new(status, reason, "seen"),
        age_ms: 0,
        valid_ms: 15_000,
        since_ms: 0,
    };
    let changes = Changes {
        cursor: Cursor {
            incarnation: 1,
            revision: 1,
        },
        reset: false,
        conditions: vec![condition],
        removed: vec![],
    };
    world.step(Event::Conditions(name(guest), changes), 0)
}

fn ends(world: &mut World, guest: &str) -> Vec<Effect> {
    let record = ExitRecord {
        boot_id: "b".into(),
        reason: ExitReason::PoweredOff,
        evidence: "why".into(),
        wall_ns: 0,
    };
    world.step(Event::Ended(name(guest), record), 0)
}

fn edge(world: &World) -> (Status, String, String) {
    let key = Key::new(Layer::Service, "web/miniflux.requires");
    let verdict = world.feed.verdict(&key).unwrap().clone();
    (verdict.status, verdict.reason, verdict.evidence)
}

/// Which guests are given their document again.
fn pushed(effects: &[Effect]) -> Vec<String> {
    let push = |effect: &Effect| match effect {
        Effect::Push(name, ..) => Some(name.to_string()),
        _ => None,
    };
    effects.iter().filter_map(push).collect()
}

fn stopped(effects: &[Effect]) -> Vec<String> {
    let stop = |effect: &Effect| match effect {
        Effect::Stop(name) => Some(name.to_string()),
        _ => None,
    };
    effects.iter().filter_map(stop).collect()
}

fn told(world: &World) -> Requirement {
    world.ties(&name("web")).requirements[&name("miniflux")].clone()
}

/// Both guests run, PostgreSQL answers, and the role is there.
fn met() -> World {
    let mut world = World::new(1);
    let spec = spec("10.0.0.2");
    world.step(Event::Applied(spec.clone()), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    for guest in ["sql", "web"] {
        boots(&mut world, guest, &spec);
        takes_over(&mut world, guest);
    }
    tells(&mut world, "sql", "postgres", Status::True, "Ready");
    tells(
        &mut world,
        "sql",
        "postgres.web_miniflux",
        Status::True,
        "Granted",
    );
    takes_over(&mut world, "web");
    world
}

/// A guest answers that it took over the last document.
fn takes_over(world: &mut World, guest: &str) -> Vec<Effect> {
    let edition = world.edition(&name(guest));
    world.step(Event::SpecApplied(name(guest), edition, None), 0)
}

#[test]
fn a_requirement_can_be_used_only_after_each_step_was_seen() {
    let mut world = World::new(1);
    let spec = spec("10.0.0.2");
    world.step(Event::Applied(spec.clone()), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    let waits = |world: &World, status: Status, why: &str| {
        let (found, reason, evidence) = edge(world);
        assert_eq!((found, reason.as_str()), (status, "WaitsFor"), "{evidence}");
        assert!(
            evidence.starts_with("sql/postgres ") && evidence.contains(why),
            "{evidence}"
        );
        assert_eq!((told(world).status, told(world).evidence), (status, evidence));
    };
    waits(&world, Status::Unknown, "was not seen yet: guest sql is");
    boots(&mut world, "web", &spec);
    boots(&mut world, "sql", &spec);
    let effects = tells(&mut world, "sql", "postgres", Status::False, "Recovering");
    waits(&world, Status::False, "is False: Recovering, seen");
    assert_eq!(pushed(&effects), ["web"]);
    tells(&mut world, "sql", "postgres", Status::True, "Ready");
    waits(&world, Status::Unknown, "has not taken over revision 1");
    takes_over(&mut world, "sql");
    waits(&world, Status::Unknown, "role web_miniflux was not made yet");
    let effects = tells(
        &mut world,
        "sql",
        "postgres.web_miniflux",
        Status::True,
        "Granted",
    );
    let (status, reason, evidence) = edge(&world);
    assert_eq!((status, reason.as_str()), (Status::True, "Met"));
    assert!(
        evidence.contains("at 10.0.0.2 port 5432, role web_miniflux"),
        "{evidence}"
    );
    assert_eq!(pushed(&effects), ["web"], "now it may start");
    let requirement = told(&world);
    assert_eq!(
        (requirement.status, requirement.address.to_string()),
        (status, "10.0.0.2".into())
    );
}

#[test]
fn both_ends_are_told_the_same_of_the_tie() {
    let world = met();
    let ties = world.ties(&name("sql"));
    assert!(ties.requirements.is_empty());
    let clients = &ties.clients[&name("postgres")];
    assert_eq!(clients.len(), 1);
    assert_eq!(
        (clients[0].role.as_str(), clients[0].from[0].to_string()),
        ("web_miniflux", "10.0.0.3".into())
    );
    assert_eq!(told(&world).role, clients[0].role);
    assert!(world.ties(&name("web")).clients.is_empty());
}

#[test]
fn a_killed_postgres_makes_the_other_guest_not_ready_by_its_edge_and_back() {
    let mut world = met();
    tells(&mut world, "web", "miniflux", Status::True, "Ready");
    assert_eq!(world.ready(&name("web"), 0), Status::True);
    let effects = tells(&mut world, "sql", "postgres", Status::False, "Ended");
    assert_eq!(
        world.ready(&name("web"), 0),
        Status::False,
        "although it says that it is ready"
    );
    let (status, reason, evidence) = edge(&world);
    assert_eq!((status, reason.as_str()), (Status::False, "WaitsFor"));
    assert_eq!(evidence, "sql/postgres is False: Ended, seen");
    assert_eq!(pushed(&effects), ["web"]);
    let effects = tells(&mut world, "sql", "postgres", Status::False, "Recovering");
    assert!(pushed(&effects).is_empty(), "no news for it");
    tells(&mut world, "sql", "postgres", Status::True, "Ready");
    assert_eq!(
        world.ready(&name("web"), 0),
        Status::Unknown,
        "it has not heard of it"
    );
    takes_over(&mut world, "web");
    assert_eq!(world.ready(&name("web"), 0), Status::True);
    world.step(Event::SessionLost(name("sql"), "why".into()), 0);
    assert_eq!(edge(&world).0, Status::Unknown, "nobody knows");
}

#[test]
fn a_guest_cannot_speak_of_its_own_requirement() {
    let mut world = met();
    tells(&mut world, "sql", "postgres", Status::False, "Ended");
    let before = world.cursors();
    tells(&mut world, "web", "miniflux.requires", Status::True, "Met");
    assert_eq!(edge(&world).0, Status::False);
    assert_eq!(world.cursors(), before, "not even for a moment");
}

#[test]
fn a_changed_address_is_pushed_to_both_and_used_when_it_is_taken_over() {
    let mut world = met();
    let effects = world.step(Event::Applied(spec("10.0.0.9")), 0);
    assert_eq!(pushed(&effects), ["sql", "web"]);
    assert_eq!(edge(&world).0, Status::Unknown, "it is not there yet");
    assert_eq!(told(&world).address.to_string(), "10.0.0.9");
    takes_over(&mut world, "web");
    let effects = takes_over(&mut world, "sql");
    assert_eq!(
        (edge(&world).0, pushed(&effects)),
        (Status::True, vec!["web".to_owned()])
    );

    // A change that does not concern the tie is no news for the other guest.
    let mut other = spec("10.0.0.9");
    let sql = other.guests.get_mut(&name("sql")).unwrap();
    sql.services[0].limits = Some(sovereign_protocol::spec::Limits::default());
    let effects = world.step(Event::Applied(other), 0);
    assert_eq!(
        (edge(&world).0, pushed(&effects)),
        (Status::True, vec!["sql".to_owned()])
    );
}

/// The revision alone does not tell the document with the old place from the one with the new.
#[test]
fn a_guest_is_not_ready_by_a_document_from_before_the_last_judgement() {
    let mut world = met();
    tells(&mut world, "web", "miniflux", Status::True, "Ready");
    assert_eq!(world.ready(&name("web"), 0), Status::True);
    world.step(Event::Applied(spec("10.0.0.9")), 0);
    let early = world.edition(&name("web")); // it says that the other place cannot be used yet
    takes_over(&mut world, "sql");
    assert_eq!(edge(&world).0, Status::True);
    world.step(Event::SpecApplied(name("web"), early, None), 0);
    assert_eq!(world.ready(&name("web"), 0), Status::Unknown);
    takes_over(&mut world, "web");
    assert_eq!(world.ready(&name("web"), 0), Status::True);
}

#[test]
fn without_a_network_the_edge_says_so() {
    let mut world = met();
    let mut world_without = World::new(1);
    world_without.step(Event::Applied(spec("10.0.0.2")), 0);
    world_without.step(Event::NetworkMode(NetworkMode::Off("no /dev/net/tun".into())), 0);
    let (status, reason, evidence) = edge(&world_without);
    assert_eq!((status, reason.as_str()), (Status::False, "NoNetworkBetween"));
    assert_eq!(evidence, "sql/postgres cannot be reached: no /dev/net/tun");
    // And a guest that is not wanted any more has no edge.
    let mut alone = spec("10.0.0.2");
    alone.guests.remove(&name("web"));
    world.step(Event::Applied(alone), 0);
    let key = Key::new(Layer::Service, "web/miniflux.requires");
    assert!(world.feed.verdict(&key).is_none());
}

#[test]
fn who_needs_another_stops_before_it() {
    let mut world = met();
    let effects = world.step(Event::StopAll, 0);
    assert_eq!(stopped(&effects), ["web"]);
    assert!(!world.is_done());
    assert!(
        stopped(&world.step(Event::Tick, 0)).is_empty(),
        "web has not ended yet"
    );
    assert_eq!(stopped(&ends(&mut world, "web")), ["sql"]);
    ends(&mut world, "sql");
    assert!(world.is_done());
}

#[test]
fn the_order_holds_for_guests_that_leave_the_file_and_a_return_is_no_stop() {
    let mut world = met();
    let nothing = HostSpec {
        guests: BTreeMap::new(),
        ..spec("10.0.0.2")
    };
    assert_eq!(stopped(&world.step(Event::Applied(nothing), 0)), ["web"]);
    world.step(Event::Applied(spec("10.0.0.2")), 0);
    assert!(
        stopped(&ends(&mut world, "web")).is_empty(),
        "sql is wanted again"
    );
    // It waits for its network before it boots again: nobody has to wait for it.
    let nothing = HostSpec {
        guests: BTreeMap::new(),
        ..spec("10.0.0.2")
    };
    assert_eq!(stopped(&world.step(Event::Applied(nothing), 0)), ["sql"]);
}

#[test]
fn a_status_names_what_is_needed() {
    let world = met();
    let report = world.report(&name("t"), 0, |ms| ms.to_string());
    assert!(report.guests[0].requires.is_empty());
    let requires = &report.guests[1].requires[0];
    assert_eq!(
        (requires.service.as_str(), requires.of.as_str(), requires.status),
        ("miniflux", "sql/postgres", Status::True)
    );
}

/// Else the guest would take over the old document and never be ready.
#[test]
fn a_change_while_a_guest_boots_reaches_it() {
    let mut world = World::new(1);
    let old = spec("10.0.0.2");
    world.step(Event::Applied(old.clone()), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    world.step(Event::Tick, 10_000); // they do not wait for the network any longer
    let effects = world.step(Event::Applied(spec("10.0.0.9")), 10_000);
    assert_eq!(pushed(&effects), ["sql", "web"]);
}
