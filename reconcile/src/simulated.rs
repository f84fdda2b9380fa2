//! A kernel for tests: takes steps as the real one does, as far as plans depend on it.

use std::net::IpAddr;

use sovereign_protocol::interface::Prefix;

use crate::family::Family;
use crate::names::{LinkName, Mac};
use crate::observed::{Address, Kind, Link, Observed};
use crate::plan::Step;
use crate::route::{KERNEL, MAIN, Route, RouteKind, WantedRoute};
use crate::rule::{KERNEL_MAIN, NETD_DEFAULT, NETD_LAST, NETD_VPN, Rule, RuleAction};
use crate::sysctl::Sysctl;

/// A namespace that exists in memory only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Simulated {
    /// What is there.
    pub state: Observed,
    last_index: u32,
}

impl Simulated {
    /// A fresh namespace: `lo`, down.
    pub fn new() -> Self {
        let mut kernel = Self::default();
        kernel.add("lo", Kind::Loopback, 0);
        kernel
    }

    /// Adds a link and gives it the next number.
    pub fn add(&mut self, name: &str, kind: Kind, group: u32) -> u32 {
        if let (Kind::Bridge, Some(bridge)) = (&kind, LinkName::parse(name)) {
            let switches = [
                (Sysctl::ReversePath(bridge.clone()), 0),
                (Sysctl::GuestAdvertisements(bridge), 1),
            ];
            self.state.sysctls.extend(switches);
        }
        self.last_index += 1;
        let index = self.last_index;
        self.state.links.insert(
            index,
            Link {
                index,
                name: name.to_owned(),
                kind,
                group,
                mac: Some(Mac([2, 0, 0, 0, 0, index as u8])),
                mtu: 1500,
                up: false,
                carrier: false,
                controller: None,
                isolated: false,
            },
        );
        index
    }

