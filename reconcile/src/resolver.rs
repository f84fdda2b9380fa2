//! Which name servers guests ask, from what this host asks itself. Pure.
//!
//! A server on the host's loopback is nothing to a guest. systemd-resolved keeps those that it asks beside its own
//! address; else, where pasta leads out, pasta asks the loopback's for its guests.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};
use sovereign_protocol::domain::Domain;
use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::limits::{NAME_SERVERS, SEARCH};

/// Where pasta answers for name servers of the host's loopback. The first is of 192.0.0.0/29 (RFC 7335), the second of
/// the unique local network that pasta's link has.
pub const FORWARDER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 3);
/// See [`FORWARDER_V4`].
pub const FORWARDER_V6: Ipv6Addr = Ipv6Addr::new(0xfdc0, 0x5d1e, 0x7a93, 0, 0, 0, 0, 3);
/// Name servers and domains that are kept of one file; resolvers read no more than a few.
const KEPT: usize = 16;
/// Bytes of a file that are read.
pub const FILE_BYTES: u64 = 64 << 10;

/// What a resolv.conf says, as far as a guest may need it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvConf {
    /// In their order, each once; those with a scope are left out, as it is a link of this host.
    pub servers: Vec<IpAddr>,
    /// In their order.
    pub search: Vec<Domain>,
}

impl ResolvConf {
    /// Reads one as resolv.conf(5) says: a keyword at the begin of its line; of `search` and `domain` the last one counts.
    /// What makes no sense is passed over, as resolvers do.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Self {
        let mut conf = Self::default();
        for line in bytes.split(|byte| *byte == b'\n') {
            let Ok(line) = std::str::from_utf8(line) else {
                continue;
            };
            let mut words = line.split_ascii_whitespace();
            match line.split_ascii_whitespace().next() {
                Some(keyword) if !line.starts_with(keyword) => {} // resolvers take none that is indented
                Some("nameserver") => {
                    let server = words.nth(1).and_then(|word| word.parse::<IpAddr>().ok());
                    let server = server.map(|server| server.to_canonical());
                    let server = server.filter(|server| !conf.servers.contains(server));
                    conf.servers.extend(server.filter(|_| conf.servers.len() < KEPT));
                }
                Some("search" | "domain") => {
                    let domains = words.skip(1).filter_map(|word| Domain::parse(word).ok());
                    conf.search = domains.take(KEPT).collect();
                }
                _ => {}
            }
        }
        conf
    }
}

/// What this host asks itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostResolver {
    /// Its resolv.conf; `None` when it cannot be read.
    pub own: Option<ResolvConf>,
    /// That in which systemd-resolved keeps the servers that it asks, where it runs.
    pub upstream: Option<ResolvConf>,
}

/// By which way guests reach a name server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By none.
    None,
    /// As this host does.
    Host,
    /// By pasta, which can ask for them on this host's loopback.
    Pasta,
}

/// What guests are told where their configuration says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Advice {
    /// Name servers, of both families.
    pub servers: Vec<IpAddr>,
    /// The search list.
    pub search: Vec<Domain>,
    /// Servers of this host's loopback that pasta is to ask for them.
    pub forwarded: BTreeSet<IpAddr>,
}

/// Why guests have no name server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoResolver {
    /// Nothing can be read.
    #[error("this host's resolv.conf cannot be read")]
    NoFile,
    /// Nothing in it.
    #[error("this host's resolv.conf names no server")]
    NoServer,
    /// Only what guests cannot reach.
    #[error("this host asks {0} only, which no guest reaches; give guests one with network.dns")]
    OnlyHere(IpAddr),
}

/// Whether another host may reach it under this address.
fn is_reachable(server: &IpAddr) -> bool {
    let linked = match server {
        IpAddr::V4(four) => four.is_link_local() || four.is_broadcast(),
        IpAddr::V6(six) => six.is_unicast_link_local(),
    };
    !(linked || server.is_loopback() || server.is_unspecified() || server.is_multicast())
}

