//! Tables of others, read and never changed: those with chains that forwarded packets meet.

use std::collections::BTreeSet;

use sovereign_reconcile::nft::{Family, Table};

use super::attributes::{Fields, Message};
use super::socket::{NftError, Requests};
use super::wire::{GET_CHAIN, GET_TABLE, Ownership, RULES, Reading, TableHead, What};
use super::{TRIES, ask, read};

/// Where forwarded packets come by (NF_INET_FORWARD).
const FORWARD: u32 = 2;
/// Tables that are read.
const TABLES: usize = 256;

/// What was read.
#[derive(Debug, Default)]
pub(crate) struct Read {
    /// Tables, ours included.
    pub(crate) tables: Vec<Table>,
    /// What was not read whole, and why.
    pub(crate) unseen: Vec<String>,
}

/// Reads all tables that have a chain at `forward`. Never asks for sets.
///
/// # Errors
/// [`NftError`].
pub(crate) async fn tables(requests: &mut Requests) -> Result<Read, NftError> {
    let mut done = Read::default();
    let wanted = at_forward(requests).await?;
    let mut heads = heads(requests).await?;
    heads.retain(|head| wanted.contains(&(head.family, head.name.clone())));
    if heads.len() > TABLES {
        done.unseen
            .push(format!("{} tables of nf_tables", heads.len() - TABLES));
        heads.truncate(TABLES);
    }
    for head in &heads {
        match whole(requests, head).await? {
            Some(table) if table.rules() < RULES => done.tables.push(table),
            Some(table) => done
                .unseen
                .push(format!("table {table}: more than {RULES} rules")),
            None => done
                .unseen
                .push(format!("table {} {}: others change it", head.family, head.name)),
        }
    }
    Ok(done)
}

/// One table as it is; `None` when it is changed during each look, or gone.
async fn whole(requests: &mut Requests, head: &TableHead) -> Result<Option<Table>, NftError> {
    for _ in 0..TRIES {
        let mut reading = Reading::new(&head.name, Ownership::Plain, requests.port());
        if read(requests, head, &mut reading).await? {
            return Ok(reading.finish().into_iter().next());
        }
    }
    Ok(None)
}

/// Families and names of tables with a base chain where packets are forwarded.
async fn at_forward(requests: &mut Requests) -> Result<BTreeSet<(Family, String)>, NftError> {
    for _ in 0..TRIES {
        let mut found = BTreeSet::new();
        let take = |message: &Message<'_>| {
            let (family, attributes) = message.netfilter()?;
            let mut fields = Fields::<13>::read(attributes)?;
            let table = fields.text(1).map(std::borrow::Cow::into_owned);
            let hook = match fields.bytes(4) {
                Some(hook) => Fields::<3>::read(hook)?.u32(1),
                None => None,
            };
            if let (Some(family), Some(table), Some(FORWARD)) = (Family::of(family), table, hook) {
                found.insert((family, table));
            }
            Ok(())
        };
        match requests.dump(ask(GET_CHAIN, 0, &[]), take).await? {
            Ok(true) => return Ok(found),
            Ok(false) => {}
            Err(refusal) => return Err(NftError::refused(What::Everything, refusal)),
        }
    }
    Err(NftError::Unsteady(TRIES))
}

async fn heads(requests: &mut Requests) -> Result<Vec<TableHead>, NftError> {
    for _ in 0..TRIES {
        let mut found = Vec::new();
        let take = |message: &Message<'_>| {
            found.extend(TableHead::read(message)?);
            Ok(())
        };
        match requests.dump(ask(GET_TABLE, 0, &[]), take).await? {
            Ok(true) => return Ok(found),
            Ok(false) => {}
            Err(refusal) => return Err(NftError::refused(What::Everything, refusal)),
        }
    }
    Err(NftError::Unsteady(TRIES))
}
