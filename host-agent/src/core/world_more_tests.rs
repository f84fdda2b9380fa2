//! Limits, networks, and what one agent leaves to the next.

use super::*;

#[test]
fn nothing_starts_again_once_all_is_to_stop() {
    let mut world = ready_world();
    assert_eq!(
        world.step(Event::StopAll, 1),
        [Effect::Stop(sql()), Effect::Forwards(sql(), false)]
    );
    assert!(world.is_stopping());
    assert_eq!(world.step(Event::Applied(spec(5433)), 2), []);
    assert_eq!(world.revision(), 1);
    assert_eq!(world.step(exit(ExitReason::PoweredOff), 3), []);
    assert!(world.is_done(), "down ends whatever was asked meanwhile");
}

fn two() -> (World, Name) {
    let other = Name::parse("other").unwrap();
    let mut both = spec(5432);
    let mut second = config(5432);
    second.forwards.clear();
    both.guests.insert(other.clone(), second);
    let mut world = ready_world();
    world.step(Event::Applied(both), 0);
    (world, other)
}

/// Everything that is kept, past the limit of one answer.
fn whole_journal(world: &World) -> Vec<sovereign_protocol::event::Event> {
    let mut all = Vec::new();
    let mut start = Start::Oldest;
    loop {
        let some = world.events(start, 0, 0);
        if some.events.is_empty() {
            return all;
        }
        start = Start::After(some.cursor);
        all.extend(some.events);
    }
}

#[test]
fn a_guest_that_floods_displaces_no_history_but_its_own() {
    let (mut world, other) = two();
    world.step(Event::SessionUp(other.clone(), "hello".into()), 0);
    world.step(Event::SessionLost(other.clone(), "gone".into()), 0);
    let quiet = |world: &World| -> Vec<String> {
        let events = whole_journal(world).into_iter();
        let quiet = events.filter(|event| !event.key.subject.starts_with("sql/"));
        quiet.map(|event| format!("{event:?}")).collect()
    };
    let before = quiet(&world);
    assert!(before.len() >= 2, "{before:?}");
    for answer in 0..50 {
        let first = answer * 1_024 + 1;
        world.step(happened(5, first..=first + 1_023), answer);
    }
    assert_eq!(quiet(&world), before);
    let all = whole_journal(&world);
    assert_eq!(all.len(), HOST_EVENTS);
    assert_eq!(all.last().unwrap().to.as_ref().unwrap().reason, "R51200");
    let (count, last) = world.displaced(0);
    assert_eq!(last.len(), HOST_EVENTS, "what the store is told is bounded");
    assert!(count > 40_000);
}

fn reported(subjects: impl Iterator<Item = String>, layer: Layer, reset: bool) -> Event {
    let conditions = subjects.map(|subject| Condition {
        key: Key::new(layer, subject),
        verdict: Verdict::yes("X", "e"),
        age_ms: 0,
        valid_ms: 1_000,
        since_ms: 0,
    });
    let changes = Changes {
        cursor: Cursor {
            incarnation: 1,
            revision: 1,
        },
        reset,
        conditions: conditions.collect(),
        removed: vec![Key::new(Layer::Clock, "offset")],
    };
    Event::Conditions(sql(), changes)
}

#[test]
fn a_guest_that_reports_without_end_fills_its_own_place_only() {
    let (mut world, other) = two();
    for round in 0..20 {
        let subjects = (0..1_000).map(|n| format!("{round}-{n}"));
        world.step(reported(subjects, Layer::Disk, false), 0);
    }
    let of = |world: &World, layer: Layer| {
        let all = world.guest_conditions(&sql(), 0);
        all.filter(|condition| condition.key.layer == layer).count()
    };
    assert_eq!(
        of(&world, Layer::Disk) + of(&world, Layer::Service),
        GUEST_CONDITIONS
    );
    let told = journal(&world);
    assert_eq!(
        told.iter()
            .filter(|line| line.ends_with("TooManyConditions"))
            .count(),
        1
    );
    world.step(Event::SessionUp(other.clone(), "hello".into()), 0);
    assert_eq!(
        world.guest_conditions(&other, 0).count(),
        1,
        "there is room for others"
    );
    world.step(reported(["data".to_owned()].into_iter(), Layer::Disk, true), 0);
    assert_eq!(of(&world, Layer::Disk), 1, "after a reset there is room again");
}

