//! Everything known about one guest's device: memory, rings, connections.
//!
//! Lives behind one mutex, held for one batch and never across an await. Every entry point is
//! reached through [`super::Shared::with`], which calls [`Guest::settle`] before it unlocks.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;

use super::connection::{Connection, End, Phase, Say, Taken};
use super::header::{HOST_CID, Header, Op, TYPE_STREAM};
use super::ring::{Broken, Packet, Ring};
use super::{Limits, Status};

/// Queue numbers of virtio-vsock, from the driver's point of view.
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
/// Host-to-guest, guest-to-host, events. QEMU serves the event ring itself.
pub(super) const RINGS: usize = 3;

/// Packets taken from the guest while the mutex is held once.
const BATCH: usize = 64;

/// Resets for unknown connections that may wait for a receive buffer. When the list is full the
/// guest's packets stay where they are.
const MAX_STRAYS: usize = 128;

/// How long a dropped stream waits for the guest to confirm.
pub(super) const LINGER: Duration = Duration::from_secs(5);

/// Names a connection for its whole life; never reused, unlike ports.
pub(super) type Id = u64;

/// Where a region of guest memory lies in QEMU's address space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) user: u64,
    pub(super) guest: u64,
    pub(super) bytes: u64,
}

/// One guest's device.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) cid: u64,
    pub(super) limits: Limits,
    pub(super) memory: Option<Arc<GuestMemoryMmap>>,
    pub(super) regions: Vec<Region>,
    pub(super) rings: [Ring; RINGS],
    pub(super) connections: BTreeMap<Id, Connection>,
    /// (host port, guest port) of every connection that is not dead.
    ports: BTreeMap<(u32, u32), Id>,
    next_id: Id,
    next_port: u32,
    talkers: VecDeque<Id>,
    strays: VecDeque<Header>,
    /// Writers that wait for a receive buffer of the guest, first come first.
    pub(super) waiters: VecDeque<Id>,
    lingering: VecDeque<(Instant, Id)>,
    scratch: Vec<u8>,
    /// Bytes held for readers, over all connections.
    pub(super) held: usize,
    /// Where the two data rings were taken from us, until they come back.
    left_at: [Option<u16>; 2],
    /// How often a new driver came, or QEMU went away.
    pub(super) resets: u64,
    pub(super) stopped: bool,
    /// The status last published.
    pub(super) told: Status,
    /// To be woken once the mutex is free.
    pub(super) wakes: Vec<Waker>,
    /// The transmit ring was left because `strays` was full.
    tx_held_back: bool,
    /// [`super::Shared::with`] shall wake the transmit task.
    pub(super) tx_due: bool,
    /// [`super::Shared::with`] shall wake the linger task.
    pub(super) linger_due: bool,
}

impl Guest {
    pub(super) fn new(cid: u64, limits: Limits) -> Self {
        Guest {
            cid,
            limits,
            memory: None,
            regions: Vec::new(),
            rings: std::array::from_fn(|_| Ring::new()),
            connections: BTreeMap::new(),
            ports: BTreeMap::new(),
            next_id: 0,
            next_port: 1 << 30,
            talkers: VecDeque::new(),
            strays: VecDeque::new(),
            waiters: VecDeque::new(),
            lingering: VecDeque::new(),
            scratch: Vec::new(),
            held: 0,
            left_at: [None; 2],
            resets: 0,
            stopped: false,
            told: Status::default(),
            wakes: Vec::new(),
            tx_held_back: false,
            tx_due: false,
            linger_due: false,
        }
    }

    /// The guest's driver is up and both data rings can be used.
    pub(super) fn ready(&self) -> bool {
        !self.stopped && self.memory.is_some() && self.rings[RX].running() && self.rings[TX].running()
    }

    // ---- connections ---------------------------------------------------------------------

    /// Adds a connection whose REQUEST is due. `None`: the limit is reached.
    pub(super) fn open(&mut self, guest_port: u32) -> Option<Id> {
        if self.connections.len() >= self.limits.connections {
            return None;
        }
        while self.ports.contains_key(&(self.next_port, guest_port)) {
            self.next_port = next_port(self.next_port);
        }
        let host_port = self.next_port;
        self.next_port = next_port(host_port);
        let id = self.next_id;
        self.next_id += 1;
        let connection = Connection::dialing(host_port, guest_port, self.limits.buffer_bytes);
        self.connections.insert(id, connection);
        self.ports.insert((host_port, guest_port), id);
        self.touch(id);
        Some(id)
    }

