//! What the file means for the network: namespace, subnet, and each guest's interface.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::domain::Domain;
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_protocol::limits::{NAME_SERVERS, SEARCH};
use sovereign_protocol::link_name::LinkName;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{HostNetwork, Namespace, Uplink, Vpn};
use sovereign_protocol::subnet::HostAddress;

use super::Problem;
use super::addresses;
use super::source::Source;
use super::validate::parse_name;
use super::written::{Guest, Network, OneOrMore};
use super::{keys, values};

/// The word for the program that leads out of a private namespace.
const PASTA: &str = "pasta";

/// The network; `None` for `namespace = "none"`.
pub(super) fn settings(source: &Source<'_>, written: &Network) -> Result<Option<HostNetwork>, Box<Problem>> {
    let text = written.address.as_deref().unwrap_or(keys::HOST_ADDRESS.default());
    let address = HostAddress::parse(text).map_err(|error| {
        source
            .problem(&["network", "address"], "BadAddress", error.to_string())
            .accepts(keys::HOST_ADDRESS.accepted())
    })?;
    let (known, word) = (("UnknownNamespace", "namespace"), written.namespace.as_deref());
    let namespace = match values::choice(source, &["network", "namespace"], word, &keys::NAMESPACE, known)? {
        "private" => Namespace::Private,
        "host" => Namespace::Host,
        "none" => return Ok(None),
        _ => Namespace::Auto,
    };
    let (known, word) = (("UnknownPolicy", "VPN policy"), written.vpn.as_deref());
    let vpn = match values::choice(source, &["network", "vpn"], word, &keys::VPN, known)? {
        "block" => Vpn::Block,
        "bypass" => Vpn::Bypass,
        _ => Vpn::Follow,
    };
    Ok(Some(HostNetwork {
        namespace,
        address,
        uplink: uplink(source, written, namespace)?,
        vpn,
        isolated: written.isolated.unwrap_or_default(),
    }))
}

/// A private namespace leads nowhere, or out by pasta, which has one way only.
fn uplink(source: &Source<'_>, written: &Network, namespace: Namespace) -> Result<Uplink, Box<Problem>> {
    let problem = |reason, text: String| source.problem(&["network", "uplink"], reason, text);
    let words = written.uplink.as_ref().map(OneOrMore::words);
    let uplink = match words.as_deref() {
        None if namespace == Namespace::Host => Uplink::Auto,
        None | Some(["none"]) => Uplink::None,
        Some(["auto"]) => Uplink::Auto,
        Some([PASTA]) if namespace != Namespace::Host => Uplink::Auto,
        Some([PASTA]) => {
            let text = "namespace = \"host\" has the machine's own way out, and no pasta".to_owned();
            return Err(
                problem("Contradiction", text).accepts("no value, \"none\", \"auto\" or names of links")
            );
        }
        Some([]) => {
            let text = "an empty list names no link".to_owned();
            return Err(problem("BadUplink", text).accepts(keys::UPLINK.accepted()));
        }
        Some(names) => {
            let name = |word: &&str| {
                LinkName::parse(word).ok_or_else(|| {
                    let text = format!("{word:?} is no name of a link");
                    problem("BadUplink", text).accepts(keys::UPLINK.accepted())
                })
            };
            Uplink::Named(names.iter().map(name).collect::<Result<_, _>>()?)
        }
    };
    if matches!(uplink, Uplink::Named(_)) && namespace != Namespace::Host {
        let text = "a private namespace has none of the machine's links".to_owned();
        return Err(problem("Contradiction", text).accepts("\"pasta\", \"none\", or namespace = \"host\""));
    }
    Ok(uplink)
}

/// What the file says of all guests' interfaces.
struct Told {
    dns: Vec<IpAddr>,
    search: Vec<Domain>,
    mtu: Option<u32>,
}

