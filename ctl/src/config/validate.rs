//! What the file means: units, names, limits and contradictions, each problem at its place.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::spec::{
    Forward, HostSpec, Image, Restart, RestartWhen, Service, ServiceKind, SpecError, TailscaleSpec,
    Translated,
};

use super::source::Source;
use super::written::{self, Written};
use super::{Guest, Problem, Settings, keys, limits, mesh, network, values};

/// A test reads every default by the form of its key.
const HAS_DEFAULT: &str = "the key has a default that fits";

/// What [`keys::PORT`] says of ports that are not written.
const POSTGRES_PORT: u16 = 5432;
/// See [`POSTGRES_PORT`].
const MINIFLUX_PORT: u16 = 8080;

/// Lines of postgresql.conf that would take PostgreSQL out of the agent's sight.
const OWNED_SETTINGS: [&str; 6] = [
    "port",
    "data_directory",
    "hba_file",
    "ident_file",
    "unix_socket_directories",
    "external_pid_file",
];

pub(super) fn settings(source: &Source<'_>, written: Written) -> Result<Settings, Box<Problem>> {
    let recipe = written.build.recipe.as_deref();
    let known = ("UnknownRecipe", "recipe");
    let recipe = values::choice(source, &["build", "recipe"], recipe, &keys::IMAGE, known)?;
    let addresses = [
        ("mirror", &written.build.mirror, &keys::MIRROR),
        ("snapshot", &written.build.snapshot, &keys::SNAPSHOT),
    ];
    for (name, address, key) in addresses {
        if let Some(address) = address
            .as_deref()
            .filter(|address| !address.starts_with("http://"))
        {
            let text =
                format!("{address:?} is no such address (packages are checked by signature, not by TLS)");
            return Err(source
                .problem(&["build", name], "BadMirror", text)
                .accepts(key.accepted()));
        }
    }
    let network = network::settings(source, &written.network)?;
    let mut interfaces = network::interfaces(source, &written.network, network.as_ref(), &written.guest)?;
    let mut guests = BTreeMap::new();
    for (name, guest) in written.guest {
        let parsed = parse_name(source, &["guest", &name], &name)?;
        let mut guest = self::guest(source, &name, guest)?;
        guest.interface = interfaces.remove(&parsed);
        guests.insert(parsed, guest);
    }
    if guests.is_empty() {
        return Err(source
            .problem(&["guest"], "NoGuest", "no guest is configured")
            .accepts("at least one [guest.NAME]"));
    }
    let settings = Settings {
        path: source.file().to_owned(),
        mirror: written.build.mirror,
        snapshot: written.build.snapshot,
        recipe: recipe.to_owned(),
        network,
        guests,
    };
    check_services(source, &settings)?;
    check_listens(source, &settings)?;
    check_contract(source, &settings)?;
    Ok(settings)
}

fn guest(source: &Source<'_>, name: &str, written: written::Guest) -> Result<Guest, Box<Problem>> {
    let at = ["guest", name];
    let path = |key: &'static str| [at[0], name, key];
    let memory = written.memory.as_deref();
    let memory_mib = values::size(source, &path("memory"), memory, &keys::MEMORY)?;
    let data_mib = values::size(source, &path("data"), written.data.as_deref(), &keys::DATA)?;
    let vcpus = values::count(source, &path("vcpus"), written.vcpus, &keys::CPUS)?;
    let mut services = Vec::new();
    for (service, written) in written.service {
        services.push(self::service(source, name, &service, written)?);
    }
    let mut forwards = Vec::new();
    for (index, written) in written.forward.into_iter().enumerate() {
        let forward = forward(source, name, &index.to_string(), written, &services)?;
        if forwards.iter().any(|other: &Forward| other.name == forward.name) {
            let path = [at[0], name, "forward", &index.to_string(), "name"];
            let text = format!("another forward of {name} is named {} already", forward.name);
            return Err(source
                .problem(&path, "Contradiction", text)
                .accepts("a name of its own for each forward, with `service` beside it"));
        }
        forwards.push(forward);
    }
    Ok(Guest {
        memory_mib: memory_mib.expect(HAS_DEFAULT),
        vcpus: vcpus.expect(HAS_DEFAULT),
        data_mib: data_mib.expect(HAS_DEFAULT),
        services,
        forwards,
        restart: Restart {
            when: restart(source, name, written.restart.as_deref())?,
            wedged: written.restart_wedged.unwrap_or(false),
        },
        interface: None,
        tailscale: written.tailscale.map(|_| TailscaleSpec {}),
    })
}

fn restart(source: &Source<'_>, guest: &str, written: Option<&str>) -> Result<RestartWhen, Box<Problem>> {
    let known = ("UnknownPolicy", "restart policy");
    let word = values::choice(
        source,
        &["guest", guest, "restart"],
        written,
        &keys::RESTART,
        known,
    )?;
    Ok(match word {
        "always" => RestartWhen::Always,
        "never" => RestartWhen::Never,
        _ => RestartWhen::OnFailure,
    })
}

