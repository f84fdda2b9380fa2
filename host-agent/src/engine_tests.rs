use std::path::Path;

use sovereign_protocol::spec::VERSION;

use super::*;
use crate::core::test_config as config;
use crate::shim::contract::ExitReason;

fn layout(dir: &Path) -> Layout {
    Layout {
        instance: Name::parse("t").unwrap(),
        run: dir.join("run"),
        state: dir.to_owned(),
    }
}

/// Else the guest would be starting for ever, and `down` would wait for its end.
#[tokio::test]
async fn a_guest_whose_secrets_cannot_be_kept_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path());
    std::fs::create_dir(dir.path().join("secrets.json.new")).unwrap(); // where the file is written first
    let (sender, mut events) = mpsc::channel(4);
    let (mut engine, _news) = Engine::new(layout, 1, sender).unwrap();
    let name = Name::parse("sql").unwrap();
    engine.start(name.clone(), &config(5432)).await;
    let Some(Event::Ended(ended, record)) = events.recv().await else {
        panic!("no end");
    };
    assert_eq!((ended, record.reason), (name, ExitReason::StartFailed));
    assert!(record.evidence.contains("secrets.json"), "{}", record.evidence);
}

#[tokio::test]
async fn who_asks_for_guests_while_all_is_stopped_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (sender, _events) = mpsc::channel(4);
    let (mut engine, _news) = Engine::new(layout(dir.path()), 1, sender).unwrap();
    let document = serde_json::to_vec(&HostSpec {
        version: VERSION,
        guests: BTreeMap::new(),
        network: None,
    });
    let document = document.unwrap();
    assert_eq!(engine.apply(&document).await.unwrap().revision, 1);
    engine.take(Event::StopAll).await;
    let refused = engine.apply(&document).await.unwrap_err();
    assert!(matches!(refused, Refusal::Conflict(_)), "{refused}");
}

/// A helper that takes connections and never answers: no TAP comes of it.
fn silent_helper(layout: &Layout) -> (std::os::unix::net::UnixListener, OpenNetwork) {
    std::fs::create_dir_all(&layout.run).unwrap();
    let helper = crate::netns::HelperConfig {
        instance: layout.instance.clone(),
        program: "/nonexistent".into(),
        socket: layout.run.join("netns"),
    };
    let listens = std::os::unix::net::UnixListener::bind(&helper.socket).unwrap();
    let network = Network::over_helper(helper);
    let (wanted, _) = watch::channel(NetworkSpec::default());
    (listens, OpenNetwork { network, wanted })
}

/// A guest with a card, in a private network.
fn with_a_card(name: &Name) -> HostSpec {
    let mut config = config(5432);
    config.interface = serde_json::from_str(r#"{"addresses":["10.0.0.2/24"]}"#).unwrap();
    HostSpec {
        version: VERSION,
        guests: [(name.clone(), config)].into(),
        network: serde_json::from_str(r#"{"namespace":"private","address":"10.0.0.1/24"}"#).unwrap(),
    }
}

/// Whether the document of a guest speaks of an interface.
fn is_told_of_a_card(engine: &Engine, name: &Name) -> bool {
    let wanted = engine.guests[name].wanted.borrow();
    let spec = sovereign_protocol::spec::GuestSpec::parse(&wanted.document).unwrap();
    let mtu = spec.interface.as_ref().and_then(|interface| interface.mtu);
    assert_eq!(wanted.mtu, mtu, "what it says");
    spec.interface.is_some()
}

/// Else a VMM that does not let go of one guest's TAP would keep requests and all other guests waiting.
#[tokio::test(start_paused = true)]
async fn a_tap_that_is_not_to_be_had_yet_keeps_nobody_but_its_guest_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let layout = layout(dir.path());
    let (_listens, open) = silent_helper(&layout);
    std::fs::write(layout.run.join("sql"), "").unwrap(); // so that no shim is started in the end
    let (sender, mut events) = mpsc::channel(4);
    let (mut engine, _news) = Engine::new(layout, 1, sender).unwrap();
    engine.network = Some(open);
    let name = Name::parse("sql").unwrap();
    let document = with_a_card(&name);
    let begun = tokio::time::Instant::now();
    engine.take(Event::Applied(document)).await;
    engine.take(Event::Running([name.clone()].into())).await; // due at once, whatever the network says
    assert_eq!(begun.elapsed(), Duration::ZERO, "the engine waited");
    assert!(is_told_of_a_card(&engine, &name), "it is still to come");

    let no_card = async {
        loop {
            match events.recv().await.unwrap() {
                Event::NoCard(guest, why) => return (guest, why),
                other => drop(other), // that there is a network
            }
        }
    };
    let told = tokio::time::timeout(Duration::from_secs(60), no_card).await;
    let (guest, why) = told.unwrap();
    assert!(guest == name && !why.is_empty());
    engine.take(Event::NoCard(guest, why)).await;
    assert!(!is_told_of_a_card(&engine, &name));
}

/// Else it would boot, some seconds later, only to be shut down.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_stopped_while_it_waits_for_its_tap_ends_without_a_shim() {
    for stop in [Effect::Stop, Effect::Kill] {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let (_listens, open) = silent_helper(&layout);
        std::fs::write(layout.run.join("sql"), "").unwrap(); // so that no shim is started if it goes wrong
        let (sender, mut events) = mpsc::channel(4);
        let (mut engine, _news) = Engine::new(layout, 1, sender).unwrap();
        engine.network = Some(open);
        let name = Name::parse("sql").unwrap();
        engine.take(Event::Applied(with_a_card(&name))).await;
        engine.take(Event::Running([name.clone()].into())).await;
        let begun = tokio::time::Instant::now();
        engine.act(stop(name.clone())).await;
        let ended = loop {
            match events.recv().await.unwrap() {
                Event::Ended(guest, record) => break (guest, record.reason),
                Event::NoCard(_, why) => panic!("it goes on: {why}"),
                other => drop(other), // that there is a network
            }
        };
        assert_eq!(ended, (name, ExitReason::Killed));
        assert_eq!(begun.elapsed(), Duration::ZERO, "it waited");
    }
}
