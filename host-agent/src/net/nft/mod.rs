//! nf_tables of one namespace, without the program `nft`: our tables read, replaced as a whole, watched.
//!
//! Ours is a table that has our name *and* our mark as its comment; everything else is never touched. A change is
//! one batch for the generation that was looked at: either nothing was changed in between and all of it is done at
//! once, or nothing is.

use std::collections::BTreeSet;
use std::io;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use sovereign_reconcile::nft::{Family, Tables, mark, marked};

pub(crate) mod attributes;
mod expressions;
pub(crate) mod foreign;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod monitor;
mod probe;
pub(crate) mod socket;
#[cfg(test)]
mod tests;
mod wire;

pub use monitor::{Changes, Other};
pub use probe::{Able, Unavailable};
pub use socket::NftError;
pub use wire::{Ownership, What};

use attributes::{Fields, Malformed, Message};
use monitor::Monitor;
use socket::{Outcome, Question, Requests};
use wire::{
    GET_CHAIN, GET_GENERATION, GET_RULE, GET_TABLE, NEW_GENERATION, Reading, SUBSYSTEM, Script, TableHead,
};

/// A look or a change that others overtook is tried again, so many times.
const TRIES: u32 = 16;
/// The families that tables of ours have.
pub const FAMILIES: [Family; 2] = [Family::Inet, Family::Bridge];
/// What is listed of leftovers.
const LEFTOVERS: usize = 4_096;

/// A table that carries our mark, of any instance.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// What packets it sees.
    pub family: Family,
    /// Its name.
    pub name: String,
    /// The tag in its mark.
    pub tag: String,
    /// The port of the socket that owns it and lives; such a table is no leftover.
    pub held: Option<u32>,
}

/// nf_tables of a namespace, for one instance.
pub struct Nft {
    requests: Requests,
    monitor: Monitor,
    tag: String,
    ownership: Ownership,
}

impl Nft {
    /// Speaks for the instance `tag` over two sockets (NETLINK_NETFILTER) that were opened in the namespace and not
    /// bound; `receive_buffer` is for news that nobody has read yet. Tables are [`Ownership::Plain`] until something
    /// else is said. Needs a tokio runtime.
    ///
    /// # Errors
    /// The system's own; `PermissionDenied` without the right to hear of changes, which is that to make them.
    pub fn over(requests: OwnedFd, events: OwnedFd, receive_buffer: usize, tag: &str) -> io::Result<Self> {
        let requests = Requests::over(requests)?;
        let monitor = Monitor::over(events, receive_buffer, tag, requests.port())?;
        Ok(Self {
            requests,
            monitor,
            tag: tag.to_owned(),
            ownership: Ownership::Plain,
        })
    }

    /// Who shall be able to change our tables, from now on; what [`probe`](Self::probe) answered, or less.
    pub fn set_ownership(&mut self, ownership: Ownership) {
        self.ownership = ownership;
    }

