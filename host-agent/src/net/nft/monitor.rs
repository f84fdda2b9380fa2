//! Changes of nf_tables as the kernel tells them: which were of ours, and who made them.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;

use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use sovereign_reconcile::nft::Family;

use super::FAMILIES;
use super::attributes::{Fields, Malformed, Message, messages};
use super::socket::{is_kernel, receive_buffer};
use super::wire::{NEW_GENERATION, SUBSYSTEM};
use crate::net::kernel::passed_socket;

/// What one turn takes at most; with more, somebody has to look.
const MESSAGES: usize = 4_096;
/// Bytes of one read; the kernel's datagrams are smaller.
const DATAGRAM: usize = 64 << 10;
/// Of the group NFNLGRP_NFTABLES, 7.
const GROUPS: u32 = 1 << 6;

/// What others did since the last time somebody asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Something in a table with our name was made, changed or removed, not by us.
    pub ours: bool,
    /// The families of the tables that it was in; all, where it is none of ours.
    pub families: BTreeSet<Family>,
    /// Who did it, where the kernel said; the last one of several.
    pub by: Option<Other>,
    /// Some news were lost: only a look helps.
    pub lost: bool,
}

/// A process as the kernel knew it when it changed something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// Its id in the machine's first namespace of processes.
    pub pid: u32,
    /// The name of its thread, at most 15 bytes.
    pub name: String,
}

/// What is known of the change whose messages are being read: it ends with a new generation.
#[derive(Debug)]
pub(super) struct Folded {
    tag: String,
    /// The socket over which we change things.
    port: u32,
    /// The families of tables with our name that it is about.
    touched: BTreeSet<Family>,
    changes: Changes,
}

impl Folded {
    pub(super) fn new(tag: &str, port: u32) -> Self {
        Self {
            tag: tag.to_owned(),
            port,
            touched: BTreeSet::new(),
            changes: Changes::default(),
        }
    }

    /// Folds one datagram; how many messages it had.
    pub(super) fn fold(&mut self, datagram: &[u8]) -> Result<usize, Malformed> {
        let mut count = 0;
        for message in messages(datagram) {
            let message = message?;
            count += 1;
            if message.kind >> 8 == SUBSYSTEM {
                self.take(&message)?;
            }
        }
        Ok(count)
    }

    fn take(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        let (family, attributes) = message.netfilter()?;
        let mut fields = Fields::<4>::read(attributes)?;
        if message.kind != NEW_GENERATION {
            // The first attribute of every object is the name of its table.
            if message.port != self.port && fields.text(1).is_some_and(|table| table == self.tag) {
                let all: &[Family] = &FAMILIES;
                let family = Family::of(family).filter(|family| all.contains(family));
                match family {
                    Some(family) => drop(self.touched.insert(family)),
                    None => self.touched.extend(all),
                }
            }
            return Ok(());
        }
        let mut touched = std::mem::take(&mut self.touched);
        if !touched.is_empty() && message.port != self.port {
            self.changes.ours = true;
            self.changes.families.append(&mut touched);
            let (pid, name) = (fields.u32(2), fields.text(3));
            self.changes.by = pid.zip(name).map(|(pid, name)| Other {
                pid,
                name: name.into_owned(),
            });
        }
        Ok(())
    }

    pub(super) fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }
}

/// A subscription.
pub(super) struct Monitor {
    socket: TokioSocket,
    buffer: Vec<u8>,
    folded: Folded,
}

impl Monitor {
    /// Subscribes with a socket that was opened in the namespace and not bound.
    pub(super) fn over(socket: OwnedFd, bytes: usize, tag: &str, port: u32) -> io::Result<Self> {
        receive_buffer(&socket, bytes)?;
        let mut socket = passed_socket(socket);
        socket.socket_mut().bind(&SocketAddr::new(0, GROUPS))?;
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(DATAGRAM),
            folded: Folded::new(tag, port),
        })
    }

    /// Waits until there is something to take. Cancel safe: what was read stays.
    pub(super) async fn wait(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() || self.folded.changes.lost {
            return Ok(());
        }
        match self.socket.recv_from(&mut self.buffer).await {
            Err(error) if is_overrun(&error) => self.folded.changes.lost = true,
            Err(error) => return Err(error),
            Ok(from) if !is_kernel(&from) => self.buffer.clear(),
            Ok(_) => {}
        }
        Ok(())
    }

    /// Takes in everything that is there.
    pub(super) fn take(&mut self) -> io::Result<Changes> {
        let mut taken = 0;
        while taken < MESSAGES {
            if self.buffer.is_empty() && self.read()?.is_break() {
                break;
            }
            match self.folded.fold(&self.buffer) {
                Ok(count) => taken += count,
                Err(Malformed) => self.folded.changes.lost = true,
            }
            self.buffer.clear();
        }
        let mut changes = self.folded.take_changes();
        changes.lost |= taken >= MESSAGES;
        Ok(changes)
    }

    fn read(&mut self) -> io::Result<ControlFlow<()>> {
        match self.socket.socket_ref().recv_from(&mut self.buffer, 0) {
            Ok((_, from)) if !is_kernel(&from) => self.buffer.clear(),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ControlFlow::Break(())),
            Err(error) if is_overrun(&error) => {
                self.folded.changes.lost = true;
                self.folded.touched.clear(); // the end of its change may be among the lost
            }
            Err(error) => return Err(error),
        }
        Ok(ControlFlow::Continue(()))
    }
}

fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error())
}
