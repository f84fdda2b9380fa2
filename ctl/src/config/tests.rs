use std::path::Path;

use sovereign_protocol::spec::{Image, ServiceKind};

use super::reference::template;
use super::*;

fn parse(text: &str) -> Result<Settings, Box<Problem>> {
    super::parse(Path::new("s.toml"), text)
}

const GUEST: &str = "[guest.sql]\n[guest.sql.service.postgres]\nkind = \"postgres\"\n";

#[test]
fn the_template_is_valid_and_means_what_it_says() {
    let settings = parse(&template()).unwrap();
    let guest = &settings.guests[&Name::parse("sql").unwrap()];
    assert_eq!((guest.memory_mib, guest.vcpus, guest.data_mib), (256, 1, 2048));
    assert_eq!(guest.forwards[0].listen.to_string(), "127.0.0.1:15432");
    assert_eq!(guest.forwards[0].port, 5432);
}

#[test]
fn settings_become_lines_of_postgresql_conf() {
    let text = format!(
        "{GUEST}[guest.sql.service.postgres.settings]\nfsync = false\nwork_mem = \"8MB\"\nlimit.x = 3\n"
    );
    assert_eq!(parse(&text).unwrap_err().reason, "WrongType");
    let text = text.replace("limit.x", "\"pg.x\"");
    let settings = parse(&text).unwrap();
    let ServiceKind::Postgres { settings, .. } = &settings.guests.values().next().unwrap().services[0].kind
    else {
        panic!()
    };
    let lines: Vec<String> = settings
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    assert_eq!(lines, ["fsync=off", "pg.x=3", "work_mem=8MB"]);
}

#[test]
fn a_network_of_two_families_gives_each_guest_both() {
    let text = format!(
        "[network]\naddress = [\"10.0.0.1/24\", \"fd00:64::1/64\"]\n{GUEST}\
         [guest.web]\naddress = [\"fd00:64::7\", \"10.0.0.7\"]\n[guest.six]\naddress = \"fd00:64::8\"\n"
    );
    let settings = parse(&text).unwrap();
    let document = settings.host_spec(&image().into(), None);
    let network = serde_json::to_value(&document.network).unwrap();
    assert_eq!(
        network["address"],
        serde_json::json!(["10.0.0.1/24", "fd00:64::1/64"])
    );
    let shown = |guest: &str| {
        let interface = settings.guests[&Name::parse(guest).unwrap()]
            .interface
            .as_ref()
            .unwrap();
        assert_eq!(
            serde_json::to_value(interface).unwrap()["gateway"],
            serde_json::json!(["10.0.0.1", "fd00:64::1"])
        );
        let addresses: Vec<String> = interface.addresses.iter().map(ToString::to_string).collect();
        addresses.join(" ")
    };
    assert_eq!(shown("web"), "10.0.0.7/24 fd00:64::7/64");
    assert_eq!(shown("sql"), "10.0.0.127/24 fd00:64::be45:f7f/64");
    assert!(
        shown("six").ends_with(" fd00:64::8/64"),
        "the other one is chosen"
    );

    let one = parse(
        &text
            .replace(", \"fd00:64::1/64\"", "")
            .replace("\"fd00:64::7\", ", "")
            .replace("\"fd00:64::8\"", "\"10.0.0.8\""),
    )
    .unwrap();
    let document = serde_json::to_value(one.host_spec(&image().into(), None)).unwrap();
    assert_eq!(
        document["network"]["address"], "10.0.0.1/24",
        "as before there were two"
    );
    assert_eq!(document["guests"]["web"]["interface"]["gateway"], "10.0.0.1");
}

#[test]
fn limits_and_tailscale_reach_the_document_and_their_absence_does_too() {
    let settings = parse(GUEST).unwrap();
    let guest = settings.guests.values().next().unwrap();
    assert_eq!((&guest.services[0].limits, &guest.tailscale), (&None, &None));
    let text = format!(
        "{GUEST}[guest.sql.service.postgres.limits]\nmemory = \"1GiB\"\ncpu = \"150%\"\n[guest.sql.tailscale]\n"
    );
    let document = parse(&text).unwrap().host_spec(&image().into(), None);
    let guest = document.guests.values().next().unwrap();
    let limits = guest.services[0].limits.as_ref().unwrap();
    assert_eq!(
        (limits.memory_max_mib, limits.cpu_percent, limits.pids_max),
        (Some(1024), Some(150), None)
    );
    assert!(guest.tailscale.is_some());
}