    /// By which the kernel knows the socket that makes, and may own, our tables.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.requests.port()
    }

    /// What nf_tables can do here, found by doing all of it in a batch that is refused at its end: no trace is left,
    /// and nobody is told. Loads the kernel's modules where they are missing.
    ///
    /// # Errors
    /// [`Unavailable`], with the first thing it cannot do.
    pub async fn probe(&mut self) -> Result<Able, Unavailable> {
        probe::probe(&mut self.requests, &self.tag).await
    }

    /// Our tables as they are, of one moment. Never asks for other tables' rules or sets.
    ///
    /// # Errors
    /// [`NftError`]; [`NftError::Conflict`] when a table has our name and not our mark.
    pub async fn observe(&mut self) -> Result<Tables, NftError> {
        let all = BTreeSet::from(FAMILIES);
        for _ in 0..TRIES {
            let (generation, heads) = self.heads(&all).await?;
            let mut reading = Reading::new(&self.tag, self.ownership, self.requests.port());
            let mut steady = true;
            for head in &heads {
                steady &= read(&mut self.requests, head, &mut reading).await?;
            }
            if heads.is_empty() || steady && self.heads(&all).await?.0 == generation {
                return Ok(reading.finish());
            }
        }
        Err(NftError::Unsteady(TRIES))
    }

    /// Makes our tables of some families as wanted, all at once: there is no moment without rules. Others' tables stay
    /// as they are, and so do ours of other families. Not cancel safe: it may be done.
    ///
    /// # Errors
    /// [`NftError`]; after any but [`NftError::NoAnswer`] nothing was changed.
    pub async fn replace(&mut self, wanted: &Tables, families: &BTreeSet<Family>) -> Result<(), NftError> {
        self.rewrite(families, |script, first, heads, ownership| {
            for head in heads {
                script.delete(first, head.family, &head.name);
            }
            for table in wanted.iter().filter(|table| families.contains(&table.family)) {
                script.make(first, table, ownership);
            }
        })
        .await
    }

    /// Removes our tables. Not cancel safe: it may be done.
    ///
    /// # Errors
    /// [`NftError`]; after any but [`NftError::NoAnswer`] nothing was changed.
    pub async fn remove(&mut self) -> Result<(), NftError> {
        self.replace(&Tables::new(), &FAMILIES.into()).await
    }

    /// Takes over what a process left that owned our tables and is gone; their rules stay as they are. Does nothing
    /// without [`Ownership::Owned`]. Not cancel safe: it may be done.
    ///
    /// # Errors
    /// [`NftError`]; after any but [`NftError::NoAnswer`] nothing was changed.
    pub async fn adopt(&mut self) -> Result<(), NftError> {
        self.rewrite(&FAMILIES.into(), |script, first, heads, ownership| {
            let orphans = heads.iter().filter(|head| head.is_orphan());
            for head in orphans.filter(|_| ownership == Ownership::Owned) {
                script.adopt(first, head.family, &head.name);
            }
        })
        .await
    }

    /// All tables that carry our mark, of any instance; at most 4,096.
    ///
    /// # Errors
    /// [`NftError`].
    pub async fn leftovers(&mut self) -> Result<BTreeSet<Leftover>, NftError> {
        for _ in 0..TRIES {
            let mut found = BTreeSet::new();
            let take = |message: &Message<'_>| {
                if let Some(head) = TableHead::read(message)?
                    && let Some(tag) = marked(&head.comment)
                    && found.len() < LEFTOVERS
                {
                    found.insert(Leftover {
                        family: head.family,
                        tag: tag.to_owned(),
                        held: head.owner,
                        name: head.name,
                    });
                }
                Ok(())
            };
            let dumped = self.requests.dump(ask(GET_TABLE, 0, &[]), take).await?;
            match dumped {
                Ok(true) => return Ok(found),
                Ok(false) => {}
                Err(refusal) => return Err(NftError::refused(What::Everything, refusal)),
            }
        }
        Err(NftError::Unsteady(TRIES))
    }

    /// Removes one of them, if it is still as it was found. Not cancel safe: it may be done.
    ///
    /// # Errors
    /// [`NftError`]; after any but [`NftError::NoAnswer`] nothing was changed.
    pub async fn remove_leftover(&mut self, leftover: &Leftover) -> Result<(), NftError> {
        let (family, name) = (leftover.family, leftover.name.clone());
        for _ in 0..TRIES {
            let (generation, heads) = self.heads_of(&name, &[family].into()).await?;
            let is_it = |head: &TableHead| marked(&head.comment) == Some(&leftover.tag);
            let Some(head) = heads.first() else {
                return Ok(()); // it is gone
            };
            if !is_it(head) {
                let (table, expected) = (format!("{family} {name}"), mark(&leftover.tag));
                return Err(NftError::Conflict { table, expected });
            }
            let mut script = Script::default();
            script.delete(self.requests.next().wrapping_add(1), family, &name);
            if self.run(script, generation).await? {
                return Ok(());
            }
        }
        Err(NftError::Unsteady(TRIES))
    }

    /// Waits for news. Cancel safe.
    ///
    /// # Errors
    /// When the socket is of no use any more.
    pub async fn wait(&mut self) -> io::Result<()> {
        self.monitor.wait().await
    }

    /// Takes the news: what others did to our tables since the last time. Our own changes are none.
    ///
    /// # Errors
    /// When the socket is of no use any more.
    pub fn take(&mut self) -> io::Result<Changes> {
        self.monitor.take()
    }

    /// Does what `write` makes of what is there, for just this generation.
    async fn rewrite(
        &mut self,
        families: &BTreeSet<Family>,
        write: impl Fn(&mut Script, u32, &[TableHead], Ownership),
    ) -> Result<(), NftError> {
        for _ in 0..TRIES {
            let (generation, heads) = self.heads(families).await?;
            let mut script = Script::default();
            // The batch's begin has the next number.
            let first = self.requests.next().wrapping_add(1);
            write(&mut script, first, &heads, self.ownership);
            if script.about.is_empty() || self.run(script, generation).await? {
                return Ok(());
            }
        }
        Err(NftError::Unsteady(TRIES))
    }

    /// Whether a script was done; not when others were faster.
    async fn run(&mut self, script: Script, generation: u32) -> Result<bool, NftError> {
        match self.requests.batch(script, SUBSYSTEM, Some(generation)).await? {
            Outcome::Done => Ok(true),
            Outcome::Stale => Ok(false),
            Outcome::Refused(refused) => match refused.into_iter().next() {
                Some((what, refusal)) => Err(NftError::refused(what, refusal)),
                None => Err(NftError::NoAnswer(None)),
            },
        }
    }

    /// The generation and our tables of some families of it, if all with our name are ours to change.
    async fn heads(&mut self, families: &BTreeSet<Family>) -> Result<(u32, Vec<TableHead>), NftError> {
        let tag = self.tag.clone();
        let (generation, heads) = self.heads_of(&tag, families).await?;
        for head in &heads {
            let table = || format!("{} {}", head.family, head.name);
            if marked(&head.comment) != Some(&tag) {
                let (table, expected) = (table(), mark(&tag));
                return Err(NftError::Conflict { table, expected });
            }
            if let Some(port) = head.owner.filter(|port| *port != self.requests.port()) {
                return Err(NftError::Held { table: table(), port });
            }
        }
        Ok((generation, heads))
    }

    async fn heads_of(
        &mut self,
        name: &str,
        families: &BTreeSet<Family>,
    ) -> Result<(u32, Vec<TableHead>), NftError> {
        let name = [name.as_bytes(), &[0]].concat();
        let by_name: [(u16, &[u8]); 1] = [(1, &name)];
        let mut questions = vec![ask(GET_GENERATION, 0, &[])];
        questions.extend(
            families
                .iter()
                .map(|family| ask(GET_TABLE, family.number(), &by_name)),
        );
        let answers = self.requests.get(&questions, Answer::read).await?;
        let (mut generation, mut heads) = (None, Vec::new());
        for answer in answers {
            match answer {
                Ok(Answer::Generation(number)) => generation = Some(number),
                Ok(Answer::Table(head)) => heads.extend(head),
                // EAFNOSUPPORT: a kernel without this family, which then has no tables.
                Err(refusal) if [Errno::NOENT, Errno::AFNOSUPPORT].contains(&refusal.errno) => {}
                Err(refusal) => return Err(NftError::refused(What::Everything, refusal)),
            }
        }
        Ok((generation.ok_or(NftError::NoAnswer(None))?, heads))
    }
}

