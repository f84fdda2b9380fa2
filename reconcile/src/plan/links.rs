//! The part of a plan about links.

use std::collections::{BTreeMap, BTreeSet};

use super::{Conflict, Part, Plan, Step};
use crate::interface::Interface;
use crate::names::LinkName;
use crate::observed::{Kind, Link, Observed};
use crate::wanted::{Bridge, Wanted};

/// Asked for each guest, so by name.
type Names<'a> = BTreeMap<&'a str, &'a Link>;

#[derive(Debug, Clone, Copy)]
enum Found<'a> {
    Absent,
    Ours(&'a Link),
    Foreign,
}

impl<'a> Found<'a> {
    fn link(self) -> Option<&'a Link> {
        match self {
            Self::Ours(link) => Some(link),
            Self::Absent | Self::Foreign => None,
        }
    }
}

impl Plan {
    pub(super) fn links(&mut self, wanted: &Wanted, observed: &Observed) {
        self.remove_unwanted(wanted, observed);
        if wanted.loopback {
            self.raise_loopback(observed);
        }
        let Some(bridge) = &wanted.bridge else {
            return;
        };
        let by_name: Names<'_> = observed
            .links
            .values()
            .map(|link| (link.name.as_str(), link))
            .collect();
        let found = self.find(wanted, &by_name, &bridge.name, Kind::Bridge);
        if !matches!(found, Found::Foreign) {
            self.bridge(wanted, bridge, found.link(), observed);
        }
        let port_of = match found {
            Found::Foreign => None,
            Found::Absent => Some((&bridge.name, None)),
            Found::Ours(link) => Some((&bridge.name, Some(link.index))),
        };
        for name in wanted.taps.keys() {
            let found = self.find(wanted, &by_name, name, Kind::Tap);
            if !matches!(found, Found::Foreign) {
                self.tap(wanted, name, found.link(), port_of);
            }
        }
    }

    fn remove_unwanted(&mut self, wanted: &Wanted, observed: &Observed) {
        let bridge = wanted.bridge.as_ref().map(|bridge| &bridge.name);
        let names: BTreeSet<&str> = wanted.taps.keys().chain(bridge).map(LinkName::as_str).collect();
        for link in observed.links.values() {
            if wanted.mark.is_on(&link.name, link.group) && !names.contains(link.name.as_str()) {
                self.remove(link);
            }
        }
    }

    fn remove(&mut self, link: &Link) {
        self.steps.insert(Step::RemoveLink {
            name: link.name.clone(),
            index: link.index,
        });
    }

    fn raise_loopback(&mut self, observed: &Observed) {
        let lo = observed.links.values().find(|link| link.kind == Kind::Loopback);
        if let Some(name) = lo.and_then(|lo| LinkName::parse(&lo.name)) {
            let wanted = Interface {
                up: true,
                ..Interface::bare(name)
            };
            self.interface(&wanted, lo, observed);
        }
    }

    /// What has this name; a link of ours that is no `kind` is removed and made again.
    fn find<'a>(&mut self, wanted: &Wanted, observed: &Names<'a>, name: &LinkName, kind: Kind) -> Found<'a> {
        let Some(link) = observed.get(name.as_str()).copied() else {
            return Found::Absent;
        };
        if !wanted.mark.is_on(&link.name, link.group) {
            let (group, ours) = (link.group, wanted.mark.group);
            self.conflicts.insert(Conflict {
                part: Part::Links,
                on: format!("link {name}"),
                evidence: format!("a link of this name is there but not ours: group {group}, ours is {ours}"),
            });
            return Found::Foreign;
        }
        if link.kind == kind {
            return Found::Ours(link);
        }
        self.remove(link);
        Found::Absent
    }

    fn bridge(&mut self, wanted: &Wanted, bridge: &Bridge, found: Option<&Link>, observed: &Observed) {
        let name = &bridge.name;
        match found {
            None => {
                self.steps.insert(Step::CreateBridge {
                    name: name.clone(),
                    mac: bridge.mac,
                    group: wanted.mark.group,
                });
            }
            Some(link) if link.mac != Some(bridge.mac) => {
                self.steps.insert(Step::SetMac {
                    name: name.clone(),
                    mac: bridge.mac,
                });
            }
            Some(_) => {}
        }
        let interface = Interface {
            up: true,
            mtu: Some(wanted.mtu),
            addresses: bridge.addresses.iter().map(|address| (*address).into()).collect(),
            connected: true,
            ..Interface::bare(name.clone())
        };
        self.interface(&interface, found, observed);
    }

    fn tap(
        &mut self,
        wanted: &Wanted,
        name: &LinkName,
        found: Option<&Link>,
        port_of: Option<(&LinkName, Option<u32>)>,
    ) {
        if found.is_none() {
            self.steps.insert(Step::CreateTap {
                name: name.clone(),
                group: wanted.mark.group,
            });
        }
        if let Some((bridge, index)) = port_of
            && (index.is_none() || found.and_then(|link| link.controller) != index)
        {
            self.steps.insert(Step::SetController {
                name: name.clone(),
                bridge: bridge.clone(),
            });
        }
        if port_of.is_some() && found.is_some_and(|link| link.isolated) != wanted.isolated {
            self.steps.insert(Step::SetIsolated {
                name: name.clone(),
                isolated: wanted.isolated,
            });
        }
        let interface = Interface {
            up: true,
            mtu: Some(wanted.mtu),
            ..Interface::bare(name.clone())
        };
        self.mtu_and_up(&interface, found);
    }
}