    /// The owner of `id` is gone.
    pub(super) fn release(&mut self, id: Id, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        self.held -= connection.release();
        if connection.lingers() {
            self.lingering.push_back((now + LINGER, id));
            self.linger_due = true;
        }
        self.touch(id);
    }

    /// Breaks off what lingers past its time. Returns when to come again.
    pub(super) fn sweep(&mut self, now: Instant) -> Option<Instant> {
        while let Some((due, id)) = self.lingering.front().copied() {
            let lingers = self.connections.get(&id).is_some_and(Connection::lingers);
            if lingers && due > now {
                return Some(due);
            }
            self.lingering.pop_front();
            if lingers && let Some(connection) = self.connections.get_mut(&id) {
                connection.break_off(End::Closed);
                self.touch(id);
            }
        }
        None
    }

    /// To be called after every change of a connection: lists it if it has something to say,
    /// forgets its ports when dead, and forgets it altogether when nobody needs it.
    pub(super) fn touch(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.next_say().is_some() && !connection.talking {
            connection.talking = true;
            self.talkers.push_back(id);
        }
        if matches!(connection.phase, Phase::Dead(_)) {
            self.ports.remove(&(connection.host_port, connection.guest_port));
            self.wakes.extend(connection.reader.take());
            self.wakes.extend(connection.writer.take());
        }
        if connection.finished() {
            self.connections.remove(&id);
        }
    }