fn told(source: &Source<'_>, written: &Network) -> Result<Told, Box<Problem>> {
    let at = ["network", "search"];
    let wrong = |text: String| {
        source
            .problem(&at, "BadDomain", text)
            .accepts(keys::SEARCH_LIST.accepted())
    };
    let domain = |text: &String| Domain::parse(text).map_err(|error| wrong(error.to_string()));
    let search: Vec<Domain> = written.search.iter().map(domain).collect::<Result<_, _>>()?;
    if search.len() > SEARCH {
        return Err(wrong(format!("{} domains are more than {SEARCH}", search.len())));
    }
    Ok(Told {
        dns: servers(source, &["network", "dns"], &written.dns, &keys::NETWORK_DNS)?,
        search,
        mtu: values::count(source, &["network", "mtu"], written.mtu, &keys::NETWORK_MTU)?,
    })
}

fn servers(
    source: &Source<'_>,
    at: &[&str],
    written: &[String],
    key: &keys::Key,
) -> Result<Vec<IpAddr>, Box<Problem>> {
    let wrong = |text: String| source.problem(at, "BadAddress", text).accepts(key.accepted());
    let server = |text: &String| text.parse().map_err(|_| wrong(format!("{text:?} is no address")));
    let servers: Vec<IpAddr> = written.iter().map(server).collect::<Result<_, _>>()?;
    if servers.len() > NAME_SERVERS {
        return Err(wrong(format!(
            "{} servers are more than {NAME_SERVERS}",
            servers.len()
        )));
    }
    Ok(servers)
}

/// Each guest's interface; those without an address of their own get one.
pub(super) fn interfaces(
    source: &Source<'_>,
    written_network: &Network,
    network: Option<&HostNetwork>,
    guests: &BTreeMap<String, Guest>,
) -> Result<BTreeMap<Name, InterfaceSpec>, Box<Problem>> {
    let mut taken = BTreeSet::new();
    let mut written = BTreeMap::new();
    for (key, guest) in guests {
        let name = parse_name(source, &["guest", key], key)?;
        let Some(text) = &guest.address else { continue };
        let at = ["guest", key, "address"];
        let Some(network) = network else {
            let problem = "there is no network: namespace is \"none\"";
            return Err(source
                .problem(&at, "Contradiction", problem)
                .accepts("no value, or another [network] namespace"));
        };
        let subnet = network.address.subnet();
        let ip = text
            .parse()
            .ok()
            .filter(|ip| subnet.host(*ip).is_ok() && *ip != network.address.ip());
        let Some(ip) = ip else {
            let problem = format!("{text:?} is no guest's address in {subnet}");
            return Err(source
                .problem(&at, "BadAddress", problem)
                .accepts(format!("an address in {subnet}")));
        };
        if !taken.insert(ip) {
            return Err(source
                .problem(&at, "Contradiction", format!("{ip} is another guest's as well"))
                .accepts("an address of its own, or no value"));
        }
        written.insert(name, ip);
    }
    let Some(network) = network else {
        return Ok(BTreeMap::new());
    };
    let told = told(source, written_network)?;
    let mut interfaces = BTreeMap::new();
    for (key, guest) in guests {
        let name = parse_name(source, &["guest", key], key)?;
        let ip = match written.get(&name) {
            Some(ip) => *ip,
            None => addresses::choose(network.address, &name, &taken).ok_or_else(|| {
                let problem = format!(
                    "{} has no address left for guest {name}",
                    network.address.subnet()
                );
                source
                    .problem(&["network", "address"], "SubnetFull", problem)
                    .accepts("a larger IPv4 subnet, or guest.NAME.address")
            })?,
        };
        taken.insert(ip);
        interfaces.insert(name, interface(source, key, network, ip, (&guest.dns, &told))?);
    }
    Ok(interfaces)
}

fn interface(
    source: &Source<'_>,
    key: &str,
    network: &HostNetwork,
    ip: IpAddr,
    (own, told): (&[String], &Told),
) -> Result<InterfaceSpec, Box<Problem>> {
    let own = servers(source, &["guest", key, "dns"], own, &keys::DNS)?;
    Ok(InterfaceSpec {
        addresses: Prefix::new(ip, network.address.prefix()).into_iter().collect(),
        gateway: Some(network.address.ip()),
        dns: if own.is_empty() { told.dns.clone() } else { own },
        search: told.search.clone(),
        mtu: told.mtu,
        ..InterfaceSpec::default()
    })
}
