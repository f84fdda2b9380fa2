//! Services that need one of another guest, and those that are needed.

use super::*;
use crate::core::service::{Action, Adjusted, Event as Of, LaunchError, Probe};
use crate::facts::BootFacts;
use sovereign_protocol::feed::Feed;
use sovereign_protocol::mesh::Requirement;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn parse(text: &str) -> GuestSpec {
    GuestSpec::parse(text.as_bytes()).unwrap()
}

/// `web`, told that its database is at this address and whether it can be used.
fn web(status: Status, address: &str) -> GuestSpec {
    parse(&format!(
        r#"{{"version":1,"revision":1,"hostname":"web",
        "services":[{{"name":"miniflux","kind":{{"miniflux":{{"port":8080}}}},"requires":"sql/postgres"}}],
        "secrets":{{"miniflux":"a","miniflux/requires":"p"}},
        "requirements":{{"miniflux":{{"of":"sql/postgres","status":"{status:?}","evidence":"sql/postgres is seen",
        "address":"{address}","port":5432,"role":"web_miniflux"}}}}}}"#
    ))
}

const A: &str = "10.0.0.2";

fn world() -> World {
    let mut world = World::new(Feed::new(1, 64), BootFacts::default());
    world.step(Event::Disk(Verdict::yes("Mounted", "")), 0);
    world
}

fn actions(effects: &[Effect]) -> Vec<Action> {
    let action = |effect: &Effect| match effect {
        Effect::Service(_, action) => Some(*action),
        _ => None,
    };
    effects.iter().filter_map(action).collect()
}

fn apply(world: &mut World, spec: GuestSpec, now: u64) -> Vec<Action> {
    actions(&world.step(Event::Apply(Box::new(spec), now + 1), now))
}

fn tell(world: &mut World, service: &str, event: Of, now: u64) -> Vec<Action> {
    actions(&world.step(Event::Service(name(service), event), now))
}

fn miniflux(world: &mut World, event: Of, now: u64) -> Vec<Action> {
    tell(world, "miniflux", event, now)
}

fn verdict(world: &World, subject: &str) -> (Status, String) {
    let verdict = world.feed.verdict(&Key::new(Layer::Service, subject)).unwrap();
    (verdict.status, verdict.reason.clone())
}

/// Miniflux is ready with a database at [`A`].
fn up() -> World {
    let mut world = world();
    assert_eq!(apply(&mut world, web(Status::True, A), 0), [Action::Launch]);
    for event in [
        Of::Launched(Ok(())),
        Of::Probed(Probe::Ready("OK".into())),
        Of::Adjusted(Adjusted::Done),
    ] {
        miniflux(&mut world, event, 0);
    }
    assert_eq!(verdict(&world, "miniflux"), (Status::True, "Ready".into()));
    world
}

#[test]
fn a_service_starts_only_while_what_it_needs_can_be_used() {
    let mut world = world();
    // What an earlier agent may have left is looked for, and nothing is there.
    assert_eq!(apply(&mut world, web(Status::Unknown, A), 0), [Action::Launch]);
    assert!(miniflux(&mut world, Of::Launched(Err(LaunchError::Waits)), 0).is_empty());
    for (status, now) in [(Status::Unknown, 0), (Status::False, 1), (Status::Unknown, 2)] {
        assert!(apply(&mut world, web(status, A), now).is_empty());
        assert_eq!(verdict(&world, "miniflux"), (status, "WaitsFor".into()));
    }
    let key = Key::new(Layer::Service, "miniflux");
    assert_eq!(
        world.feed.verdict(&key).unwrap().evidence,
        "not started: sql/postgres is seen"
    );
    assert!(actions(&world.step(Event::Tick, 3)).is_empty());
    assert_eq!(apply(&mut world, web(Status::True, A), 4), [Action::Launch]);
}

