//! The codes of findings.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of finding it is. The names are what programs, conditions and `docs/networking.md` know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Code {
    /// No VMM holds the TAP of a guest that should have one.
    NoCarrier,
    /// Others of this host have addresses in the guests' subnet.
    AddressConflict,
    /// A foreign route leads guests' addresses elsewhere.
    RouteConflict,
    /// A foreign rule looks everything up in main, before ours or on a host whose main table is nobody's.
    LookupMain,
    /// Default routes in main on a host that netd rules.
    DefaultInMain,
    /// Another foreign rule decides about guests' packets in the place of ours.
    ForeignRule,
    /// Answers come by a link by which they would not leave, and the kernel drops them for it.
    StrictReversePath,
    /// The kernel would send guests' packets another way than the one that was chosen, or none.
    WrongWay,
    /// The way out carries less than guests send, and nobody tells them.
    MtuBlackHole,
    /// A foreign filter surely stops guests' packets.
    ForwardDrop,
    /// A foreign filter may stop guests' packets: not all of it can be followed.
    ForwardMayDrop,
    /// What goes from one guest to another on the bridge passes the machine's FORWARD, and is stopped there.
    BridgeFiltered,
    /// A foreign rule takes a port that leads to a guest.
    PortTaken,
    /// Copies of one rule in iptables, as scripts that append without looking leave them.
    DuplicateRules,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::NoCarrier,
        Self::AddressConflict,
        Self::RouteConflict,
        Self::LookupMain,
        Self::DefaultInMain,
        Self::ForeignRule,
        Self::StrictReversePath,
        Self::WrongWay,
        Self::MtuBlackHole,
        Self::ForwardDrop,
        Self::ForwardMayDrop,
        Self::BridgeFiltered,
        Self::PortTaken,
        Self::DuplicateRules,
    ];

    /// As it is written everywhere.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCarrier => "NoCarrier",
            Self::AddressConflict => "AddressConflict",
            Self::RouteConflict => "RouteConflict",
            Self::LookupMain => "LookupMain",
            Self::DefaultInMain => "DefaultInMain",
            Self::ForeignRule => "ForeignRule",
            Self::StrictReversePath => "StrictReversePath",
            Self::WrongWay => "WrongWay",
            Self::MtuBlackHole => "MtuBlackHole",
            Self::ForwardDrop => "ForwardDrop",
            Self::ForwardMayDrop => "ForwardMayDrop",
            Self::BridgeFiltered => "BridgeFiltered",
            Self::PortTaken => "PortTaken",
            Self::DuplicateRules => "DuplicateRules",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