#[test]
fn a_guest_does_not_speak_for_the_host() {
    let mut world = ready_world();
    world.step(Event::Clock(sql(), Verdict::no("Off", "+9000 ms")), 0);
    for (layer, subject) in [
        (Layer::Clock, "offset"),
        (Layer::Vmm, "vmm"),
        (Layer::Session, "agent"),
    ] {
        for reset in [false, true] {
            world.step(reported([subject.to_owned()].into_iter(), layer, reset), 0);
        }
        let key = host_key(layer, &sql(), subject);
        assert_ne!(world.feed.verdict(&key).unwrap().reason, "X", "{layer}");
    }
    let offset = host_key(Layer::Clock, &sql(), "offset");
    assert_eq!(world.feed.verdict(&offset).unwrap().reason, "Off");
}

#[test]
fn a_world_goes_on_where_the_last_agent_ended() {
    let mut last = ready_world();
    last.step(happened(5, 1..=2), 10);
    let (all, read) = (whole_journal(&last), last.read().clone());
    assert_eq!(read[&sql()].revision, 2);
    let mut journal = Journal::new(7, HOST_EVENTS);
    for event in all.clone() {
        journal.restore(event, 0);
    }
    let mut world = World::resume(9, journal, read.clone(), 3, Some(spec(5432)));
    assert_eq!(whole_journal(&world), all);
    assert_eq!((world.read(), world.revision()), (&read, 3));
    assert_eq!(world.spec(), Some(&spec(5432)));
    assert!(world.wants(&spec(5432)) && !world.wants(&spec(5433)));
    world.step(Event::Applied(spec(5432)), 1);
    assert_eq!(world.revision(), 3, "what is wanted already is no change");
    world.step(happened(5, 1..=2), 2);
    let again = whole_journal(&world);
    let told = again.iter().filter(|event| event.key.subject == "sql/postgres");
    assert_eq!(told.count(), 2, "what was read before is not told again");
}

#[test]
fn only_what_serves_has_open_forwards_and_they_lead_to_the_wanted_ports() {
    let mut world = World::new(1);
    world.step(Event::Applied(spec(5432)), 0);
    assert_eq!(world.serving(), []);
    let mut world = ready_world();
    assert_eq!(world.serving(), [sql()]);
    let postgres = Name::parse("postgres").unwrap();
    assert_eq!(world.forward_ports(&sql()), BTreeMap::from([(postgres, 5432)]));
    assert_eq!(world.step(Event::Tick, 1), [], "nothing is switched twice");
    let of = |world: &World| world.report(&sql(), 1, |_| String::new()).guests[0].forwards[0].status;
    assert_eq!(of(&world), Status::Unknown);
    world.step(
        Event::Forward(sql(), "other".into(), Verdict::no("PortUnavailable", "")),
        1,
    );
    assert_eq!(of(&world), Status::Unknown, "another forward's");
    world.step(
        Event::Forward(sql(), "postgres".into(), Verdict::yes("Listening", "")),
        1,
    );
    assert_eq!(of(&world), Status::True);
    assert_eq!(
        world.ready(&sql(), 1),
        Status::True,
        "a port in use leaves the guest ready"
    );
}

fn networked(address: &str) -> HostSpec {
    let mut networked = spec(5432);
    networked.network = Some(sovereign_protocol::spec::HostNetwork {
        namespace: Namespace::Auto,
        addresses: vec![address.parse().unwrap()],
        uplink: sovereign_protocol::spec::Uplink::None,
        vpn: sovereign_protocol::spec::Vpn::Follow,
        isolated: false,
    });
    networked
}

#[test]
fn a_network_is_tried_until_it_is_there_and_again_only_when_it_is_another() {
    let decides = |world: &mut World, spec: &HostSpec| {
        let effects = world.step(Event::Applied(spec.clone()), 0);
        effects.contains(&Effect::DecideNetwork(Namespace::Auto))
    };
    let (one, two) = (networked("10.0.0.1/24"), networked("10.0.1.1/24"));
    let mut world = World::new(1);
    assert!(!decides(&mut world, &spec(5432)));
    assert!(decides(&mut world, &one));
    assert!(decides(&mut world, &one), "nobody has said yet");
    world.step(Event::NetworkMode(NetworkMode::Off("no tun".into())), 0);
    assert!(!decides(&mut world, &one) && decides(&mut world, &two));
    let opened = world.step(Event::NetworkMode(NetworkMode::Private), 0);
    assert_eq!(opened, [Effect::OpenNetwork]);
    assert!(!decides(&mut world, &one) && !decides(&mut world, &two));
    let mut without = World::new(1);
    assert_eq!(
        without.step(Event::NetworkMode(NetworkMode::Off("x".into())), 0),
        []
    );
}

