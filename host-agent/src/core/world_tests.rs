use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use sovereign_protocol::condition::Condition;
use sovereign_protocol::spec::{Forward, Image, Namespace, Restart, Service, ServiceKind, VERSION};
use sovereign_reconcile::family::Family;
use sovereign_reconcile::view::NetworkMode;

use sovereign_protocol::limits::GUEST_CONDITIONS;

use super::*;
use crate::net::NetworkEvent;
use crate::shim::contract::VmmState;

fn sql() -> Name {
    Name::parse("sql").unwrap()
}

pub(crate) fn config(port: u16) -> GuestConfig {
    let postgres = Name::parse("postgres").unwrap();
    GuestConfig {
        memory_mib: 256,
        vcpus: 1,
        data_mib: 64,
        image: Image {
            kernel: "k".into(),
            initramfs: "i".into(),
            root: "r".into(),
            agent: "a".into(),
            digest: "d".into(),
        },
        services: vec![Service {
            name: postgres.clone(),
            kind: ServiceKind::Postgres {
                settings: BTreeMap::new(),
                port,
            },
            limits: None,
            requires: None,
        }],
        forwards: vec![Forward {
            name: postgres,
            service: None,
            listen: "127.0.0.1:15432".parse().unwrap(),
            port,
            translated: None,
        }],
        restart: Restart::default(),
        interface: None,
        tailscale: None,
    }
}

fn spec(port: u16) -> HostSpec {
    HostSpec {
        version: VERSION,
        network: None,
        guests: BTreeMap::from([(sql(), config(port))]),
    }
}

fn booted() -> Event {
    let vmm = VmmStatus {
        kind: "qemu".into(),
        accel: "tcg".into(),
        why: "x".into(),
        pid: 7,
    };
    Event::Booted {
        guest: sql(),
        boot_id: "b".into(),
        vmm,
        machine: Machine::wanted(&config(5432), false),
    }
}

fn service(status: Status, valid_ms: u64) -> Event {
    let condition = Condition {
        key: Key::new(Layer::Service, "postgres"),
        verdict: Verdict::new(status, "X", "e"),
        age_ms: 0,
        valid_ms,
        since_ms: 0,
    };
    let cursor = Cursor {
        incarnation: 1,
        revision: 1,
    };
    Event::Conditions(
        sql(),
        Changes {
            cursor,
            reset: false,
            conditions: vec![condition],
            removed: vec![],
        },
    )
}

fn exit(reason: ExitReason) -> Event {
    let record = ExitRecord {
        boot_id: "b".into(),
        reason,
        evidence: "why".into(),
        wall_ns: 0,
    };
    Event::Ended(sql(), record)
}

fn edition(revision: u64, judged: u64) -> Edition {
    Edition { revision, judged }
}

fn ready_world() -> World {
    let mut world = World::new(1);
    for event in [
        Event::Applied(spec(5432)),
        booted(),
        Event::SessionUp(sql(), "hello".into()),
        Event::SpecApplied(sql(), edition(1, 0), None),
        service(Status::True, 1_000),
    ] {
        world.step(event, 0);
    }
    world
}

#[test]
fn a_guest_is_ready_only_when_each_step_was_seen() {
    let mut world = World::new(1);
    assert_eq!(
        world.step(Event::Applied(spec(5432)), 0),
        [Effect::Start(sql(), config(5432))]
    );
    assert_eq!(world.ready(&sql(), 0), Status::Unknown);
    world.step(booted(), 0);
    world.step(Event::SessionUp(sql(), "hello".into()), 0);
    world.step(service(Status::True, 1_000), 0);
    assert_eq!(
        world.ready(&sql(), 0),
        Status::Unknown,
        "the spec is not applied yet"
    );
    let effects = world.step(Event::SpecApplied(sql(), edition(1, 0), None), 0);
    assert_eq!(effects, [Effect::Forwards(sql(), true)]);
    assert_eq!(world.ready(&sql(), 1_000), Status::True);
    assert_eq!(
        world.ready(&sql(), 1_001),
        Status::Unknown,
        "the service was not seen since"
    );
}