/// An agent that starts anew does not say of a running service that it was not started.
#[test]
fn what_runs_is_adopted_although_what_it_needs_cannot_be_used() {
    let mut world = world();
    assert_eq!(apply(&mut world, web(Status::False, A), 0), [Action::Launch]);
    assert_eq!(verdict(&world, "miniflux"), (Status::False, "WaitsFor".into()));
    miniflux(&mut world, Of::Launched(Ok(())), 1);
    assert_eq!(actions(&world.step(Event::Tick, 2)), [Action::Probe]);
    miniflux(&mut world, Of::Probed(Probe::Broken("500".into())), 3);
    assert_eq!(verdict(&world, "miniflux"), (Status::False, "Broken".into()));
    assert_eq!(apply(&mut world, web(Status::True, A), 4), [Action::Adjust]);
}

#[test]
fn what_can_be_used_by_the_time_the_look_has_ended_is_used() {
    let mut world = world();
    assert_eq!(apply(&mut world, web(Status::Unknown, A), 0), [Action::Launch]);
    assert!(
        apply(&mut world, web(Status::True, A), 1).is_empty(),
        "the look goes on"
    );
    assert_eq!(
        miniflux(&mut world, Of::Launched(Err(LaunchError::Waits)), 2),
        [Action::Launch]
    );
}

#[test]
fn the_data_disk_is_waited_for_as_well() {
    let mut world = World::new(Feed::new(1, 64), BootFacts::default());
    assert!(apply(&mut world, web(Status::True, A), 0).is_empty());
    assert_eq!(verdict(&world, "miniflux").1, "Waiting");
    assert_eq!(
        actions(&world.step(Event::Disk(Verdict::yes("Mounted", "")), 1)),
        [Action::Launch]
    );
}

#[test]
fn a_running_service_is_left_alone_while_the_other_guest_is_not_well() {
    let mut world = up();
    for (status, now) in [(Status::False, 100), (Status::Unknown, 101), (Status::True, 102)] {
        assert!(apply(&mut world, web(status, A), now).is_empty());
        assert_eq!(
            verdict(&world, "miniflux"),
            (Status::True, "Ready".into()),
            "it says itself how it is"
        );
        // And it is asked at once, not at the next steady look.
        assert_eq!(actions(&world.step(Event::Tick, now)), [Action::Probe]);
        miniflux(&mut world, Of::Probed(Probe::Ready("OK".into())), now);
    }
    let broken = Probe::Broken("500".into());
    miniflux(&mut world, Of::Probed(broken), 200);
    assert_eq!(verdict(&world, "miniflux"), (Status::False, "Broken".into()));
}

#[test]
fn another_address_restarts_it_when_it_can_be_used_and_no_sooner() {
    let mut world = up();
    assert!(apply(&mut world, web(Status::Unknown, "10.0.0.9"), 10).is_empty());
    assert!(
        actions(&world.step(Event::Tick, 11))
            .iter()
            .all(|action| *action == Action::Probe)
    );
    // Nobody is at the old address any more: it cannot get well before it is changed.
    assert!(miniflux(&mut world, Of::Probed(Probe::Broken("500".into())), 12).is_empty());
    assert_eq!(
        apply(&mut world, web(Status::True, "10.0.0.9"), 13),
        [Action::Adjust]
    );
    let restart = Of::Adjusted(Adjusted::Restart("its database".into()));
    assert_eq!(miniflux(&mut world, restart, 14), [Action::Stop]);
    let effects = world.step(Event::Service(name("miniflux"), Of::Ended("exit".into())), 15);
    let [Effect::Service(brief, Action::Launch)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!(
        brief.requirement.as_ref().unwrap().0.address.to_string(),
        "10.0.0.9"
    );
}

#[test]
fn what_cannot_be_reached_is_tried_for_ever_and_a_crash_loop_ends_when_it_can_be_used_again() {
    let mut world = world();
    apply(&mut world, web(Status::True, A), 0);
    let mut now = 0;
    for _ in 0..20 {
        let not_yet = LaunchError::NotYet("refused".into());
        assert!(miniflux(&mut world, Of::Launched(Err(not_yet)), now).is_empty());
        assert_eq!(verdict(&world, "miniflux"), (Status::False, "Unreachable".into()));
        now += 1_000;
        assert_eq!(actions(&world.step(Event::Tick, now)), [Action::Launch]);
    }
    for _ in 0..5 {
        miniflux(&mut world, Of::Launched(Ok(())), now);
        miniflux(&mut world, Of::Ended("exit status: 1".into()), now);
        now += 10_000;
        world.step(Event::Tick, now);
    }
    assert_eq!(verdict(&world, "miniflux").1, "CrashLoop");
    apply(&mut world, web(Status::False, A), now);
    assert_eq!(verdict(&world, "miniflux").1, "CrashLoop");
    assert_eq!(apply(&mut world, web(Status::True, A), now + 1), [Action::Launch]);
}

#[test]
fn one_that_ends_while_what_it_needs_is_gone_waits_for_it() {
    let mut world = up();
    apply(&mut world, web(Status::False, A), 10);
    miniflux(&mut world, Of::Ended("exit status: 1".into()), 11);
    assert!(actions(&world.step(Event::Tick, 5_000)).is_empty());
    assert_eq!(verdict(&world, "miniflux"), (Status::False, "WaitsFor".into()));
    assert_eq!(apply(&mut world, web(Status::True, A), 5_001), [Action::Launch]);
}

#[test]
fn a_document_without_the_database_or_its_password_is_not_taken() {
    let mut spec = web(Status::True, A);
    assert!(crate::core::apply::admit(&spec).is_ok());
    spec.secrets.remove(&Requirement::secret(&name("miniflux")));
    assert!(
        crate::core::apply::admit(&spec)
            .unwrap_err()
            .contains("password is missing")
    );
    let mut spec = web(Status::True, A);
    spec.requirements.clear();
    assert!(crate::core::apply::admit(&spec).is_err());
}

/// `sql` with these clients, as JSON.
fn sql(clients: &str, password: &str) -> GuestSpec {
    parse(&format!(
        r#"{{"version":1,"revision":1,"hostname":"sql",
        "services":[{{"name":"postgres","kind":{{"postgres":{{"settings":{{}},"port":5432}}}}}}],
        "secrets":{{"postgres/web_miniflux":"{password}"}},"clients":{{"postgres":[{clients}]}}}}"#
    ))
}

