//! Tables, chains and rules as messages of nf_tables, and a dump of them back as the same values. Pure.
//!
//! `Reading` of a dump of what was written is what was written: what the kernel adds (handles, use counts, the
//! other end of a range of one) is left out, and everything else that was not written makes a difference.

use std::collections::BTreeMap;

use sovereign_reconcile::nft::{
    Chain, Expression, Family, Hook, Point, Policy, Rule, Standing, Table, Tables,
};

use super::attributes::{Fields, Head, Malformed, Message, Writer};
use super::expressions;

/// NFNL_SUBSYS_NFTABLES.
pub(super) const SUBSYSTEM: u16 = 10;
/// NFT_MSG_*, with the subsystem.
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
pub(super) const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
pub(super) const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
pub(super) const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
pub(super) const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
pub(super) const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
pub(super) const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
pub(super) const NEW_GENERATION: u16 = SUBSYSTEM << 8 | 15;
pub(super) const GET_GENERATION: u16 = SUBSYSTEM << 8 | 16;
/// NFT_TABLE_F_*.
const DORMANT: u32 = 1;
const OWNER: u32 = 2;
const PERSIST: u32 = 4;
/// NFT_CHAIN_BASE.
const BASE: u32 = 1;
/// NFTNL_UDATA_TABLE_COMMENT and NFTNL_UDATA_RULE_COMMENT.
const COMMENT: u8 = 0;
/// What is read of a table that others filled.
pub(super) const RULES: usize = 1 << 16;

pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_DUMP: u16 = 0x300;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;
pub(super) const NLM_F_APPEND: u16 = 0x800;

/// Who may change our tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// Everybody with the right to change any.
    Plain,
    /// Only the socket that made them; they outlive it, and the next process takes them over (kernel 6.9).
    Owned,
}

impl Ownership {
    fn flags(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Owned => OWNER | PERSIST,
        }
    }
}

/// What is asked for or made, by what `nft` is told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The right to change anything, and that there is nf_tables at all.
    Everything,
    /// A table.
    Table(String),
    /// A chain: its table, its name, `filter` or `nat`.
    Chain(String, String, String),
    /// A rule: its chain, its comment.
    Rule(String, String),
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Everything => f.write_str("any change of nf_tables"),
            Self::Table(table) => write!(f, "table {table}"),
            Self::Chain(table, name, kind) if kind.is_empty() => write!(f, "chain {table} {name}"),
            Self::Chain(table, name, kind) => write!(f, "chain {table} {name} ({kind})"),
            Self::Rule(chain, comment) => write!(f, "rule \"{comment}\" in {chain}"),
        }
    }
}

/// Messages with what each of them is about.
#[derive(Debug, Default)]
pub(super) struct Script {
    pub(super) writer: Writer,
    pub(super) about: Vec<What>,
}

impl Script {
    /// Removes a table with all that is in it. Messages are numbered from `first` on.
    pub(super) fn delete(&mut self, first: u32, family: Family, name: &str) {
        let what = What::Table(format!("{family} {name}"));
        let head = self.head(first, DELETE_TABLE, 0, family, what);
        self.writer.message(head, |writer| writer.text(1, name));
    }

    /// Takes over a table that has no owner any more.
    pub(super) fn adopt(&mut self, first: u32, family: Family, name: &str) {
        let what = What::Table(format!("{family} {name}"));
        let head = self.head(first, NEW_TABLE, 0, family, what);
        self.writer.message(head, |writer| {
            writer.text(1, name);
            writer.u32(2, Ownership::Owned.flags());
        });
    }

    /// Makes a table and all that is in it: chains first, for rules jump to them.
    pub(super) fn make(&mut self, first: u32, table: &Table, ownership: Ownership) {
        let family = table.family;
        let what = What::Table(table.to_string());
        let head = self.head(first, NEW_TABLE, NLM_F_EXCL, family, what);
        self.writer.message(head, |writer| {
            writer.text(1, &table.name);
            writer.u32(2, ownership.flags());
            writer.bytes(6, &comment(&table.comment));
        });
        for (name, chain) in &table.chains {
            let kind = chain
                .hook
                .as_ref()
                .map(|hook| hook.kind.clone())
                .unwrap_or_default();
            let what = What::Chain(table.to_string(), name.clone(), kind);
            let head = self.head(first, NEW_CHAIN, NLM_F_CREATE, family, what);
            self.writer.message(head, |writer| {
                writer.text(1, &table.name);
                writer.text(3, name);
                if let Some(hook) = &chain.hook {
                    write_hook(writer, hook);
                }
            });
        }
        for (name, chain) in &table.chains {
            for rule in &chain.rules {
                let what = What::Rule(format!("{table} {name}"), rule.comment.clone());
                let head = self.head(first, NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, family, what);
                self.writer.message(head, |writer| {
                    writer.text(1, &table.name);
                    writer.text(2, name);
                    writer.nest(4, |writer| {
                        rule.expressions
                            .iter()
                            .for_each(|step| expressions::write(writer, step));
                    });
                    if !rule.comment.is_empty() {
                        writer.bytes(7, &comment(&rule.comment));
                    }
                });
            }
        }
    }

