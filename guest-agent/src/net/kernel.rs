//! Looking at the kernel's network and carrying out changes of it: thin, nothing is decided here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sovereign_protocol::link_name::LinkName;
use sovereign_reconcile::plan::Step;

use super::socket::Netlink;
use super::wire::{self, List, Message};
use crate::core::net::{Change, LO, Seen};
use crate::places;

/// Files beside netlink. Tests have their own.
#[derive(Debug, Clone)]
pub struct Files {
    /// One directory per interface, with a link to its device and that one's driver.
    pub class_net: PathBuf,
    /// Switches of the kernel's network code.
    pub sysctl: PathBuf,
    /// resolv.conf, where /etc links to.
    pub resolver: PathBuf,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            class_net: "/sys/class/net".into(),
            sysctl: "/proc/sys/net".into(),
            resolver: Path::new(places::ETC).join("resolv.conf"),
        }
    }
}

/// The network of the namespace in which this was opened.
#[derive(Debug)]
pub struct Kernel {
    netlink: Netlink,
    files: Files,
    /// The numbers of links, as of the last look.
    indices: BTreeMap<String, u32>,
}

impl Kernel {
    /// Opens it.
    ///
    /// # Errors
    /// The system's own.
    pub fn open(files: Files) -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            files,
            indices: BTreeMap::new(),
        })
    }

    /// Looks at everything.
    ///
    /// # Errors
    /// The kernel's refusal of a list.
    pub fn look(&mut self) -> io::Result<Seen> {
        let mut seen = Seen {
            resolver: fs::read_to_string(&self.files.resolver).ok(),
            ipv6: self.ipv6(),
            ..Seen::default()
        };
        for list in [List::Links, List::Addresses, List::Routes] {
            for message in self.netlink.list(list)? {
                match message {
                    Message::Link(link) => {
                        seen.drivers
                            .extend(self.driver(&link.name).map(|driver| (link.index, driver)));
                        seen.network.links.insert(link.index, link);
                    }
                    Message::Address(address, state) => {
                        let place = (address.link, address.ip);
                        seen.unusable.extend(state.map(|state| (place, state)));
                        seen.network.addresses.insert(address);
                    }
                    Message::Route(route) => drop(seen.network.routes.insert(route)),
                    Message::Done | Message::Answer(_) | Message::Other => {}
                }
            }
        }
        let links = seen.network.links.values();
        self.indices = links.map(|link| (link.name.clone(), link.index)).collect();
        Ok(seen)
    }

    /// Carries out one change of what the last look saw.
    ///
    /// # Errors
    /// The kernel's refusal; `Unsupported` for a change that no guest's plan has.
    pub fn act(&mut self, change: &Change) -> io::Result<()> {
        match change {
            Change::Network(step) => self.step(step),
            Change::Resolver(text) => self.write_resolver(text),
        }
    }

    fn step(&mut self, step: &Step) -> io::Result<()> {
        match step {
            Step::SetUp { name } => {
                let index = self.index(name)?;
                self.netlink.change(|s| wire::up(index, s))
            }
            Step::SetDown { name } => {
                let index = self.index(name)?;
                self.netlink.change(|s| wire::down(index, s))
            }
            Step::SetMtu { name, mtu } => {
                let index = self.index(name)?;
                self.netlink.change(|s| wire::mtu(index, *mtu, s))
            }
            Step::AddAddress { link, address } => {
                let index = self.index(link)?;
                self.netlink.change(|s| wire::add_address(index, *address, s))
            }
            Step::RemoveAddress { link, address } => {
                let index = self.index(link)?;
                self.keep_neighbours(index, link);
                self.netlink.change(|s| wire::remove_address(index, *address, s))
            }
            Step::AddRoute { route } => {
                let (index, metric) = (self.index(&route.link)?, route.metric());
                let gateway = route.gateway.ok_or(io::ErrorKind::Unsupported)?;
                self.netlink
                    .change(|s| wire::add_route(index, gateway, metric, s))
            }
            Step::RemoveRoute { route } => {
                let place = route.link.zip(route.gateway);
                let (index, gateway) = place.ok_or(io::ErrorKind::Unsupported)?;
                let metric = route.metric;
                self.netlink
                    .change(|s| wire::remove_route(index, gateway, metric, s))
            }
            _ => Err(io::ErrorKind::Unsupported.into()), // links are made and filters set on hosts only
        }
    }

    fn index(&self, name: &LinkName) -> io::Result<u32> {
        let index = self.indices.get(name.as_str()).copied();
        index.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
    }

    fn driver(&self, link: &str) -> Option<String> {
        let driver = fs::read_link(self.files.class_net.join(link).join("device/driver"));
        Some(driver.ok()?.file_name()?.to_string_lossy().into_owned())
    }

    fn ipv6(&self) -> bool {
        let switch = self.files.sysctl.join("ipv6/conf/lo/disable_ipv6");
        fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0")
    }

    /// Without this switch the kernel removes every other address of the same network with the first one.
    fn keep_neighbours(&mut self, index: u32, link: &LinkName) {
        if index == LO {
            return;
        }
        let switch = format!("ipv4/conf/{link}/promote_secondaries");
        // Where it cannot be set the next look puts back what is ours.
        let _ = fs::write(self.files.sysctl.join(switch), "1");
    }

    fn write_resolver(&self, text: &str) -> io::Result<()> {
        let new = self.files.resolver.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, &self.files.resolver)
    }
}