#[test]
fn the_same_spec_again_does_nothing_and_a_changed_one_is_pushed() {
    let mut world = ready_world();
    assert_eq!(world.step(Event::Applied(spec(5432)), 1), []);
    assert_eq!(world.ready(&sql(), 1), Status::True);
    let effects = world.step(Event::Applied(spec(5433)), 2);
    assert_eq!(
        effects,
        [Effect::Push(sql(), config(5433)), Effect::Forwards(sql(), false)]
    );
}

#[test]
fn what_is_the_hosts_alone_does_not_make_a_guest_unready() {
    let mut world = ready_world();
    let mut more = spec(5432);
    let guest = more.guests.get_mut(&sql()).unwrap();
    let second = Forward {
        name: Name::parse("second").unwrap(),
        service: Some(Name::parse("postgres").unwrap()),
        listen: "127.0.0.1:15433".parse().unwrap(),
        port: 5432,
        translated: None,
    };
    guest.forwards.push(second);
    guest.memory_mib = 512;
    assert_eq!(world.step(Event::Applied(more), 1), []);
    assert_eq!((world.ready(&sql(), 1), world.revision()), (Status::True, 2));
    assert_eq!(
        (world.serving(), world.forward_ports(&sql()).len()),
        (vec![sql()], 2)
    );
}

#[test]
fn a_lost_session_makes_the_guest_unknown_not_false() {
    let mut world = ready_world();
    let effects = world.step(Event::SessionLost(sql(), "reset".into()), 1);
    assert_eq!(effects, [Effect::Forwards(sql(), false)]);
    assert_eq!(world.ready(&sql(), 1), Status::Unknown);
    assert!(
        world
            .guest_conditions(&sql(), 1)
            .all(|c| c.verdict.status != Status::False)
    );
    world.step(Event::SessionUp(sql(), "hello".into()), 2);
    let effects = world.step(service(Status::True, 1_000), 2);
    assert_eq!(effects, [Effect::Forwards(sql(), true)]);
}

#[test]
fn a_paused_vmm_is_unknown_and_comes_back_without_a_restart() {
    let mut world = ready_world();
    world.step(Event::VmmState(sql(), VmmState::Says("paused".into())), 1);
    assert_eq!(world.ready(&sql(), 1), Status::Unknown);
    let effects = world.step(Event::VmmState(sql(), VmmState::Says("running".into())), 2);
    assert_eq!(effects, [Effect::Forwards(sql(), true)]);
}

#[test]
fn a_crash_is_restarted_with_pauses_until_it_is_a_loop() {
    let mut world = ready_world();
    world.step(exit(ExitReason::Crashed), 10);
    assert_eq!(world.next_tick_ms(), Some(260));
    assert_eq!(world.step(Event::Tick, 259), []);
    assert_eq!(world.step(Event::Tick, 260).len(), 1);
    for n in 0..4 {
        world.step(booted(), 1_000 * n);
        world.step(exit(ExitReason::Crashed), 1_000 * n);
        world.step(Event::Tick, 1_000 * n + 900);
    }
    let report = world.report(&sql(), 5_000, |ms| ms.to_string());
    assert_eq!(report.guests[0].phase, Phase::CrashLoop);
    assert_eq!(report.guests[0].conditions[0].reason, "CrashLoop");
    assert_eq!(world.next_tick_ms(), None);
    let effects = world.step(Event::Applied(spec(5432)), 9_000);
    assert_eq!(effects.len(), 1, "up starts it again");
}

#[test]
fn a_guest_reboot_starts_at_once_and_a_power_off_does_not() {
    let mut world = ready_world();
    let effects = world.step(exit(ExitReason::GuestRebooted), 1);
    assert!(effects.contains(&Effect::Start(sql(), config(5432))));
    let mut world = ready_world();
    world.step(exit(ExitReason::PoweredOff), 1);
    assert_eq!(world.next_tick_ms(), None);
}

