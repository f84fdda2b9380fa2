use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::super::keys::Form;
use super::super::{parse, values};
use super::*;

/// A file that holds nothing but an unknown key in the table of this path.
fn stranger_in(table: &str) -> String {
    let table = table.replace("NAME", "sql").replace("SERVICE", "postgres");
    let kind = "[guest.sql.service.postgres]\nkind = \"postgres\"\n";
    match table.as_str() {
        "guest.sql.service.postgres" => format!("{kind}stranger = 1\n"),
        table if table.ends_with("[]") => {
            format!("{kind}[[{}]]\nstranger = 1\n", table.trim_end_matches("[]"))
        }
        table => format!("[{table}]\nstranger = 1\n"),
    }
}

#[test]
fn every_key_that_the_file_may_hold_is_here_and_no_other() {
    let tables: BTreeSet<&str> = ALL
        .iter()
        .filter_map(|key| Some(key.path.rsplit_once('.')?.0))
        .collect();
    for table in tables {
        let problem = parse(Path::new("s.toml"), &stranger_in(table)).unwrap_err();
        assert_eq!(problem.reason, "UnknownKey", "{table}: {problem}");
        let mut may: Vec<String> = problem.accepted.unwrap().split(", ").map(str::to_owned).collect();
        // Tables of their own; each has its keys here.
        let below = |key: &str| {
            ALL.iter()
                .any(|own| own.path.starts_with(&format!("{table}.{key}.")))
                || (table == "guest.NAME" && ["service", "forward"].contains(&key))
        };
        may.retain(|key| !below(key));
        let own = ALL
            .iter()
            .filter(|key| key.path.rsplit_once('.').is_some_and(|(at, _)| at == table));
        let mut here: Vec<String> = own
            .map(|key| key.path.rsplit_once('.').unwrap().1.to_owned())
            .collect();
        may.sort();
        here.sort();
        assert_eq!(may, here, "{table}");
    }
}

#[test]
fn every_default_fits_its_form_and_is_what_an_empty_guest_gets() {
    let empty = "[guest.sql]\n[guest.sql.service.postgres]\nkind = \"postgres\"\n";
    let spelt = "[build]\nrecipe = \"postgresql-17\"\n[network]\nnamespace = \"auto\"\naddress = \"192.168.100.1/24\"\n\
        vpn = \"follow\"\nisolated = false # and of forwards: vsock, tcp\n\
        [guest.sql]\nmemory = \"256MiB\"\nvcpus = 1\ndata = \"2GiB\"\nrestart = \"on-failure\"\nrestart_wedged = false\n\
        [guest.sql.service.postgres]\nkind = \"postgres\"\nport = 5432\n";
    let path = Path::new("s.toml");
    assert_eq!(parse(path, empty).unwrap(), parse(path, spelt).unwrap());
    let source = super::super::source::Source::read(path, "").unwrap();
    for key in ALL {
        let Absent::Value(default) = key.absent else {
            continue;
        };
        assert!(
            spelt.contains(default),
            "{} = {default} is not in this test",
            key.path
        );
        let fits = match &key.form {
            Form::Size(_) => values::size(&source, &[], Some(default), key).is_ok(),
            Form::Count(_) => values::count::<u32>(&source, &[], default.parse().ok(), key).is_ok(),
            Form::Choice(_) => values::choice(&source, &[], Some(default), key, ("", "")).is_ok(),
            Form::Flag => ["true", "false"].contains(&default),
            Form::Percent(_) | Form::Words(_) => true,
        };
        assert!(fits, "{}: {default}", key.path);
    }
}

#[test]
fn the_file_of_init_shows_every_key_and_holds_with_every_example() {
    let text = template();
    let all: String = text
        .lines()
        .filter(|line| !line.starts_with("# What") && !line.starts_with("# Change"))
        .map(|line| format!("{}\n", line.trim_start_matches("# ")))
        .collect();
    let settings = parse(Path::new("s.toml"), &all).unwrap_or_else(|problem| panic!("{problem}\n{all}"));
    let guest = settings.guests.values().next().unwrap();
    assert!(guest.tailscale.is_some() && guest.services[0].limits.is_some());
    for key in ALL {
        let name = key.path.rsplit_once('.').unwrap().1;
        assert!(text.contains(name), "{name}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= 130), "{text}");
}

/// To write it anew: `WRITE_DOCS=1 cargo test -p sovereign-ctl configuration`.
#[test]
fn the_configuration_document_is_made_of_the_keys() {
    const BEGIN: &str = "<!-- made from ctl/src/config/keys.rs by the test that compares it -->\n";
    const END: &str = "<!-- until here -->\n";
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (head, rest) = document.split_once(BEGIN).expect("the marker is there");
    let (made, tail) = rest.split_once(END).expect("its end is there");
    let fresh = format!("```toml\n{}```\n\n{}", template(), table());
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(&path, format!("{head}{BEGIN}{fresh}{END}{tail}")).unwrap();
        return;
    }
    assert!(
        made == fresh,
        "docs/configuration.md is not as the keys; write it anew as this test's comment says"
    );
}
