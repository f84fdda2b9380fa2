//! The packet filter of a network, by whichever program of the kernel works: nf_tables, else iptables, else none.
//!
//! It knows what is there of ours, makes it as wanted, and hears of others' changes where the kernel tells of them: of
//! nf_tables, but not of x_tables, which has to be looked at again.

use std::collections::BTreeMap;
use std::io;

use rustix::fd::OwnedFd;
use sovereign_reconcile::conflict::{Conflict, Part};
use sovereign_reconcile::filter::{Filter, PortForward};
use tokio::time::Instant;

use super::chain;
use super::iptables::{self, IptablesError};
use super::nft::{Nft, NftError, Ownership};

mod by_chains;
pub(super) mod by_tables;

use by_chains::Chains;
use by_tables::Tables;

/// How what is said of a filter begins when nothing enforces it; the reason follows.
pub const UNFILTERED: &str = "none: ";

/// Which back end is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first that works.
    #[default]
    Auto,
    /// nf_tables without ownership.
    PlainNft,
    /// iptables.
    Iptables,
}

/// Why the filter was not looked at or not made as wanted.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilterError {
    /// nf_tables refused.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// It cannot be said in nf_tables.
    #[error(transparent)]
    NoTables(#[from] sovereign_reconcile::nft::FilterError),
    /// iptables refused.
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    /// It cannot be said in iptables.
    #[error(transparent)]
    NoChains(#[from] sovereign_reconcile::iptables::TagError),
}

impl FilterError {
    /// Whether the sockets may be used again.
    pub(super) fn socket_lives(&self) -> bool {
        !matches!(self, Self::Nft(error) if !error.socket_lives())
    }
}

/// The packet filter of one namespace, for one instance.
pub(super) enum Enforcer {
    Tables(Box<Tables>),
    Chains(Chains),
    /// Nothing works, for this reason.
    None(String),
}

impl Enforcer {
    /// Finds the back end that works in the namespace of the two sockets (NETLINK_NETFILTER); `programs` says where
    /// iptables may be run, if it may.
    pub(super) async fn open(
        sockets: Option<(OwnedFd, OwnedFd)>,
        receive_buffer: usize,
        tag: &str,
        choice: Choice,
        programs: Option<iptables::Namespace<'_>>,
    ) -> io::Result<Self> {
        let Some((requests, events)) = sockets else {
            return Ok(Self::None(
                "nobody opened its sockets in this namespace".to_owned(),
            ));
        };
        if choice == Choice::Iptables {
            return Ok(Self::by_programs(tag, programs, "").await);
        }
        let mut nft = Nft::over(requests, events, receive_buffer, tag)?;
        Ok(match nft.probe().await {
            Ok(mut able) => {
                if choice == Choice::PlainNft {
                    able.ownership = Ownership::Plain;
                }
                Self::Tables(Box::new(Tables::of(nft, able).await))
            }
            Err(why) => Self::by_programs(tag, programs, &format!("{}; ", chain(&why))).await,
        })
    }

    async fn by_programs(tag: &str, programs: Option<iptables::Namespace<'_>>, before: &str) -> Self {
        let Some(namespace) = programs else {
            return Self::None(format!("{before}iptables is not used in a private namespace"));
        };
        match iptables::probe(namespace).await {
            Ok(found) => {
                let whys: Vec<String> = found.failures.iter().map(|why| chain(why)).collect();
                match found.working.into_iter().next() {
                    Some(programs) => Self::Chains(Chains::of(programs, tag)),
                    None => Self::None(format!("{before}{}", whys.join("; "))),
                }
            }
            Err(error) => Self::None(format!("{before}{}", chain(&error))),
        }
    }

    /// Which back end it is, for status.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Tables(tables) => tables.name().to_owned(),
            Self::Chains(chains) => chains.name().to_owned(),
            Self::None(why) => format!("{UNFILTERED}{why}"),
        }
    }

    /// Whether nothing works.
    pub(super) fn is_none(&self) -> bool {
        matches!(self, Self::None(_))
    }

    /// Waits for news, or until it is to be looked at without any; for ever where there are none. Cancel safe.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        match self {
            Self::Tables(tables) => tables.wait().await,
            Self::Chains(chains) => {
                chains.wait().await;
                Ok(())
            }
            Self::None(_) => std::future::pending().await,
        }
    }

    /// Takes the news; who changed something of ours, if somebody did.
    pub(super) async fn take(&mut self) -> Result<Option<String>, FilterError> {
        match self {
            Self::Tables(tables) => tables.take().await,
            Self::Chains(_) | Self::None(_) => Ok(None),
        }
    }

    /// When it has to be looked at again after something else changed, where the kernel tells of nothing.
    pub(super) fn due(&self) -> Option<Instant> {
        match self {
            Self::Chains(chains) => Some(chains.due()),
            Self::Tables(_) | Self::None(_) => None,
        }
    }

    /// Looks at what is there of ours.
    pub(super) async fn look(&mut self) -> Result<(), FilterError> {
        match self {
            Self::Tables(tables) => tables.look().await,
            Self::Chains(chains) => chains.look().await,
            Self::None(_) => Ok(()),
        }
    }

    /// Whether something is to be done.
    ///
    /// # Errors
    /// What stands in the way.
    pub(super) fn differs(&mut self, filter: Option<&Filter>) -> Result<bool, Conflict> {
        let differs = match self {
            Self::Tables(tables) => tables.differs(filter),
            Self::Chains(chains) => chains.differs(filter),
            Self::None(why) if filter.is_some() => Err(why.clone()),
            Self::None(_) => Ok(false),
        };
        differs.map_err(|evidence| Conflict {
            part: Part::Filter,
            on: "packet filter".to_owned(),
            evidence,
        })
    }

    /// Makes it as wanted, and nothing of it for `None`.
    pub(super) async fn set(&mut self, filter: Option<&Filter>) -> Result<(), FilterError> {
        match self {
            Self::Tables(tables) => tables.set(filter).await,
            Self::Chains(chains) => chains.set(filter).await,
            Self::None(_) => Ok(()), // said by `differs`
        }
    }

    /// The forwards that cannot be made, and why.
    pub(super) fn refused(&self, filter: &Filter) -> BTreeMap<PortForward, String> {
        match self {
            Self::Chains(chains) => chains.refused(filter),
            Self::Tables(_) => by_tables::refused(filter),
            Self::None(_) => BTreeMap::new(), // said of the whole by `differs`
        }
    }

    /// What was asked for and is not done, for status.
    pub(super) fn lacks(&self, filter: Option<&Filter>) -> Vec<String> {
        match self {
            Self::Chains(chains) => chains.lacks(filter),
            Self::Tables(tables) => filter.map(|filter| tables.lacks(filter)).unwrap_or_default(),
            Self::None(_) => Vec::new(),
        }
    }
}