#[test]
fn stop_stops_in_order_and_is_done_when_all_have_ended() {
    let mut world = ready_world();
    let effects = world.step(Event::StopAll, 1);
    assert_eq!(effects, [Effect::Stop(sql()), Effect::Forwards(sql(), false)]);
    assert!(!world.is_done());
    world.step(exit(ExitReason::PoweredOff), 2);
    assert!(world.is_done());
}

#[test]
fn a_guest_that_left_the_file_is_stopped_once() {
    let mut world = ready_world();
    let empty = HostSpec {
        version: VERSION,
        network: None,
        guests: BTreeMap::new(),
    };
    let effects = world.step(Event::Applied(empty.clone()), 1);
    assert!(effects.contains(&Effect::Stop(sql())));
    assert_eq!(world.step(Event::Applied(empty), 2), []);
}

#[test]
fn a_guest_cannot_speak_for_the_host() {
    let mut world = ready_world();
    let lie = Condition {
        key: Key::new(Layer::Vmm, "vmm"),
        verdict: Verdict::no("Lie", ""),
        age_ms: 0,
        valid_ms: 1,
        since_ms: 0,
    };
    let cursor = Cursor {
        incarnation: 1,
        revision: 2,
    };
    let changes = Changes {
        cursor,
        reset: true,
        conditions: vec![lie],
        removed: vec![Key::new(Layer::Session, "agent")],
    };
    world.step(Event::Conditions(sql(), changes), 1);
    let host: Vec<_> = world
        .guest_conditions(&sql(), 1)
        .filter(|c| host_owned(c.key.layer, "x"))
        .collect();
    assert_eq!(host.len(), 2);
    assert!(host.iter().all(|c| c.verdict.status == Status::True));
}

fn any_event() -> impl Strategy<Value = Event> {
    prop_oneof![
        Just(Event::Applied(spec(5432))),
        Just(Event::Applied(spec(5433))),
        Just(Event::Applied(HostSpec {
            version: VERSION,
            network: None,
            guests: BTreeMap::new()
        })),
        Just(booted()),
        Just(Event::SessionUp(sql(), String::new())),
        Just(Event::SessionLost(sql(), String::new())),
        Just(Event::SpecApplied(sql(), edition(1, 0), None)),
        Just(service(Status::True, 1_000)),
        Just(service(Status::False, 1_000)),
        Just(exit(ExitReason::Crashed)),
        Just(exit(ExitReason::GuestRebooted)),
        Just(exit(ExitReason::PoweredOff)),
        Just(Event::StopAll),
        Just(Event::Tick),
    ]
}

proptest! {
    /// Whatever happens in whatever order: ready implies an answering service in a running VMM.
    #[test]
    fn ready_is_never_claimed_without_a_running_vmm(events in proptest::collection::vec(any_event(), 0..40)) {
        let mut world = World::new(1);
        for (now, event) in events.into_iter().enumerate() {
            world.step(event, now as u64 * 100);
            let report = world.report(&sql(), now as u64 * 100, |_| String::new());
            for guest in report.guests {
                if guest.ready == Status::True {
                    prop_assert!(guest.vmm.is_some());
                    prop_assert_eq!(guest.applied_revision, guest.spec_revision);
                    prop_assert!(guest.conditions.iter().any(|c| c.layer == Layer::Service && c.status == Status::True));
                }
            }
        }
    }
}

fn happened(incarnation: u64, seqs: std::ops::RangeInclusive<u64>) -> Event {
    use sovereign_protocol::event;
    let last = *seqs.end();
    let event = |seq| event::Event {
        seq,
        key: Key::new(Layer::Service, "postgres"),
        from: None,
        to: Some(Verdict::yes(format!("R{seq}"), "")),
        age_ms: 3,
    };
    let events = event::Events {
        cursor: Cursor {
            incarnation,
            revision: last,
        },
        wall_ms: 0,
        lost: 0,
        events: seqs.map(event).collect(),
    };
    Event::Happened(sql(), events)
}

fn journal(world: &World) -> Vec<String> {
    let events = world.events(Start::Oldest, 100, 0).events;
    events
        .into_iter()
        .filter_map(|e| Some(format!("{} {}", e.key.subject, e.to?.reason)))
        .collect()
}

