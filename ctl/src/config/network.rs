//! What the file means for the network: namespace, subnet, and each guest's interface.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::domain::Domain;
use sovereign_protocol::interface::{InterfaceSpec, Prefix};
use sovereign_protocol::limits::{NAME_SERVERS, SEARCH};
use sovereign_protocol::link_name::LinkName;
use sovereign_protocol::name::Name;
use sovereign_protocol::one_or_more;
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
    let addresses = addresses_of(source, written)?;
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
        addresses,
        uplink: uplink(source, written, namespace)?,
        vpn,
        isolated: written.isolated.unwrap_or_default(),
    }))
}

/// The host's own, one of each family.
fn addresses_of(source: &Source<'_>, written: &Network) -> Result<Vec<HostAddress>, Box<Problem>> {
    let problem = |reason, text: String| {
        let problem = source.problem(&["network", "address"], reason, text);
        problem.accepts(keys::HOST_ADDRESS.accepted())
    };
    let words = match &written.address {
        Some(written) => written.words(),
        None => vec![keys::HOST_ADDRESS.default()],
    };
    if words.is_empty() {
        return Err(problem("BadAddress", "an empty list holds no address".to_owned()));
    }
    let parse =
        |text: &str| HostAddress::parse(text).map_err(|error| problem("BadAddress", error.to_string()));
    let addresses = words.into_iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    one_or_more::one_of_each_family(addresses.iter().map(HostAddress::ip))
        .map_err(|text| problem("Contradiction", text))?;
    Ok(addresses)
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

/// Each guest's interface, with an address of each of the network's families; those that it has none of in the file are
/// chosen.
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
        let Some(address) = &guest.address else { continue };
        let own = own_addresses(source, key, network, &address.words())?;
        if let Some(ip) = own.iter().find(|ip| taken.contains(*ip)) {
            let text = format!("{ip} is another guest's as well");
            return Err(source
                .problem(&["guest", key, "address"], "Contradiction", text)
                .accepts("an address of its own, or no value"));
        }
        taken.extend(own.iter().copied());
        written.insert(name, own);
    }
    let Some(network) = network else {
        return Ok(BTreeMap::new());
    };
    let told = told(source, written_network)?;
    let mut interfaces = BTreeMap::new();
    for (key, guest) in guests {
        let name = parse_name(source, &["guest", key], key)?;
        let own = written.remove(&name).unwrap_or_default();
        let mut prefixes = Vec::new();
        for host in &network.addresses {
            let ip = match own.iter().find(|ip| host.subnet().contains(**ip)) {
                Some(ip) => *ip,
                None => addresses::choose(*host, &name, &taken).ok_or_else(|| {
                    let problem = format!("{} has no address left for guest {name}", host.subnet());
                    source
                        .problem(&["network", "address"], "SubnetFull", problem)
                        .accepts("a larger subnet")
                })?,
            };
            taken.insert(ip);
            prefixes.extend(Prefix::new(ip, host.prefix()));
        }
        interfaces.insert(
            name,
            interface(source, key, network, prefixes, (&guest.dns, &told))?,
        );
    }
    Ok(interfaces)
}

/// The addresses that the file gives a guest.
fn own_addresses(
    source: &Source<'_>,
    key: &str,
    network: Option<&HostNetwork>,
    words: &[&str],
) -> Result<Vec<IpAddr>, Box<Problem>> {
    let at = ["guest", key, "address"];
    let Some(network) = network else {
        let problem = "there is no network: namespace is \"none\"";
        return Err(source
            .problem(&at, "Contradiction", problem)
            .accepts("no value, or another [network] namespace"));
    };
    let mut own = Vec::new();
    for text in words {
        let fits = |ip: &IpAddr| {
            let host = network.around(*ip);
            host.is_some_and(|host| host.subnet().host(*ip).is_ok() && *ip != host.ip())
        };
        let Some(ip) = text.parse().ok().filter(fits) else {
            let problem = format!("{text:?} is no guest's address in {}", network.subnets());
            return Err(source
                .problem(&at, "BadAddress", problem)
                .accepts(format!("an address in {}", network.subnets())));
        };
        own.push(ip);
    }
    one_or_more::one_of_each_family(own.iter().copied()).map_err(|text| {
        source
            .problem(&at, "Contradiction", text)
            .accepts(keys::ADDRESS.accepted())
    })?;
    Ok(own)
}

fn interface(
    source: &Source<'_>,
    key: &str,
    network: &HostNetwork,
    addresses: Vec<Prefix>,
    (own, told): (&[String], &Told),
) -> Result<InterfaceSpec, Box<Problem>> {
    let own = servers(source, &["guest", key, "dns"], own, &keys::DNS)?;
    Ok(InterfaceSpec {
        addresses,
        gateways: network.addresses.iter().map(HostAddress::ip).collect(),
        dns: if own.is_empty() { told.dns.clone() } else { own },
        search: told.search.clone(),
        mtu: told.mtu,
        ..InterfaceSpec::default()
    })
}
