//! The binary as scripts meet it: help, exit codes, the JSON of failures, quiet places.

#![allow(clippy::unwrap_used)] // clippy.toml excepts test functions, not the helpers beside them

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

use serde_json::Value;

mod forward;
mod home;
mod host;
mod plan;

use home::{Home, code, failure, stderr, stdout};

const VERBS: [&str; 18] = [
    "init",
    "build",
    "up",
    "plan",
    "down",
    "destroy",
    "status",
    "doctor",
    "test",
    "watch",
    "events",
    "logs",
    "exec",
    "psql",
    "forward",
    "host",
    "secret",
    "completions",
];

#[test]
fn every_verb_has_help_with_an_example() {
    let home = Home::new();
    let all = stdout(&home.run(&["--help"]));
    for verb in VERBS {
        assert!(all.contains(&format!("\n  {verb}")), "{verb} is not in --help");
        let help = home.run(&[verb, "--help"]);
        assert_eq!(code(&help), 0);
        assert!(stdout(&help).contains(&format!("sovereign {verb}")), "{verb}");
    }
    assert!(stdout(&home.run(&["--version"])).starts_with("sovereign "));
}

#[test]
fn usage_errors_are_exit_2_also_as_json() {
    let home = Home::new();
    for args in [
        &["stauts"][..],
        &["exec", "sql"],
        &["up", "--timeout", "0"],
        &["logs", "SQL"],
        &["secret", "sql"],
        &["completions", "tcsh"],
        &[],
    ] {
        assert_eq!(code(&home.run(args)), 2, "{args:?}");
    }
    let output = home.run(&["--json", "stauts"]);
    assert_eq!(
        (code(&output), &failure(&output)["reason"]),
        (2, &Value::from("Usage"))
    );
}

#[test]
fn configuration_errors_are_exit_3_and_nothing_is_made() {
    let home = Home::new();
    let none = home.run(&["up"]);
    assert_eq!(code(&none), 3);
    assert!(
        stderr(&none).ends_with("next: sovereign init\n"),
        "{}",
        stderr(&none)
    );
    std::fs::write(
        home.path().join("sovereign.toml"),
        "[guest.sql]\nmemry = \"1GiB\"\n",
    )
    .unwrap();
    let output = home.run(&["up", "--json"]);
    assert_eq!(code(&output), 3);
    let evidence = failure(&output)["evidence"].as_str().unwrap().to_owned();
    for part in ["sovereign.toml:2:", "guest.sql.memry", "did you mean \"memory\""] {
        assert!(evidence.contains(part), "{evidence}");
    }
    let named = home.run(&["up", "--config", "other.toml"]);
    assert_eq!(code(&named), 3);
    assert!(
        stderr(&named).contains("sovereign --config other.toml init"),
        "{}",
        stderr(&named)
    );
    assert!(!home.path().join("state").exists() && !home.path().join("run").exists());
}

#[test]
fn init_writes_once() {
    let home = Home::new();
    let path = home.path().join("sovereign.toml");
    assert_eq!(code(&home.run(&["init"])), 0);
    let first = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, first.clone() + "# mine\n").unwrap();
    let again = home.run(&["init", "--json"]);
    assert_eq!(code(&again), 0);
    assert_eq!(
        serde_json::from_str::<Value>(&stdout(&again)).unwrap()["reason"],
        "Exists"
    );
    assert!(std::fs::read_to_string(&path).unwrap().ends_with("# mine\n"));
}

#[test]
fn with_nothing_running() {
    let home = Home::new();
    home.run(&["init"]);
    let status = home.run(&["status"]);
    assert_eq!(code(&status), 0);
    let report: Value = serde_json::from_str(&stdout(&status)).unwrap();
    assert_eq!(
        (&report["schema"], &report["guests"][0]["ready"]),
        (&"sovereign.status/1".into(), &"Unknown".into())
    );
    assert!(stderr(&status).contains("nothing running"));
    assert_eq!(code(&home.run(&["status", "--check"])), 1);
    assert_eq!(code(&home.run(&["down"])), 0);
    for args in [
        &["watch"][..],
        &["exec", "sql", "--", "true"],
        &["psql", "sql", "-c", "select 1"],
    ] {
        let output = home.run(args);
        assert_eq!(code(&output), 4, "{args:?}");
        assert!(
            stderr(&output).ends_with("next: sovereign up\n"),
            "{}",
            stderr(&output)
        );
    }
    let other = home.run(&["--instance", "x1", "watch"]);
    assert!(
        stderr(&other).ends_with("next: sovereign --instance x1 up\n"),
        "{}",
        stderr(&other)
    );
    assert!(!home.path().join("state").exists(), "asking makes nothing");
}