/// Reads a table's chains and rules. Not when others changed them on the way.
async fn read(requests: &mut Requests, head: &TableHead, reading: &mut Reading) -> Result<bool, NftError> {
    let name = [head.name.as_bytes(), &[0]].concat();
    let by_table: [(u16, &[u8]); 1] = [(1, &name)];
    let family = head.family.number();
    let what = || What::Table(format!("{} {}", head.family, head.name));
    reading.table(head);
    // Chains cannot be asked for by table; those of others in the family are passed over.
    for (kind, attributes) in [(GET_CHAIN, &[][..]), (GET_RULE, &by_table[..])] {
        let dumped = requests.dump(ask(kind, family, attributes), |message| reading.take(message));
        match dumped.await? {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(refusal) if refusal.errno == Errno::NOENT => return Ok(false),
            Err(refusal) => return Err(NftError::refused(what(), refusal)),
        }
    }
    Ok(true)
}

/// The messages that make some tables, numbered from `first` on: what a batch holds between its two frames. `None`
/// when something in them is too long for a message.
#[must_use]
pub fn messages_of(tables: &Tables, first: u32) -> Option<Vec<u8>> {
    let mut script = Script::default();
    for table in tables {
        script.make(first, table, Ownership::Plain);
    }
    script.writer.finish()
}

fn ask<'a>(kind: u16, family: u8, attributes: &'a [(u16, &'a [u8])]) -> Question<'a> {
    Question {
        kind,
        family,
        attributes,
    }
}

enum Answer {
    Generation(u32),
    /// `None` of a family that we do not know.
    Table(Option<TableHead>),
}

impl Answer {
    fn read(message: &Message<'_>) -> Result<Self, Malformed> {
        if message.kind != NEW_GENERATION {
            return TableHead::read(message).map(Self::Table);
        }
        let (_, attributes) = message.netfilter()?;
        let number = Fields::<2>::read(attributes)?.u32(1);
        number.map(Self::Generation).ok_or(Malformed)
    }
}
