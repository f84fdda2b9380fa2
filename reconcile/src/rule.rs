//! Rules that choose a routing table.

use std::fmt;

use serde::{Deserialize, Serialize};
use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::names::Mark;
use crate::route::OURS;

/// Packets to our guests: below netd's ladder, which begins at 10000 (FACTS section 2).
pub const TO_GUESTS: u32 = 9_000;
/// Answers of our guests to who asked from a network that is attached to another link than the way out.
pub const ATTACHED: u32 = 9_004;
/// Answers of our guests to who asked by another link than the way out.
pub const ANSWERS: u32 = 9_005;
/// Packets of our guests to elsewhere.
pub const FROM_GUESTS: u32 = 9_010;
/// Packets of our guests for which no way was found: they never fall into other rules.
pub const NO_WAY: u32 = 9_020;
/// netd's rule for the uids of a VPN that takes all their traffic (Android 12 and later).
pub const NETD_VPN: u32 = 13_000;
/// netd's rule for the default network.
pub const NETD_DEFAULT: u32 = 31_000;
/// netd's last rule.
pub const NETD_LAST: u32 = 32_000;
/// The kernel's own rule for the main table.
pub const KERNEL_MAIN: u32 = 32_766;

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RuleAction {
    /// Looks into a table.
    Lookup(u32),
    /// Answers that there is no way.
    Unreachable,
    /// Anything else.
    Other,
}

/// A rule. The order is that in which the kernel asks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Rule {
    /// Its family.
    pub family: Family,
    /// Lower ones are asked first.
    pub priority: u32,
    /// Packets to these addresses only.
    pub to: Option<Prefix>,
    /// Packets from these addresses only.
    pub from: Option<Prefix>,
    /// Packets that came in here only; `lo` means the host's own.
    pub iif: Option<String>,
    /// Packets with this mark only, and the bits of it that count.
    pub mark: Option<(u32, u32)>,
    /// Packets of these users only, first and last.
    pub uids: Option<(u32, u32)>,
    /// There are other conditions.
    pub narrower: bool,
    /// What it does.
    pub action: RuleAction,
    /// Who made it (RTPROT_*).
    pub protocol: u8,
}

impl Rule {
    /// One of ours without a condition.
    #[must_use]
    pub fn ours(family: Family, priority: u32, action: RuleAction) -> Self {
        Self {
            family,
            priority,
            to: None,
            from: None,
            iif: None,
            mark: None,
            uids: None,
            narrower: false,
            action,
            protocol: OURS,
        }
    }

    /// Whether plans look at it: ours, and netd's that tell of its networks. Others may be ten thousand.
    #[must_use]
    pub fn matters(&self) -> bool {
        let netd = [NETD_VPN, NETD_DEFAULT, NETD_LAST, KERNEL_MAIN];
        self.protocol == OURS || netd.contains(&self.priority)
    }

    /// Whether it is of the instance with this mark.
    #[must_use]
    pub fn is_of(&self, mark: &Mark) -> bool {
        let of_bridge = self.iif.as_deref() == Some(&mark.prefix);
        self.protocol == OURS && (of_bridge || self.action == RuleAction::Lookup(mark.table))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.priority)?;
        if let Some(from) = self.from {
            write!(f, " from {from}")?;
        }
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {}", iif.escape_debug())?;
        }
        if let Some((mark, mask)) = self.mark {
            write!(f, " fwmark {mark:#x}/{mask:#x}")?;
        }
        if let Some((first, last)) = self.uids {
            write!(f, " uidrange {first}-{last}")?;
        }
        match self.action {
            RuleAction::Lookup(table) => write!(f, " lookup {table}"),
            RuleAction::Unreachable => f.write_str(" unreachable"),
            RuleAction::Other => f.write_str(" other"),
        }
    }
}
