use super::*;
use crate::core::service::Probe;
use sovereign_protocol::secret::Secret;
use sovereign_protocol::spec::Exposed;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn spec(port: u16) -> GuestSpec {
    GuestSpec {
        version: 1,
        revision: 1,
        hostname: name("sql"),
        services: vec![Service {
            name: name("postgres"),
            kind: ServiceKind::Postgres {
                settings: BTreeMap::new(),
                port,
            },
            limits: None,
            requires: None,
        }],
        secrets: BTreeMap::new(),
        interface: None,
        open: std::collections::BTreeSet::new(),
        tailscale: None,
        requirements: std::collections::BTreeMap::new(),
        clients: std::collections::BTreeMap::new(),
    }
}

fn world() -> World {
    World::new(Feed::new(1, 16), BootFacts::default())
}

fn actions(effects: Vec<Effect>) -> Vec<Action> {
    let action = |effect| {
        if let Effect::Service(_, action) = effect {
            Some(action)
        } else {
            None
        }
    };
    effects.into_iter().filter_map(action).collect()
}

fn event(world: &mut World, event: service::Event, now: u64) -> Vec<Action> {
    actions(world.step(Event::Service(name("postgres"), event), now))
}

fn ready() -> World {
    let mut world = world();
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    assert_eq!(
        actions(world.step(Event::Apply(Box::new(spec(5432)), 1), 0)),
        [Action::Launch]
    );
    event(&mut world, service::Event::Launched(Ok(())), 0);
    event(&mut world, service::Event::Probed(Probe::Ready("1".into())), 0);
    event(&mut world, service::Event::Adjusted(service::Adjusted::Done), 0);
    world
}

fn verdict(world: &World) -> &Verdict {
    world.feed.verdict(&Key::new(Layer::Service, "postgres")).unwrap()
}

#[test]
fn a_spec_before_the_disk_and_after_it_both_launch_once() {
    let mut world = world();
    assert!(actions(world.step(Event::Apply(Box::new(spec(5432)), 1), 0)).is_empty());
    assert_eq!(verdict(&world).status, Status::Unknown);
    assert_eq!(
        actions(world.step(Event::Disk(Verdict::yes("Mounted", "")), 1)),
        [Action::Launch]
    );
    assert!(actions(world.step(Event::Disk(Verdict::yes("Mounted", "")), 2)).is_empty());
    assert!(actions(world.step(Event::Apply(Box::new(spec(5432)), 1), 3)).is_empty());
}

#[test]
fn applying_the_same_spec_again_does_nothing_and_a_change_adjusts() {
    let mut world = ready();
    assert_eq!(
        world.step(Event::Apply(Box::new(spec(5432)), 1), 1),
        [Effect::Answer(1, Ok(1))]
    );
    assert_eq!(
        actions(world.step(Event::Apply(Box::new(spec(5433)), 1), 1)),
        [Action::Adjust]
    );
    event(&mut world, service::Event::Adjusted(service::Adjusted::Done), 1);
    let mut secret = spec(5433);
    secret
        .secrets
        .insert("postgres".into(), Exposed(Secret::new("s".into())));
    assert_eq!(
        actions(world.step(Event::Apply(Box::new(secret), 1), 1)),
        [Action::Adjust]
    );
}

#[test]
fn a_service_that_is_not_wanted_any_more_is_stopped_and_forgotten() {
    let mut world = ready();
    let empty = GuestSpec {
        services: Vec::new(),
        ..spec(1)
    };
    assert_eq!(
        actions(world.step(Event::Apply(Box::new(empty), 1), 1)),
        [Action::Stop]
    );
    event(&mut world, service::Event::Ended("0".into()), 2);
    assert!(
        world
            .feed
            .verdict(&Key::new(Layer::Service, "postgres"))
            .is_none()
    );
}

#[test]
fn a_shutdown_powers_off_when_services_have_stopped_and_only_once() {
    let mut world = ready();
    let effects = world.step(Event::Shutdown, 1);
    assert!(!effects.contains(&Effect::PowerOff));
    assert_eq!(actions(effects), [Action::Stop]);
    assert!(world.step(Event::Shutdown, 2).is_empty());
    assert!(world.step(Event::Disk(Verdict::yes("Mounted", "")), 2).is_empty());
    assert_eq!(
        world.step(
            Event::Service(name("postgres"), service::Event::Ended("0".into())),
            3
        ),
        [Effect::PowerOff]
    );
    assert!(world.step(Event::Tick, 99_999).is_empty());
}

#[test]
fn a_shutdown_does_not_wait_for_ever() {
    let mut world = ready();
    world.step(Event::Shutdown, 0);
    assert!(
        !world
            .step(Event::Tick, SHUTDOWN_MS - 1)
            .contains(&Effect::PowerOff)
    );
    assert!(world.step(Event::Tick, SHUTDOWN_MS).contains(&Effect::PowerOff));
    assert_eq!(world.step(Event::Shutdown, SHUTDOWN_MS), []);
}

#[test]
fn without_services_a_shutdown_is_at_once() {
    assert_eq!(world().step(Event::Shutdown, 0), [Effect::PowerOff]);
}