#[test]
fn a_network_that_is_there_stays_in_its_namespace() {
    let at = |namespace| {
        let mut spec = networked("10.0.0.1/24");
        spec.network.as_mut().unwrap().namespace = namespace;
        spec
    };
    let said = |mode: &NetworkMode, namespace| {
        let mut world = World::new(1);
        world.step(Event::NetworkMode(mode.clone()), 0);
        world.network_in_the_way(&at(namespace))
    };
    let off = NetworkMode::Off(String::new());
    for (mode, namespace) in [
        (&NetworkMode::Private, Namespace::Auto),
        (&NetworkMode::Host, Namespace::Host),
        (&off, Namespace::Host),
        (&NetworkMode::Undecided, Namespace::Host),
    ] {
        assert_eq!(said(mode, namespace), None);
    }
    let moved = said(&NetworkMode::Private, Namespace::Host).unwrap();
    assert!(moved.ends_with("sovereign down, then sovereign up"), "{moved}");
    assert!(said(&NetworkMode::Host, Namespace::Auto).is_some());
}

#[test]
fn a_tap_is_wanted_for_who_has_a_card_or_will_have_one() {
    let interface = || Some(sovereign_protocol::interface::InterfaceSpec::default());
    let mut carded = spec(5432);
    carded.guests.get_mut(&sql()).unwrap().interface = interface();
    let mut world = World::new(1);
    world.step(Event::Applied(spec(5432)), 0);
    assert!(world.carded().is_empty());
    world.step(Event::Applied(carded.clone()), 0);
    let carded_now = |world: &World| world.carded().into_keys().collect::<BTreeSet<Name>>();
    assert_eq!(carded_now(&world), BTreeSet::from([sql()]));

    let Event::Booted {
        guest, boot_id, vmm, ..
    } = booted()
    else {
        unreachable!()
    };
    let machine = Machine::wanted(&carded.guests[&sql()], true);
    world.step(
        Event::Booted {
            guest,
            boot_id,
            vmm,
            machine,
        },
        1,
    );
    world.step(Event::Applied(spec(5432)), 2);
    assert_eq!(
        carded_now(&world),
        BTreeSet::from([sql()]),
        "its VMM has the TAP still"
    );
    let nobody = HostSpec {
        guests: BTreeMap::new(),
        ..spec(5432)
    };
    world.step(Event::Applied(nobody), 3);
    assert_eq!(
        carded_now(&world),
        BTreeSet::from([sql()]),
        "it stops with its card"
    );
    world.step(exit(ExitReason::PoweredOff), 4);
    assert!(world.carded().is_empty());
}

#[test]
fn a_guest_that_booted_before_its_network_says_so() {
    let mut carded = networked("10.0.0.1/24");
    carded.guests.get_mut(&sql()).unwrap().interface =
        Some(sovereign_protocol::interface::InterfaceSpec::default());
    let mut world = World::new(1);
    world.step(Event::Applied(carded), 0);
    world.step(Event::NetworkMode(NetworkMode::Private), 0);
    world.step(booted(), 10_000); // without a card
    let card = host_key(Layer::Tap, &sql(), "card");
    assert_eq!(world.feed.verdict(&card).unwrap().reason, "NoCard");
}

