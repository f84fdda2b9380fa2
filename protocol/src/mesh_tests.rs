use super::*;

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

#[test]
fn a_service_of_a_guest_is_two_names_and_a_slash() {
    let of: ServiceRef = "sql/postgres".parse().unwrap();
    assert_eq!((of.guest.as_str(), of.service.as_str()), ("sql", "postgres"));
    assert_eq!(serde_json::to_string(&of).unwrap(), r#""sql/postgres""#);
    assert_eq!(
        serde_json::from_str::<ServiceRef>(r#""sql/postgres""#).unwrap(),
        of
    );
    for bad in ["sql", "", "/", "sql/", "/postgres", "sql/postgres/x", "SQL/x"] {
        assert!(bad.parse::<ServiceRef>().is_err(), "{bad:?}");
    }
}

#[test]
fn no_two_services_have_one_role_and_none_leaves_its_quotes() {
    let role = |text: &str| Role::of(&text.parse().unwrap()).map(String::from);
    assert_eq!(role("web/miniflux").unwrap(), "web_miniflux");
    assert_ne!(role("a-b/c").unwrap(), role("a/b-c").unwrap());
    let (long, most) = ("x".repeat(32), "y".repeat(30));
    assert_eq!(role(&format!("{long}/{most}")).unwrap().len(), ROLE_CHARS);
    assert!(
        role(&format!("{long}/{most}y")).is_err(),
        "PostgreSQL would cut it"
    );
    for bad in ["", "1a", "a\"b", "a b", "a'b", "a/b", "A", "ä", "a\n"] {
        assert!(Role::try_from(bad.to_owned()).is_err(), "{bad:?}");
    }
}

#[test]
fn a_cycle_is_told_with_its_way() {
    let needs = |pairs: &[(&str, &[&str])]| {
        let pairs = pairs.iter().map(|(guest, of)| {
            let of = of.iter().map(|of| name(of)).collect::<BTreeSet<_>>();
            (name(guest), of)
        });
        pairs.collect::<BTreeMap<_, _>>()
    };
    let way = |pairs: &[(&str, &[&str])]| {
        cycle(&needs(pairs)).map(|way| way.iter().map(Name::to_string).collect::<Vec<_>>().join(" "))
    };
    assert_eq!(way(&[]), None);
    assert_eq!(way(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]), None);
    assert_eq!(way(&[("a", &["a"])]).as_deref(), Some("a a"));
    let through = way(&[("a", &["b"]), ("b", &["d", "c"]), ("c", &["b"]), ("d", &[])]);
    assert_eq!(through.as_deref(), Some("b c b"));
}

/// Two guests: `sql` with PostgreSQL, `web` with what needs it.
fn host() -> serde_json::Value {
    let guest = |services: serde_json::Value, address: &str| {
        serde_json::json!({
            "memory_mib": 256, "vcpus": 1, "data_mib": 64,
            "image": {"kernel": "k", "initramfs": "i", "root": "r", "agent": "a", "digest": "d"},
            "services": services, "forwards": [], "interface": {"addresses": [address]},
        })
    };
    let postgres =
        serde_json::json!([{"name": "postgres", "kind": {"postgres": {"settings": {}, "port": 5432}}}]);
    let miniflux = serde_json::json!([
        {"name": "miniflux", "kind": {"miniflux": {"port": 8080}}, "requires": "sql/postgres"}
    ]);
    serde_json::json!({
        "version": 1, "network": {"namespace": "auto", "address": "10.0.0.1/24"},
        "guests": {"sql": guest(postgres, "10.0.0.2/24"), "web": guest(miniflux, "10.0.0.3/24")},
    })
}

/// What is said of a changed host spec; the unchanged one is good.
fn said(change: impl FnOnce(&mut serde_json::Value)) -> String {
    let mut spec = host();
    change(&mut spec);
    match HostSpec::parse(&serde_json::to_vec(&spec).unwrap()) {
        Ok(read) => {
            let written = serde_json::to_vec(&read).unwrap();
            format!("{}", HostSpec::parse(&written).unwrap() == read)
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_a_service_requires_is_there_and_can_be_reached() {
    assert_eq!(said(|_| {}), "true");
    let key = "guests.web.services[0].requires: ";
    let requires =
        |of: serde_json::Value| said(move |spec| spec["guests"]["web"]["services"][0]["requires"] = of);
    for (of, problem) in [
        ("db/postgres", "there is no guest db"),
        ("sql/pg", "guest sql has no service pg"),
        (
            "web/miniflux",
            "web/miniflux is of the same guest, and only another one's can be required",
        ),
    ] {
        assert_eq!(requires(of.into()), format!("{key}{problem}"));
    }
    assert_eq!(
        requires(serde_json::Value::Null),
        format!("{key}Miniflux needs a PostgreSQL, and none is named")
    );
    assert!(requires("sql".into()).contains("cannot be read"));
    let own = said(|spec| spec["guests"]["sql"]["services"][0]["requires"] = "web/miniflux".into());
    assert_eq!(
        own,
        "guests.sql.services[0].requires: PostgreSQL needs no other service"
    );
    let between = format!("{key}there is no network between web and sql");
    let cut = |guest: &'static str| {
        said(move |spec| drop(spec["guests"][guest].as_object_mut().unwrap().remove("interface")))
    };
    assert_eq!((cut("sql"), cut("web")), (between.clone(), between.clone()));
    let none = said(|spec| {
        spec.as_object_mut().unwrap().remove("network");
        for guest in ["sql", "web"] {
            spec["guests"][guest].as_object_mut().unwrap().remove("interface");
        }
    });
    assert_eq!(none, between);
    let isolated = said(|spec| spec["network"]["isolated"] = true.into());
    assert_eq!(
        isolated,
        format!("{key}the network is isolated: web and sql do not reach each other")
    );
    let long = said(|spec| {
        let mut web = spec["guests"]["web"].take();
        web["services"][0]["name"] = "y".repeat(32).into();
        let guests = spec["guests"].as_object_mut().unwrap();
        guests.remove("web");
        guests.insert("x".repeat(32), web);
    });
    assert!(long.contains("is no role: use 1 to 63"), "{long}");
}

#[test]
fn guests_that_need_each_other_are_refused() {
    let text = said(|spec| {
        let miniflux = |of: &str| serde_json::json!({"name": "feeds", "kind": {"miniflux": {"port": 1}}, "requires": of});
        let postgres = spec["guests"]["sql"]["services"][0].clone();
        let services = |spec: &mut serde_json::Value, guest: &str, service| {
            spec["guests"][guest]["services"]
                .as_array_mut()
                .unwrap()
                .push(service);
        };
        services(spec, "sql", miniflux("web/postgres"));
        services(spec, "web", postgres);
    });
    assert_eq!(
        text,
        "guests.sql.services: sql, web, sql need each other: none could be stopped first"
    );
}

fn guest(more: &str) -> Result<GuestSpec, SpecError> {
    let text = format!(
        r#"{{"version":1,"revision":1,"hostname":"web","services":[
        {{"name":"miniflux","kind":{{"miniflux":{{"port":8080}}}},"requires":"sql/postgres"}},
        {{"name":"postgres","kind":{{"postgres":{{"settings":{{}},"port":5432}}}}}}],"secrets":{{}}{more}}}"#
    );
    GuestSpec::parse(text.as_bytes())
}