/// What guests are told.
///
/// # Errors
/// [`NoResolver`], where they have a way out and no server to ask by it.
pub fn advise(host: &HostResolver, way: Way) -> Result<Advice, NoResolver> {
    if way == Way::None {
        return Ok(Advice::default());
    }
    let own = host.own.as_ref().ok_or(NoResolver::NoFile)?;
    let search = match (&own.search[..], &host.upstream) {
        ([], Some(upstream)) => upstream.search.clone(),
        (search, _) => search.to_vec(),
    };
    let advice = |servers| Advice {
        servers,
        search: search.clone(),
        forwarded: BTreeSet::new(),
    };
    for conf in [Some(own), host.upstream.as_ref()].into_iter().flatten() {
        let servers: Vec<IpAddr> = conf.servers.iter().copied().filter(is_reachable).collect();
        if !servers.is_empty() {
            return Ok(advice(servers));
        }
    }
    let first = *own.servers.first().ok_or(NoResolver::NoServer)?;
    let here: BTreeSet<IpAddr> = own.servers.iter().copied().filter(IpAddr::is_loopback).collect();
    if way == Way::Host || here.is_empty() {
        return Err(NoResolver::OnlyHere(first));
    }
    let forwarders = [IpAddr::V4(FORWARDER_V4), IpAddr::V6(FORWARDER_V6)];
    let answers = |forwarder: &IpAddr| here.iter().any(|own| own.is_ipv4() == forwarder.is_ipv4());
    Ok(Advice {
        forwarded: here.clone(),
        ..advice(forwarders.into_iter().filter(answers).collect())
    })
}

