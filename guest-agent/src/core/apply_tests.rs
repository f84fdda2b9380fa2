use super::*;
use crate::core::service::{Action, Adjusted, Event as Of, LaunchError, Probe};
use crate::core::world::Event;
use crate::facts::BootFacts;
use sovereign_protocol::condition::Status;
use sovereign_protocol::feed::Feed;

use sovereign_protocol::secret::Secret;
use sovereign_protocol::spec::{Service, TailscaleSpec};

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn spec(revision: u64, port: u16, address: &str) -> GuestSpec {
    GuestSpec {
        version: 1,
        revision,
        hostname: name("sql"),
        services: vec![Service {
            name: name("postgres"),
            kind: ServiceKind::Postgres {
                settings: std::collections::BTreeMap::new(),
                port,
            },
            limits: None,
            requires: None,
        }],
        secrets: std::collections::BTreeMap::new(),
        interface: Some(InterfaceSpec {
            addresses: vec![address.parse().unwrap()],
            ..InterfaceSpec::default()
        }),
        open: BTreeSet::new(),
        tailscale: None,
        requirements: std::collections::BTreeMap::new(),
        clients: std::collections::BTreeMap::new(),
    }
}

const A: &str = "10.0.0.2/24";
const B: &str = "10.0.0.3/24";

/// PostgreSQL is ready on 5432 and the interface has A, both by revision 1.
fn ready() -> World {
    let mut world = World::new(Feed::new(1, 64), BootFacts::default());
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    let effects = world.step(Event::Apply(Box::new(spec(1, 5432, A)), 1), 0);
    assert_eq!(answers(&effects), [(1, Ok(1))]);
    world.step(Event::NetworkTaken(1, Ok(())), 0);
    for event in [
        Of::Launched(Ok(())),
        Of::Probed(Probe::Ready("1".into())),
        Of::Adjusted(Adjusted::Done),
    ] {
        service(&mut world, event, 0);
    }
    world
}

fn service(world: &mut World, event: Of, now: u64) -> Vec<Effect> {
    world.step(Event::Service(name("postgres"), event), now)
}

fn answers(effects: &[Effect]) -> Vec<(u64, Result<u64, String>)> {
    let answer = |effect: &Effect| match effect {
        Effect::Answer(ticket, answer) => Some((*ticket, answer.clone())),
        _ => None,
    };
    effects.iter().filter_map(answer).collect()
}

fn refusal(effects: &[Effect]) -> String {
    match &answers(effects)[..] {
        [(_, Err(why))] => why.clone(),
        other => panic!("no refusal: {other:?}"),
    }
}

fn orders(effects: &[Effect]) -> Vec<Order> {
    let order = |effect: &Effect| match effect {
        Effect::Network(order) => Some(order.clone()),
        _ => None,
    };
    effects.iter().filter_map(order).collect()
}

fn actions(effects: &[Effect]) -> Vec<(u16, Action)> {
    let action = |effect: &Effect| match effect {
        Effect::Service(service, action) => Some((service.service.kind.port(), *action)),
        _ => None,
    };
    effects.iter().filter_map(action).collect()
}

fn to(address: &str) -> Wanted {
    Wanted::Spec(spec(0, 0, address).interface.unwrap())
}

fn not_applied(world: &World, key: &Key) -> Option<String> {
    let verdict = world.feed.verdict(key)?;
    assert_eq!(
        (verdict.status, verdict.reason.as_str()),
        (Status::False, "NotApplied")
    );
    Some(verdict.evidence.clone())
}

#[test]
fn the_first_document_begins_everything_and_is_answered_at_once() {
    let mut world = World::new(Feed::new(1, 64), BootFacts::default());
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    let effects = world.step(Event::Apply(Box::new(spec(1, 5432, A)), 7), 0);
    assert_eq!(
        orders(&effects),
        [Order {
            attempt: 1,
            wanted: to(A),
            strict: false
        }]
    );
    assert_eq!(actions(&effects), [(5432, Action::Launch)]);
    assert!(effects.contains(&Effect::Hostname(name("sql"))));
    assert_eq!(answers(&effects), [(7, Ok(1))]);
}

#[test]
fn a_document_without_an_interface_leaves_none_of_ours() {
    let mut world = ready();
    let mut without = spec(2, 5432, A);
    without.interface = None;
    let effects = world.step(Event::Apply(Box::new(without.clone()), 2), 1);
    assert_eq!(orders(&effects)[0].wanted, Wanted::Nothing);
    assert_eq!(
        answers(&world.step(Event::NetworkTaken(2, Ok(())), 2)),
        [(2, Ok(2))]
    );
    let effects = world.step(Event::Apply(Box::new(without), 3), 3);
    assert_eq!((orders(&effects).len(), answers(&effects)), (0, vec![(3, Ok(2))]));
}

