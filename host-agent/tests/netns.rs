//! The real program as helper: its command line is part of what agents of other versions rely on.
//!
//! The helper changes nothing outside its own namespace, so this needs no outer one. Where the
//! machine does not let us have a namespace, the probe must say why, and that is all.

use std::path::Path;

use sovereign_host_agent::netns::{Helper, HelperConfig, Stage, probe};
use sovereign_protocol::name::Name;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sovereign-host");

/// Whether private namespaces work here; a reason that is none of the machine's is an error.
async fn works() -> bool {
    match probe(Path::new(PROGRAM)).await {
        Ok(()) => true,
        Err(failure) => {
            assert!(failure.errno.is_some(), "{failure}");
            assert_ne!(failure.stage, Stage::Start, "{failure}");
            eprintln!("SKIPPED: the rest of this test: {failure}");
            false
        }
    }
}

#[tokio::test]
async fn the_program_is_a_helper() {
    if !works().await {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = HelperConfig {
        instance: Name::parse("test").unwrap(),
        program: PROGRAM.into(),
        socket: dir.path().join("netns.sock"),
    };
    assert!(Helper::find(&config).await.unwrap().is_none());
    let helper = Helper::start(&config, None).await.unwrap();
    let first = helper.take().await.unwrap();
    let number = first.namespaces.number().unwrap();
    assert_eq!(helper.take().await.unwrap().namespaces.number().unwrap(), number);
    let found = Helper::find(&config).await.unwrap().unwrap();
    assert_eq!(found.pid(), helper.pid());
    helper.end().await.unwrap();
    found.ended().await;

    // With the namespace kept, another one goes on in it.
    let second = Helper::start(&config, Some(&first.namespaces)).await.unwrap();
    assert_eq!(second.take().await.unwrap().namespaces.number().unwrap(), number);
    second.end().await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn two_helpers_of_one_instance_do_not_fight() {
    if !works().await {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = HelperConfig {
        instance: Name::parse("test").unwrap(),
        program: PROGRAM.into(),
        socket: dir.path().join("netns.sock"),
    };
    let first = Helper::start(&config, None).await.unwrap();
    let failure = Helper::start(&config, None).await.unwrap_err();
    assert_eq!(failure.stage, Stage::Listen, "{failure}");
    first.take().await.unwrap();
    first.end().await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_no_helper_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for (program, says) in [
        ("/bin/true", "said nothing"),
        ("/bin/echo", "expected value"),
        ("/none", "os error 2"),
    ] {
        let config = HelperConfig {
            instance: Name::parse("test").unwrap(),
            program: program.into(),
            socket: dir.path().join("netns.sock"),
        };
        let failure = Helper::start(&config, None).await.unwrap_err();
        assert!(failure.to_string().contains(says), "{program}: {failure}");
        let failure = probe(Path::new(program)).await.unwrap_err();
        assert!(failure.to_string().contains(says), "{program}: {failure}");
    }
}
