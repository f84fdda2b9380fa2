//! Connections that the kernel remembers and that lead where nothing is any more.
//!
//! A translation is decided by the first packet of a connection. UDP has no end: a client that goes on asking keeps
//! its entry alive, and is sent where the forward led before. So the entries go when a forward or a guest's address
//! changes, and those of guests when the way out does ([`Former`]). TCP ends by itself and is left alone, unless it began
//! without the translation that it needs ([`Gap`]).

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use sovereign_protocol::port::Transport;
use sovereign_reconcile::filter::{Filter, PortForward};

use super::former::Former;
use super::gap::Gap;
use super::nft::NftError;
use super::nft::attributes::{Fields, Malformed, Message};
use super::nft::socket::{Question, Refusal, Requests};

/// NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW, _GET, _DELETE.
const NEW: u16 = 1 << 8;
const GET: u16 = 1 << 8 | 1;
const DELETE: u16 = 1 << 8 | 2;
/// CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_ID, CTA_ZONE.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const ID: u16 = 12;
const ZONE: u16 = 18;
const NESTED: u16 = 0x8000;
/// IPS_SRC_NAT, IPS_DST_NAT.
const SOURCE_TRANSLATED: u32 = 1 << 4;
const DESTINATION_TRANSLATED: u32 = 1 << 5;
/// What is removed at once; a second call goes on.
const ENTRIES: usize = 1 << 16;

/// What changed, so that entries of it are stale.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stale {
    /// Forwards that came, went or lead elsewhere. Those of TCP are of no interest.
    pub forwards: BTreeSet<PortForward>,
    /// Addresses that guests had or got.
    pub guests: BTreeSet<IpAddr>,
    /// What could begin untranslated.
    pub gap: Gap,
    /// What guests left by.
    pub former: Former,
}

impl Stale {
    /// What is stale after a filter took the place of another one, or of an unknown one.
    #[must_use]
    pub fn between(before: Option<&Filter>, after: Option<&Filter>) -> Self {
        let forwards = |filter: Option<&Filter>| filter.map(|f| f.forwards.clone()).unwrap_or_default();
        let guests = |filter: Option<&Filter>| -> BTreeSet<IpAddr> {
            let senders = filter.into_iter().flat_map(|filter| filter.senders.values());
            senders
                .flat_map(|sender| sender.addresses.iter().copied())
                .collect()
        };
        Self {
            forwards: &forwards(before) ^ &forwards(after),
            guests: &guests(before) ^ &guests(after),
            ..Self::default()
        }
    }

    /// Whether an entry may lead to the wrong place now.
    #[must_use]
    pub fn has(&self, entry: &Entry) -> bool {
        self.gap.has(entry) || self.former.has(entry) || self.leads_elsewhere(entry)
    }

    fn leads_elsewhere(&self, entry: &Entry) -> bool {
        if entry.transport != Transport::Udp.number() {
            return false;
        }
        // A flow that only left under this host's address asked another machine's port.
        let is_ours = !entry.is_masqueraded();
        let to_port = |forward: &&PortForward| {
            forward.transport == Transport::Udp
                && (forward.ports.first()..=forward.ports.last()).contains(&entry.port)
                && forward.to.is_ipv4() == entry.destination.is_ipv4()
                && forward.listen.is_none_or(|listen| listen == entry.destination)
        };
        let ends = [entry.source, entry.destination, entry.answers_from];
        is_ours && self.forwards.iter().any(|forward| to_port(&forward))
            || ends.iter().any(|end| self.guests.contains(end))
    }

    /// Takes another change in.
    pub(super) fn add(&mut self, more: Self) {
        self.forwards.extend(more.forwards);
        self.guests.extend(more.guests);
        self.gap.add(more.gap);
        self.former.add(more.former);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.guests.is_empty()
            && self.gap.is_empty()
            && self.former.is_empty()
            && !self
                .forwards
                .iter()
                .any(|forward| forward.transport == Transport::Udp)
    }
}

/// One connection as the kernel remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The transport protocol's number.
    pub transport: u8,
    /// Who opened it.
    pub source: IpAddr,
    /// Whom it was opened to, before any translation.
    pub destination: IpAddr,
    /// The port it was opened to, before any translation; 0 for protocols without ports.
    pub port: u16,
    /// Who answers: the destination after translation.
    pub answers_from: IpAddr,
    /// Whom it answers: the source after translation.
    pub answers_to: IpAddr,
    /// IPS_*.
    pub status: u32,
    /// The kernel's own words for it, to remove just this one.
    key: Key,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    family: u8,
    original: Vec<u8>,
    id: Option<Vec<u8>>,
    zone: Option<Vec<u8>>,
}

