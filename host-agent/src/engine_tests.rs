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
