//! What the file means for the network: namespace, subnet, and each guest's interface.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::interface::{InterfaceSpec, Prefix};
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

/// A private namespace leads nowhere.
fn uplink(source: &Source<'_>, written: &Network, namespace: Namespace) -> Result<Uplink, Box<Problem>> {
    let problem = |reason, text: String| source.problem(&["network", "uplink"], reason, text);
    let words = written.uplink.as_ref().map(OneOrMore::words);
    let uplink = match words.as_deref() {
        None if namespace == Namespace::Host => Uplink::Auto,
        None | Some(["none"]) => Uplink::None,
        Some(["auto"]) => Uplink::Auto,
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
    if uplink != Uplink::None && namespace != Namespace::Host {
        let text = "only namespace = \"host\" has a way out".to_owned();
        return Err(problem("Contradiction", text).accepts("no value, \"none\", or namespace = \"host\""));
    }
    Ok(uplink)
}

/// Each guest's interface, with an address of each of the network's families; those that it has none of in the file are
/// chosen.
pub(super) fn interfaces(
    source: &Source<'_>,
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
        interfaces.insert(name, interface(source, key, network, prefixes, &guest.dns)?);
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
    dns: &[String],
) -> Result<InterfaceSpec, Box<Problem>> {
    let servers = dns.iter().map(|text| {
        text.parse().map_err(|_| {
            source
                .problem(
                    &["guest", key, "dns"],
                    "BadAddress",
                    format!("{text:?} is no address"),
                )
                .accepts(keys::DNS.accepted())
        })
    });
    Ok(InterfaceSpec {
        addresses,
        gateways: network.addresses.iter().map(HostAddress::ip).collect(),
        dns: servers.collect::<Result<_, Box<Problem>>>()?,
        mtu: None,
    })
}