#[test]
fn a_guests_events_are_recorded_once_and_a_gap_is_told() {
    let mut world = World::new(1);
    world.step(Event::Applied(spec(5432)), 0);
    world.step(happened(5, 1..=2), 10);
    world.step(happened(5, 1..=3), 11); // a new session begins at the oldest
    world.step(happened(5, 6..=6), 12);
    world.step(happened(9, 1..=1), 13); // another agent's journal
    assert_eq!(
        journal(&world),
        [
            "sql/postgres R1",
            "sql/postgres R2",
            "sql/postgres R3",
            "sql/events EventsLost",
            "sql/postgres R6",
            "sql/postgres R1"
        ]
    );
    assert_eq!(world.events(Start::Oldest, 100, 0).events[0].age_ms, 93);
}

#[test]
fn what_the_guest_journals_is_not_journalled_by_the_host_as_well() {
    let mut world = ready_world();
    world.step(service(Status::False, 1_000), 1);
    world.step(Event::SessionLost(sql(), "x".into()), 2);
    let journal = journal(&world);
    assert!(
        journal.iter().all(|line| !line.starts_with("sql/postgres")),
        "{journal:?}"
    );
    assert_eq!(journal.last().unwrap(), "sql/agent Lost");
}

#[test]
fn what_needs_another_boot_is_said_and_keeps_nobody_from_being_ready() {
    let mut world = ready_world();
    let mut bigger = spec(5432);
    bigger.guests.get_mut(&sql()).unwrap().memory_mib = 512;
    world.step(Event::Applied(bigger), 1);
    let said = |world: &World| {
        let key = host_key(Layer::Vmm, &sql(), MACHINE);
        world.feed.verdict(&key).map(|verdict| verdict.evidence.clone())
    };
    let text = "memory in MiB 256 -> 512: in force after `sovereign down sql` and `sovereign up`";
    assert_eq!(said(&world).as_deref(), Some(text));
    assert_eq!(world.ready(&sql(), 1), Status::True);
    world.step(Event::Applied(spec(5432)), 2);
    assert_eq!(said(&world), None);
}

#[test]
fn what_another_agent_left_behind_is_adopted_and_stopped() {
    let mut world = World::new(1);
    let effects = world.step(Event::Found(sql(), config(5432)), 0);
    assert_eq!(effects, [Effect::Start(sql(), config(5432)), Effect::Stop(sql())]);
    world.step(booted(), 1);
    world.step(Event::StopAll, 1);
    assert!(!world.is_done(), "down waits for it");
    world.step(exit(ExitReason::PoweredOff), 2);
    assert!(world.is_done());
    let mut wanted = ready_world();
    assert_eq!(
        wanted.step(Event::Found(sql(), config(5432)), 1),
        [],
        "a wanted one is adopted already"
    );
}

#[test]
fn the_restart_policy_decides_what_an_end_means() {
    let after = |when: RestartWhen, reason: ExitReason| {
        let mut world = ready_world();
        let mut policy = spec(5432);
        policy.guests.get_mut(&sql()).unwrap().restart.when = when;
        world.step(Event::Applied(policy), 1);
        world.step(exit(reason), 2);
        world.next_tick_ms().is_some()
    };
    for (when, powered_off, crashed) in [
        (RestartWhen::OnFailure, false, true),
        (RestartWhen::Always, true, true),
        (RestartWhen::Never, false, false),
    ] {
        assert_eq!(after(when, ExitReason::PoweredOff), powered_off, "{when:?}");
        assert_eq!(after(when, ExitReason::Crashed), crashed, "{when:?}");
    }
}

#[test]
fn a_wedged_guest_is_ended_only_where_the_configuration_says_so() {
    for wedged in [false, true] {
        let mut world = ready_world();
        let mut policy = spec(5432);
        policy.guests.get_mut(&sql()).unwrap().restart.wedged = wedged;
        world.step(Event::Applied(policy), 1);
        world.step(Event::SessionLost(sql(), "x".into()), 2);
        world.step(Event::SessionSilent(sql(), "y".into()), 3);
        assert_eq!(world.ready(&sql(), 3), Status::Unknown);
        assert_eq!(world.next_tick_ms(), wedged.then_some(30_003));
        let effects = world.step(Event::Tick, 30_003);
        assert_eq!(effects.contains(&Effect::Kill(sql())), wedged);
    }
}

