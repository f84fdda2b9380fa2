//! `host` where nothing runs. Nothing is installed, enabled or started here, whatever the machine has.

use std::path::Path;

use serde_json::Value;

use crate::home::{Home, code, failure, stderr, stdout};

#[test]
fn with_nothing_running_it_says_where_things_would_be() {
    let home = Home::new();
    let status = home.run(&["host", "status"]);
    assert_eq!(code(&status), 0, "{}", stderr(&status));
    let object: Value = serde_json::from_str(&stdout(&status)).unwrap();
    assert_eq!(
        (&object["ok"], &object["reason"]),
        (&Value::from(true), &Value::from("NotRunning"))
    );
    let host = &object["host"];
    assert_eq!(
        (&host["running"], &host["pid"], &host["network"]),
        (&false.into(), &Value::Null, &Value::Null)
    );
    let control = home.path().join("run/default/control.sock");
    assert_eq!(host["control"], control.to_str().unwrap());
    let stop = home.run(&["host", "stop"]);
    assert_eq!((code(&stop), stderr(&stop).as_str()), (0, "no host agent runs\n"));
    assert_eq!(code(&home.run(&["host"])), 2);
    assert_eq!(
        std::fs::read_dir(home.path()).unwrap().count(),
        0,
        "a look makes nothing"
    );
}

#[test]
fn the_unit_is_printed_and_nothing_is_written() {
    let home = Home::new();
    let printed = home.installed(&[], &["--instance", "x1", "host", "install", "--print"]);
    assert_eq!(code(&printed), 0, "{}", stderr(&printed));
    let at = home.path().display();
    let line = format!(
        "ExecStart={at}/bin/sovereign-host run --instance x1 --run-dir {at}/run/x1 --state-dir {at}/state/x1\n"
    );
    let text = stdout(&printed);
    assert!(
        text.contains(&line) && text.contains("KillMode=process\n"),
        "{text}"
    );
    let left: Vec<_> = std::fs::read_dir(home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["bin"]);
}

#[test]
fn without_systemd_nothing_is_installed_and_the_way_out_is_named() {
    if Path::new("/run/systemd/system").exists() {
        eprintln!("SKIPPED: systemd manages this machine, and a test installs nothing");
        return;
    }
    let home = Home::new();
    let refused = home.installed(&[], &["host", "install", "--json"]);
    assert_eq!(
        (code(&refused), &failure(&refused)["reason"]),
        (6, &Value::from("NoSystemd"))
    );
    let next = failure(&refused)["next"].as_str().unwrap().to_owned();
    assert!(next.starts_with("sovereign host install --print"), "{next}");
    let left: Vec<_> = std::fs::read_dir(home.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(left, ["bin"]);
}
