//! A kernel for tests: takes steps as the real one does, as far as plans depend on it.

use std::net::IpAddr;

use sovereign_protocol::subnet::HostAddress;

use crate::names::{LinkName, Mac};
use crate::observed::{Address, Kind, Link, Observed, Route};
use crate::plan::Step;

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
                self.named(name, |link| link.controller = Some(bridge))
            }
            Step::SetUp { name } => self.set_up(self.index(name)?),
            Step::RemoveAddress { link, address } => self.remove_address(self.index(link)?, *address),
            Step::AddAddress { link, address } => self.add_address(self.index(link)?, *address, true),
            Step::AddRoute { link, address } => {
                let route = connected(self.index(link)?, address.ip(), address.prefix());
                self.state.routes.insert(route).then_some(()).ok_or("EEXIST")
            }
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
            port.controller = port.controller.filter(|controller| *controller != index);
        }
        Ok(())
    }

    /// Sets a link down.
    pub fn set_down(&mut self, index: u32) {
        let _ = self.link(index, |link| link.up = false);
        self.state.routes.retain(|route| route.link != index);
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
    pub fn add_address(&mut self, link: u32, address: HostAddress, ours: bool) -> Result<(), &'static str> {
        let (ip, prefix) = (address.ip(), address.prefix());
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (link, ip, prefix);
        if self.state.addresses.iter().any(same) {
            return Err("EEXIST");
        }
        self.state.addresses.insert(Address {
            link,
            ip,
            prefix,
            ours,
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
    pub fn remove_address(&mut self, link: u32, address: HostAddress) -> Result<(), &'static str> {
        let (ip, prefix) = (address.ip(), address.prefix());
        let before = self.state.addresses.len();
        let same = |a: &Address| (a.link, a.ip, a.prefix) == (link, ip, prefix);
        self.state.addresses.retain(|a| !same(a));
        self.state.routes.remove(&connected(link, ip, prefix));
        (self.state.addresses.len() < before)
            .then_some(())
            .ok_or("EADDRNOTAVAIL")
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

fn connected(link: u32, ip: IpAddr, prefix: u8) -> Route {
    let network = HostAddress::new(ip, prefix).map(|a| a.subnet().network());
    Route {
        link,
        network: network.unwrap_or(ip),
        prefix,
    }
}