#[test]
fn a_guest_that_runs_is_adopted_before_anybody_knows_whether_there_is_a_network() {
    let mut carded = spec(5432);
    carded.guests.get_mut(&sql()).unwrap().interface =
        Some(sovereign_protocol::interface::InterfaceSpec::default());
    let mut fresh = World::new(1);
    assert_eq!(
        fresh.step(Event::Applied(carded.clone()), 0),
        [],
        "it waits for its network"
    );
    let mut adopting = World::new(1);
    adopting.step(Event::Running(BTreeSet::from([sql()])), 0);
    let effects = adopting.step(Event::Applied(carded), 0);
    assert!(matches!(effects[..], [Effect::Start(..)]), "{effects:?}");
    adopting.step(Event::StopAll, 0);
    assert!(!adopting.is_done(), "down must not leave it running");
}

#[test]
fn a_forward_that_is_gone_is_no_condition_any_more() {
    let mut world = World::new(7);
    world.step(Event::Applied(spec(5432)), 0);
    let told = Verdict::unknown("Reserved", "127.0.0.1:15432");
    world.step(Event::Forward(sql(), "postgres".to_owned(), told), 1);
    let forwards = |world: &World| {
        let changes = world.changes(None, 2);
        let subjects = changes.conditions.into_iter().map(|condition| condition.key);
        subjects.filter(|key| key.layer == Layer::Forward).count()
    };
    assert_eq!(forwards(&world), 1);
    world.step(Event::Applied(spec(5433)), 3);
    assert_eq!(forwards(&world), 1, "the same forward leads elsewhere");
    let mut without = spec(5433);
    without.guests.get_mut(&sql()).unwrap().forwards.clear();
    world.step(Event::Applied(without), 4);
    assert_eq!(forwards(&world), 0);
}

#[test]
fn an_adopted_card_is_not_judged_before_somebody_looked() {
    let mut carded = spec(5432);
    carded.guests.get_mut(&sql()).unwrap().interface =
        Some(sovereign_protocol::interface::InterfaceSpec::default());
    let mut world = World::new(7);
    world.step(Event::Running([sql()].into()), 0);
    world.step(Event::Applied(carded.clone()), 0);
    let Event::Booted {
        guest, boot_id, vmm, ..
    } = booted()
    else {
        unreachable!()
    };
    let machine = Machine::wanted(&carded.guests[&sql()], true);
    let adopted = Event::Booted {
        guest,
        boot_id,
        vmm,
        machine,
    };
    world.step(adopted, 1);
    assert_eq!(world.network_mode(), NetworkMode::Undecided);
    world.step(Event::NetworkMode(NetworkMode::Private), 2);
    let held = (world.network_mode(), world.holding_cards());
    assert_eq!(held, (NetworkMode::Private, BTreeSet::from([sql()])));
    let cards = |world: &World| -> Vec<String> {
        let told = journal(world).into_iter();
        told.filter(|line| line.contains("NoCarrier") || line.contains("RestartNeeded"))
            .collect()
    };
    assert_eq!(cards(&world), [""; 0]);
    let attached = |attached| NetworkEvent::Carrier {
        guest: sql(),
        attached,
    };
    world.step(Event::Network(attached(true)), 3);
    assert_eq!(cards(&world), [""; 0]);
    world.step(Event::Network(attached(false)), 4);
    assert_eq!(cards(&world).len(), 1);
    world.step(Event::NetworkMode(NetworkMode::Off("none".to_owned())), 5);
    assert_eq!(cards(&world).len(), 2, "now another boot would have no card");
}