#[test]
fn a_ready_service_that_is_not_probed_any_more_goes_stale() {
    let mut world = ready();
    let mut now = 0;
    while now < 2 * service::VALID_MS {
        now += 1_000;
        world.step(Event::Tick, now); // the probe that it asks for never ends
    }
    let stale = world
        .feed
        .snapshot(now)
        .find(|c| c.key.layer == Layer::Service)
        .unwrap();
    assert_eq!(
        (stale.verdict.status, stale.verdict.reason.as_str()),
        (Status::Unknown, "Stale")
    );
}

#[test]
fn a_stuck_service_stays_false_and_fresh() {
    let mut world = world();
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    world.step(Event::Apply(Box::new(spec(5432)), 1), 0);
    let hopeless = service::LaunchError::Hopeless("OtherVersion", "16".into());
    event(&mut world, service::Event::Launched(Err(hopeless)), 0);
    for now in (0..100_000).step_by(1_000) {
        world.step(Event::Tick, now);
        assert!(
            world
                .feed
                .snapshot(now)
                .all(|c| c.key.layer != Layer::Service || c.verdict.reason == "OtherVersion")
        );
    }
}

#[test]
fn the_clock_is_unknown_until_the_host_has_measured_it() {
    let clock = Key::new(Layer::Clock, "realtime");
    let ahead = ClockCorrection {
        offset_ns: 5_000_000_000,
        bound_ns: 1,
        woke: false,
    };
    let mut before = world();
    assert_eq!(before.feed.verdict(&clock).unwrap().status, Status::Unknown);
    let effects = before.step(Event::Correction(ahead), 1);
    assert!(matches!(
        effects[..],
        [Effect::Clock(Adjustment {
            step_ns: -5_000_000_000,
            ..
        })]
    ));
    assert_eq!(before.feed.verdict(&clock).unwrap().status, Status::True);
    before.step(Event::ClockFailed("EPERM".into()), 2);
    assert_eq!(before.feed.verdict(&clock).unwrap().reason, "NotAdjusted");

    let mut running = ready();
    assert_eq!(running.step(Event::Correction(ahead), 1), []);
    assert_eq!(running.feed.verdict(&clock).unwrap().reason, "Ahead");
}

#[test]
fn the_secret_of_a_service_is_the_one_last_told() {
    let mut world = ready();
    let mut told = spec(5432);
    told.secrets
        .insert("postgres".into(), Exposed(Secret::new("s".into())));
    let effects = world.step(Event::Apply(Box::new(told), 1), 1);
    let [Effect::Service(brief, Action::Adjust)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(brief.password.as_ref().unwrap().0.reveal(), "s");
    assert!(!format!("{effects:?}").contains("\"s\""));
}

#[test]
fn ticks_come_quickly_only_while_something_is_due() {
    assert_eq!(world().tick_ms(), TICK_STEADY_MS);
    let mut world = ready();
    assert_eq!(world.tick_ms(), TICK_STEADY_MS);
    event(&mut world, service::Event::Probed(Probe::Silent("2 s".into())), 1);
    assert_eq!(world.tick_ms(), TICK_FAST_MS);
    let mut changing = ready();
    changing.step(Event::Apply(Box::new(spec(5433)), 1), 1);
    assert!(changing.application.is_changing());
    assert_eq!(
        changing.tick_ms(),
        TICK_FAST_MS,
        "the service rests, its change does not"
    );
    let mut ending = ready();
    ending.step(Event::Shutdown, 1);
    assert_eq!(ending.tick_ms(), TICK_FAST_MS);
}

#[test]
fn a_shutdown_stops_what_is_wanted_once_and_what_is_not_wanted_any_more() {
    let mut world = ready();
    let empty = GuestSpec {
        services: Vec::new(),
        ..spec(1)
    };
    assert!(is_wanted(Some(&spec(1)), &name("postgres")));
    assert!(!is_wanted(Some(&spec(1)), &name("other")) && !is_wanted(Some(&empty), &name("postgres")));
    world.application = Application::default();
    assert_eq!(
        actions(world.step(Event::Shutdown, 1)),
        [Action::Stop],
        "also without a spec"
    );
    assert_eq!(world.shutdown(2), []);
}

#[test]
fn the_kernel_is_judged_by_what_is_wanted() {
    let contract = Key::new(Layer::Kernel, "contract");
    let miss = |breaks: &str| judge::Miss {
        symbol: "SYSVIPC".into(),
        seen: "ENOSYS".into(),
        breaks: vec![breaks.into()],
    };
    let mut world = world();
    world.step(Event::Kernel(vec![miss("postgresql"), miss("tailscale")]), 0);
    assert_eq!(
        world.feed.verdict(&contract).unwrap().status,
        Status::True,
        "nothing needs it"
    );
    world.step(Event::Apply(Box::new(spec(5432)), 1), 1);
    world.step(Event::Kernel(vec![miss("postgresql")]), 2);
    assert_eq!(world.feed.verdict(&contract).unwrap().reason, "Lacks");
    world.step(Event::Kernel(vec![miss("tailscale")]), 3);
    assert_eq!(world.feed.verdict(&contract).unwrap().status, Status::True);
}