#[test]
fn a_secret_is_printed_alone_and_a_broken_file_is_never_quoted() {
    let home = Home::new();
    home.write_state("secrets.json", r#"{"sql/postgres":"canary"}"#);
    let found = home.run(&["secret", "sql/postgres"]);
    assert_eq!(
        (stdout(&found), stderr(&found)),
        ("canary\n".to_owned(), String::new())
    );
    let absent = home.run(&["secret", "sql/other"]);
    assert_eq!(code(&absent), 1);
    assert!(stderr(&absent).contains("sql/postgres") && !stderr(&absent).contains("canary"));
    home.write_state("secrets.json", r#"{"sql/postgres":["canary"]}"#);
    let broken = home.run(&["secret", "sql/postgres"]);
    assert_eq!(code(&broken), 3);
    assert!(!stderr(&broken).contains("canary"));
}

#[test]
fn logs_are_escaped() {
    let home = Home::new();
    assert_eq!(code(&home.run(&["logs", "sql"])), 1);
    home.write_state("guests/sql/console.log", "boot\r\n\x1b[2Jx\n");
    assert_eq!(stdout(&home.run(&["logs", "sql"])), "boot\n\\x1b[2Jx\n");
}

/// A host agent that was killed leaves its guests running, and their disks in use.
#[test]
fn destroy_leaves_a_guest_that_runs_without_an_agent_and_waits_for_no_lock() {
    let home = Home::new();
    home.write_state("guests/sql/data.img", "data");
    home.write_state("lock", "");
    let run = home.path().join("run/default/sql");
    std::fs::create_dir_all(&run).unwrap();
    let shim = std::os::unix::net::UnixListener::bind(run.join("shim.sock")).unwrap();
    let refused = || {
        let output = home.run(&["destroy", "sql", "--yes"]);
        assert_eq!(code(&output), 6, "{}", stderr(&output));
        assert!(
            stderr(&output).ends_with("next: sovereign down\n"),
            "{}",
            stderr(&output)
        );
        assert!(home.state("guests/sql/data.img").exists());
    };
    refused();
    drop(shim);
    let lock = std::fs::File::open(home.state("lock")).unwrap();
    lock.lock().unwrap(); // as an agent does before it listens
    refused();
    drop(lock);
    // A child of another test that was just forked has the lock, too, until it becomes its program.
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let mut output = home.run(&["destroy", "sql", "--yes"]);
    while code(&output) == 6 && std::time::Instant::now() < until {
        output = home.run(&["destroy", "sql", "--yes"]);
    }
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(!home.state("guests/sql").exists());
}

#[test]
fn destroy_asks_and_then_removes_the_guest_and_its_secrets_only() {
    let home = Home::new();
    home.write_state("guests/sql/data.img", "data");
    home.write_state("guests/forge/data.img", "data");
    home.write_state("secrets.json", r#"{"sql/postgres":"a","forge/postgres":"b"}"#);
    let unasked = home.run(&["destroy", "sql"]);
    assert_eq!(code(&unasked), 2);
    assert!(stderr(&unasked).ends_with("next: sovereign destroy sql --yes\n"));
    assert!(home.state("guests/sql").exists());
    assert_eq!(code(&home.run(&["destroy", "sql", "--yes"])), 0);
    assert!(!home.state("guests/sql").exists() && home.state("guests/forge/data.img").exists());
    let secrets = std::fs::read_to_string(home.state("secrets.json")).unwrap();
    assert_eq!(secrets, r#"{"forge/postgres":"b"}"#);
    let mode = std::fs::metadata(home.state("secrets.json"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(
        code(&home.run(&["destroy", "sql", "--yes"])),
        0,
        "again is no failure"
    );
}

#[test]
fn a_socket_path_over_the_limit_is_exit_3() {
    let home = Home::new();
    home.run(&["init"]);
    let output = Command::new(env!("CARGO_BIN_EXE_sovereign"))
        .args(["up"])
        .current_dir(home.path())
        .env("SOVEREIGN_RUN_DIR", format!("/tmp/{}", "x".repeat(100)))
        .output()
        .unwrap();
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("107"));
}

#[test]
fn a_reader_that_has_had_enough_is_no_failure() {
    let home = Home::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sovereign"))
        .args(["status"])
        .env("SOVEREIGN_STATE_DIR", home.path())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 0);
    assert!(!stderr(&output).contains("error"), "{}", stderr(&output));
}

#[test]
fn doctor_ends_in_order_where_nothing_was_ever_made_and_test_says_so_by_its_code() {
    let home = Home::new();
    let codes = |output: &Output| -> Vec<String> {
        let diagnosis: Value = serde_json::from_str(&stdout(output)).unwrap();
        let findings = diagnosis["findings"].as_array().unwrap().iter();
        findings
            .map(|finding| finding["code"].as_str().unwrap().to_owned())
            .collect()
    };
    let none = home.run(&["doctor", "--json"]);
    assert_eq!(code(&none), 0, "{}", stderr(&none));
    assert_eq!(codes(&none)[0], "NoConfiguration");
    assert_eq!(code(&home.run(&["test"])), 1);
    assert_eq!(
        std::fs::read_dir(home.path()).unwrap().count(),
        0,
        "a look makes nothing"
    );
    std::fs::write(home.path().join("sovereign.toml"), [0xff, 0xfe, 0]).unwrap();
    let corrupt = home.run(&["doctor", "--json"]);
    assert_eq!(
        (code(&corrupt), codes(&corrupt)[0].as_str()),
        (0, "ConfigurationUnreadable")
    );
}

#[test]
fn completions_are_scripts_that_the_shells_take() {
    let home = Home::new();
    for (shell, check) in [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")] {
        let script = home.run(&["completions", shell]);
        assert_eq!((code(&script), stderr(&script).as_str()), (0, ""), "{shell}");
        let path = home.path().join(shell);
        std::fs::write(&path, &script.stdout).unwrap();
        let Ok(checked) = Command::new(check).arg("-n").arg(&path).output() else {
            eprintln!("SKIPPED: {shell} is not installed, so its script is not read by it");
            continue;
        };
        assert!(checked.status.success(), "{shell}: {}", stderr(&checked));
    }
    let completed = Command::new("bash")
        .args(["-c", "source ./bash; COMP_WORDS=(sovereign forward a); COMP_CWORD=2; _sovereign sovereign a forward; echo ${COMPREPLY[@]}"])
        .current_dir(home.path())
        .output()
        .unwrap();
    assert_eq!(stdout(&completed).trim(), "add", "{}", stderr(&completed));
}

#[test]
fn short_forms_of_guest_names_are_in_the_help_of_verbs_that_take_one_and_not_in_the_overview() {
    let home = Home::new();
    home.run(&["init"]);
    assert!(!stdout(&home.run(&["--help"])).contains("--sql"));
    for verb in [
        &["up"][..],
        &["plan"],
        &["down"],
        &["destroy"],
        &["logs"],
        &["exec"],
        &["psql"],
        &["events"],
        &["forward", "add"],
        &["forward", "list"],
        &["forward", "remove"],
    ] {
        let help = stdout(&home.run(&[verb, &["--help"]].concat()));
        assert!(help.contains("--sql"), "{verb:?}: {help}");
    }
    let (short, long) = (home.run(&["logs", "--sql"]), home.run(&["logs", "sql"]));
    assert_eq!((code(&short), stderr(&short)), (code(&long), stderr(&long)));
    assert_eq!(code(&home.run(&["down", "--forge"])), 0, "nothing runs");
    assert_eq!(code(&home.run(&["status", "--sql"])), 2);
}