impl Entry {
    /// Whether either of its ends was changed on the way.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.status & (SOURCE_TRANSLATED | DESTINATION_TRANSLATED) != 0
    }

    /// Whether only who opened it was changed: it leaves under this host's address.
    #[must_use]
    pub fn is_masqueraded(&self) -> bool {
        self.status & (SOURCE_TRANSLATED | DESTINATION_TRANSLATED) == SOURCE_TRANSLATED
    }

    /// Reads one; `None` for anything else.
    fn read(message: &Message<'_>) -> Result<Option<Self>, Malformed> {
        if message.kind != NEW {
            return Ok(None);
        }
        let (family, attributes) = message.netfilter()?;
        let mut fields = Fields::<19>::read(attributes)?;
        let original = fields.bytes(ORIGINAL).ok_or(Malformed)?;
        let (Some(there), Some(back)) = (
            Tuple::read(original)?,
            Tuple::read(fields.bytes(REPLY).ok_or(Malformed)?)?,
        ) else {
            return Ok(None); // neither IPv4 nor IPv6
        };
        Ok(Some(Self {
            transport: there.transport,
            source: there.source,
            destination: there.destination,
            port: there.port,
            answers_from: back.source,
            answers_to: back.destination,
            status: fields.u32(STATUS).unwrap_or_default(),
            key: Key {
                family,
                original: original.to_vec(),
                id: fields.bytes(ID).map(<[u8]>::to_vec),
                zone: fields.bytes(ZONE).map(<[u8]>::to_vec),
            },
        }))
    }
}

/// One way of a connection.
struct Tuple {
    source: IpAddr,
    destination: IpAddr,
    transport: u8,
    port: u16,
}

impl Tuple {
    fn read(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut fields = Fields::<3>::read(bytes)?;
        let mut ip = Fields::<5>::read(fields.bytes(1).ok_or(Malformed)?)?;
        let mut protocol = Fields::<4>::read(fields.bytes(2).ok_or(Malformed)?)?;
        let mut address = |four: u16, six: u16| {
            let four = ip.bytes(four).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
            let six = ip.bytes(six).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
            let four = four.map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
            four.or(six.map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))))
        };
        let Some((source, destination)) = address(1, 3).zip(address(2, 4)) else {
            return Ok(None);
        };
        let port = protocol
            .bytes(3)
            .and_then(|bytes| <[u8; 2]>::try_from(bytes).ok());
        Ok(Some(Self {
            source,
            destination,
            transport: protocol.u8(1).ok_or(Malformed)?,
            port: port.map(u16::from_be_bytes).unwrap_or_default(),
        }))
    }
}

/// Why entries could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// The kernel refused; on one without connection tracking there is nothing to remove.
    #[error("the kernel refused to {0} connections")]
    Refused(&'static str, #[source] io::Error),
    /// No complete answer: the socket is not to be used again.
    #[error("connections could not be looked at")]
    Socket(#[source] NftError),
}

/// Connection tracking of a namespace.
pub struct Conntrack {
    requests: Requests,
}

impl Conntrack {
    /// Speaks over a socket (NETLINK_NETFILTER) that was opened in the namespace and not bound. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's own.
    pub fn over(socket: OwnedFd) -> io::Result<Self> {
        let requests = Requests::over(socket)?;
        Ok(Self { requests })
    }

    /// Removes what is stale; how many entries that were, at most 65,536 in one call.
    ///
    /// # Errors
    /// [`ConntrackError`]; some may be removed.
    pub async fn flush(&mut self, what: &Stale) -> Result<usize, ConntrackError> {
        if what.is_empty() {
            return Ok(0);
        }
        let mut stale = Vec::new();
        let take = |message: &Message<'_>| {
            let entry = Entry::read(message)?;
            if let Some(entry) = entry.filter(|entry| stale.len() < ENTRIES && what.has(entry)) {
                stale.push(entry.key);
            }
            Ok(())
        };
        let all = Question {
            kind: GET,
            family: 0,
            attributes: &[],
        };
        let dumped = self.requests.dump(all, take).await;
        let dumped = dumped.map_err(ConntrackError::Socket)?;
        dumped.map_err(|refusal| refused("list", &refusal))?;
        let mut removed = 0;
        for key in stale {
            let mut attributes = vec![(ORIGINAL | NESTED, &key.original[..])];
            attributes.extend(key.id.as_deref().map(|id| (ID, id)));
            attributes.extend(key.zone.as_deref().map(|zone| (ZONE, zone)));
            let one = Question {
                kind: DELETE,
                family: key.family,
                attributes: &attributes,
            };
            let outcome = self.requests.change(one).await;
            match outcome.map_err(ConntrackError::Socket)? {
                Ok(()) => removed += 1,
                Err(refusal) if refusal.errno == Errno::NOENT => {} // it ended meanwhile
                Err(refusal) => return Err(refused("remove", &refusal)),
            }
        }
        Ok(removed)
    }
}

