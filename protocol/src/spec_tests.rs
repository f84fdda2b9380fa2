use super::*;
use crate::ways::Ways;

fn guest() -> GuestSpec {
    GuestSpec {
        version: VERSION,
        revision: 1,
        hostname: Name::parse("sql").unwrap(),
        services: vec![Service {
            name: Name::parse("postgres").unwrap(),
            kind: ServiceKind::Postgres {
                settings: BTreeMap::from([("work_mem".into(), "4MB".into())]),
                port: 5432,
            },
            limits: None,
            requires: None,
        }],
        secrets: BTreeMap::from([("postgres".into(), Exposed(Secret::new("s3cret".into())))]),
        interface: None,
        open: BTreeSet::new(),
        tailscale: None,
        requirements: BTreeMap::new(),
        clients: BTreeMap::new(),
    }
}

#[test]
fn a_guest_spec_survives_the_way_and_shows_no_secret() {
    let document = serde_json::to_vec(&guest()).unwrap();
    assert_eq!(GuestSpec::parse(&document).unwrap(), guest());
    assert!(!format!("{:?}", guest()).contains("s3cret"));
}

#[test]
fn a_document_of_before_interfaces_and_limits_still_reads_and_is_still_written() {
    let text = r#"{"version":1,"revision":1,"hostname":"sql","services":[{"name":"postgres","kind":{"postgres":{"settings":{"work_mem":"4MB"},"port":5432}}}],"secrets":{"postgres":"s3cret"}}"#;
    assert_eq!(GuestSpec::parse(text.as_bytes()).unwrap(), guest());
    assert_eq!(serde_json::to_string(&guest()).unwrap(), text);
}

#[test]
fn interface_tailscale_and_limits_survive_the_way_and_are_checked() {
    let mut full = guest();
    full.interface = Some(InterfaceSpec {
        addresses: vec!["192.168.100.2/24".parse().unwrap()],
        gateways: vec!["192.168.100.1".parse().unwrap()],
        dns: vec!["192.168.100.1".parse().unwrap()],
        search: vec![crate::domain::Domain::parse("home.arpa").unwrap()],
        mtu: Some(1400),
        ways: Ways {
            v4: Some(1),
            v6: None,
        },
    });
    full.tailscale = Some(TailscaleSpec {});
    full.services[0].limits = Some(Limits {
        memory_max_mib: Some(128),
        cpu_percent: Some(150),
        pids_max: None,
    });
    let parse = |spec: &GuestSpec| GuestSpec::parse(&serde_json::to_vec(spec).unwrap());
    assert_eq!(parse(&full).unwrap(), full);
    let short = r#"{"addresses":["192.168.100.2/24"]}"#;
    let short_spec: InterfaceSpec = serde_json::from_str(short).unwrap();
    assert_eq!((short_spec.mtu, short_spec.ways.is_empty()), (None, true));
    let written = serde_json::to_string(&short_spec).unwrap();
    assert!(
        !written.contains("ways"),
        "an older guest agent refuses {written}"
    );

    let mut wrong = full.clone();
    wrong.interface.as_mut().unwrap().gateways = vec!["10.0.0.1".parse().unwrap()];
    let error = parse(&wrong).unwrap_err().to_string();
    assert!(
        error.starts_with("interface.gateway: 10.0.0.1 is in none"),
        "{error}"
    );
    let mut wrong = full;
    wrong.services[0].limits.as_mut().unwrap().cpu_percent = Some(0);
    let error = parse(&wrong).unwrap_err().to_string();
    assert_eq!(error, "services[0].limits.cpu_percent: 0 is not from 1 to 6400");
}