    /// Ends every stream at once, because the guest's driver is gone.
    fn end_all(&mut self) {
        self.strays.clear();
        self.talkers.clear();
        self.waiters.clear();
        self.lingering.clear();
        self.tx_held_back = false;
        let ids: Vec<Id> = self.connections.keys().copied().collect();
        for id in ids {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.talking = false;
                connection.waiting = false;
                self.held -= connection.guest_reset();
                self.touch(id);
            }
        }
    }

    // ---- rings ---------------------------------------------------------------------------

    /// GET_VRING_BASE: once per ring, on a reset and on a pause in the same words. Streams wait:
    /// [`Self::place_ring`] shows which it was.
    pub(super) fn stop_ring(&mut self, index: usize) -> u16 {
        self.rings[index].stop();
        let base = self.rings[index].queue.next_avail();
        if let Some(left) = self.left_at.get_mut(index) {
            *left = Some(base);
        }
        base
    }

    /// SET_VRING_BASE: after a pause a ring goes on where it was left; a new driver begins anew,
    /// and nothing of the old one lives on. (A ring that was left at 0 has carried nothing.)
    pub(super) fn place_ring(&mut self, index: usize, base: u16) {
        let left = self.left_at.get_mut(index).and_then(Option::take);
        if left.is_some_and(|left| left != base) {
            self.left_at = [None; 2];
            self.resets += 1;
            self.end_all();
        }
        self.rings[index].queue.set_next_avail(base);
    }

    /// QEMU hung up or the device ends: nothing of it can be trusted any more.
    pub(super) fn disconnect(&mut self) {
        self.resets += u64::from(self.rings[RX].queue.ready());
        for ring in &mut self.rings {
            ring.stop();
            *ring = Ring::new();
        }
        self.left_at = [None; 2];
        self.end_all();
        self.memory = None;
        self.regions.clear();
    }

    /// A ring came up or the guest refilled one: writers may go on.
    pub(super) fn wake_writers(&mut self) {
        for id in std::mem::take(&mut self.waiters) {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.waiting = false;
                self.wakes.extend(connection.writer.take());
            }
        }
    }

    fn broke(&mut self, index: usize, reason: &Broken) {
        tracing::warn!(ring = index, %reason, "vsock ring of the guest stopped");
        self.rings[index].broken = true;
        self.end_all();
    }

    /// Puts one packet into the receive ring. `None`: no room now.
    pub(super) fn put(&mut self, header: Header, payload: &[u8]) -> Option<usize> {
        let memory = self.memory.clone()?;
        if !self.rings[RX].running() {
            return None;
        }
        match self.rings[RX].put_packet(&memory, header, payload) {
            Ok(taken) => taken,
            Err(reason) => {
                self.broke(RX, &reason);
                None
            }
        }
    }

    /// Says what is due, wakes the transmit task if it was held back, and interrupts the guest.
    pub(super) fn settle(&mut self) {
        self.say_strays();
        self.say_round();
        if self.tx_held_back && self.strays.len() < MAX_STRAYS {
            self.tx_held_back = false;
            self.tx_due = true;
        }
        if let Some(memory) = &self.memory {
            self.rings[RX].signal(memory);
            self.rings[TX].signal(memory);
        }
    }

    fn say_strays(&mut self) {
        while let Some(header) = self.strays.front().copied() {
            if self.put(header, &[]).is_none() {
                return;
            }
            self.strays.pop_front();
        }
    }

    /// One packet for each connection in turn until all have spoken or the ring is full.
    fn say_round(&mut self) {
        while let Some(id) = self.talkers.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.talking = false;
            let Some(say) = connection.next_say() else {
                continue;
            };
            let header = control(self.cid, connection, say);
            if self.put(header, &[]).is_none() {
                // `put` may have ended everything; only a live connection keeps its turn.
                if let Some(connection) = self.connections.get_mut(&id)
                    && connection.next_say().is_some()
                {
                    connection.talking = true;
                    self.talkers.push_front(id);
                }
                return;
            }
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.said(say);
            }
            self.touch(id);
        }
    }

    /// Takes packets from the guest, at most one batch. True: come again soon.
    pub(super) fn take_batch(&mut self) -> bool {
        let Some(memory) = self.memory.clone() else {
            return false;
        };
        for _ in 0..BATCH {
            if !self.rings[TX].running() {
                return false;
            }
            if self.strays.len() >= MAX_STRAYS {
                self.tx_held_back = true;
                return false;
            }
            let mut payload = std::mem::take(&mut self.scratch);
            let limit = self.limits.buffer_bytes as usize;
            let taken = self.rings[TX].take_packet(&memory, &mut payload, limit);
            match taken {
                Ok(None) => {
                    self.scratch = payload;
                    return false;
                }
                Ok(Some(packet)) => self.dispatch(packet, &payload),
                Err(reason) => self.broke(TX, &reason),
            }
            self.scratch = payload;
        }
        true
    }

    fn dispatch(&mut self, packet: Packet, payload: &[u8]) {
        let (header, well_formed) = match packet {
            Packet::Whole(header) => (header, true),
            Packet::Malformed(header) => (header, false),
            Packet::Short => return,
        };
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return; // nobody to answer: the address is not the guest's own
        }
        let found = self.ports.get(&(header.dst_port, header.src_port)).copied();
        let Some(id) = found.filter(|_| header.kind == TYPE_STREAM) else {
            if header.op != Op::Reset {
                self.strays.push_back(header.reset_reply());
            }
            return;
        };
        let room = self.limits.total_bytes.saturating_sub(self.held);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let was = connection.phase;
        if well_formed {
            match connection.receive(&header, payload, room) {
                Taken::Held(bytes) => self.held += bytes,
                Taken::Overrun => tracing::debug!(port = header.src_port, "vsock credit overrun"),
            }
        } else {
            connection.break_off(End::Reset);
        }
        if connection.held() > 0 || connection.read_finished() {
            self.wakes.extend(connection.reader.take());
        }
        if connection.phase != was || connection.credit() > 0 || connection.write_finished() {
            self.wakes.extend(connection.writer.take());
        }
        self.touch(id);
    }
}

fn next_port(port: u32) -> u32 {
    // Stay clear of privileged ports and of VMADDR_PORT_ANY (u32::MAX).
    if port >= u32::MAX - 1 { 1 << 30 } else { port + 1 }
}

/// The header of a packet from `connection`.
pub(super) fn header(cid: u64, connection: &Connection, op: Op, flags: u32) -> Header {
    let (buf_alloc, fwd_cnt) = connection.credit_fields();
    Header {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: connection.host_port,
        dst_port: connection.guest_port,
        len: 0,
        kind: TYPE_STREAM,
        op,
        flags,
        buf_alloc,
        fwd_cnt,
    }
}

fn control(cid: u64, connection: &Connection, say: Say) -> Header {
    let (op, flags) = match say {
        Say::Reset => (Op::Reset, 0),
        Say::Request => (Op::Request, 0),
        Say::Shutdown(flags) => (Op::Shutdown, flags),
        Say::CreditUpdate => (Op::CreditUpdate, 0),
        Say::CreditRequest => (Op::CreditRequest, 0),
    };
    header(cid, connection, op, flags)
}
