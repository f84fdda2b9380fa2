//! `forward` with no host agent: what it writes, says and refuses.

use serde_json::Value;

use crate::home::{Home, code, failure, stderr, stdout};

fn home() -> (Home, std::path::PathBuf) {
    let home = Home::new();
    home.run(&["init"]);
    let file = home.path().join("sovereign.toml");
    (home, file)
}

#[test]
fn added_listed_and_removed() {
    let (home, file) = home();
    let fresh = std::fs::read_to_string(&file).unwrap();
    let added = home.run(&["forward", "add", "sql", "15433:5432"]);
    assert_eq!(code(&added), 0, "{}", stderr(&added));
    assert_eq!(
        stderr(&added),
        "127.0.0.1:15433 leads to sql:5432 (forward postgres-15433); in force after `sovereign up`; written to sovereign.toml\n"
    );
    let listed = home.run(&["forward"]);
    let lines: Value = serde_json::from_str(&stdout(&listed)).unwrap();
    assert_eq!(
        lines["forwards"][1],
        serde_json::json!({"guest": "sql", "name": "postgres-15433", "listen": "127.0.0.1:15433",
            "target": "sql:5432", "via": "vsock", "protocol": "tcp", "status": "Unknown", "reason": null,
            "origin": "unapplied"})
    );
    let again = home.run(&["forward", "add", "sql", "15433", "--json"]);
    let object: Value = serde_json::from_str(&stdout(&again)).unwrap();
    assert_eq!(
        (code(&again), &object["ok"], &object["forward"]["target"]),
        (0, &true.into(), &"sql:5432".into())
    );
    let removed = home.run(&["forward", "remove", "sql", "15433"]);
    assert_eq!(
        (code(&removed), std::fs::read_to_string(&file).unwrap()),
        (0, fresh)
    );
    let nothing = home.run(&["forward", "remove", "sql", "15433"]);
    assert_eq!(
        (code(&nothing), stderr(&nothing).as_str()),
        (0, "guest sql has no forward 15433\n")
    );
    assert!(!home.path().join("state").exists() && !home.path().join("run").exists());
}

#[test]
fn each_refusal_has_its_code_and_leaves_the_file_alone() {
    let (home, file) = home();
    let fresh = std::fs::read_to_string(&file).unwrap();
    for (args, expected, reason) in [
        (&["add", "sql", "15433:x"][..], 2, "Usage"),
        (&["add", "sql", "0"], 2, "Usage"),
        (&["add", "nobody", "15433"], 3, "NoSuchGuest"),
        (&["add", "sql", "15433:80"], 3, "NoSuchService"),
        (&["add", "sql", "15433", "--temporary"], 4, "NotRunning"),
        (&["add", "sql", "0.0.0.0:15432"], 6, "AddressTaken"),
        (&["add", "sql", "15433", "--name", "postgres"], 6, "NameTaken"),
        (&["add", "sql", "15433", "--via", "tcp"], 2, "Usage"),
        (&["add", "sql", "15433", "--via", "kernel"], 2, "Loopback"),
        (
            &["add", "sql", "10.0.0.5:80", "--via", "vsock", "--udp"],
            2,
            "Contradiction",
        ),
        (&["add", "sql", "0.0.0.0:8000-8010"], 3, "NotPossible"),
    ] {
        let args = [&["--json", "forward"], args].concat();
        let output = home.run(&args);
        assert_eq!(code(&output), expected, "{args:?}: {}", stdout(&output));
        assert_eq!(failure(&output)["reason"], reason, "{args:?}");
    }
    let taken = home.run(&["forward", "add", "sql", "0.0.0.0:15432"]);
    assert_eq!(
        stderr(&taken),
        "error: 0.0.0.0:15432 is taken: 127.0.0.1:15432 leads to sql:5432 (forward postgres)\n\
         next: sovereign forward remove sql postgres\n"
    );
    assert_eq!(std::fs::read_to_string(&file).unwrap(), fresh);
}

#[test]
fn a_guest_that_is_written_in_short_gets_its_forward_too() {
    let (home, file) = home();
    std::fs::write(&file, "guest.sql.service.postgres.kind = \"postgres\" # short\n").unwrap();
    assert_eq!(code(&home.run(&["forward", "add", "sql", "15433"])), 0);
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "guest.sql.service.postgres.kind = \"postgres\" # short\n\n\
         [[guest.sql.forward]]\nname = \"postgres\"\nlisten = \"127.0.0.1:15433\"\nport = 5432\n"
    );
}