fn service(
    source: &Source<'_>,
    guest: &str,
    key: &str,
    written: written::Service,
) -> Result<Service, Box<Problem>> {
    let at = |last: &'static str| ["guest", guest, "service", key, last];
    let name = parse_name(source, &["guest", guest, "service", key], key)?;
    let known = ("UnknownKind", "kind of service");
    let kind = values::choice(source, &at("kind"), Some(&written.kind), &keys::KIND, known)?;
    let port = values::count(source, &at("port"), written.port, &keys::PORT)?;
    let requires = mesh::requires(source, &at("requires"), written.requires.as_deref())?;
    if let Some(setting) = written.settings.keys().next().filter(|_| kind == "miniflux") {
        let path = ["guest", guest, "service", key, "settings", setting];
        let problem = source.problem(&path, "OwnedSetting", "Miniflux has no settings here");
        return Err(problem.accepts("no value"));
    }
    let mut settings = BTreeMap::new();
    for (setting, value) in written.settings {
        let path = ["guest", guest, "service", key, "settings", &setting];
        if OWNED_SETTINGS.contains(&setting.as_str()) {
            let problem = source.problem(&path, "OwnedSetting", "the guest agent sets this itself");
            let accepted = if setting == "port" {
                "the service's own key, port = …"
            } else {
                "no value"
            };
            return Err(problem.accepts(accepted));
        }
        settings.insert(setting.clone(), setting_value(source, &path, value)?);
    }
    let kind = match kind {
        "miniflux" => ServiceKind::Miniflux {
            port: port.unwrap_or(MINIFLUX_PORT),
        },
        _ => ServiceKind::Postgres {
            settings,
            port: port.unwrap_or(POSTGRES_PORT),
        },
    };
    Ok(Service {
        name,
        kind,
        requires,
        limits: limits::of(
            source,
            &["guest", guest, "service", key, "limits"],
            written.limits,
        )?,
    })
}

fn setting_value(source: &Source<'_>, path: &[&str], value: toml::Value) -> Result<String, Box<Problem>> {
    match value {
        toml::Value::String(text) if !text.contains(['\n', '\r', '\0']) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(if flag { "on" } else { "off" }.to_owned()),
        _ => Err(source
            .problem(path, "WrongType", "this is not one line of postgresql.conf")
            .accepts("text of one line, a number, true or false")),
    }
}

fn forward(
    source: &Source<'_>,
    guest: &str,
    index: &str,
    written: written::Forward,
    services: &[Service],
) -> Result<Forward, Box<Problem>> {
    let at = |last: &'static str| ["guest", guest, "forward", index, last];
    let name = parse_name(source, &at("name"), &written.name)?;
    let (key, wanted) = match &written.service {
        Some(service) => ("service", service),
        None => ("name", &written.name),
    };
    let Some(service) = services.iter().find(|service| service.name.as_str() == wanted) else {
        let known: Vec<&str> = services.iter().map(|service| service.name.as_str()).collect();
        let text = format!("guest {guest} has no service {wanted:?}");
        let problem = source
            .problem(&at(key), "NoSuchService", text)
            .near(wanted, &known);
        return Err(problem.accepts(match (known.as_slice(), key) {
            ([], _) => "none: add a service first".to_owned(),
            (known, "service") => known.join(", "),
            (known, _) => format!("{}, or any name beside `service = …`", known.join(", ")),
        }));
    };
    let (listen, more) = listens(&written.listen).ok_or_else(|| {
        source
            .problem(
                &at("listen"),
                "BadAddress",
                format!("{:?} is no address to listen on", written.listen),
            )
            .accepts(keys::FORWARD_LISTEN.accepted())
    })?;
    let (known, word) = (("UnknownWay", "way"), written.via.as_deref());
    let via = values::choice(source, &at("via"), word, &keys::FORWARD_VIA, known)?;
    let (known, word) = (("UnknownProtocol", "protocol"), written.protocol.as_deref());
    let transport = match values::choice(source, &at("protocol"), word, &keys::FORWARD_PROTOCOL, known)? {
        "udp" => Transport::Udp,
        _ => Transport::Tcp,
    };
    let translated = (via == "kernel").then_some(Translated { transport, more });
    if translated.is_none() && (more > 0 || transport == Transport::Udp) {
        let key = if more > 0 { "listen" } else { "protocol" };
        let text = "vsock carries single TCP ports only";
        return Err(source
            .problem(&at(key), "Contradiction", text)
            .accepts("via = \"kernel\" beside it"));
    }
    if listen.port() == 0 {
        return Err(source
            .problem(&at("listen"), "OutOfRange", "port 0 cannot be forwarded")
            .accepts("a port from 1 to 65535"));
    }
    let own = service.kind.port();
    let port = values::count(source, &at("port"), written.port, &keys::FORWARD_PORT)?.unwrap_or(own);
    if port != own {
        let text = format!(
            "port {port} contradicts service {}, which listens on {own}",
            service.name
        );
        return Err(source
            .problem(&at("port"), "Contradiction", text)
            .accepts(format!("{own}, or leave the key out")));
    }
    Ok(Forward {
        service: (service.name != name).then(|| service.name.clone()),
        name,
        listen,
        port,
        translated,
    })
}

