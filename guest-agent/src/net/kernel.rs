//! Looking at the kernel's network and carrying out actions on it: thin, nothing is decided here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::socket::Netlink;
use super::wire::{self, List, Message};
use crate::core::net::{Action, LO, Link, Seen};
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
                    Message::Link(link) => seen.links.push(self.with_driver(link)),
                    Message::Address(address) => seen.addresses.push(address),
                    Message::Route(route) => seen.routes.push(route),
                    Message::Done | Message::Answer(_) | Message::Other => {}
                }
            }
        }
        Ok(seen)
    }

    /// Carries out one action.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn act(&mut self, action: &Action) -> io::Result<()> {
        match action {
            Action::Up(index) => self.netlink.change(|s| wire::up(*index, s)),
            Action::Mtu(index, mtu) => self.netlink.change(|s| wire::mtu(*index, *mtu, s)),
            Action::AddAddress(index, prefix) => {
                self.netlink.change(|s| wire::add_address(*index, *prefix, s))
            }
            Action::RemoveAddress(index, prefix) => {
                self.keep_neighbours(*index);
                self.netlink.change(|s| wire::remove_address(*index, *prefix, s))
            }
            Action::AddRoute(index, gateway) => self.netlink.change(|s| wire::add_route(*index, *gateway, s)),
            Action::RemoveRoute(index, gateway) => {
                self.netlink.change(|s| wire::remove_route(*index, *gateway, s))
            }
            Action::Resolver(text) => self.write_resolver(text),
        }
    }

    fn with_driver(&self, mut link: Link) -> Link {
        let driver = fs::read_link(self.files.class_net.join(&link.name).join("device/driver"));
        link.driver = driver
            .ok()
            .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        link
    }

    fn ipv6(&self) -> bool {
        let switch = self.files.sysctl.join("ipv6/conf/lo/disable_ipv6");
        fs::read_to_string(switch).is_ok_and(|text| text.trim() == "0")
    }

    /// Without this switch the kernel removes every other address of the same network with the first one.
    fn keep_neighbours(&mut self, index: u32) {
        if index == LO {
            return;
        }
        for message in self.netlink.list(List::Links).unwrap_or_default() {
            if let Message::Link(link) = message
                && link.index == index
            {
                let switch = format!("ipv4/conf/{}/promote_secondaries", link.name);
                // Where it cannot be set the next look puts back what is ours.
                let _ = fs::write(self.files.sysctl.join(switch), "1");
            }
        }
    }

    fn write_resolver(&self, text: &str) -> io::Result<()> {
        let new = self.files.resolver.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(new, &self.files.resolver)
    }
}
