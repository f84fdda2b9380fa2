//! The changes that a plan is made of.

use std::fmt;

use serde::Serialize;
use sovereign_protocol::interface::Prefix;

use crate::conflict::Part;
use crate::family::Family;
use crate::names::{LinkName, Mac};
use crate::route::{Route, WantedRoute};
use crate::rule::Rule;
use crate::sysctl::Sysctl;

/// One change. Their order is the order in which they are made.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "change", rename_all = "snake_case")]
pub enum Step {
    /// Put a switch back as it was before us.
    RestoreSysctl {
        /// The switch.
        #[serde(serialize_with = "as_text")]
        sysctl: Sysctl,
        /// As we had set it.
        from: i64,
        /// As it was.
        to: i64,
    },
    /// Remove a link that carries our mark.
    RemoveLink {
        /// Its name, for people.
        name: String,
        /// Its number, for the kernel.
        index: u32,
    },
    /// Make the bridge, marked in the same message.
    CreateBridge {
        /// Its name.
        name: LinkName,
        /// Its hardware address.
        #[serde(serialize_with = "as_text")]
        mac: Mac,
        /// The mark.
        group: u32,
    },
    /// Make a TAP: not lasting, then marked, then lasting.
    CreateTap {
        /// Its name.
        name: LinkName,
        /// The mark.
        group: u32,
    },
    /// Pin the bridge's hardware address again.
    SetMac {
        /// The link.
        name: LinkName,
        /// The address.
        #[serde(serialize_with = "as_text")]
        mac: Mac,
    },
    /// Set the MTU.
    SetMtu {
        /// The link.
        name: LinkName,
        /// Bytes.
        mtu: u32,
    },
    /// Make a TAP a port of the bridge.
    SetController {
        /// The TAP.
        name: LinkName,
        /// The bridge.
        bridge: LinkName,
    },
    /// Take a TAP out of its bridge.
    LeaveController {
        /// The TAP.
        name: LinkName,
    },
    /// Let a port reach the bridge only, or other ports as well.
    SetIsolated {
        /// The TAP.
        name: LinkName,
        /// The bridge only.
        isolated: bool,
    },
    /// Set a link up.
    SetUp {
        /// The link.
        name: LinkName,
    },
    /// Set a link down; no plan does, but it puts back what [`Step::SetUp`] changed.
    SetDown {
        /// The link.
        name: LinkName,
    },
    /// Remove a route of our own.
    RemoveRoute {
        /// It.
        #[serde(flatten)]
        route: Route,
    },
    /// Remove an address that carries our mark.
    RemoveAddress {
        /// The link.
        link: LinkName,
        /// The address.
        address: Prefix,
    },
    /// Add an address.
    AddAddress {
        /// The link.
        link: LinkName,
        /// The address.
        address: Prefix,
    },
    /// Add a route.
    AddRoute {
        /// It.
        #[serde(flatten)]
        route: WantedRoute,
    },
    /// Filter and translate as wanted: everything of ours at once, in one transaction.
    SetFilter {
        /// How our tables or chains are called.
        tag: String,
    },
    /// Remove our tables or chains.
    RemoveFilter {
        /// How they are called.
        tag: String,
    },
    /// Add a rule.
    AddRule {
        /// It.
        #[serde(flatten)]
        rule: Rule,
    },
    /// Remove a rule of our own; after the new ones, so that no packet meets neither.
    RemoveRule {
        /// It.
        #[serde(flatten)]
        rule: Rule,
    },
    /// Set a switch; how it was is kept first.
    SetSysctl {
        /// The switch.
        #[serde(serialize_with = "as_text")]
        sysctl: Sysctl,
        /// As it is.
        from: i64,
        /// As it should be.
        to: i64,
    },
}

pub(crate) fn as_text<S: serde::Serializer>(value: &impl fmt::Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

impl Step {
    /// The part that it is of.
    #[must_use]
    pub fn part(&self) -> Part {
        match self {
            Self::AddRoute { route } if !route.ours => Part::Links,
            Self::AddRoute { .. }
            | Self::RemoveRoute { .. }
            | Self::AddRule { .. }
            | Self::RemoveRule { .. }
            | Self::SetSysctl { .. }
            | Self::RestoreSysctl { .. } => Part::Routing,
            Self::SetFilter { .. } | Self::RemoveFilter { .. } => Part::Filter,
            _ => Part::Links,
        }
    }
}

impl Step {
    /// The one family that it is about; none of a whole link, and of the packet filter.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        match self {
            Self::AddAddress { address, .. } | Self::RemoveAddress { address, .. } => {
                Some(Family::of(address.address()))
            }
            Self::AddRoute { route } => Some(Family::of(route.to.address())),
            Self::RemoveRoute { route } => Some(Family::of(route.to.address())),
            Self::AddRule { rule } | Self::RemoveRule { rule } => Some(rule.family),
            Self::SetSysctl { sysctl, .. } | Self::RestoreSysctl { sysctl, .. } => Some(sysctl.family()),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RemoveLink { name, .. } => write!(f, "link {}: remove", name.escape_debug()),
            Self::CreateBridge { name, mac, group } => {
                write!(f, "link {name}: create bridge, address {mac}, group {group}")
            }
            Self::CreateTap { name, group } => write!(f, "link {name}: create tap, group {group}"),
            Self::SetMac { name, mac } => write!(f, "link {name}: set address {mac}"),
            Self::SetMtu { name, mtu } => write!(f, "link {name}: set mtu {mtu}"),
            Self::SetController { name, bridge } => write!(f, "link {name}: make port of {bridge}"),
            Self::LeaveController { name } => write!(f, "link {name}: take out of its bridge"),
            Self::SetIsolated { name, isolated } => {
                let how = if *isolated { "from" } else { "together with" };
                write!(f, "link {name}: keep {how} other ports")
            }
            Self::SetUp { name } => write!(f, "link {name}: set up"),
            Self::SetDown { name } => write!(f, "link {name}: set down"),
            Self::RemoveAddress { link, address } => write!(f, "address {address}: remove from {link}"),
            Self::AddAddress { link, address } => write!(f, "address {address}: add to {link}"),
            Self::AddRoute { route } => write!(f, "route {route}: add"),
            Self::RemoveRoute { route } => write!(f, "route {} table {}: remove", route.to, route.table),
            Self::SetFilter { tag } => write!(f, "packet filter {tag}: set"),
            Self::RemoveFilter { tag } => write!(f, "packet filter {tag}: remove"),
            Self::AddRule { rule } => write!(f, "rule {} {rule}: add", rule.family),
            Self::RemoveRule { rule } => write!(f, "rule {} {rule}: remove", rule.family),
            Self::SetSysctl { sysctl, from, to } => write!(f, "sysctl {sysctl}: set to {to} from {from}"),
            Self::RestoreSysctl { sysctl, to, .. } => write!(f, "sysctl {sysctl}: put back to {to}"),
        }
    }
}
