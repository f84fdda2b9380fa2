use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sovereign_protocol::condition::Layer;
use sovereign_protocol::layers::Level;

use super::*;
use crate::doctor::words;

/// Codes that say that all is well: no finding is ever made of them.
const WELL: &[&str] = &[
    "Answered",
    "Answers",
    "Configured",
    "Formatted",
    "Granted",
    "Healed",
    "Healthy",
    "Listening",
    "Measured",
    "Met",
    "Mounted",
    "Ready",
    "Running",
    "Started",
    "Steered",
    "Stepped",
];

/// Codes that only stand in the journal and are no condition.
const JOURNAL_ONLY: &[&str] = &[
    "ConnectionsNotEnded",
    "EventsLost",
    "Failed",
    "Fight",
    "TooManyConditions",
];

/// Where verdicts are made of a code that is not written beside them, and the file that holds the codes.
///
/// A new place of this kind fails the test until it is named here.
const COMPUTED: &[(&str, &str, Codes)] = &[
    (
        "guest-agent/src/core/judge.rs",
        "fact.reason.as_str()",
        Codes::Words("guest-agent/src/init/data.rs"),
    ),
    (
        "guest-agent/src/core/judge.rs",
        "fact.reason.as_str()",
        Codes::Words("guest-agent/src/init/disks.rs"),
    ),
    (
        "guest-agent/src/core/service.rs",
        "reason",
        Codes::Words("guest-agent/src/core/service.rs"),
    ),
    (
        "guest-agent/src/core/service.rs",
        "reason",
        Codes::Words("guest-agent/src/postgres/cluster.rs"),
    ),
    (
        "guest-agent/src/core/service.rs",
        "reason",
        Codes::Words("guest-agent/src/miniflux/mod.rs"),
    ),
    (
        "host-agent/src/core/world.rs",
        "code",
        Codes::Variants("host-agent/src/shim/contract.rs", "enum ExitReason"),
    ),
    (
        "host-agent/src/core/network.rs",
        "code.as_str()",
        Codes::Variants("reconcile/src/finding/code.rs", "enum Code"),
    ),
    (
        "guest-agent/src/core/net.rs",
        "reason",
        Codes::Words("guest-agent/src/core/net.rs"),
    ),
    (
        "guest-agent/src/net/loopback.rs",
        "reason",
        Codes::Words("guest-agent/src/core/net.rs"),
    ),
    (
        "guest-agent/src/net/mod.rs",
        "reason",
        Codes::Words("guest-agent/src/core/net.rs"),
    ),
    (
        "guest-agent/src/tailscale/status.rs",
        "state",
        Codes::Words("guest-agent/src/tailscale/status.rs"),
    ),
    (
        "host-agent/src/inspect/guest.rs",
        "exit.reason.as_str()",
        Codes::Variants("host-agent/src/shim/contract.rs", "enum ExitReason"),
    ),
    (
        "host-agent/src/inspect/guest.rs",
        "reason.as_str()",
        Codes::Variants("host-agent/src/shim/contract.rs", "enum ExitReason"),
    ),
];

/// How a file holds codes.
#[derive(Clone, Copy)]
enum Codes {
    /// As string literals in CamelCase.
    Words(&'static str),
    /// As the variants of an enum.
    Variants(&'static str, &'static str),
}

/// String literals in CamelCase that are no codes.
const NO_CODES: &[&str] = &["OK", "PascalCase", "TailscaleIPs"];

/// The layers whose conditions a file judges; a file that is not here judges none.
fn layers(file: &str) -> &'static [Layer] {
    use Layer::{
        Clock, Disk, Forward, Interface, Kernel, Loopback, Nat, Routing, Service, Session, Tailscale, Tap,
        Vmm,
    };
    match file {
        "guest-agent/src/core/judge.rs"
        | "guest-agent/src/init/data.rs"
        | "guest-agent/src/init/disks.rs" => &[Disk, Kernel],
        "guest-agent/src/core/service.rs"
        | "guest-agent/src/postgres/cluster.rs"
        | "guest-agent/src/miniflux/mod.rs"
        | "host-agent/src/core/mesh.rs" => &[Service],
        "guest-agent/src/core/clock.rs" | "host-agent/src/offset.rs" => &[Clock],
        "guest-agent/src/core/world.rs" | "guest-agent/src/core/apply.rs" => &[Clock, Service],
        "host-agent/src/core/network.rs" | "reconcile/src/finding/code.rs" => &[Tap, Routing, Nat],
        "host-agent/src/core/surroundings.rs" => &[Routing],
        "host-agent/src/core/translations.rs" => &[Forward],
        "guest-agent/src/observe.rs" => &[Loopback, Disk, Kernel],
        "host-agent/src/engine.rs" | "host-agent/src/engine/forwards.rs" => &[Forward, Tap, Interface],
        "host-agent/src/core/observe.rs" | "host-agent/src/core/world.rs" => {
            &[Vmm, Session, Tap, Routing, Nat]
        }
        "host-agent/src/shim/contract.rs" | "host-agent/src/inspect/guest.rs" => &[Vmm, Session],
        "protocol/src/condition.rs" => &[Vmm],
        file if file.starts_with("guest-agent/src/net/") || file == "guest-agent/src/core/net.rs" => {
            &[Loopback, Interface]
        }
        file if file.starts_with("guest-agent/src/tailscale/") => &[Tailscale],
        file if file.starts_with("host-agent/src/net/") => &[Tap, Routing, Nat],
        _ => &[],
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The sources of the agents, without their tests.
fn sources() -> BTreeMap<String, String> {
    let mut open = [
        "guest-agent/src",
        "host-agent/src",
        "protocol/src",
        "reconcile/src",
    ]
    .map(|d| root().join(d))
    .to_vec();
    let mut found = BTreeMap::new();
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name().into_string().unwrap();
            if path.is_dir() {
                open.push(path);
            } else if name.ends_with(".rs")
                && !name.contains("tests")
                && !path.iter().any(|part| part == "tests")
            {
                let text = std::fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned();
                let relative = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.insert(relative, code);
            }
        }
    }
    found
}