const CLIENT: &str = r#"{"role":"web_miniflux","from":["10.0.0.3"]}"#;

#[test]
fn a_client_is_told_when_its_role_is_there_and_forgotten_when_it_leaves() {
    let mut world = world();
    let role = "postgres.web_miniflux";
    assert_eq!(apply(&mut world, sql(CLIENT, "p"), 0), [Action::Launch]);
    assert_eq!(verdict(&world, role), (Status::Unknown, "Granting".into()));
    tell(&mut world, "postgres", Of::Launched(Ok(())), 0);
    let ready = || Of::Probed(Probe::Ready("1".into()));
    assert_eq!(tell(&mut world, "postgres", ready(), 0), [Action::Adjust]);
    assert_eq!(verdict(&world, "postgres").0, Status::True);
    assert_eq!(verdict(&world, role).1, "Granting", "ready is not granted");
    tell(&mut world, "postgres", Of::Adjusted(Adjusted::Done), 0);
    assert_eq!(verdict(&world, role), (Status::True, "Granted".into()));

    // It lasts while the server is away, and begins anew with another address or password.
    tell(&mut world, "postgres", Of::Ended("signal 9".into()), 1);
    assert_eq!(verdict(&world, role).1, "Granted");
    world.step(Event::Tick, 1_000);
    tell(&mut world, "postgres", Of::Launched(Ok(())), 1_000);
    tell(&mut world, "postgres", ready(), 1_000);
    tell(&mut world, "postgres", Of::Adjusted(Adjusted::Done), 1_000);
    let elsewhere = CLIENT.replace("10.0.0.3", "10.0.0.4");
    for (client, password) in [(elsewhere.as_str(), "p"), (elsewhere.as_str(), "q")] {
        assert_eq!(apply(&mut world, sql(client, password), 2_000), [Action::Adjust]);
        assert_eq!(verdict(&world, role), (Status::Unknown, "Granting".into()));
        tell(&mut world, "postgres", Of::Adjusted(Adjusted::Done), 2_000);
        assert_eq!(verdict(&world, role).1, "Granted");
    }
    assert_eq!(apply(&mut world, sql("", "q"), 3_000), [Action::Adjust]);
    assert!(world.feed.verdict(&Key::new(Layer::Service, role)).is_none());
}