fn refused(what: &'static str, refusal: &Refusal) -> ConntrackError {
    ConntrackError::Refused(what, refusal.errno.into())
}

/// The reader as a plain function for the fuzz workspace.
#[cfg(feature = "fuzz")]
pub(super) fn fuzz(data: &[u8]) {
    for message in super::nft::attributes::messages(data) {
        let Ok(message) = message else { return };
        if let Ok(Some(entry)) = Entry::read(&message) {
            let stale = Stale {
                guests: [entry.answers_from].into(),
                ..Stale::default()
            };
            assert_eq!(stale.has(&entry), entry.transport == Transport::Udp.number());
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use sovereign_protocol::port::Ports;
    use sovereign_protocol::subnet::Subnet;
    use sovereign_reconcile::filter::WayOut;
    use sovereign_reconcile::names::LinkName;

    use super::super::nft::attributes::messages;
    use super::*;

    /// What a kernel 6.18 told of six connections (`golden/remake-conntrack.sh`), a datagram on each line.
    const TOLD: &str = include_str!("nft/golden/conntrack.told");

    pub(in crate::net) fn entries() -> Vec<Entry> {
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        let bytes: Vec<u8> = TOLD
            .lines()
            .flat_map(|line| line.as_bytes().chunks(2).map(byte).collect::<Vec<_>>())
            .collect();
        let all = messages(&bytes).map(|message| Entry::read(&message.unwrap()).unwrap());
        all.flatten().collect()
    }

    fn forward(transport: Transport, listen: Option<&str>, ports: &str, to: &str) -> PortForward {
        PortForward {
            transport,
            listen: listen.map(|text| text.parse().unwrap()),
            ports: Ports::parse(ports).unwrap(),
            to: to.parse().unwrap(),
            to_port: 53,
        }
    }

    /// The destinations and ports of what a forward or a guest makes stale.
    fn stale(forwards: &[PortForward], guests: &[&str]) -> Vec<String> {
        let stale = Stale {
            forwards: forwards.iter().cloned().collect(),
            guests: guests.iter().map(|text| text.parse().unwrap()).collect(),
            ..Stale::default()
        };
        let mut found: Vec<_> = entries()
            .iter()
            .filter(|entry| stale.has(entry))
            .map(|entry| format!("{} {} {}", entry.source, entry.destination, entry.port))
            .collect();
        found.sort();
        found
    }

    #[test]
    fn entries_are_read_as_the_kernel_tells_them() {
        let mut seen: Vec<_> = entries()
            .iter()
            .map(|entry| {
                let Entry {
                    transport,
                    source,
                    destination,
                    port,
                    answers_from,
                    status,
                    ..
                } = entry;
                let translated = status & (SOURCE_TRANSLATED | DESTINATION_TRANSLATED);
                format!("{transport} {source} {destination} {port} {answers_from} {translated}")
            })
            .collect();
        seen.sort();
        assert_eq!(
            seen,
            [
                "17 10.9.0.2 192.0.2.2 5300 192.0.2.2 16",
                "17 192.0.2.2 192.0.2.1 5300 10.9.0.2 32",
                "17 192.0.2.2 192.0.2.1 5301 192.0.2.1 0",
                "17 fd00:8::2 fd00:8::1 5300 fd00:9::2 32",
                "6 192.0.2.2 192.0.2.1 5300 10.9.0.2 32",
            ]
        );
    }

    pub(in crate::net) fn filter(forwards: &[PortForward], way_out: WayOut) -> Filter {
        Filter {
            tag: "sv".to_owned(),
            bridge: LinkName::parse("svb").unwrap(),
            subnets: [Subnet::parse("192.0.2.0/30").unwrap()].into(),
            way_out,
            forwards: forwards.iter().cloned().collect(),
            answers: BTreeMap::new(),
            senders: BTreeMap::new(),
        }
    }

    /// The connections of a gap in a filter, by where they went.
    fn gap(forwards: &[PortForward], way_out: WayOut, own: &[&str]) -> Vec<String> {
        let gap = Gap::of(
            &filter(forwards, way_out),
            own.iter().map(|ip| ip.parse().unwrap()).collect(),
        );
        let entries = entries();
        let mut found: Vec<_> = entries
            .iter()
            .filter(|entry| gap.has(entry))
            .map(|entry| format!("{} {} {}", entry.source, entry.destination, entry.port))
            .collect();
        found.sort();
        found
    }

    #[test]
    fn what_began_in_a_gap_is_what_was_meant_for_a_forward_or_left_and_was_not_translated() {
        use Transport::{Tcp, Udp};
        let taken = "192.0.2.2 192.0.2.1 5301";
        let udp = [forward(Udp, None, "5299-5301", "10.9.0.3")];
        let none = WayOut::None;
        assert_eq!(gap(&udp, none, &["192.0.2.1"]), [taken], "5300 was translated");
        assert!(
            gap(&udp, none, &["192.0.2.9"]).is_empty(),
            "another machine's port"
        );
        assert!(gap(&[forward(Tcp, None, "5301", "10.9.0.3")], none, &["192.0.2.1"]).is_empty());
        let elsewhere = [forward(Udp, Some("192.0.2.9"), "5301", "10.9.0.3")];
        assert!(gap(&elsewhere, none, &["192.0.2.1"]).is_empty());
        assert!(
            gap(&[], WayOut::Masquerade, &[]).is_empty(),
            "from guest to guest"
        );
        assert!(gap(&[], none, &[]).is_empty());
    }

    #[test]
    fn a_guest_that_left_under_its_own_address_begins_anew_unless_it_spoke_to_this_host() {
        let beyond: IpAddr = "198.51.100.9".parse().unwrap();
        let mut left = entries();
        left.retain(|entry| !entry.is_translated());
        let [entry] = &mut left[..] else {
            panic!("{left:?}")
        };
        entry.destination = beyond;
        let has = |way_out, own: &[IpAddr]| {
            Gap::of(&filter(&[], way_out), own.iter().copied().collect()).has(entry)
        };
        assert!(has(WayOut::Masquerade, &[]));
        assert!(!has(WayOut::Masquerade, &[beyond]));
        assert!(!has(WayOut::None, &[]), "nobody would have translated it");
    }

    #[test]
    fn only_udp_that_a_forward_or_a_guest_meant_is_stale() {
        use Transport::{Tcp, Udp};
        let old = "192.0.2.2 192.0.2.1 5300";
        // Not the guest's own question to another machine's port 5300, not TCP, not the other family.
        assert_eq!(stale(&[forward(Udp, None, "5300", "10.9.0.3")], &[]), [old]);
        assert_eq!(
            stale(&[forward(Udp, None, "5300", "fd00:9::3")], &[]),
            ["fd00:8::2 fd00:8::1 5300"]
        );
        // A forward that is new takes over what a program here was asked.
        let taken = "192.0.2.2 192.0.2.1 5301";
        assert_eq!(
            stale(&[forward(Udp, None, "5299-5301", "10.9.0.3")], &[]),
            [old, taken]
        );
        assert_eq!(
            stale(&[forward(Udp, Some("192.0.2.1"), "5300", "10.9.0.3")], &[]),
            [old]
        );
        assert!(stale(&[forward(Udp, Some("192.0.2.9"), "5300", "10.9.0.3")], &[]).is_empty());
        assert!(stale(&[forward(Tcp, None, "5300", "10.9.0.3")], &[]).is_empty());
        assert_eq!(stale(&[], &["10.9.0.2"]), ["10.9.0.2 192.0.2.2 5300", old]);
        assert!(stale(&[], &["10.9.0.3"]).is_empty());
    }
}
