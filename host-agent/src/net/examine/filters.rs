//! Foreign packet filters, read only: nf_tables over netlink, and what iptables' programs say.

use rustix::fd::OwnedFd;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::Saved;
use sovereign_reconcile::iptables::Family as Programs;
use sovereign_reconcile::nft::Table;

use super::super::chain;
use super::super::iptables::{self, IptablesError, Variant};
use super::super::nft::foreign;
use super::super::nft::socket::Requests;

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Filters {
    pub(super) tables: Vec<Table>,
    pub(super) saves: Vec<Saved>,
    /// What could not be read, and why.
    pub(super) unseen: Vec<String>,
}

/// Reads them. What cannot be read is told and passed over.
pub(super) async fn read(socket: OwnedFd) -> Filters {
    let mut filters = Filters::default();
    match Requests::over(socket) {
        Ok(mut requests) => match foreign::tables(&mut requests).await {
            Ok(read) => (filters.tables, filters.unseen) = (read.tables, read.unseen),
            Err(error) => filters.unseen.push(format!("nf_tables: {}", chain(&error))),
        },
        Err(error) => filters.unseen.push(format!("nf_tables: {error}")),
    }
    for family in [Programs::V4, Programs::V6] {
        saves(family, &mut filters).await;
    }
    filters
}

/// What the programs of one family say; two names of one program are asked once.
async fn saves(family: Programs, filters: &mut Filters) {
    let mut asked: Option<Variant> = None;
    for programs in iptables::installed() {
        if asked == Some(programs.variant()) {
            continue;
        }
        let program = programs.saves_by(family);
        match programs.save(family).await {
            Ok(text) => {
                if programs.variant() == Variant::Plain {
                    let first = text.lines().next();
                    asked = first.map(|line| match line.contains("(nf_tables)") {
                        true => Variant::Nft,
                        false => Variant::Legacy,
                    });
                }
                let family = match family {
                    Programs::V4 => Family::V4,
                    Programs::V6 => Family::V6,
                };
                filters.saves.push(Saved {
                    program,
                    family,
                    text,
                });
            }
            Err(IptablesError::NoFamily(_)) => {} // not installed
            Err(error) => filters.unseen.push(format!("{program}: {}", chain(&error))),
        }
    }
}