/// A guest's interface with everything that its configuration leaves to this host; `mtu` is what fits through the way out.
#[must_use]
pub fn complete(interface: &InterfaceSpec, advice: &Advice, mtu: u32) -> InterfaceSpec {
    let speaks = |server: &&IpAddr| {
        let mut own = interface.addresses.iter();
        own.any(|address| address.address().is_ipv4() == server.is_ipv4())
    };
    let mut complete = interface.clone();
    if complete.dns.is_empty() {
        let servers = advice.servers.iter().filter(speaks);
        complete.dns = servers.take(NAME_SERVERS).copied().collect();
    }
    if complete.search.is_empty() {
        complete.search = advice.search.iter().take(SEARCH).cloned().collect();
    }
    complete.mtu.get_or_insert(mtu);
    complete
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn conf(text: &str) -> ResolvConf {
        ResolvConf::parse(text.as_bytes())
    }

    fn shown(advice: Result<Advice, NoResolver>) -> String {
        match advice {
            Ok(advice) => {
                let join = |words: Vec<String>| words.join(",");
                let servers = join(advice.servers.iter().map(ToString::to_string).collect());
                let search = join(advice.search.iter().map(ToString::to_string).collect());
                let forwarded = join(advice.forwarded.iter().map(ToString::to_string).collect());
                format!("{servers}|{search}|{forwarded}")
            }
            Err(why) => format!("{why:?}"),
        }
    }

    #[test]
    fn a_file_is_read_as_resolvers_read_it() {
        let text = "# nameserver 1.1.1.1\n; nameserver 1.1.1.2\n nameserver 1.1.1.3\nnameserver 9.9.9.9 trailing\n\
                    nameserver 9.9.9.9\nnameserver fe80::1%eth0\nnameserver\nnameserver 1.1.1\nnameserver\tfd00::53\n\
                    search one.example two.example.\ndomain last.example\noptions ndots:2\nnameservers 8.8.8.8\n";
        let read = conf(text);
        let servers: Vec<String> = read.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["9.9.9.9", "fd00::53"]);
        assert_eq!(read.search, [Domain::parse("last.example").unwrap()]);
        assert_eq!(conf("search a.example ../etc b.example").search.len(), 2);
        assert_eq!(conf("search a.example\nsearch .").search, []);
        assert_eq!(
            ResolvConf::parse(b"nameserver 9.9.9.9\nsearch \xff\xfe\n\0")
                .servers
                .len(),
            1
        );
        let many: String = (1..99).map(|n| format!("nameserver 10.0.0.{n}\n")).collect();
        assert_eq!(conf(&many).servers.len(), KEPT);
    }

    #[test]
    fn guests_ask_what_they_can_reach() {
        let stub = "nameserver 127.0.0.53\nsearch lan.example\n";
        let dead = "nameserver 127.0.0.1\nnameserver ::1\n";
        let cases = [
            (Way::None, Some("nameserver 9.9.9.9"), None, "||"),
            (Way::None, None, None, "||"),
            (
                Way::Host,
                Some("nameserver 9.9.9.9\nnameserver 127.0.0.1"),
                None,
                "9.9.9.9||",
            ),
            (
                Way::Pasta,
                Some("nameserver 127.0.0.1\nnameserver 9.9.9.9"),
                None,
                "9.9.9.9||",
            ),
            (
                Way::Host,
                Some(stub),
                Some("nameserver 10.0.0.1"),
                "10.0.0.1|lan.example|",
            ),
            (
                Way::Pasta,
                Some(stub),
                Some("nameserver 10.0.0.1"),
                "10.0.0.1|lan.example|",
            ),
            (
                Way::Host,
                Some("nameserver 127.0.0.53"),
                Some("nameserver 10.0.0.1\nsearch up.example"),
                "10.0.0.1|up.example|",
            ),
            (Way::Host, Some(stub), None, "OnlyHere(127.0.0.53)"),
            (
                Way::Host,
                Some(stub),
                Some("nameserver 127.0.0.53"),
                "OnlyHere(127.0.0.53)",
            ),
            (Way::Pasta, Some(stub), None, "192.0.0.3|lan.example|127.0.0.53"),
            (
                Way::Pasta,
                Some(dead),
                None,
                "192.0.0.3,fdc0:5d1e:7a93::3||127.0.0.1,::1",
            ),
            (
                Way::Pasta,
                Some("nameserver 169.254.1.1"),
                None,
                "OnlyHere(169.254.1.1)",
            ),
            (
                Way::Host,
                Some("nameserver ::ffff:127.0.0.1"),
                None,
                "OnlyHere(127.0.0.1)",
            ),
            (Way::Host, Some("nameserver 0.0.0.0"), None, "OnlyHere(0.0.0.0)"),
            (Way::Host, Some("search lan.example"), None, "NoServer"),
            (Way::Pasta, None, Some("nameserver 10.0.0.1"), "NoFile"),
        ];
        for (way, own, upstream, expected) in cases {
            let host = HostResolver {
                own: own.map(conf),
                upstream: upstream.map(conf),
            };
            assert_eq!(shown(advise(&host, way)), expected, "{way:?} {host:?}");
        }
    }

    #[test]
    fn what_is_configured_stays_and_the_rest_is_filled_in() {
        let interface = |text: &str| serde_json::from_str::<InterfaceSpec>(text).unwrap();
        let advice = Advice {
            servers: ["9.9.9.9", "fd00::1", "10.0.0.1", "10.0.0.2", "10.0.0.3"]
                .map(|ip| ip.parse().unwrap())
                .to_vec(),
            search: vec![Domain::parse("lan.example").unwrap()],
            ..Advice::default()
        };
        let four = complete(&interface(r#"{"addresses":["10.9.0.2/24"]}"#), &advice, 1400);
        let servers: Vec<String> = four.dns.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["9.9.9.9", "10.0.0.1", "10.0.0.2"]);
        assert_eq!((four.search.len(), four.mtu), (1, Some(1400)));
        assert_eq!(four.check(), Ok(()));
        let six = complete(&interface(r#"{"addresses":["fd00::2/64"]}"#), &advice, 1500);
        assert_eq!(six.dns, [IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 1])]);
        let text = r#"{"addresses":["10.9.0.2/24"],"dns":["10.9.0.1"],"search":["own.example"],"mtu":1300}"#;
        assert_eq!(complete(&interface(text), &advice, 1400), interface(text));
    }

    proptest! {
        #[test]
        fn no_bytes_harm(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let own = Some(ResolvConf::parse(&bytes));
            for way in [Way::Host, Way::Pasta] {
                let host = HostResolver { own: own.clone(), upstream: own.clone() };
                if let Ok(advice) = advise(&host, way) {
                    prop_assert!(advice.servers.iter().all(is_reachable));
                }
            }
        }
    }
}