#[test]
fn a_private_namespace_leaves_by_pasta_or_not_at_all() {
    use sovereign_protocol::spec::Uplink;
    let uplink = |network: &str| {
        let settings = parse(&format!("[network]\n{network}\n{GUEST}"));
        let document = settings.map(|settings| settings.host_spec(&image().into(), None));
        document.map(|document| document.network.unwrap().uplink)
    };
    for private in ["", "namespace = \"private\"\n", "namespace = \"auto\"\n"] {
        assert_eq!(uplink(private).unwrap(), Uplink::None);
        for word in ["pasta", "auto"] {
            assert_eq!(
                uplink(&format!("{private}uplink = \"{word}\"")).unwrap(),
                Uplink::Auto
            );
        }
        let problem = uplink(&format!("{private}uplink = \"eth0\"")).unwrap_err();
        assert_eq!(problem.reason, "Contradiction", "{problem}");
    }
    let problem = uplink("namespace = \"host\"\nuplink = \"pasta\"").unwrap_err();
    assert_eq!(problem.reason, "Contradiction", "{problem}");
}

#[test]
fn what_is_said_for_all_guests_reaches_each_that_says_nothing_else() {
    let interface = |network: &str, guest: &str| {
        let settings = parse(&format!("[network]\n{network}\n[guest.other]\n{guest}\n"))?;
        let document = settings.host_spec(&image().into(), None);
        let guest = document.guests.values().next().unwrap();
        Ok::<_, Box<Problem>>(guest.interface.clone().unwrap())
    };
    let plain = interface("", "").unwrap();
    assert!(plain.dns.is_empty() && plain.search.is_empty() && plain.mtu.is_none());
    let all = "dns = [\"9.9.9.9\"]\nsearch = [\"lan.example\", \"home.arpa.\"]\nmtu = 1400";
    let told = interface(all, "").unwrap();
    assert_eq!(told.dns, ["9.9.9.9".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!((told.search[1].as_str(), told.mtu), ("home.arpa", Some(1400)));
    let own = interface(all, "dns = [\"10.0.0.1\"]").unwrap();
    assert_eq!(
        (own.dns.len(), own.dns[0].to_string()),
        (1, "10.0.0.1".to_owned())
    );
    for (wrong, reason) in [
        ("dns = [\"nine\"]", "BadAddress"),
        (
            "dns = [\"1.1.1.1\", \"1.1.1.2\", \"1.1.1.3\", \"1.1.1.4\"]",
            "BadAddress",
        ),
        ("search = [\"a b\"]", "BadDomain"),
        (
            "search = [\"a\", \"b\", \"c\", \"d\", \"e\", \"f\", \"g\"]",
            "BadDomain",
        ),
        ("mtu = 576", "OutOfRange"),
        ("mtu = 9000", "OutOfRange"),
    ] {
        assert_eq!(interface(wrong, "").unwrap_err().reason, reason, "{wrong}");
    }
}

fn image() -> Image {
    Image {
        kernel: "k".into(),
        initramfs: "i".into(),
        root: "r".into(),
        agent: "a".into(),
        digest: "d".into(),
    }
}

#[test]
fn only_the_asked_guests_are_in_the_document() {
    let settings = parse(&format!("{GUEST}[guest.other]\n")).unwrap();
    let image = image();
    assert_eq!(settings.host_spec(&image.clone().into(), None).guests.len(), 2);
    let only = std::collections::BTreeSet::from([Name::parse("sql").unwrap()]);
    assert_eq!(
        settings
            .host_spec(&image.clone().into(), Some(&only))
            .guests
            .keys()
            .cloned()
            .collect::<Vec<_>>(),
        only.into_iter().collect::<Vec<_>>()
    );
}

const WEB: &str = "[guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n";

#[test]
fn a_guest_comes_with_what_it_requires_and_boots_the_image_of_its_services() {
    let settings = parse(&format!("{GUEST}{WEB}[guest.other]\n")).unwrap();
    let names = |names: &[&str]| -> std::collections::BTreeSet<Name> {
        names.iter().map(|name| Name::parse(name).unwrap()).collect()
    };
    for (asked, with) in [
        (&["web"][..], &["sql", "web"][..]),
        (&["sql"], &["sql"]),
        (&["other", "web"], &["other", "sql", "web"]),
        (&["nobody"], &[]),
    ] {
        assert_eq!(settings.with_required(&names(asked)), names(with));
    }
    assert_eq!(
        settings.recipes().into_iter().collect::<Vec<_>>(),
        [MINIFLUX, RECIPE]
    );
    assert_eq!(parse(GUEST).unwrap().recipes().len(), 1);
    let own = |recipe: &str| Image {
        digest: recipe.to_owned(),
        ..image()
    };
    let by_recipe = [MINIFLUX, RECIPE].map(|recipe| (recipe.to_owned(), own(recipe)));
    let spec = settings.host_spec(&Images::new(image(), by_recipe.into()), None);
    let digests: Vec<&str> = spec
        .guests
        .values()
        .map(|guest| guest.image.digest.as_str())
        .collect();
    assert_eq!(digests, [RECIPE, RECIPE, MINIFLUX]);
    let miniflux = &spec.guests[&Name::parse("web").unwrap()].services[0];
    assert_eq!(
        (&miniflux.kind, miniflux.kind.port()),
        (&ServiceKind::Miniflux { port: 8080 }, 8080)
    );
    assert_eq!(miniflux.requires.as_ref().unwrap().to_string(), "sql/postgres");
}

/// (what stands in the file, line, key, code, text that the message must hold)
const TABLE: &[(&str, usize, &str, &str, &str)] = &[
    ("", 1, "guest", "NoGuest", "[guest.NAME]"),
    ("[guest.sql", 1, "[guest.sql", "NotToml", ""),
    ("[guest.sql]\nmemory = \n", 2, "memory", "NotToml", ""),
    (
        "[guest.sql]\nmemory = \"1GiB\"\nmemory = \"2GiB\"\n",
        3,
        "memory",
        "NotToml",
        "duplicate",
    ),
    (
        "[guest.sql]\nmemry = \"1GiB\"\n",
        2,
        "guest.sql.memry",
        "UnknownKey",
        "did you mean \"memory\"",
    ),
    (
        "[guests.sql]\n",
        1,
        "guests",
        "UnknownKey",
        "did you mean \"guest\"",
    ),
    (
        "[guest.sql]\nzzzz = 1\n",
        2,
        "guest.sql.zzzz",
        "UnknownKey",
        "accepted: memory, vcpus, data, address, dns, restart, restart_wedged, tailscale, service, forward",
    ),
    (
        "[build]\nmiror = \"http://x\"\n",
        2,
        "build.miror",
        "UnknownKey",
        "did you mean \"mirror\"",
    ),
    (
        "[[guest.sql.forward]]\nname = \"x\"\nlistn = \"x\"\n",
        3,
        "guest.sql.forward.0.listn",
        "UnknownKey",
        "did you mean \"listen\"",
    ),
    (
        "[guest.sql]\nmemory = 256\n",
        2,
        "guest.sql.memory",
        "WrongType",
        "invalid type",
    ),
    (
        "[guest.sql.service.postgres]\nport = 1\n",
        1,
        "guest.sql.service.postgres",
        "MissingKey",
        "`kind`",
    ),
    (
        "[guest.sql]\nmemory = \"256MB\"\n",
        2,
        "guest.sql.memory",
        "BadSize",
        "accepted: 96 MiB to 1 TiB, as a number and MiB",
    ),
    (
        "[guest.sql]\n\n# x\nmemory = \"8MiB\"\n",
        4,
        "guest.sql.memory",
        "OutOfRange",
        "96 MiB to 1 TiB",
    ),
    (
        "[guest.sql]\ndata = \"1MiB\"\n",
        2,
        "guest.sql.data",
        "OutOfRange",
        "64 MiB to 16 TiB",
    ),
    (
        "[guest.sql]\nvcpus = 0\n",
        2,
        "guest.sql.vcpus",
        "OutOfRange",
        "1 to 64",
    ),
    (
        "[guest.sql]\nvcpus = 1000\n",
        2,
        "guest.sql.vcpus",
        "OutOfRange",
        "1 to 64",
    ),
    ("[guest.SQL]\n", 1, "guest.SQL", "BadName", "a-z"),
    (
        "[guest.sql.service.db]\nkind = \"postgre\"\n",
        2,
        "guest.sql.service.db.kind",
        "UnknownKind",
        "did you mean \"postgres\"",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\nport = 0\n",
        3,
        "guest.sql.service.db.port",
        "OutOfRange",
        "1 to 65535",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[guest.sql.service.db.settings]\nport = 1\n",
        4,
        "guest.sql.service.db.settings.port",
        "OwnedSetting",
        "the service's own key",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[guest.sql.service.db.settings]\n\"a b\" = 1\n",
        3,
        "guest.sql.service.db.settings",
        "OutOfRange",
        "not one line of postgresql.conf",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[guest.sql.service.db.settings]\na = \"1\\nb = 2\"\n",
        4,
        "guest.sql.service.db.settings.a",
        "WrongType",
        "one line",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[[guest.sql.forward]]\nname = \"bd\"\nlisten = \"127.0.0.1:1\"\n",
        4,
        "guest.sql.forward.0.name",
        "NoSuchService",
        "accepted: db, or any name beside",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[[guest.sql.forward]]\nname = \"db\"\nlisten = \"15432\"\n",
        5,
        "guest.sql.forward.0.listen",
        "BadAddress",
        "127.0.0.1:15432",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[[guest.sql.forward]]\nname = \"db\"\nlisten = \"127.0.0.1:1\"\nport = 1\n",
        6,
        "guest.sql.forward.0.port",
        "Contradiction",
        "listens on 5432",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[[guest.sql.forward]]\nname = \"x\"\nservice = \"bd\"\nlisten = \"127.0.0.1:1\"\n",
        5,
        "guest.sql.forward.0.service",
        "NoSuchService",
        "accepted: db",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[[guest.sql.forward]]\nname = \"db\"\nlisten = \"127.0.0.1:1\"\n\
         [[guest.sql.forward]]\nname = \"db\"\nlisten = \"127.0.0.1:2\"\n",
        7,
        "guest.sql.forward.1.name",
        "Contradiction",
        "named db already",
    ),
    (
        "[guest.a.service.db]\nkind = \"postgres\"\n[[guest.a.forward]]\nname = \"db\"\nlisten = \"127.0.0.1:1\"\n\
         [guest.b.service.db]\nkind = \"postgres\"\n[[guest.b.forward]]\nname = \"db\"\nlisten = \"127.0.0.1:1\"\n",
        10,
        "guest.b.forward.0.listen",
        "Contradiction",
        "leads to guest a already",
    ),
    (
        "[network]\naddress = [\"10.0.0.1/24\", \"10.0.1.1/24\"]\n[guest.sql]\n",
        2,
        "network.address",
        "Contradiction",
        "10.0.0.1 and 10.0.1.1 are both IPv4: one of each family is taken; accepted: an address with its prefix",
    ),
    (
        "[network]\naddress = []\n[guest.sql]\n",
        2,
        "network.address",
        "BadAddress",
        "an empty list",
    ),
    (
        "[network]\naddress = [\"10.0.0.1/24\", \"fd00::/64\"]\n[guest.sql]\n",
        2,
        "network.address",
        "BadAddress",
        "fd00:: is no host's address in fd00::/64",
    ),
    (
        "[network]\naddress = [\"10.0.0.1/24\", \"fd00::1/64\"]\n[guest.sql]\naddress = [\"10.0.0.2\", \"10.0.0.3\"]\n",
        4,
        "guest.sql.address",
        "Contradiction",
        "10.0.0.2 and 10.0.0.3 are both IPv4: one of each family is taken; accepted: an address in",
    ),
    (
        "[network]\naddress = [\"10.0.0.1/24\", \"fd00::1/64\"]\n[guest.sql]\naddress = [\"10.0.0.2\", \"fd01::2\"]\n",
        4,
        "guest.sql.address",
        "BadAddress",
        "\"fd01::2\" is no guest's address in 10.0.0.0/24 and fd00::/64",
    ),
    (
        "[network]\naddress = [\"10.0.0.1/24\", \"fd00::1/64\"]\n[guest.a]\naddress = \"fd00::2\"\n[guest.b]\naddress = [\"10.0.0.2\", \"fd00::2\"]\n",
        6,
        "guest.b.address",
        "Contradiction",
        "fd00::2 is another guest's as well",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\nlimits.memory = \"8MiB\"\n",
        3,
        "guest.sql.service.db.limits.memory",
        "OutOfRange",
        "accepted: 16 MiB to 1 TiB",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\n[guest.sql.service.db.limits]\ncpu = \"1.5\"\n",
        4,
        "guest.sql.service.db.limits.cpu",
        "OutOfRange",
        "accepted: \"1%\" to \"6400%\", such as \"150%\"",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\nlimits = { tasks = 1 }\n",
        3,
        "guest.sql.service.db.limits.tasks",
        "OutOfRange",
        "accepted: 16 to 4194304",
    ),
    (
        "[guest.sql.service.db]\nkind = \"postgres\"\nlimits.task = 100\n",
        3,
        "guest.sql.service.db.limits.task",
        "UnknownKey",
        "did you mean \"tasks\"; accepted: memory, cpu, tasks",
    ),
    (
        "[guest.sql.tailscale]\nauthkey = \"x\"\n",
        2,
        "guest.sql.tailscale.authkey",
        "UnknownKey",
        "unknown key; accepted: no key",
    ),
    (
        "[guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql\"\n",
        3,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "accepted: GUEST/SERVICE, such as \"sql/postgres\"",
    ),
    (
        "[guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n",
        3,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "there is no guest sql; accepted: none: add a guest with PostgreSQL first",
    ),
    (
        "[guest.sql.service.postgres]\nkind = \"postgres\"\n\
         [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgre\"\n",
        5,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "guest sql has no service postgre; did you mean \"sql/postgres\"; accepted: sql/postgres",
    ),
    (
        "[guest.sql.service.postgres]\nkind = \"postgres\"\n[guest.web.service.miniflux]\nkind = \"miniflux\"\n",
        3,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "Miniflux needs a PostgreSQL, and none is named; accepted: sql/postgres",
    ),
    (
        "[guest.sql.service.postgres]\nkind = \"postgres\"\nrequires = \"web/miniflux\"\n\
         [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n",
        3,
        "guest.sql.service.postgres.requires",
        "BadRequirement",
        "PostgreSQL needs no other service; accepted: no value",
    ),
    (
        "network.namespace = \"none\"\n[guest.sql.service.postgres]\nkind = \"postgres\"\n\
         [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n",
        6,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "there is no network between web and sql; accepted: another [network] namespace than \"none\"",
    ),
    (
        "network.isolated = true\n[guest.sql.service.postgres]\nkind = \"postgres\"\n\
         [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\n",
        6,
        "guest.web.service.miniflux.requires",
        "BadRequirement",
        "the network is isolated: web and sql do not reach each other; accepted: isolated = false in [network]",
    ),
    (
        "[guest.sql.service.postgres]\nkind = \"postgres\"\n\
         [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"sql/postgres\"\nsettings.a = 1\n",
        6,
        "guest.web.service.miniflux.settings.a",
        "OwnedSetting",
        "Miniflux has no settings here",
    ),
    (
        "[guest.sql.service.a]\nkind = \"postgres\"\n[guest.sql.service.b]\nkind = \"postgres\"\n",
        3,
        "guest.sql.service.b",
        "Contradiction",
        "a guest of its own for each service",
    ),
    (
        "[build]\nrecipe = \"postgresql-16\"\n",
        2,
        "build.recipe",
        "UnknownRecipe",
        "did you mean \"postgresql-17\"",
    ),
    (
        "[build]\nmirror = \"https://x\"\n",
        2,
        "build.mirror",
        "BadMirror",
        "http://host/debian",
    ),
];

#[test]
fn every_mistake_is_named_with_file_line_key_and_what_is_accepted() {
    for (text, line, key, reason, holds) in TABLE {
        let problem = parse(text).expect_err(text);
        assert_eq!(
            (problem.line, problem.key.as_str(), problem.reason),
            (*line, *key, *reason),
            "{text:?}: {problem}"
        );
        let message = problem.to_string();
        assert!(
            message.starts_with(&format!("s.toml:{line}:")) && message.contains(holds),
            "{message}"
        );
        let error = CommandError::from(problem);
        assert_eq!(error.kind.exit_code(), 3);
        assert!(
            error
                .human()
                .contains(&format!("next: edit s.toml line {line}, then: sovereign up"))
        );
    }
}

#[allow(unreachable_pub)] // it is public where it is at home
#[path = "../../../fuzz/src/mutate.rs"]
mod mutate;

/// The corpus of the fuzz workspace, which cannot link a program: a configuration, or a problem with its place.
#[test]
fn no_text_panics_and_each_problem_says_where() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/sovereign-toml");
    let mut corpus = vec![template().into_bytes()];
    for entry in std::fs::read_dir(dir).unwrap() {
        corpus.push(std::fs::read(entry.unwrap().path()).unwrap());
    }
    corpus.sort();
    let mut dice = mutate::Dice::new(1);
    for round in 0..3_000 {
        let (input, other) = (&corpus[round % corpus.len()], &corpus[dice.below(corpus.len())]);
        let bytes = if round < corpus.len() {
            input.clone()
        } else {
            mutate::mutated(input, other, &mut dice)
        };
        let text = String::from_utf8_lossy(&bytes);
        if let Err(problem) = parse(&text) {
            let lines = text.lines().count().max(1);
            assert!((1..=lines + 1).contains(&problem.line), "{problem:?} in {text}");
            assert!(
                !problem.reason.is_empty() && !problem.problem.is_empty(),
                "{problem:?}"
            );
        }
    }
}