/// The first argument of each verdict that is not well: a literal, or an expression.
fn verdicts(code: &str) -> Vec<Result<String, String>> {
    let calls = ["Verdict::no(", "Verdict::unknown("]
        .into_iter()
        .flat_map(|call| {
            let places = code
                .match_indices(call)
                .map(|(at, call)| code[at + call.len()..].trim_start());
            places.collect::<Vec<_>>()
        });
    calls
        .map(|arguments| match arguments.strip_prefix('"') {
            Some(rest) => Ok(rest.split('"').next().unwrap().to_owned()),
            None => Err(arguments.split(',').next().unwrap().trim().to_owned()),
        })
        .collect()
}

fn is_code(word: &str) -> bool {
    word.len() > 2
        && word.starts_with(|c: char| c.is_ascii_uppercase())
        && word.chars().all(|c| c.is_ascii_alphabetic())
        && word.chars().any(|c| c.is_ascii_lowercase())
}

/// String literals that look like codes.
fn words(code: &str) -> Vec<String> {
    code.split('"')
        .skip(1)
        .step_by(2)
        .filter(|word| is_code(word))
        .map(str::to_owned)
        .collect()
}

fn variants(code: &str, head: &str) -> Vec<String> {
    let body = code.split(head).nth(1).expect("the enum is there");
    let body = body.split_once('{').unwrap().1.split('}').next().unwrap();
    let lines = body.lines().map(|line| line.trim().trim_end_matches(','));
    lines.filter(|line| is_code(line)).map(str::to_owned).collect()
}

fn is_known(file: &str, code: &str) -> bool {
    let ignored = [WELL, JOURNAL_ONLY, NO_CODES]
        .iter()
        .any(|list| list.contains(&code));
    ignored
        || layers(file)
            .iter()
            .any(|layer| find((*layer).into(), code).is_some())
}

/// The promise of the table. A shared list in `protocol` would keep it by types, but the agents write codes beside the
/// evidence that they judge, which is where a reader looks for them: so their sources are the list, and this test
/// reads it.
#[test]
fn every_code_that_an_agent_can_emit_is_in_the_table() {
    let sources = sources();
    let mut unknown = BTreeSet::new();
    let mut seen = 0;
    for (file, code) in &sources {
        for verdict in verdicts(code) {
            seen += 1;
            match verdict {
                // What any layer may say is told by the layer's own entry.
                Ok(any) if ["Stale", "SessionLost", "Unobserved"].contains(&any.as_str()) => {}
                Ok(code) if is_known(file, &code) => {}
                Ok(code) => {
                    unknown.insert(format!("{file}: {code}"));
                }
                Err(expression) => {
                    let named = COMPUTED
                        .iter()
                        .any(|(place, text, _)| place == file && *text == expression);
                    if !named {
                        unknown.insert(format!(
                            "{file}: computed from `{expression}`, which COMPUTED does not name"
                        ));
                    }
                }
            }
        }
    }
    for (_, _, codes) in COMPUTED {
        let (file, found) = match codes {
            Codes::Words(file) => (file, words(&sources[*file])),
            Codes::Variants(file, head) => (file, variants(&sources[*file], head)),
        };
        assert!(found.len() > 1, "{file}: {found:?}");
        unknown.extend(
            found
                .into_iter()
                .filter(|code| !is_known(file, code))
                .map(|code| format!("{file}: {code}")),
        );
    }
    assert!(seen > 40, "only {seen} verdicts were found: the scan is broken");
    assert!(
        unknown.is_empty(),
        "codes without an entry in ctl/src/doctor/table: {unknown:#?}"
    );
}

