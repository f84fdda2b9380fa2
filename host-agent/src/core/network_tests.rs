//! Guests hear of another way out.

use super::super::{Effect, Event};
use super::*;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

/// One guest of each family, and one that has no network.
fn spec() -> HostSpec {
    let image = r#"{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"}"#;
    let guest = |interface: &str| {
        format!(
            r#"{{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{image},"services":[],"forwards":[]{interface}}}"#
        )
    };
    let text = format!(
        r#"{{"version":1,"network":{{"namespace":"host","address":"10.0.0.1/24"}},"guests":{{"four":{},"none":{}}}}}"#,
        guest(r#","interface":{"addresses":["10.0.0.2/24"]}"#),
        guest(""),
    );
    HostSpec::parse(text.as_bytes()).unwrap()
}

fn pushed(effects: &[Effect]) -> Vec<String> {
    let push = |effect: &Effect| match effect {
        Effect::Push(name, _) => Some(name.to_string()),
        _ => None,
    };
    effects.iter().filter_map(push).collect()
}

/// What a guest's document says.
fn ways(world: &World, guest: &str) -> Ways {
    let config = &world.guests[&name(guest)].config;
    world
        .interface(config)
        .map(|interface| interface.ways)
        .unwrap_or_default()
}

#[test]
fn another_way_is_pushed_to_the_guests_that_it_concerns_under_the_same_revision() {
    let mut world = World::new(1);
    let told = |world: &mut World, v4, v6| {
        let ways = Ways { v4, v6 };
        pushed(&world.step(Event::Network(NetworkEvent::Ways { ways }), 0))
    };
    assert!(told(&mut world, Some(7), None).is_empty(), "nobody is there");
    world.step(Event::NetworkMode(NetworkMode::Host), 0);
    world.step(Event::Applied(spec()), 0);
    world.step(
        Event::Network(NetworkEvent::Ready {
            guests: [name("four")].into(),
            lacking: BTreeMap::new(),
        }),
        0,
    );
    assert_eq!(
        ways(&world, "four"),
        Ways {
            v4: Some(7),
            v6: None
        }
    );
    assert_eq!(ways(&world, "none"), Ways::default());

    assert!(
        told(&mut world, Some(7), Some(1)).is_empty(),
        "no address of that family"
    );
    let before = world.edition(&name("four"));
    assert_eq!(told(&mut world, Some(8), Some(1)), ["four"]);
    assert!(told(&mut world, Some(8), Some(1)).is_empty(), "it knows");
    assert_eq!(
        world.edition(&name("four")),
        before,
        "it stays as ready as it was"
    );
    assert_eq!(ways(&world, "four").v4, Some(8));
    assert_eq!(world.revision(), 1, "nobody asked for anything else");
}

#[test]
fn a_guest_that_gets_no_card_is_told_so_and_so_are_people() {
    let mut world = World::new(1);
    world.step(Event::NetworkMode(NetworkMode::Host), 0);
    world.step(Event::Applied(spec()), 0);
    let ready = NetworkEvent::Ready {
        guests: [name("four")].into(),
        lacking: BTreeMap::new(),
    };
    world.step(Event::Network(ready), 0);
    let lost = || Event::NoCard(name("four"), "another process holds it".to_owned());
    assert_eq!(pushed(&world.step(lost(), 0)), ["four"]);
    let guest = world.guests.get_mut(&name("four")).unwrap();
    guest.machine = Some(crate::shim::contract::Machine::wanted(&guest.config, false));
    world.step(Event::Tick, 0);
    let card = world
        .feed
        .verdict(&host_key(Layer::Tap, &name("four"), CARD))
        .unwrap();
    assert_eq!(
        (&*card.reason, &*card.evidence),
        ("NoCard", "another process holds it")
    );
    world.step(Event::StopAll, 0);
    assert!(
        pushed(&world.step(lost(), 0)).is_empty(),
        "it would take the stop back"
    );
}
