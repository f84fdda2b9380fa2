use super::*;
use sovereign_protocol::spec::ServiceKind;
use std::collections::BTreeMap;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn services(ports: &[(&str, u16)]) -> Vec<Service> {
    let service = |(own, port): &(&str, u16)| Service {
        name: name(own),
        kind: ServiceKind::Postgres {
            settings: BTreeMap::new(),
            port: *port,
        },
        limits: None,
        requires: None,
    };
    ports.iter().map(service).collect()
}

fn translated(forward: &Forward) -> (Transport, u16) {
    let Translated { transport, more } = forward.translated.unwrap();
    (transport, more)
}

fn known(guest: &str, own: &str, listen: &str) -> Known {
    Known {
        guest: name(guest),
        forward: Forward {
            name: name(own),
            service: None,
            listen: listen.parse().unwrap(),
            port: 5432,
            translated: None,
        },
    }
}

fn asked(mapping: &str, own: Option<&str>, known: &[Known]) -> Result<Forward, CommandError> {
    by(None, false, mapping, own, known)
}

fn by(
    via: Option<Via>,
    udp: bool,
    mapping: &str,
    own: Option<&str>,
    known: &[Known],
) -> Result<Forward, CommandError> {
    let own = own.map(name);
    let asked = Asked {
        guest: &name("sql"),
        mapping: mapping.parse().unwrap(),
        name: own.as_ref(),
        via,
        udp,
    };
    decide(&asked, &services(&[("postgres", 5432)]), known)
}

#[test]
fn mappings_have_one_to_three_parts() {
    for (text, listen, more, port) in [
        ("15433", "127.0.0.1:15433", 0, None),
        ("15433:5432", "127.0.0.1:15433", 0, Some(5432)),
        ("0.0.0.0:15433", "0.0.0.0:15433", 0, None),
        ("10.0.0.1:15433:5432", "10.0.0.1:15433", 0, Some(5432)),
        ("[::1]:15433:5432", "[::1]:15433", 0, Some(5432)),
        ("[::]:1", "[::]:1", 0, None),
        ("0.0.0.0:8000-8010", "0.0.0.0:8000", 10, None),
        ("[::]:8000-8000:80", "[::]:8000", 0, Some(80)),
        ("8000-8010:5432", "127.0.0.1:8000", 10, Some(5432)),
    ] {
        let mapping: Mapping = text.parse().unwrap();
        assert_eq!(
            (mapping.listen.to_string().as_str(), mapping.more, mapping.port),
            (listen, more, port),
            "{text}"
        );
    }
    for text in [
        "", ":", "0", "1:0", "65536", "1:2:3", "a", "::1:5432", "[::1]", "1.2.3:4", "1.2.3.4:", "+1", "1-",
        "2-1", "1-+2", "1:2-3", "1-2-3",
    ] {
        let parsed = text.parse::<Mapping>();
        assert!(parsed.is_err(), "{text}: {parsed:?}");
    }
}

#[test]
fn a_second_forward_gets_a_name_with_its_port_and_names_its_service() {
    let first = asked("15432:5432", None, &[]).unwrap();
    assert_eq!((first.name.as_str(), &first.service), ("postgres", &None));
    let there = [known("sql", "postgres", "127.0.0.1:15432")];
    let second = asked("15433", None, &there).unwrap();
    assert_eq!(
        (second.name.as_str(), second.service().as_str()),
        ("postgres-15433", "postgres")
    );
    let own = asked("15433", Some("db"), &there).unwrap();
    assert_eq!((own.name.as_str(), own.service().as_str()), ("db", "postgres"));
    let long = name(&"x".repeat(NAME_CHARS));
    assert_eq!(
        free_name(&long, 65535, |_| true).as_str(),
        format!("{}-65535", "x".repeat(26))
    );
}

#[test]
fn the_same_again_is_the_one_that_is_there() {
    let there = [known("sql", "pg", "127.0.0.1:15432")];
    assert_eq!(asked("15432:5432", None, &there).unwrap(), there[0].forward);
    assert_eq!(asked("15432", Some("pg"), &there).unwrap(), there[0].forward);
}