/// `ADDRESS:PORT` or `ADDRESS:FIRST-LAST`: the first, and how many follow.
fn listens(text: &str) -> Option<(SocketAddr, u16)> {
    if let Ok(one) = text.parse() {
        return Some((one, 0));
    }
    let (address, ports) = text.rsplit_once(':')?;
    let ports = Ports::parse(ports).ok()?;
    let first: SocketAddr = format!("{address}:{}", ports.first()).parse().ok()?;
    Some((first, ports.span()))
}

pub(super) fn parse_name(source: &Source<'_>, path: &[&str], text: &str) -> Result<Name, Box<Problem>> {
    Name::parse(text).map_err(|error| source.problem(path, "BadName", error.to_string()))
}

/// Each image holds the programs of one kind of service, and the guest's agent runs one.
fn check_services(source: &Source<'_>, settings: &Settings) -> Result<(), Box<Problem>> {
    for (name, guest) in &settings.guests {
        if let [_, second, ..] = guest.services.as_slice() {
            let path = ["guest", name.as_str(), "service", second.name.as_str()];
            let text = format!("guest {name} has a service already, and a guest runs one");
            return Err(source
                .problem(&path, "Contradiction", text)
                .accepts("a guest of its own for each service"));
        }
    }
    Ok(())
}

fn check_listens(source: &Source<'_>, settings: &Settings) -> Result<(), Box<Problem>> {
    let mut taken: Vec<(&Name, &Forward)> = Vec::new();
    for (name, guest) in &settings.guests {
        for (index, forward) in guest.forwards.iter().enumerate() {
            let collides = taken.iter().find(|(_, other)| other.collides(forward));
            if let Some((other, _)) = collides {
                let path = ["guest", name.as_str(), "forward", &index.to_string(), "listen"];
                let text = format!("{} leads to guest {other} already", forward.listens());
                return Err(source
                    .problem(&path, "Contradiction", text)
                    .accepts("an address of its own for each forward"));
            }
            taken.push((name, forward));
        }
    }
    Ok(())
}

/// Runs the contract's own checks, so that the file and the agent can never disagree about a limit.
fn check_contract(source: &Source<'_>, settings: &Settings) -> Result<(), Box<Problem>> {
    match contract(settings) {
        Ok(()) => Ok(()),
        Err(SpecError::Value { path, problem }) => Err(at_written_path(source, settings, &path, problem)),
        Err(error) => Err(source.problem(&[], "Invalid", error.to_string())),
    }
}

/// What the host agent would say of all guests of a configuration, whatever image they boot.
///
/// # Errors
/// Its first objection.
pub(crate) fn contract(settings: &Settings) -> Result<(), SpecError> {
    let image = Image {
        kernel: "/".into(),
        initramfs: "/".into(),
        root: "/".into(),
        agent: "/".into(),
        digest: String::new(),
    };
    let all: BTreeSet<Name> = settings.guests.keys().cloned().collect();
    let document = serde_json::to_vec(&settings.host_spec(&image.into(), Some(&all)));
    HostSpec::parse(&document.map_err(SpecError::Unreadable)?).map(drop)
}

/// Leads a path of the contract, `guests.sql.memory_mib`, back to the key as written.
fn at_written_path(source: &Source<'_>, settings: &Settings, path: &str, problem: String) -> Box<Problem> {
    let mut parts = path.split(['.', '[']).skip(1);
    let guest = parts.next().unwrap_or_default();
    let key = match parts.next().unwrap_or_default() {
        "memory_mib" => "memory",
        "data_mib" => "data",
        "services" => "service",
        "forwards" => "forward",
        other => other,
    };
    let index = parts
        .next()
        .and_then(|part| part.trim_end_matches(']').parse::<usize>().ok());
    let service = index.and_then(|index| {
        let guest = settings.guests.iter().find(|(name, _)| name.as_str() == guest)?.1;
        Some(guest.services.get(index)?.name.as_str())
    });
    let mut written = vec!["guest", guest, key];
    if let (true, Some(service)) = (path.ends_with("].requires"), service) {
        written.extend([service, "requires"]);
        return mesh::objection(source, settings, &written, problem);
    }
    if key == "service" {
        let below = index.map(|_| "settings");
        written.extend(service.into_iter().chain(below));
    }
    let unit = if matches!(key, "memory" | "data") {
        " (MiB)"
    } else {
        ""
    };
    source.problem(&written, "OutOfRange", format!("{problem}{unit}"))
}