    fn head(&mut self, first: u32, kind: u16, flags: u16, family: Family, what: What) -> Head {
        let sequence = first.wrapping_add(self.about.len() as u32);
        self.about.push(what);
        Head {
            kind,
            flags: NLM_F_REQUEST | flags,
            sequence,
            family: family.number(),
            resource: 0,
        }
    }
}

fn write_hook(writer: &mut Writer, hook: &Hook) {
    let policy = match hook.policy {
        Policy::Drop => 0,
        Policy::Accept => 1,
        Policy::Other(number) => number,
    };
    writer.text(7, &hook.kind);
    writer.u32(5, policy);
    writer.nest(4, |writer| {
        writer.u32(1, hook.point.number());
        writer.u32(2, hook.priority as u32);
    });
}

/// A comment as `nft` keeps it: kind, length with the final zero, text.
fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(usize::from(u8::MAX) - 1)];
    [&[COMMENT, text.len() as u8 + 1], text, &[0]].concat()
}

/// The comment, if there is nothing else.
fn read_comment(data: &[u8]) -> Option<String> {
    let [COMMENT, length, text @ .., 0] = data else {
        return None;
    };
    let text = String::from_utf8(text.to_vec()).ok()?;
    (usize::from(*length) == text.len() + 1).then_some(text)
}

/// What the kernel told of tables with one name.
#[derive(Debug)]
pub(super) struct Reading {
    tag: String,
    ownership: Ownership,
    /// Of the socket that should own them.
    port: u32,
    tables: BTreeMap<Family, (Table, Option<u32>)>,
    chains: BTreeMap<Family, BTreeMap<String, Chain>>,
    rules: usize,
}

impl Reading {
    /// Nothing yet.
    #[must_use]
    pub(super) fn new(tag: &str, ownership: Ownership, port: u32) -> Self {
        Self {
            tag: tag.to_owned(),
            ownership,
            port,
            tables: BTreeMap::new(),
            chains: BTreeMap::new(),
            rules: 0,
        }
    }

