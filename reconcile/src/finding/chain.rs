//! Chains of a packet filter, whoever made them, as steps for one packet; and what becomes of it there.
//!
//! A step whose condition cannot be told leaves both ends open from there on: then the answer is `Fate::MayDrop`, never a
//! plain yes or no.

use std::collections::BTreeMap;
use std::fmt;

use super::packet::{Holds, Packet};
use crate::nft;

/// Chains that call each other, at most (NFT_JUMP_STACK_SIZE).
const DEPTH: usize = 16;

/// What a step does with packets that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing that decides.
    Continue,
    /// These chains let it pass.
    Accept,
    /// It is gone, or refused.
    Drop,
    /// Back to the calling chain.
    Return,
    /// Into another chain, and back.
    Jump(String),
    /// Into another chain, and not back.
    Goto(String),
    /// Something that is not understood.
    Unknown,
}

/// One rule.
#[derive(Clone)]
pub(super) struct Step {
    pub(super) holds: fn(&Condition, &Packet) -> Holds,
    pub(super) condition: Condition,
    pub(super) action: Action,
    /// As it would be shown.
    pub(super) text: String,
}

/// What a rule asks, in the words of its program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    /// Of iptables: its arguments.
    Words(Vec<String>),
    /// Of nf_tables.
    Steps(Vec<nft::Expression>),
}

/// The chains of one table, and the one where forwarded packets come in.
#[derive(Clone)]
pub(super) struct Chains {
    /// Who printed it: a program of iptables, or `nft`.
    pub(super) program: String,
    /// The table, such as `inet firewalld` or `ip filter`.
    pub(super) table: String,
    /// The chain that the kernel calls.
    pub(super) base: String,
    /// What becomes of packets that no rule decided.
    pub(super) drops: bool,
    /// They are tables of nf_tables, whoever printed them.
    pub(super) is_nf: bool,
    pub(super) chains: BTreeMap<String, Vec<Step>>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fate {
    /// It passes, as far as these chains go.
    Passes,
    /// Surely gone, by this rule or policy.
    Drops(String),
    /// Gone by this rule or policy, unless something that is not understood says otherwise.
    MayDrop(String),
}

impl Chains {
    /// Whether they are those of a table of nf_tables, which `iptables-nft` keeps its own in.
    pub(super) fn is_table(&self, table: &nft::Table) -> bool {
        self.is_nf && self.table == table.to_string()
    }

    /// What becomes of a packet.
    pub(super) fn fate(&self, packet: &Packet) -> Fate {
        let mut walk = Walk {
            chains: self,
            packet,
            may_accept: false,
            may_drop: None,
        };
        let ended = walk.chain(&self.base, true, 0);
        let policy = || format!("policy DROP of {self}");
        match (ended, walk.may_drop) {
            (Some(End::Drop(by)), _) if walk.may_accept => Fate::MayDrop(by),
            (Some(End::Drop(by)), _) => Fate::Drops(by),
            (None, _) if self.drops && walk.may_accept => Fate::MayDrop(policy()),
            (None, _) if self.drops => Fate::Drops(policy()),
            (_, Some(by)) => Fate::MayDrop(by),
            _ => Fate::Passes,
        }
    }
}

impl fmt::Display for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "chain {} of table {} ({})",
            self.base, self.table, self.program
        )
    }
}

impl fmt::Debug for Chains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

enum End {
    Accept,
    Drop(String),
}

struct Walk<'a> {
    chains: &'a Chains,
    packet: &'a Packet,
    /// Something before may have let it pass.
    may_accept: bool,
    /// Something before may have dropped it: the first of these.
    may_drop: Option<String>,
}

impl Walk<'_> {
    /// Goes through a chain; how it surely ended there. `certain`: the packet surely comes here.
    fn chain(&mut self, name: &str, mut certain: bool, depth: usize) -> Option<End> {
        let Some(steps) = self.chains.chains.get(name).filter(|_| depth < DEPTH) else {
            self.open(&format!("chain {name}, which cannot be read"));
            return None;
        };
        for step in steps {
            let surely = match (step.holds)(&step.condition, self.packet) {
                Holds::No => continue,
                Holds::Yes => certain,
                Holds::Perhaps => false,
            };
            let by = || {
                format!(
                    "{} in {}, table {} ({})",
                    step.text, name, self.chains.table, self.chains.program
                )
            };
            match &step.action {
                Action::Continue => {}
                Action::Accept if surely => return Some(End::Accept),
                Action::Accept => self.may_accept = true,
                Action::Drop if surely => return Some(End::Drop(by())),
                Action::Drop => {
                    let by = by();
                    self.may_drop.get_or_insert(by);
                }
                Action::Return if surely => return None,
                Action::Return => certain = false,
                Action::Jump(to) => {
                    let end = self.chain(to, surely, depth + 1);
                    if end.is_some() {
                        return end;
                    }
                }
                Action::Goto(to) => {
                    let end = self.chain(to, surely, depth + 1);
                    if end.is_some() || surely {
                        return end;
                    }
                    certain = false;
                }
                Action::Unknown => {
                    let by = by();
                    self.open(&by);
                }
            }
        }
        None
    }

    fn open(&mut self, by: &str) {
        self.may_accept = true;
        self.may_drop.get_or_insert_with(|| by.to_owned());
    }
}