    /// Takes a step, or refuses it with the kernel's word.
    pub fn apply(&mut self, step: &Step) -> Result<(), &'static str> {
        match step {
            Step::RemoveLink { index, .. } => self.remove(*index),
            Step::CreateBridge { name, mac, group } => {
                let index = self.create(name, Kind::Bridge, *group)?;
                self.link(index, |link| link.mac = Some(*mac))
            }
            Step::CreateTap { name, group } => self.create(name, Kind::Tap, *group).map(drop),
            Step::SetMac { name, mac } => self.named(name, |link| link.mac = Some(*mac)),
            Step::SetMtu { name, mtu } => self.named(name, |link| link.mtu = *mtu),
            Step::SetController { name, bridge } => {
                let bridge = self.index(bridge)?;
                self.named(name, |link| {
                    (link.controller, link.isolated) = (Some(bridge), false)
                })
            }
            Step::LeaveController { name } => self.named(name, |link| {
                (link.controller, link.isolated) = (None, false);
            }),
            Step::SetUp { name } => self.set_up(self.index(name)?),
            Step::SetDown { name } => {
                self.set_down(self.index(name)?);
                Ok(())
            }
            Step::RemoveAddress { link, address } => self.remove_address(self.index(link)?, *address),
            Step::AddAddress { link, address } => self.add_address(self.index(link)?, *address, true),
            Step::AddRoute { route } => self.add_route(route),
            Step::RemoveRoute { route } => self.state.routes.remove(route).then_some(()).ok_or("ESRCH"),
            Step::AddRule { rule } => self
                .state
                .rules
                .insert(rule.clone())
                .then_some(())
                .ok_or("EEXIST"),
            Step::RemoveRule { rule } => self.state.rules.remove(rule).then_some(()).ok_or("ENOENT"),
            Step::SetSysctl { sysctl, to, .. } | Step::RestoreSysctl { sysctl, to, .. } => {
                self.state.sysctls.insert(sysctl.clone(), *to);
                Ok(())
            }
            Step::SetIsolated { name, isolated } => {
                let port = self.index(name)?;
                let link = self.state.links.get(&port).ok_or("ENODEV")?;
                link.controller.ok_or("EINVAL")?;
                self.link(port, |link| link.isolated = *isolated)
            }
            Step::SetFilter { .. } | Step::RemoveFilter { .. } => Ok(()), // none here
        }
    }

    /// The number of a link.
    ///
    /// # Errors
    /// When it is not there.
    pub fn index(&self, name: &LinkName) -> Result<u32, &'static str> {
        self.state
            .link(name.as_str())
            .map(|link| link.index)
            .ok_or("ENODEV")
    }

    /// Takes a link away; of a bridge, its ports stay.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove(&mut self, index: u32) -> Result<(), &'static str> {
        self.state
            .links
            .contains_key(&index)
            .then_some(())
            .ok_or("ENODEV")?;
        self.state.remove_link(index);
        for port in self.state.links.values_mut() {
            if port.controller == Some(index) {
                (port.controller, port.isolated) = (None, false);
            }
        }
        Ok(())
    }

    /// Sets a link down.
    pub fn set_down(&mut self, index: u32) {
        let _ = self.link(index, |link| link.up = false);
        self.state.routes.retain(|route| route.link != Some(index));
    }

    fn set_up(&mut self, index: u32) -> Result<(), &'static str> {
        self.link(index, |link| link.up = true)?;
        let addresses = self.state.addresses.iter().filter(|a| a.link == index);
        self.state
            .routes
            .extend(addresses.map(|a| connected(index, a.ip, a.prefix)));
        Ok(())
    }

    /// Adds an address.
    ///
    /// # Errors
    /// When it is there.
    pub fn add_address(
        &mut self,
        link: u32,
        address: impl Into<Prefix>,
        ours: bool,
    ) -> Result<(), &'static str> {
        let address = address.into();
        let (ip, prefix) = (address.address(), address.length());
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (link, ip, prefix);
        if self.state.addresses.iter().any(same) {
            return Err("EEXIST");
        }
        self.state.addresses.insert(Address {
            link,
            ip,
            prefix,
            ours,
            passed_over: false,
        });
        if self.state.links.get(&link).is_some_and(|link| link.up) {
            self.state.routes.insert(connected(link, ip, prefix));
        }
        Ok(())
    }

    /// Takes an address away.
    ///
    /// # Errors
    /// When it is not there.
    pub fn remove_address(&mut self, link: u32, address: impl Into<Prefix>) -> Result<(), &'static str> {
        let address = address.into();
        let (ip, prefix) = (address.address(), address.length());
        let before = self.state.addresses.len();
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (link, ip, prefix);
        self.state.addresses.retain(|a| !same(a));
        self.state.routes.remove(&connected(link, ip, prefix));
        (self.state.addresses.len() < before)
            .then_some(())
            .ok_or("EADDRNOTAVAIL")
    }

    /// A route of our table takes the place of one to the same destination, as NLM_F_REPLACE does.
    fn add_route(&mut self, wanted: &WantedRoute) -> Result<(), &'static str> {
        let link = self.index(&wanted.link)?;
        let up = self.state.links.get(&link).is_some_and(|link| link.up);
        up.then_some(()).ok_or("ENETDOWN")?;
        let route = Route {
            table: wanted.table,
            to: wanted.to,
            metric: wanted.metric(),
            link: Some(link),
            gateway: wanted.gateway,
            kind: RouteKind::Unicast,
            protocol: wanted.protocol(),
        };
        let place = |r: &Route| (r.table, r.to, r.metric);
        if wanted.replaces() {
            self.state.routes.retain(|other| place(other) != place(&route));
        }
        self.state.routes.insert(route).then_some(()).ok_or("EEXIST")
    }

    fn create(&mut self, name: &LinkName, kind: Kind, group: u32) -> Result<u32, &'static str> {
        if self.state.link(name.as_str()).is_some() {
            return Err("EEXIST");
        }
        Ok(self.add(name.as_str(), kind, group))
    }

    fn named(&mut self, name: &LinkName, change: impl FnOnce(&mut Link)) -> Result<(), &'static str> {
        self.link(self.index(name)?, change)
    }

    /// Changes a link.
    ///
    /// # Errors
    /// When it is not there.
    pub fn link(&mut self, index: u32, change: impl FnOnce(&mut Link)) -> Result<(), &'static str> {
        self.state.links.get_mut(&index).map(change).ok_or("ENODEV")
    }
}