#[test]
fn a_host_document_of_before_tailscale_still_reads_and_is_still_written() {
    let text = r#"{"version":1,"guests":{"sql":{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"},"services":[],"forwards":[],"restart":{"when":"on-failure","wedged":false}}}}"#;
    let mut spec = HostSpec::parse(text.as_bytes()).unwrap();
    assert_eq!(serde_json::to_string(&spec).unwrap(), text);
    let sql = spec.guests.values_mut().next().unwrap();
    sql.tailscale = Some(TailscaleSpec {});
    let written = serde_json::to_string(&spec).unwrap();
    assert_eq!(written, text.replace("}}}}", r#"},"tailscale":{}}}}"#));
    assert_eq!(HostSpec::parse(written.as_bytes()).unwrap(), spec);
}

#[test]
fn forwards_of_a_guest_have_names_of_their_own_and_a_service_to_lead_to() {
    let with = |forwards: &str| {
        let text = format!(
            r#"{{"version":1,"guests":{{"sql":{{"memory_mib":256,"vcpus":1,"data_mib":64,"image":{{"kernel":"k","initramfs":"i","root":"r","agent":"a","digest":"d"}},"services":[{{"name":"pg","kind":{{"postgres":{{"settings":{{}},"port":5432}}}}}}],"forwards":[{forwards}]}}}}}}"#
        );
        HostSpec::parse(text.as_bytes()).map_err(|error| error.to_string())
    };
    let plain = r#"{"name":"pg","listen":"127.0.0.1:1","port":5432}"#;
    let second = r#"{"name":"b","service":"pg","listen":"127.0.0.1:2","port":5432}"#;
    let both = with(&format!("{plain},{second}")).unwrap();
    let forwards = &both.guests.values().next().unwrap().forwards;
    assert_eq!(forwards[0].service(), forwards[1].service());
    assert_eq!(serde_json::to_string(&forwards[0]).unwrap(), plain);
    let twice = with(&format!("{plain},{}", plain.replace(":1", ":2"))).unwrap_err();
    assert_eq!(twice, "guests.sql.forwards: pg is there twice");
    let nobody = with(&second.replace("pg", "no")).unwrap_err();
    assert_eq!(nobody, "guests.sql.forwards: guest sql has no service no");
}

#[test]
fn contradictions_are_named_by_path() {
    let mut twice = guest();
    twice.services.push(twice.services[0].clone());
    let error = GuestSpec::parse(&serde_json::to_vec(&twice).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "services[1].name: postgres is there twice");

    let mut injected = guest();
    injected.services[0].kind = ServiceKind::Postgres {
        settings: BTreeMap::from([("a".into(), "1\nb=2".into())]),
        port: 5432,
    };
    assert!(GuestSpec::parse(&serde_json::to_vec(&injected).unwrap()).is_err());
    let mut future = guest();
    future.version = 2;
    let error = GuestSpec::parse(&serde_json::to_vec(&future).unwrap()).unwrap_err();
    assert!(matches!(error, SpecError::Version(2)));
}

#[test]
fn nobody_asks_a_host_for_a_way() {
    let mut spec = host();
    let interface = spec.guests.values_mut().next().unwrap().interface.as_mut();
    interface.unwrap().ways.v4 = Some(1);
    let error = HostSpec::parse(&serde_json::to_vec(&spec).unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guests.one.interface.ways: only the host agent says them"
    );
}

fn host() -> HostSpec {
    let interface = |address: &str| InterfaceSpec {
        addresses: vec![address.parse().unwrap()],
        ..InterfaceSpec::default()
    };
    let config = |listen: &str, address: &str| GuestConfig {
        memory_mib: 96,
        vcpus: 1,
        data_mib: 64,
        image: Image {
            kernel: "k".into(),
            initramfs: "i".into(),
            root: "r".into(),
            agent: "a".into(),
            digest: "d".into(),
        },
        services: guest().services,
        forwards: vec![Forward {
            name: Name::parse("postgres").unwrap(),
            service: None,
            listen: listen.parse().unwrap(),
            port: 5432,
            translated: None,
        }],
        restart: Restart::default(),
        interface: Some(interface(address)),
        tailscale: None,
    };
    let name = |text| Name::parse(text).unwrap();
    HostSpec {
        version: VERSION,
        guests: BTreeMap::from([
            (name("one"), config("127.0.0.1:1", "10.0.0.2/24")),
            (name("two"), config("127.0.0.1:2", "10.0.0.3/24")),
        ]),
        network: Some(HostNetwork {
            namespace: Namespace::Auto,
            addresses: vec!["10.0.0.1/24".parse().unwrap()],
            uplink: Uplink::None,
            vpn: Vpn::Follow,
            isolated: false,
        }),
    }
}

/// What is said of a changed host spec; the unchanged one is good.
fn said(change: impl FnOnce(&mut HostSpec, &mut GuestConfig)) -> String {
    let mut spec = host();
    let two = Name::parse("two").unwrap();
    let mut config = spec.guests.remove(&two).unwrap();
    change(&mut spec, &mut config);
    spec.guests.insert(two, config);
    let parsed = HostSpec::parse(&serde_json::to_vec(&spec).unwrap());
    parsed.map_or_else(|error| error.to_string(), |read| format!("{}", read == spec))
}

#[test]
fn a_host_spec_is_checked_whole_and_limits_are_within() {
    assert_eq!(said(|_, _| {}), "true");
    assert_eq!(
        said(|_, two| (two.memory_mib, two.vcpus, two.data_mib) = (1 << 20, 64, 16 << 20)),
        "true"
    );
    let limits = Limits {
        memory_max_mib: Some(1 << 20),
        cpu_percent: Some(6_400),
        pids_max: Some(1 << 22),
    };
    assert_eq!(said(|_, two| two.services[0].limits = Some(limits)), "true");
    assert_eq!(
        said(|_, two| two.memory_mib = 95),
        "guests.two.memory_mib: 95 is not from 96 to 1048576"
    );
    assert!(said(|_, two| two.data_mib = (16 << 20) + 1).contains("data_mib"));
}

#[test]
fn addresses_belong_to_one_guest_of_the_network() {
    let at = |address: &'static str| {
        said(move |_, two| two.interface.as_mut().unwrap().addresses = vec![address.parse().unwrap()])
    };
    let key = "guests.two.interface.addresses: ";
    assert_eq!(
        at("10.0.1.3/24"),
        format!("{key}10.0.1.3/24 is not in 10.0.0.0/24")
    );
    assert_eq!(
        at("10.0.0.3/16"),
        format!("{key}10.0.0.3/16 is not in 10.0.0.0/24")
    );
    assert_eq!(at("10.0.0.1/24"), format!("{key}10.0.0.1 is the host's own"));
    assert_eq!(at("10.0.0.2/24"), format!("{key}10.0.0.2 is guest one's as well"));
    assert_eq!(
        said(|spec, _| spec.network = None),
        "guests.one.interface.addresses: there is no network"
    );
}

#[test]
fn a_forward_leads_from_its_own_port_to_a_service() {
    let two = "guests.two.forwards: ";
    assert_eq!(
        said(|_, two| two.forwards[0].port = 0),
        format!("{two}port 0 cannot be forwarded")
    );
    assert_eq!(
        said(|_, two| two.forwards[0].listen.set_port(0)),
        format!("{two}port 0 cannot be forwarded")
    );
    assert_eq!(
        said(|_, two| two.forwards[0].listen.set_port(1)),
        format!("{two}127.0.0.1:1 is also forwarded to guest one")
    );
    assert!(said(|_, two| two.forwards[0].name = Name::parse("web").unwrap()).contains("no service web"));
}

#[test]
fn a_setting_has_the_name_of_one() {
    let set = |key: &str| {
        let settings = BTreeMap::from([(key.to_owned(), "1".to_owned())]);
        said(|_, two| two.services[0].kind = ServiceKind::Postgres { settings, port: 5432 })
    };
    assert_eq!(set("auto_explain.log_min_duration"), "true");
    for bad in ["", "a b", "a=b\nc"] {
        assert!(set(bad).contains("not one line"), "{bad:?}");
    }
}

#[test]
fn a_network_has_one_subnet_of_each_family_and_guests_are_in_theirs() {
    let both = |spec: &mut HostSpec| {
        let network = spec.network.as_mut().unwrap();
        network.addresses = vec!["10.0.0.1/24".parse().unwrap(), "fd00:5::1/64".parse().unwrap()];
    };
    let second = |two: &mut GuestConfig, address: &str, gateway: &str| {
        let interface = two.interface.as_mut().unwrap();
        interface.addresses.push(address.parse().unwrap());
        interface.gateways = vec!["10.0.0.1".parse().unwrap(), gateway.parse().unwrap()];
    };
    assert_eq!(
        said(|spec, two| {
            both(spec);
            second(two, "fd00:5::2/64", "fd00:5::1");
        }),
        "true"
    );
    for (address, problem) in [
        (
            "fd00:6::2/64",
            "fd00:6::2/64 is not in 10.0.0.0/24 and fd00:5::/64",
        ),
        (
            "fd00:5::2/48",
            "fd00:5::2/48 is not in 10.0.0.0/24 and fd00:5::/64",
        ),
        ("fd00:5::1/64", "fd00:5::1 is the host's own"),
    ] {
        let said = said(|spec, two| {
            both(spec);
            let interface = two.interface.as_mut().unwrap();
            interface.addresses.push(address.parse().unwrap());
        });
        assert!(said.contains(problem), "{said}");
    }
    let twice = said(|spec, _| {
        let network = spec.network.as_mut().unwrap();
        network.addresses.push("10.0.1.1/24".parse().unwrap());
    });
    assert_eq!(
        twice,
        "network.address: 10.0.0.1 and 10.0.1.1 are both IPv4: one of each family is taken"
    );
    let none = said(|spec, _| spec.network.as_mut().unwrap().addresses.clear());
    assert!(none.contains("network.address: there is no address"), "{none}");
}

/// Documents of one family are the bytes that they were.
#[test]
fn one_address_is_written_as_it_always_was() {
    let network = serde_json::to_string(&host().network).unwrap();
    assert_eq!(network, r#"{"namespace":"auto","address":"10.0.0.1/24"}"#);
    let interface = InterfaceSpec {
        addresses: vec!["10.0.0.2/24".parse().unwrap()],
        gateways: vec!["10.0.0.1".parse().unwrap()],
        ..InterfaceSpec::default()
    };
    let text = r#"{"addresses":["10.0.0.2/24"],"gateway":"10.0.0.1","dns":[],"mtu":null}"#;
    assert_eq!(serde_json::to_string(&interface).unwrap(), text);
    let without = InterfaceSpec {
        gateways: Vec::new(),
        ..interface
    };
    assert!(
        serde_json::to_string(&without)
            .unwrap()
            .contains(r#""gateway":null"#)
    );
}
