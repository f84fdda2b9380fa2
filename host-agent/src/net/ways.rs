//! By which way guests leave now: asks the kernel where the main table decides, and keeps on disk what guests were told. Of
//! a private network that is the way of the machine's own packets (`outside.rs`).
//!
//! What is a move is decided in `reconcile::way`; here are its looks, its clock and its file.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;
use sovereign_protocol::ways::Ways;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::uplink::Exit;
use sovereign_reconcile::way::{Hop, ToldWays, Way};

use super::kernel::{Kernel, KernelError};
use super::observed::Observed;
use super::wanted::{NetworkSpec, Wanted};
use crate::clock::wall_ns;
use crate::files;

/// Where nobody is (RFC 5737, RFC 3849): the kernel is asked how a packet would go there, and none is sent.
const ELSEWHERE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// The file beside that of the switches which keeps what guests were told.
pub(super) const WAYS: &str = "ways.json";

/// What guests were told, and its file.
#[derive(Debug)]
pub(super) struct Teller {
    record: PathBuf,
    told: ToldWays,
    /// What was told since this agent began.
    said: Ways,
}

impl Teller {
    /// Goes on where the record ends. One that cannot be read is begun anew: guests then hear a greater number, and take
    /// the way for another one.
    pub(super) fn open(record: PathBuf) -> Self {
        let told = files::read_optional(&record).and_then(|text| {
            let told = text.map(|text| serde_json::from_slice(&text)).transpose();
            Ok(told?.unwrap_or_default())
        });
        let told = told.unwrap_or_else(|error| {
            let error = format!("{error:#}");
            tracing::warn!(error, "what guests were told of their way out is not known");
            ToldWays::default()
        });
        Self {
            record,
            told,
            said: Ways::default(),
        }
    }

    /// Takes a look in; what is news to guests. It is on disk before.
    pub(super) fn look(&mut self, now: BTreeMap<Family, Way>, now_ms: u64) -> Option<Ways> {
        if self.told.look(now, now_ms, wall_s()) {
            self.keep();
        }
        let ways = self.told.ways();
        (ways != self.said).then(|| {
            self.said = ways;
            ways
        })
    }

    /// What was opened until now is dead, although the way looks the same; told at the next look.
    pub(super) fn renew(&mut self) {
        self.told.renew(wall_s());
        self.keep();
    }

    fn keep(&self) {
        let kept = serde_json::to_vec(&self.told).map_err(anyhow::Error::from);
        let kept = kept.and_then(|text| files::replace(&self.record, &text));
        if let Err(error) = kept {
            // The next number is greater in any case, but an agent that starts now would tell of a move again.
            let error = format!("{error:#}");
            tracing::warn!(error, "what guests are told of their way out is not kept");
        }
    }

    /// The ways that guests were told of.
    pub(super) fn told(&self) -> BTreeMap<Family, Way> {
        self.told.told()
    }

    /// When it is to be looked again although nothing happens.
    pub(super) fn due_ms(&self) -> Option<u64> {
        self.told.due_ms()
    }

    /// Forgets everything, as nobody is left who was told.
    ///
    /// # Errors
    /// With the path.
    pub(super) fn forget(self) -> anyhow::Result<()> {
        files::remove(&self.record)
    }
}

/// Seconds since 1970.
fn wall_s() -> u64 {
    u64::try_from(wall_ns() / 1_000_000_000).unwrap_or(0)
}

/// The ways that there are.
///
/// # Errors
/// When the socket is of no use any more. A kernel that does not answer the question leaves it to the routes that were seen.
pub(super) async fn ways(
    kernel: &mut Kernel,
    observed: &Observed,
    wanted: &Wanted,
    spec: &NetworkSpec,
) -> Result<BTreeMap<Family, Way>, KernelError> {
    let mut ways = BTreeMap::new();
    for (family, exit) in &wanted.exits {
        let answer = match exit {
            Exit::Main(_) => ask(kernel, *family, observed, wanted, spec).await?,
            Exit::None(_) | Exit::Table(..) | Exit::Own(..) => Answer::Unknown,
        };
        let way = match answer {
            Answer::Shut => None,
            Answer::Hop(hop) => Way::of(observed, *family, exit, Some(hop)),
            Answer::Unknown => Way::of(observed, *family, exit, None),
        };
        ways.extend(way.map(|way| (*family, way)));
    }
    Ok(ways)
}