#[test]
fn the_interface_comes_first_and_services_only_after_it() {
    let mut world = ready();
    let effects = world.step(Event::Apply(Box::new(spec(2, 5433, B)), 2), 1);
    assert!(orders(&effects)[0].strict);
    assert_eq!((actions(&effects), answers(&effects)), (vec![], vec![]));
    let effects = world.step(Event::NetworkTaken(2, Ok(())), 2);
    assert_eq!(
        (actions(&effects), answers(&effects)),
        (vec![(5433, Action::Adjust)], vec![])
    );
    let effects = service(&mut world, Of::Adjusted(Adjusted::Done), 3);
    assert_eq!(answers(&effects), [(2, Ok(2))]);
}

#[test]
fn an_interface_that_fails_changes_no_service_and_is_the_answer() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(spec(2, 5433, B)), 2), 1);
    let effects = world.step(Event::NetworkTaken(2, Err("EINVAL".into())), 2);
    assert_eq!(
        refusal(&effects),
        "revision 2 was not taken, revision 1 goes on: interface: EINVAL"
    );
    assert_eq!(
        (actions(&effects), orders(&effects)),
        (vec![], vec![]),
        "the network went back by itself"
    );
    let key = Key::new(Layer::Interface, "net.config");
    assert!(not_applied(&world, &key).unwrap().ends_with("EINVAL"));
    assert_eq!(world.wanted().unwrap().revision, 1);

    // The next document is measured against what is there, and clears the refusal.
    let effects = world.step(Event::Apply(Box::new(spec(3, 5432, A)), 3), 3);
    assert_eq!((orders(&effects).len(), answers(&effects)), (0, vec![(3, Ok(3))]));
    assert_eq!(not_applied(&world, &key), None);
}

#[test]
fn a_network_that_does_not_answer_is_told_to_go_back() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(spec(2, 5432, B)), 2), 1);
    assert_eq!(answers(&world.step(Event::Tick, ANSWER_MS)), []);
    let effects = world.step(Event::Tick, ANSWER_MS + 1);
    assert!(refusal(&effects).ends_with("the network does not answer"));
    assert_eq!(orders(&effects)[0].wanted, to(A));
    assert_eq!(
        world.step(Event::NetworkTaken(2, Ok(())), ANSWER_MS + 2),
        [],
        "too late"
    );
}

#[test]
fn a_service_that_cannot_be_adjusted_takes_the_interface_back_too() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(spec(2, 5433, B)), 2), 1);
    world.step(Event::NetworkTaken(2, Ok(())), 2);
    let effects = service(
        &mut world,
        Of::Adjusted(Adjusted::Failed("no such setting".into())),
        3,
    );
    assert_eq!(
        refusal(&effects),
        "revision 2 was not taken, revision 1 goes on: postgres: no such setting"
    );
    assert_eq!(orders(&effects)[0].wanted, to(A));
    assert!(!orders(&effects)[0].strict);
    assert_eq!(
        actions(&effects),
        [(5432, Action::Adjust)],
        "with the old settings"
    );
    service(&mut world, Of::Adjusted(Adjusted::Done), 4);
    let key = config_key(&name("postgres"));
    assert!(not_applied(&world, &key).unwrap().contains("no such setting"));
    let stays = world.feed.snapshot(4 * LOOK_VALID_MS).count();
    for now in (0..4 * LOOK_VALID_MS).step_by(1_000) {
        world.step(Event::Tick, now);
    }
    assert_eq!(world.feed.snapshot(4 * LOOK_VALID_MS).count(), stays);
    assert!(
        not_applied(&world, &key).is_some(),
        "it is told until another document comes"
    );
    world.step(Event::Apply(Box::new(spec(3, 5432, A)), 3), 4 * LOOK_VALID_MS);
    assert_eq!(not_applied(&world, &key), None);
}