#[test]
fn a_card_has_failed_only_when_none_of_its_families_works() {
    let mut carded = spec(5432);
    let interface = |addresses: &[&str]| sovereign_protocol::interface::InterfaceSpec {
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        ..Default::default()
    };
    carded.guests.get_mut(&sql()).unwrap().interface = Some(interface(&["10.0.0.2/24", "fd00:5::2/64"]));
    let six = Name::parse("six").unwrap();
    let mut only = config(5432);
    only.interface = Some(interface(&["fd00:5::3/64"]));
    carded.guests.insert(six.clone(), only);
    let mut world = World::new(7);
    world.step(Event::Applied(carded.clone()), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    let Event::Booted { boot_id, vmm, .. } = booted() else {
        unreachable!()
    };
    for guest in [sql(), six.clone()] {
        let machine = Machine::wanted(&carded.guests[&guest], true);
        let (boot_id, vmm) = (boot_id.clone(), vmm.clone());
        let carrier = NetworkEvent::Carrier {
            guest: guest.clone(),
            attached: true,
        };
        world.step(
            Event::Booted {
                guest,
                boot_id,
                vmm,
                machine,
            },
            1,
        );
        world.step(Event::Network(carrier), 1);
    }
    let ready = |lacking: &[(Family, &str)]| NetworkEvent::Ready {
        guests: [sql(), six.clone()].into(),
        lacking: lacking
            .iter()
            .map(|(family, why)| (*family, (*why).to_owned()))
            .collect(),
    };
    let card = |world: &World, guest: &Name| {
        let report = world.report(&sql(), 1, |ms| ms.to_string());
        let of = report.guests.into_iter().filter(|seen| seen.name == *guest);
        let conditions = of.flat_map(|guest| guest.conditions);
        let mut cards = conditions.filter(|condition| condition.subject.ends_with("card"));
        let card = cards.next().unwrap();
        (card.reason, card.evidence)
    };
    world.step(Event::Network(ready(&[])), 2);
    assert_eq!(card(&world, &sql()).0, "Attached");
    world.step(Event::Network(ready(&[(Family::V6, "switched off")])), 3);
    let (reason, evidence) = card(&world, &sql());
    assert_eq!(reason, "Attached");
    assert!(
        evidence.ends_with("its TAP has carrier; no IPv6: switched off"),
        "{evidence}"
    );
    let failed = ("NetworkFailed".to_owned(), "IPv6: switched off".to_owned());
    assert_eq!(card(&world, &six), failed);
    let told = |world: &World| {
        let events = world.events(Start::Oldest, 100, 0).events.into_iter();
        let told = events.filter_map(|event| event.to);
        told.filter(|to| to.evidence == "IPv6 only: switched off").count()
    };
    world.step(Event::Network(ready(&[(Family::V6, "switched off")])), 4);
    assert_eq!(told(&world), 1, "once");
    world.step(Event::Network(ready(&[])), 5);
    assert_eq!(
        (card(&world, &sql()).0, card(&world, &six).0),
        ("Attached".into(), "Attached".into())
    );
}

#[test]
fn guests_are_judged_each_by_its_own_conditions() {
    let mut world = ready_world();
    let other = Name::parse("sq").unwrap(); // the beginning of the other's name
    let mut both = spec(5432);
    both.guests.insert(other.clone(), config(5432));
    world.step(Event::Applied(both), 1);
    let applied = Event::SpecApplied(other.clone(), world.edition(&other), None);
    world.step(applied, 1);
    let readiness = world.readiness(1);
    assert_eq!(readiness[&sql()], Status::True);
    assert_eq!(readiness[&other], Status::Unknown, "nothing of it was seen");
    let report = world.report(&sql(), 1, |ms| ms.to_string());
    let counts: Vec<_> = report
        .guests
        .iter()
        .map(|g| (g.ready, g.conditions.len()))
        .collect();
    assert!(
        matches!(counts[..], [(Status::Unknown, 0), (Status::True, 3..)]),
        "{counts:?}"
    );
    let Event::Conditions(_, broken) = service(Status::False, 1_000) else {
        unreachable!("conditions");
    };
    world.step(Event::Conditions(other.clone(), broken), 1);
    let readiness = world.readiness(1);
    assert_eq!(
        (readiness[&sql()], readiness[&other]),
        (Status::True, Status::False)
    );
}

#[path = "world_more_tests.rs"]
mod more;