#[test]
fn a_forward_of_the_kernel_that_is_asked_for_again_stays_as_it_is() {
    let mut carded = networked("10.0.0.1/24");
    let guest = carded.guests.get_mut(&sql()).unwrap();
    guest.interface = Some(sovereign_protocol::interface::InterfaceSpec {
        addresses: vec!["10.0.0.2/24".parse().unwrap()],
        ..Default::default()
    });
    guest.forwards[0].translated = Some(sovereign_protocol::spec::Translated::default());
    let mut world = World::new(1);
    for event in [
        Event::Applied(carded.clone()),
        Event::NetworkMode(NetworkMode::Off("no card".into())),
        booted(),
        Event::SessionUp(sql(), "hello".into()),
        Event::SpecApplied(sql(), edition(1, 0), None),
        service(Status::True, 1_000),
    ] {
        world.step(event, 0);
    }
    let works = |there: bool| {
        let forwards = world.translations().into_values().filter(|_| there).collect();
        Event::Network(NetworkEvent::Works {
            part: crate::net::Part::Filter,
            how: None,
            forwards,
            refused: BTreeMap::new(),
        })
    };
    let (there, gone) = (works(true), works(false));
    let told = || {
        let told = Verdict::unknown("Translating", "the kernel is told");
        Event::Forward(sql(), "postgres".to_owned(), told)
    };
    let reason = |world: &World| {
        let key = host_key(Layer::Forward, &sql(), "postgres");
        world.feed.verdict(&key).unwrap().reason.clone()
    };
    world.step(told(), 1);
    assert_eq!(reason(&world), "Translating");
    world.step(there.clone(), 2);
    assert_eq!(reason(&world), "Translated");
    let before = whole_journal(&world).len();
    world.step(Event::Applied(carded), 3);
    world.step(told(), 3);
    assert_eq!(reason(&world), "Translated", "nobody tells of it a second time");
    assert_eq!(whole_journal(&world).len(), before);
    // The network may be quicker than who asks it.
    world.step(gone, 4);
    assert_eq!(reason(&world), "Translating");
    world.step(there, 5);
    world.step(told(), 5);
    assert_eq!(reason(&world), "Translated");
    // No port, or no guest that is ready, is no matter of the kernel.
    let taken = Verdict::no("PortUnavailable", "");
    world.step(Event::Forward(sql(), "postgres".to_owned(), taken), 6);
    assert_eq!(reason(&world), "PortUnavailable");
    world.step(service(Status::False, 1_000), 7);
    world.step(told(), 7);
    assert_eq!(reason(&world), "Translating");
}

#[test]
fn a_guest_wanted_again_while_it_stops_starts_after_its_end() {
    let mut world = ready_world();
    let nobody = HostSpec {
        guests: BTreeMap::new(),
        ..spec(5432)
    };
    world.step(Event::Applied(nobody), 1);
    world.step(Event::Applied(spec(5432)), 2);
    world.step(booted(), 3); // of an adoption, say: it stops all the same
    assert_eq!(
        world.report(&sql(), 3, |_| String::new()).guests[0].phase,
        Phase::Stopping
    );
    let effects = world.step(exit(ExitReason::PoweredOff), 4);
    assert!(
        effects.iter().any(|effect| matches!(effect, Effect::Start(..))),
        "{effects:?}"
    );
}

#[test]
fn an_end_takes_a_guests_own_conditions_and_leaves_those_of_others() {
    let (mut world, other) = two();
    world.step(Event::SessionUp(other.clone(), "hello".into()), 0);
    world.step(exit(ExitReason::Crashed), 1);
    assert_eq!(world.guest_conditions(&other, 1).count(), 1);
    let left: Vec<Key> = world.guest_conditions(&sql(), 1).map(|c| c.key).collect();
    assert_eq!(left, [host_key(Layer::Vmm, &sql(), "vmm")]);
}

#[test]
fn what_a_vmm_says_is_told_apart() {
    let Event::Booted { vmm, .. } = booted() else {
        unreachable!()
    };
    for (state, reason) in [
        (VmmState::Says("running".into()), Some("Running")),
        (VmmState::Says("paused".into()), Some("Paused")),
        (VmmState::Says("io-error".into()), Some("HostDiskFull")),
        (VmmState::Says("internal-error".into()), Some("Stuck")),
        (VmmState::Stopped, Some("Stopped")),
        (VmmState::Silent('D'), Some("Silent")),
        (VmmState::Starting, None),
    ] {
        let verdict = crate::core::vmm_verdict(&state, &vmm);
        assert_eq!(verdict.as_ref().map(|v| v.reason.as_str()), reason, "{state:?}");
    }
}

#[test]
fn a_spec_that_is_taken_ends_the_refusal_of_the_one_before() {
    let mut world = ready_world();
    world.step(Event::Applied(spec(5433)), 1);
    world.step(Event::SpecRefused(sql(), "services: bad".into()), 2);
    assert_eq!(world.ready(&sql(), 2), Status::False);
    world.step(Event::Applied(spec(5434)), 3);
    world.step(Event::SpecApplied(sql(), edition(3, 0), None), 4);
    assert_eq!(world.ready(&sql(), 4), Status::True);
    let lost = Event::SessionLost(sql(), "x".into());
    world.step(lost, 5);
    world.step(Event::SpecApplied(sql(), edition(3, 0), None), 6);
    assert_eq!(
        world.ready(&sql(), 6),
        Status::Unknown,
        "only a refusal is taken back"
    );
}