#[test]
fn a_service_that_does_not_come_back_from_its_restart_runs_as_before() {
    for end in [
        Of::Ended("exit status 1".into()),
        Of::Launched(Err(LaunchError::Hopeless("BadSettings", "shared_buffers".into()))),
    ] {
        let mut world = ready();
        world.step(Event::Apply(Box::new(spec(2, 5433, A)), 2), 1);
        let effects = service(&mut world, Of::Adjusted(Adjusted::Restart("port".into())), 2);
        assert_eq!(actions(&effects), [(5433, Action::Stop)]);
        assert_eq!(
            actions(&service(&mut world, Of::Ended("0".into()), 3)),
            [(5433, Action::Launch)]
        );
        let mut effects = service(&mut world, end, 4);
        assert!(refusal(&effects).contains("postgres: "), "{effects:?}");
        effects.extend(world.step(Event::Tick, 1_000));
        assert_eq!(actions(&effects), [(5432, Action::Launch)]);
    }
}

#[test]
fn a_restart_that_takes_long_is_answered_before_and_told_after() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(spec(2, 5433, A)), 2), 0);
    service(&mut world, Of::Adjusted(Adjusted::Restart("port".into())), 0);
    let effects = world.step(Event::Tick, ANSWER_MS);
    assert_eq!(answers(&effects), [(2, Ok(2))]);
    service(&mut world, Of::Ended("0".into()), 5_000);
    let effects = service(&mut world, Of::Ended("exit status 1".into()), 6_000);
    assert_eq!(answers(&effects), [], "answered once");
    assert!(not_applied(&world, &config_key(&name("postgres"))).is_some());
    assert_eq!(world.wanted().unwrap().revision, 1);
}

#[test]
fn a_newer_document_ends_the_older_one() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(spec(2, 5433, A)), 2), 1);
    let effects = world.step(Event::Apply(Box::new(spec(3, 5434, A)), 3), 2);
    assert_eq!(refusal(&effects), "revision 3 came before it was reached");
    // The adjustment to 5433 fails, which nobody wants any more.
    let effects = service(
        &mut world,
        Of::Adjusted(Adjusted::Failed("5433 is taken".into())),
        3,
    );
    assert_eq!(
        (actions(&effects), answers(&effects)),
        (vec![(5434, Action::Adjust)], vec![])
    );
    let effects = service(&mut world, Of::Adjusted(Adjusted::Done), 4);
    assert_eq!(answers(&effects), [(3, Ok(3))]);
}

#[test]
fn a_service_that_was_dropped_and_comes_back_while_it_stops_is_started_again() {
    let mut world = ready();
    let mut without = spec(2, 5432, A);
    without.services.clear();
    let effects = world.step(Event::Apply(Box::new(without), 2), 1);
    assert_eq!(actions(&effects), [(5432, Action::Stop)]);
    world.step(Event::Apply(Box::new(spec(3, 5432, A)), 3), 2);
    let effects = service(&mut world, Of::Ended("0".into()), 3);
    assert_eq!(actions(&effects), [(5432, Action::Launch)]);
}

#[test]
fn a_service_that_is_stuck_does_not_hold_up_the_document_that_frees_it() {
    let mut world = World::new(Feed::new(1, 64), BootFacts::default());
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    world.step(Event::Apply(Box::new(spec(1, 5432, A)), 1), 0);
    let bad = LaunchError::Hopeless("BadSettings", "work_mem".into());
    service(&mut world, Of::Launched(Err(bad)), 1);
    let effects = world.step(Event::Apply(Box::new(spec(2, 5433, A)), 2), 2);
    assert_eq!(
        (actions(&effects), answers(&effects)),
        (vec![(5433, Action::Launch)], vec![(2, Ok(2))])
    );
}

#[test]
fn nothing_is_taken_while_shutting_down() {
    let mut world = ready();
    world.step(Event::Shutdown, 1);
    let effects = world.step(Event::Apply(Box::new(spec(2, 5433, B)), 2), 2);
    assert_eq!(
        effects,
        [Effect::Answer(2, Err("the guest is shutting down".into()))]
    );
}

#[test]
fn tailscale_is_watched_while_it_is_wanted() {
    let mut world = ready();
    let mut with = spec(2, 5432, A);
    with.tailscale = Some(TailscaleSpec {});
    let effects = world.step(Event::Apply(Box::new(with.clone()), 2), 1);
    assert!(effects.contains(&Effect::Tailscale(true)));
    with.revision = 3;
    assert_eq!(
        world.step(Event::Apply(Box::new(with), 3), 2),
        [Effect::Answer(3, Ok(3))]
    );
    let effects = world.step(Event::Apply(Box::new(spec(4, 5432, A)), 4), 3);
    assert!(effects.contains(&Effect::Tailscale(false)));
}