    /// Takes in a table, chain or rule; what is not in a table of the name, or is something else, is passed over.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(super) fn take(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        if ![NEW_TABLE, NEW_CHAIN, NEW_RULE].contains(&message.kind) {
            return Ok(());
        }
        let (family, attributes) = message.netfilter()?;
        let Some(family) = Family::of(family) else {
            return Ok(());
        };
        let mut fields = Fields::<13>::read(attributes)?;
        if fields.text(1).ok_or(Malformed)? != self.tag {
            return Ok(());
        }
        match message.kind {
            NEW_TABLE => {
                let head = table_head(family, &self.tag, &mut fields);
                self.table(&head);
                Ok(())
            }
            NEW_CHAIN => self.chain(family, &mut fields),
            _ => self.rule(family, &mut fields),
        }
    }

    /// Takes in a table of the name.
    pub(super) fn table(&mut self, head: &TableHead) {
        let mut table = Table::new(head.family, &self.tag);
        (table.standing, table.comment) = (self.standing(head), head.comment.clone());
        self.tables.insert(head.family, (table, head.objects));
    }

    fn standing(&self, head: &TableHead) -> Standing {
        let ours = head.owner.is_none_or(|owner| owner == self.port);
        match (head.flags & !DORMANT, self.ownership) {
            (flags, _) if flags & !(OWNER | PERSIST) != 0 => Standing::Unknown(flags),
            (flags, _) if flags & OWNER != 0 && !ours => Standing::Held(head.owner.unwrap_or_default()),
            _ if head.flags & DORMANT != 0 => Standing::Dormant,
            (flags, ownership) if flags == ownership.flags() => Standing::AsWanted,
            (_, Ownership::Owned) => Standing::Unowned,
            (_, Ownership::Plain) => Standing::Persistent,
        }
    }

    fn chain(&mut self, family: Family, fields: &mut Fields<'_, 13>) -> Result<(), Malformed> {
        let name = fields.text(3).ok_or(Malformed)?.into_owned();
        let mut oddities = String::new();
        let hook = match fields.bytes(4) {
            None => None,
            Some(bytes) => {
                let mut hook = Fields::<5>::read(bytes)?;
                let (point, priority) = (hook.u32(1).ok_or(Malformed)?, hook.u32(2).ok_or(Malformed)?);
                if hook.all_taken().is_none() {
                    oddities.push_str("devices ");
                }
                Some(Hook {
                    kind: fields.text(7).ok_or(Malformed)?.into_owned(),
                    point: Point::of(point),
                    priority: priority as i32,
                    policy: match fields.u32(5) {
                        Some(0) => Policy::Drop,
                        Some(1) | None => Policy::Accept,
                        Some(number) => Policy::Other(number),
                    },
                })
            }
        };
        let flags = fields.u32(10).unwrap_or_default() & !BASE;
        if flags != 0 {
            oddities.push_str(&format!("flags {flags:#x} "));
        }
        if fields.bytes(12).is_some() {
            oddities.push_str("userdata ");
        }
        let chain = self.chains.entry(family).or_default().entry(name).or_default();
        (chain.hook, chain.oddities) = (hook, oddities);
        Ok(())
    }

    fn rule(&mut self, family: Family, fields: &mut Fields<'_, 13>) -> Result<(), Malformed> {
        let chain = fields.text(2).ok_or(Malformed)?.into_owned();
        let list = fields.bytes(4).unwrap_or_default();
        self.rules += 1;
        if self.rules > RULES {
            return Ok(()); // more than we ever make: different already
        }
        let mut rule = Rule {
            comment: String::new(),
            expressions: expressions::read_all(list)?,
        };
        // Rules of iptables-nft have it.
        let compat = fields.bytes(5).map(|bytes| ("compat", bytes));
        let userdata = fields.bytes(7).and_then(|bytes| match read_comment(bytes) {
            Some(comment) => {
                rule.comment = comment;
                None
            }
            None => Some(("userdata", bytes)),
        });
        for (name, bytes) in compat.into_iter().chain(userdata) {
            let (name, bytes) = (name.to_owned(), bytes.to_vec());
            rule.expressions.push(Expression::Unknown { name, bytes });
        }
        let chains = self.chains.entry(family).or_default();
        chains.entry(chain).or_default().rules.push(rule);
        Ok(())
    }

    /// All of it.
    #[must_use]
    pub(super) fn finish(mut self) -> Tables {
        let tables = std::mem::take(&mut self.tables).into_iter();
        tables
            .map(|(family, (mut table, objects))| {
                table.chains = self.chains.remove(&family).unwrap_or_default();
                let chains = table.chains.len() as u32;
                table.strangers = objects.unwrap_or(chains).saturating_sub(chains);
                table
            })
            .collect()
    }
}

/// What a table's own message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TableHead {
    pub(super) family: Family,
    pub(super) name: String,
    pub(super) comment: String,
    flags: u32,
    pub(super) owner: Option<u32>,
    /// Chains, sets and all else in it.
    objects: Option<u32>,
}

impl TableHead {
    /// `None` for families that we do not know.
    ///
    /// # Errors
    /// [`Malformed`].
    pub(super) fn read(message: &Message<'_>) -> Result<Option<Self>, Malformed> {
        let (family, attributes) = message.netfilter()?;
        let mut fields = Fields::<13>::read(attributes)?;
        let name = fields.text(1).ok_or(Malformed)?.into_owned();
        Ok(Family::of(family).map(|family| table_head(family, &name, &mut fields)))
    }

    /// Whether it was made to outlive an owner that is gone.
    pub(super) fn is_orphan(&self) -> bool {
        self.flags & (OWNER | PERSIST) == PERSIST
    }
}

fn table_head(family: Family, name: &str, fields: &mut Fields<'_, 13>) -> TableHead {
    TableHead {
        family,
        name: name.to_owned(),
        comment: fields.bytes(6).and_then(read_comment).unwrap_or_default(),
        flags: fields.u32(2).unwrap_or_default(),
        owner: fields.u32(7),
        objects: fields.u32(3),
    }
}