#[test]
fn conflicts_are_named_with_who_is_in_the_way() {
    let there = [
        known("forge", "web", "127.0.0.1:15433"),
        known("sql", "db", "127.0.0.1:15432"),
    ];
    let refused = |mapping: &str, own: Option<&str>| {
        let error = asked(mapping, own, &there).unwrap_err();
        assert_eq!(error.kind, Kind::Refused, "{mapping}");
        error.human()
    };
    let text = refused("15433", None);
    assert!(
        text.contains("127.0.0.1:15433 leads to forge:5432 (forward web)"),
        "{text}"
    );
    assert!(
        text.contains("next: sovereign forward remove forge web"),
        "{text}"
    );
    assert!(refused("0.0.0.0:15433", None).contains("is taken"));
    assert!(refused("15434", Some("db")).contains("has a forward db already"));
    assert!(
        refused("15432", Some("other")).contains("is taken"),
        "another name for the same port"
    );
    assert!(asked("[::]:15433", None, &there).is_ok(), "another family");
    let error = asked("15434:80", None, &[]).unwrap_err();
    assert_eq!(
        (error.kind, error.reason.as_str()),
        (Kind::Configuration, "NoSuchService")
    );
    assert!(error.human().contains("it has postgres on 5432"));
    let two = services(&[("a", 1), ("b", 2)]);
    let asked = Asked {
        guest: &name("sql"),
        mapping: "15434".parse().unwrap(),
        name: None,
        via: None,
        udp: false,
    };
    let error = decide(&asked, &two, &[]).unwrap_err();
    assert_eq!(error.reason, "Ambiguous");
}

#[test]
fn the_kernel_is_asked_for_by_word_by_udp_or_by_a_range() {
    let tcp = by(Some(Via::Kernel), false, "0.0.0.0:15433", None, &[]).unwrap();
    assert_eq!(translated(&tcp), (Transport::Tcp, 0));
    let udp = by(None, true, "[::]:15433", None, &[]).unwrap();
    assert_eq!(translated(&udp), (Transport::Udp, 0));
    let range = by(None, false, "10.0.0.5:8000-8010", None, &[]).unwrap();
    assert_eq!(translated(&range), (Transport::Tcp, 10));
    let known = Known {
        guest: name("sql"),
        forward: range,
    };
    assert_eq!(
        known.to_string(),
        "10.0.0.5:8000-8010 (tcp by the kernel) leads to sql:5432-5442 (forward postgres)"
    );
    let plain = by(Some(Via::Vsock), false, "15433", None, &[]).unwrap();
    assert_eq!(plain.translated, None);
}

#[test]
fn what_cannot_be_carried_is_refused_with_what_can() {
    for (via, udp, mapping, reason, next) in [
        (
            Some(Via::Vsock),
            true,
            "10.0.0.5:53",
            "Contradiction",
            "10.0.0.5:53 --via kernel --udp",
        ),
        (
            Some(Via::Vsock),
            false,
            "0.0.0.0:80-90:5432",
            "Contradiction",
            "0.0.0.0:80-90:5432 --via kernel",
        ),
        (
            Some(Via::Kernel),
            false,
            "80",
            "Loopback",
            "0.0.0.0:80 --via kernel",
        ),
        (
            None,
            true,
            "[::1]:80",
            "Loopback",
            "0.0.0.0:80 --via kernel --udp",
        ),
    ] {
        let error = by(via, udp, mapping, None, &[]).unwrap_err();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Usage, reason),
            "{mapping}"
        );
        let text = error.human();
        assert!(
            text.ends_with(&format!("next: sovereign forward add sql {next}\n")),
            "{text}"
        );
    }
}

#[test]
fn a_port_of_udp_is_another_than_that_of_tcp_and_a_range_has_all_of_its_own() {
    let tcp = by(Some(Via::Kernel), false, "0.0.0.0:8000-8010", None, &[]).unwrap();
    let there = [Known {
        guest: name("sql"),
        forward: tcp.clone(),
    }];
    assert_eq!(by(None, false, "0.0.0.0:8000-8010", None, &there).unwrap(), tcp);
    let udp = by(None, true, "0.0.0.0:8000-8010", None, &there).unwrap();
    assert_eq!(udp.name.as_str(), "postgres-8000");
    for taken in ["8010", "10.0.0.5:8005", "0.0.0.0:8000"] {
        let error = asked(taken, None, &there).unwrap_err();
        assert_eq!(error.reason, "AddressTaken", "{taken}");
    }
    assert!(asked("8011", None, &there).is_ok());
}

#[test]
fn a_forward_is_meant_by_name_port_or_address() {
    let Known { forward, .. } = known("sql", "db", "127.0.0.1:15432");
    for text in ["db", "15432", "127.0.0.1:15432"] {
        assert!(is_meant(&forward, text), "{text}");
    }
    for text in ["d", "5432", "0.0.0.0:15432", ""] {
        assert!(!is_meant(&forward, text), "{text}");
    }
}
#[test]
fn a_range_is_meant_as_a_whole_and_a_protocol_tells_two_apart() {
    let udp = by(None, true, "0.0.0.0:8000-8010", Some("x"), &[]).unwrap();
    for text in ["x", "8000-8010", "0.0.0.0:8000-8010", "8000-8010/udp"] {
        assert!(is_meant(&udp, text), "{text}");
    }
    for text in ["8000", "8000-8010/tcp", "x/udp", "0.0.0.0:8000"] {
        assert!(!is_meant(&udp, text), "{text}");
    }
}