/// The ways of guests of a private network, who leave by those of the machine around it where something leads them there.
pub(super) fn led_out_by(wanted: &Wanted, mut own: BTreeMap<Family, Way>) -> BTreeMap<Family, Way> {
    own.retain(|family, _| wanted.exits.get(family).is_some_and(|exit| exit.link().is_some()));
    own
}

/// What a kernel says of a packet to elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// It goes there.
    Hop(Hop),
    /// It does not leave, or there is nobody whose packet could.
    Shut,
    /// Nothing that is understood.
    Unknown,
}

/// How a guest's packet to elsewhere would go: rules and routes of VPNs are in the answer, which no default route shows.
async fn ask(
    kernel: &mut Kernel,
    family: Family,
    observed: &Observed,
    wanted: &Wanted,
    spec: &NetworkSpec,
) -> Result<Answer, KernelError> {
    let bridge = wanted.bridge.as_ref();
    let bridge = bridge.and_then(|bridge| observed.link(bridge.name.as_str()));
    let mut guests = spec.guests.values().flatten();
    let guest = guests.find(|address| Family::of(**address) == family);
    let (Some(bridge), Some(guest)) = (bridge, guest) else {
        return Ok(Answer::Shut);
    };
    asked(kernel, family, Some((*guest, bridge.index))).await
}

/// The ways that packets of the machine's own take, in the namespace that `kernel` speaks to.
///
/// # Errors
/// As [`ways`].
pub(super) async fn own_ways(
    kernel: &mut Kernel,
    observed: &Observed,
) -> Result<BTreeMap<Family, Way>, KernelError> {
    let mut ways = BTreeMap::new();
    for family in Family::BOTH {
        let way = match asked(kernel, family, None).await? {
            Answer::Shut => None,
            Answer::Hop(hop) => Way::of_machine(observed, family, Some(hop)),
            Answer::Unknown => Way::of_machine(observed, family, None),
        };
        ways.extend(way.map(|way| (family, way)));
    }
    Ok(ways)
}

/// What the kernel says of a packet to elsewhere: of its own, or from an address behind a link.
async fn asked(
    kernel: &mut Kernel,
    family: Family,
    from: Option<(IpAddr, u32)>,
) -> Result<Answer, KernelError> {
    let Some(question) = question(family, from) else {
        return Ok(Answer::Unknown);
    };
    match kernel.get(question).await {
        Ok(RouteNetlinkMessage::NewRoute(answer)) => Ok(understood(&answer)),
        Err(error) if !error.socket_lives() => Err(error),
        Err(error) if is_no(&error, from.is_some()) => Ok(Answer::Shut),
        Ok(_) | Err(_) => Ok(Answer::Unknown),
    }
}

/// No route, forwarding is off, or a rule or route that says no. A blackhole says EINVAL, which to a question of somebody
/// else's packet also means that he may not send it.
fn is_no(error: &KernelError, of_guest: bool) -> bool {
    let noes = [Errno::NETUNREACH, Errno::HOSTUNREACH, Errno::ACCESS];
    noes.iter().any(|no| error.is(*no)) || (!of_guest && error.is(Errno::INVAL))
}

fn question(family: Family, from: Option<(IpAddr, u32)>) -> Option<RouteNetlinkMessage> {
    let elsewhere = ELSEWHERE.iter().filter_map(|text| text.parse::<IpAddr>().ok());
    let elsewhere = elsewhere.into_iter().find(|ip| Family::of(*ip) == family)?;
    let mut message = RouteMessage::default();
    let (address_family, bits) = match family {
        Family::V4 => (AddressFamily::Inet, 32),
        Family::V6 => (AddressFamily::Inet6, 128),
    };
    message.header.address_family = address_family;
    message.header.destination_prefix_length = bits;
    message.attributes = vec![RouteAttribute::Destination(route_address(elsewhere))];
    if let Some((guest, bridge)) = from {
        message.header.source_prefix_length = bits;
        let from = [
            RouteAttribute::Source(route_address(guest)),
            RouteAttribute::Iif(bridge),
        ];
        message.attributes.extend(from);
    }
    Some(RouteNetlinkMessage::GetRoute(message))
}

