//! What nf_tables can do here, by doing it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::Subnet;
use sovereign_reconcile::answers::MASK;
use sovereign_reconcile::filter::{Filter, PortForward, Sender, WayOut};
use sovereign_reconcile::names::{LinkName, Mac};
use sovereign_reconcile::nft::{Family, Table, tables};

use super::socket::{NftError, Outcome, Requests};
use super::wire::{Ownership, SUBSYSTEM, Script, What};

/// Why nf_tables is of no use here.
#[derive(Debug, thiserror::Error)]
#[error("nf_tables is of no use here: {what}")]
pub struct Unavailable {
    /// The first thing that did not work.
    pub what: What,
    /// How the kernel refused it; `None` when it did not answer, or took what it should refuse.
    pub errno: Option<i32>,
    /// Why.
    #[source]
    pub source: io::Error,
}

impl Unavailable {
    /// Whether the kernel said that it has no such thing, and not that it cannot now.
    fn lacks(&self) -> bool {
        let lacking = [Errno::OPNOTSUPP, Errno::NOENT, Errno::INVAL];
        lacking
            .iter()
            .any(|errno| self.errno == Some(errno.raw_os_error()))
    }
}

/// What nf_tables can do, where all that we cannot be without works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Able {
    /// Whether a table can be owned and outlive its owner.
    pub ownership: Ownership,
    /// Whether connections have marks (CONFIG_NF_CONNTRACK_MARK).
    pub marks: bool,
}

/// Everything that our tables ever use, with marks and, if that is refused, without them; then what tells whether a table
/// can be owned.
pub(super) async fn probe(requests: &mut Requests, tag: &str) -> Result<Able, Unavailable> {
    let name = format!("{tag}-probe");
    let mut marks = true;
    loop {
        let sample = sample(&name, marks).map_err(|error| no_answer(io::Error::other(error)))?;
        match attempt(requests, &name, &sample, Ownership::Plain).await? {
            None => break,
            Some(refused) if marks && refused.lacks() => marks = false,
            Some(refused) => return Err(refused),
        }
    }
    let one = [Table::new(Family::Inet, &name)];
    let ownership = match attempt(requests, &name, &one, Ownership::Owned).await? {
        None => Ownership::Owned,
        Some(_) => Ownership::Plain,
    };
    Ok(Able { ownership, marks })
}

/// Makes some tables in a batch that cannot succeed: it ends with the removal of one that is not there. So only the
/// refusals of what comes before it say something, and nothing is left.
async fn attempt(
    requests: &mut Requests,
    name: &str,
    tables: &[Table],
    ownership: Ownership,
) -> Result<Option<Unavailable>, Unavailable> {
    let mut script = Script::default();
    let first = requests.next().wrapping_add(1);
    for table in tables {
        script.make(first, table, ownership);
    }
    let impossible = format!("{name}-nowhere");
    script.delete(first, Family::Inet, &impossible);
    let end = What::Table(format!("{} {impossible}", Family::Inet));
    let outcome = requests.batch(script, SUBSYSTEM, None).await;
    let refused = match outcome {
        Ok(Outcome::Refused(refused)) => refused,
        Ok(Outcome::Done | Outcome::Stale) => {
            return Err(no_answer(io::Error::other(
                "a table was removed that was not there",
            )));
        }
        Err(NftError::NoAnswer(Some(error))) => return Err(no_answer(error)),
        Err(error) => return Err(no_answer(io::Error::other(error))),
    };
    let first = refused
        .into_iter()
        .find(|(what, refusal)| *what != end || refusal.errno != Errno::NOENT);
    Ok(first.map(|(what, refusal)| Unavailable {
        what,
        errno: Some(refusal.errno.raw_os_error()),
        source: refusal.errno.into(),
    }))
}

fn no_answer(source: io::Error) -> Unavailable {
    Unavailable {
        what: What::Everything,
        errno: source.raw_os_error(),
        source,
    }
}

/// Tables with every kind of chain and step that our own have.
fn sample(name: &str, marks: bool) -> Result<Vec<Table>, Box<dyn std::error::Error + Send + Sync>> {
    let bridge = LinkName::parse("svprobe").ok_or("no link's name")?;
    let mut filter = Filter {
        tag: name.to_owned(),
        bridge: bridge.clone(),
        subnets: BTreeSet::from([Subnet::parse("10.0.0.0/23")?, Subnet::parse("fd00::/64")?]),
        way_out: WayOut::Masquerade,
        forwards: BTreeSet::new(),
        answers: marks.then(|| (bridge.clone(), MASK)).into_iter().collect(),
        senders: BTreeMap::new(),
    };
    let addresses = [
        IpAddr::from([10, 0, 0, 2]),
        IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 2]),
    ];
    for to in addresses {
        filter.forwards.insert(PortForward {
            transport: Transport::Tcp,
            listen: None,
            ports: Ports::one(80).ok_or("no port")?,
            to,
            to_port: 8080,
        });
    }
    let mac = Mac([2, 0, 0, 0, 0, 1]);
    let addresses = BTreeSet::from(addresses);
    filter.senders.insert(bridge, Sender { mac, addresses });
    let mut made: Vec<Table> = tables(&filter)?.into_iter().collect();
    filter.way_out = WayOut::None;
    for (table, closed) in made.iter_mut().zip(tables(&filter)?) {
        for (name, chain) in closed.chains {
            table.chains.entry(name).or_default().rules.extend(chain.rules);
        }
    }
    Ok(made)
}