#[test]
fn a_guest_is_told_of_ties_of_services_that_it_has() {
    let requirement = r#"{"of":"sql/postgres","status":"True","evidence":"e","address":"10.0.0.2","port":5432,"role":"web_miniflux"}"#;
    let with = |service: &str| format!(r#","requirements":{{"{service}":{requirement}}}"#);
    let read = guest(&with("miniflux")).unwrap();
    let told = &read.requirements[&name("miniflux")];
    assert_eq!(
        (told.of.to_string(), told.port),
        ("sql/postgres".to_owned(), 5432)
    );
    assert_eq!(Requirement::secret(&name("miniflux")), "miniflux/requires");
    let mut other = told.clone();
    other.status = Status::False;
    assert!(told.is_same_place(&other));
    other.address = "10.0.0.9".parse().unwrap();
    assert!(!told.is_same_place(&other));
    for wrong in ["postgres", "nobody"] {
        assert!(
            guest(&with(wrong))
                .unwrap_err()
                .to_string()
                .starts_with("requirements.")
        );
    }
    let clients = |service: &str, role: &str, count: usize| {
        let client = format!(r#"{{"role":"{role}","from":["10.0.0.3"]}}"#);
        let list = vec![client; count].join(",");
        guest(&format!(r#","clients":{{"{service}":[{list}]}}"#))
    };
    let read = clients("postgres", "web_miniflux", CLIENTS).unwrap();
    let client = &read.clients[&name("postgres")][0];
    assert_eq!(client.secret(&name("postgres")), "postgres/web_miniflux");
    assert!(clients("postgres", "web_miniflux", CLIENTS + 1).is_err());
    assert!(clients("miniflux", "web_miniflux", 1).is_err());
    assert!(clients("postgres", "x\"; drop", 1).is_err());
}