#[test]
fn what_was_said_of_a_forward_goes_with_it() {
    let mut world = ready_world();
    let taken = Verdict::no("PortUnavailable", "");
    world.step(Event::Forward(sql(), "postgres".into(), taken.clone()), 1);
    let key = host_key(Layer::Forward, &sql(), "postgres");
    world.step(Event::Applied(spec(5432)), 1);
    assert_eq!(world.feed.verdict(&key), Some(&taken));
    let mut without = spec(5432);
    without.guests.get_mut(&sql()).unwrap().forwards.clear();
    world.step(Event::Applied(without), 2);
    assert_eq!(world.feed.verdict(&key), None);
}

#[test]
fn since_is_when_readiness_last_changed() {
    let mut world = ready_world();
    let since = |world: &World| {
        world.report(&sql(), 9, |ms| ms.to_string()).guests[0]
            .since
            .clone()
    };
    world.step(Event::Tick, 5);
    assert_eq!(since(&world), "0");
    world.step(Event::SessionLost(sql(), "x".into()), 7);
    world.step(Event::Tick, 8);
    assert_eq!(since(&world), "7");
}

#[test]
fn a_thousand_guests_have_room_and_one_takes_no_more_than_its_own() {
    let mut many = spec(5432);
    let config = config(5432);
    let names: Vec<Name> = (0..1_000)
        .map(|n| Name::parse(&format!("g{n}")).unwrap())
        .collect();
    many.guests = names.iter().map(|name| (name.clone(), config.clone())).collect();
    for world in [
        World::new(1),
        World::resume(1, Journal::new(1, 8), BTreeMap::new(), 0, None),
    ] {
        let mut world = world;
        world.step(Event::Applied(many.clone()), 0);
        for name in &names {
            for n in 0..9 {
                let key = host_key(Layer::Service, name, &format!("s{n}"));
                world.feed.mirror(key, Verdict::yes("Ready", ""), 1_000, 0);
            }
        }
        let whole = names
            .iter()
            .filter(|name| world.guest_conditions(name, 0).count() >= 9);
        assert_eq!(whole.count(), 1_000);
    }
}

#[test]
fn what_others_stop_is_a_condition_until_they_do_so_no_more() {
    use crate::net::{NetworkEvent, Part, Stop};
    use sovereign_reconcile::finding::Code;

    let mut world = ready_world();
    let mut tell = |event| {
        world.step(Event::Network(event), 1);
        let report = world.report(&sql(), 1, |_| String::new());
        let said = report.network.iter();
        let said = said.map(|c| format!("{} {:?} {}: {}", c.layer, c.status, c.reason, c.evidence));
        said.collect::<Vec<_>>()
    };
    let works = || NetworkEvent::Works {
        part: Part::Filter,
        how: Some("nf_tables".to_owned()),
        forwards: [].into(),
        refused: BTreeMap::new(),
    };
    let by = |part, code, evidence: &str| Stop {
        part,
        code,
        evidence: evidence.to_owned(),
    };
    let well = ["nat True Filtered: nf_tables"];
    assert_eq!(tell(works()), well);
    let docker = || NetworkEvent::Stopped {
        by: vec![by(Part::Filter, Code::ForwardDrop, "policy DROP")],
    };
    assert_eq!(tell(docker()), ["nat False ForwardDrop: policy DROP"]);
    assert_eq!(
        tell(works()),
        ["nat False ForwardDrop: policy DROP"],
        "ours being there is not enough"
    );
    assert_eq!(
        tell(NetworkEvent::Failed {
            part: Part::Filter,
            step: "set".to_owned(),
            evidence: "no".to_owned(),
        }),
        ["nat False FilterFailed: set: no"],
        "what is ours comes first"
    );
    assert_eq!(tell(works()), ["nat False ForwardDrop: policy DROP"]);
    let both = NetworkEvent::Stopped {
        by: vec![
            by(Part::Routing, Code::LookupMain, "rule 1"),
            by(Part::Filter, Code::ForwardDrop, "policy DROP"),
        ],
    };
    assert_eq!(
        tell(both),
        [
            "routing False LookupMain: rule 1",
            "nat False ForwardDrop: policy DROP"
        ]
    );
    assert_eq!(tell(NetworkEvent::Stopped { by: vec![] }), well);
    let what = vec!["IPv4 rule 1: remove".to_owned()];
    tell(NetworkEvent::Removed { what });
    let journal = whole_journal(&world);
    let told = journal.last().and_then(|event| event.to.as_ref()).unwrap();
    assert_eq!(
        (told.reason.as_str(), told.evidence.as_str()),
        ("LeftoverRemoved", "IPv4 rule 1: remove")
    );
}