fn route_address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

/// IPv6 answers with the route itself where that one says no (`unreachable default`), by way of `lo`.
fn understood(answer: &RouteMessage) -> Answer {
    match answer.header.kind {
        RouteType::Unicast => hop(answer).map_or(Answer::Unknown, Answer::Hop),
        RouteType::Unreachable | RouteType::Prohibit | RouteType::BlackHole => Answer::Shut,
        _ => Answer::Unknown,
    }
}

fn hop(answer: &RouteMessage) -> Option<Hop> {
    let mut hop = Hop {
        link: 0,
        gateway: None,
        source: None,
    };
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => hop.source = Some(IpAddr::V4(*ip)),
            RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => hop.source = Some(IpAddr::V6(*ip)),
            RouteAttribute::Oif(index) => hop.link = *index,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => hop.gateway = Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => hop.gateway = Some(IpAddr::V6(*ip)),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => hop.gateway = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    (hop.link != 0).then_some(hop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_reconcile::names::LinkName;

    fn way(link: &str) -> BTreeMap<Family, Way> {
        let way = Way {
            link: LinkName::parse(link).unwrap(),
            gateway: None,
            sources: ["10.0.0.2".parse().unwrap()].into(),
        };
        [(Family::V4, way)].into()
    }

    #[test]
    fn what_was_told_outlives_the_teller_and_ends_with_the_network() {
        let directory = tempfile::tempdir().unwrap();
        let record = directory.path().join("ways.json");
        let mut teller = Teller::open(record.clone());
        assert_eq!(teller.look(way("a"), 0), None);
        let told = teller.look(way("a"), 1_000).unwrap();
        assert!(told.v4.is_some() && told.v6.is_none());
        assert_eq!(teller.look(way("a"), 2_000), None, "it was told");

        let mut next = Teller::open(record.clone());
        assert_eq!(next.look(way("b"), 0), Some(told), "the same, and at once");
        let moved = next.look(way("b"), 1_000).unwrap();
        assert!(moved.v4 > told.v4);

        std::fs::write(&record, "{").unwrap();
        let mut lost = Teller::open(record.clone());
        assert_eq!(lost.look(way("b"), 0), None);
        assert!(lost.look(way("b"), 1_000).unwrap().v4 >= told.v4);
        lost.forget().unwrap();
        assert!(!record.exists());
    }

    #[test]
    fn an_answer_is_a_hop_only_where_packets_go_on() {
        let answer = |kind, link| {
            let mut answer = RouteMessage::default();
            answer.header.kind = kind;
            let ip = |text: &str| RouteAddress::Inet6(text.parse().unwrap());
            answer.attributes = vec![
                RouteAttribute::Oif(link),
                RouteAttribute::Gateway(ip("fe80::1")),
                RouteAttribute::PrefSource(ip("2001:db8::2")),
            ];
            understood(&answer)
        };
        let hop = Hop {
            link: 2,
            gateway: Some("fe80::1".parse().unwrap()),
            source: Some("2001:db8::2".parse().unwrap()),
        };
        assert_eq!(answer(RouteType::Unicast, 2), Answer::Hop(hop));
        assert_eq!(answer(RouteType::Unicast, 0), Answer::Unknown);
        for no in [RouteType::Unreachable, RouteType::Prohibit, RouteType::BlackHole] {
            assert_eq!(answer(no, 1), Answer::Shut, "{no:?}");
        }
        assert_eq!(answer(RouteType::Local, 1), Answer::Unknown, "elsewhere is here");
    }

    /// A disk that is full keeps nobody from being told.
    #[test]
    fn what_cannot_be_kept_is_told() {
        let mut teller = Teller::open("/dev/null/nowhere/ways.json".into());
        assert_eq!(teller.look(way("a"), 0), None);
        assert!(teller.look(way("a"), 1_000).is_some());
    }
}