#[test]
fn reserved_settings_and_a_second_database_are_refused() {
    assert!(admit(&spec(1, 5432, A)).is_ok());
    let mut taken = spec(1, 5432, A);
    taken.services[0].kind = ServiceKind::Postgres {
        settings: std::collections::BTreeMap::from([("Port".into(), "1".into())]),
        port: 1,
    };
    assert_eq!(
        admit(&taken).unwrap_err(),
        "services[0].settings.Port: this setting belongs to the agent"
    );
    let mut two = spec(1, 5432, A);
    two.services.push(two.services[0].clone());
    assert!(admit(&two).is_err());
    assert!(admit(&spec(1, 0, A)).is_err());
    let mut secret = spec(1, 5432, A);
    let value = Exposed(Secret::new("pässword".into()));
    secret.secrets.insert("postgres".into(), value);
    let refusal = admit(&secret).unwrap_err();
    assert_eq!(refusal, "secrets.postgres: only printable ASCII is accepted");
}

#[test]
fn a_refusal_is_of_one_part() {
    let key = Key::new(Layer::Service, "postgres.config");
    let application = Application {
        refused: Some((key.clone(), "bad value".to_owned())),
        ..Application::default()
    };
    assert_eq!(application.refusal(&key), Some("bad value"));
    assert_eq!(application.refusal(&Key::new(Layer::Interface, "config")), None);
    assert_eq!(Application::default().refusal(&key), None);
}

/// What the host says of its way out, in a document that is the same in all else.
fn by_way(revision: u64, port: u16, number: u64) -> GuestSpec {
    let mut spec = spec(revision, port, A);
    spec.interface.as_mut().unwrap().ways.v4 = Some(number);
    spec
}

fn ways(effects: &[Effect]) -> Vec<u64> {
    let way = |effect: &Effect| match effect {
        Effect::Ways(interface) => interface.ways.v4,
        _ => None,
    };
    effects.iter().filter_map(way).collect()
}

#[test]
fn another_way_is_told_on_once_and_is_no_other_interface() {
    let mut world = ready();
    let effects = world.step(Event::Apply(Box::new(by_way(1, 5432, 7)), 2), 1);
    assert_eq!((ways(&effects), orders(&effects)), (vec![7], vec![]));
    assert_eq!(answers(&effects), [(2, Ok(1))]);
    let effects = world.step(Event::Apply(Box::new(by_way(1, 5432, 7)), 3), 2);
    assert_eq!((ways(&effects), answers(&effects)), (vec![], vec![(3, Ok(1))]));
    let effects = world.step(Event::Apply(Box::new(spec(2, 5432, A)), 4), 3);
    assert_eq!(
        (ways(&effects), orders(&effects)),
        (vec![], vec![]),
        "nothing is said"
    );
}

/// It is the host's way that moved, whatever becomes of the rest of the document.
#[test]
fn a_refused_document_takes_no_way_back() {
    let mut world = ready();
    world.step(Event::Apply(Box::new(by_way(1, 5432, 7)), 2), 1);
    let effects = world.step(Event::Apply(Box::new(by_way(2, 5433, 8)), 3), 2);
    assert_eq!(
        (ways(&effects), actions(&effects)),
        (vec![8], vec![(5433, Action::Adjust)])
    );
    let effects = service(&mut world, Of::Adjusted(Adjusted::Failed("no".into())), 3);
    assert!(refusal(&effects).contains("revision 1 goes on"), "{effects:?}");
    assert_eq!((ways(&effects), orders(&effects)), (vec![], vec![]));
    let effects = world.step(Event::Apply(Box::new(by_way(3, 5432, 8)), 4), 4);
    assert_eq!(ways(&effects), [] as [u64; 0], "it was told");
}

#[test]
fn what_ended_is_an_event_and_no_condition() {
    use crate::core::former::{Ended, Moved};
    let mut world = ready();
    let before = world.feed.cursor();
    let ended = Ended {
        moved: Moved { v4: true, v6: false },
        ended: 3,
        refused: Vec::new(),
    };
    world.step(Event::FormerEnded(ended), 5);
    assert!(world.feed.since(Some(before), 5).conditions.is_empty());
    let events = world
        .feed
        .journal()
        .read(sovereign_protocol::event::Start::Oldest, 64, 5, 0);
    let last = events.events.last().unwrap();
    assert_eq!(last.key, Ended::key());
    assert_eq!(last.to.as_ref().unwrap().reason, "ConnectionsEnded");
}