/// # Panics
/// Never: the length is that of an address.
fn connected(link: u32, ip: IpAddr, prefix: u8) -> Route {
    let place = Prefix::new(ip, prefix).expect("the length of an address's prefix");
    Route {
        table: MAIN,
        to: place.network(),
        metric: if ip.is_ipv4() { 0 } else { 256 },
        link: Some(link),
        gateway: None,
        kind: RouteKind::Unicast,
        protocol: KERNEL,
    }
}

/// A plain Linux host with two uplinks, `eth0` before `eth1`.
#[must_use]
pub fn router() -> Simulated {
    let mut kernel = Simulated::new();
    for (n, name) in ["eth0", "eth1"].into_iter().enumerate() {
        let index = uplink(&mut kernel, name);
        let mut route = default_route(MAIN, index, ["10.0.0.1", "10.1.0.1"][n]);
        route.metric = 100 * (n as u32 + 1);
        kernel.state.routes.insert(route);
    }
    let main = Rule::ours(Family::V4, KERNEL_MAIN, RuleAction::Lookup(MAIN));
    kernel.state.rules.insert(Rule {
        protocol: KERNEL,
        ..main
    });
    kernel
}

/// A phone with Wi-Fi, a cellular network and a tunnel, as netd leaves it (FACTS section 2).
#[must_use]
pub fn phone(default: &str, vpn: bool) -> Simulated {
    let mut kernel = Simulated::new();
    let netd = |priority, action| Rule {
        protocol: 0,
        ..Rule::ours(Family::V4, priority, action)
    };
    let of_host = |rule| Rule {
        iif: Some("lo".to_owned()),
        ..rule
    };
    for (name, gateway) in [
        ("wlan0", "10.0.0.1"),
        ("rmnet1", "10.64.0.1"),
        ("tun1", "10.99.0.1"),
    ] {
        let index = uplink(&mut kernel, name);
        let table = 1_000 + index;
        kernel.state.routes.insert(default_route(table, index, gateway));
        if name == default {
            let rule = of_host(netd(NETD_DEFAULT, RuleAction::Lookup(table)));
            kernel.state.rules.insert(Rule {
                mark: Some((0, 0xffff)),
                ..rule
            });
        }
        if name == "tun1" && vpn {
            let rule = of_host(netd(NETD_VPN, RuleAction::Lookup(table)));
            kernel.state.rules.insert(Rule {
                uids: Some((0, 99_999)),
                mark: Some((0, 0x20000)),
                ..rule
            });
            let marked = netd(NETD_VPN, RuleAction::Lookup(table));
            kernel.state.rules.insert(Rule {
                mark: Some((0xc0066, 0xcffff)),
                ..marked
            });
        }
    }
    kernel
        .state
        .rules
        .insert(netd(NETD_LAST, RuleAction::Unreachable));
    kernel
}

fn uplink(kernel: &mut Simulated, name: &str) -> u32 {
    let index = kernel.add(name, Kind::Other, 0);
    if let Some(link) = kernel.state.links.get_mut(&index) {
        (link.up, link.carrier) = (true, true);
    }
    index
}

/// A default route of somebody else's.
///
/// # Panics
/// When the gateway is no address.
#[must_use]
pub fn default_route(table: u32, link: u32, gateway: &str) -> Route {
    let gateway: IpAddr = gateway.parse().expect("an address");
    Route {
        table,
        to: Family::of(gateway).everywhere(),
        metric: 0,
        link: Some(link),
        gateway: Some(gateway),
        kind: RouteKind::Unicast,
        protocol: 3,
    }
}