#[test]
fn the_scan_sees_literals_expressions_and_variants() {
    let code = "Verdict::no(\"Down\", x); Verdict::unknown(\n    \"Lost\",\n y); Verdict::no(fact.reason, z)";
    let expected = [
        Ok("Down".to_owned()),
        Err("fact.reason".to_owned()),
        Ok("Lost".to_owned()),
    ];
    assert_eq!(verdicts(code), expected);
    assert_eq!(words(r#"a("Missing"), b("not this"), "SQL", "x""#), ["Missing"]);
    assert_eq!(
        variants("enum E {\n /// Doc.\n One,\n Two,\n}", "enum E"),
        ["One", "Two"]
    );
    assert!(!is_known("guest-agent/src/core/judge.rs", "NeverHeardOf"));
    assert!(
        !is_known("guest-agent/src/core/judge.rs", "CrashLoop"),
        "a service's code is no disk's"
    );
}

#[test]
fn every_level_answers_for_codes_that_it_does_not_know() {
    for level in Level::ALL {
        let entry = of(level, "NeverHeardOf");
        assert_eq!((entry.level, entry.code, entry.kind), (level, ANY, Kind::Fault));
    }
}

#[test]
fn every_entry_is_whole_and_each_code_is_there_once() {
    let mut seen = BTreeSet::new();
    for entry in entries() {
        let name = format!("{} {}", entry.level, entry.code);
        assert!(seen.insert(name.clone()), "{name} is there twice");
        assert!(
            entry.what.ends_with('.') && !entry.what.contains(". "),
            "{name}: not one sentence: {}",
            entry.what
        );
        let texts = [
            entry.what,
            entry.check.run,
            entry.check.wrong_if,
            entry.fix.run,
            entry.fix.risk,
        ];
        for text in texts {
            assert!(!text.is_empty(), "{name}");
            for part in text.split('{').skip(1) {
                let word = part.split('}').next().unwrap();
                assert!(words::known(word), "{name}: {{{word}}} is no placeholder");
            }
        }
    }
}

/// What findings about others mean is told where people look for it.
#[test]
fn the_networking_document_names_every_finding_and_every_leftover() {
    use sovereign_reconcile::finding::{Code, LeftoverName};
    let text = std::fs::read_to_string(root().join("docs/networking.md")).unwrap();
    let codes = Code::ALL.iter().map(|code| format!("| `{code}` |"));
    let leftovers = LeftoverName::ALL.iter().map(|name| format!("--fix={name}"));
    for wanted in codes.chain(leftovers) {
        assert!(text.contains(&wanted), "docs/networking.md lacks {wanted}");
    }
}

/// The part of docs/troubleshooting.md that is made of the table.
fn document() -> String {
    let mut text = String::new();
    for level in Level::ALL {
        text += &format!("\n### {level}\n\n| code | what is wrong | next command |\n|---|---|---|\n");
        for entry in entries().filter(|entry| entry.level == level && entry.kind != Kind::Consequence) {
            let code = if entry.code == ANY {
                "any other"
            } else {
                entry.code
            };
            let plain = |text: &str| {
                text.replace("{sovereign}", "sovereign")
                    .replace("{guest}", "NAME")
                    .replace("{subject}", "SUBJECT")
                    .replace("{code}", "the code")
                    .replace("{instance}", "INSTANCE")
                    .replace("{disk}", "data.img")
                    .replace("{pid}", "PID")
                    .replace("{port}", "PORT")
                    .replace("{next}", "what the message says")
            };
            text += &format!(
                "| {code} | {} | `{}` |\n",
                plain(entry.what),
                plain(entry.fix.run)
            );
        }
    }
    text
}

/// To write it anew: `WRITE_DOCS=1 cargo test -p sovereign-ctl troubleshooting`.
#[test]
fn the_troubleshooting_document_is_the_table() {
    const BEGIN: &str = "<!-- made from ctl/src/doctor/table by the test that compares it -->\n";
    let path = root().join("docs/troubleshooting.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, tail) = text.split_once(BEGIN).expect("the marker is there");
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}{}", document())).unwrap();
        return;
    }
    assert!(
        tail == document(),
        "docs/troubleshooting.md is not as the table; write it anew as this test's comment says"
    );
}
