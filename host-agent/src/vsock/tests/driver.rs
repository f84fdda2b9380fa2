//! A driver's side of two rings, written by hand so that it can also be wrong.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::vsock::header::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};

pub(super) const CID: u64 = 7;
pub(super) const MEMORY_BYTES: usize = 1 << 20;
pub(super) const ENTRIES: u16 = 16;
pub(super) const RX_BASE: u64 = 0x1000;
pub(super) const TX_BASE: u64 = 0x4000;
const BUFFERS: u64 = 0x10000;
const RX_BUFFER_BYTES: u32 = 1024;
/// Each descriptor of a ring owns one slot of guest memory.
const SLOT_BYTES: u64 = 0x4000;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// Offsets of a ring's three parts from its base.
pub(super) const AVAIL: u64 = 0x1000;
pub(super) const USED: u64 = 0x2000;

/// One ring as its driver sees it. No EVENT_IDX.
pub(super) struct DriverRing {
    base: u64,
    slots: u64,
    avail: u16,
    seen: u16,
}

impl DriverRing {
    fn new(base: u64, slots: u64) -> Self {
        DriverRing {
            base,
            slots,
            avail: 0,
            seen: 0,
        }
    }

    pub(super) fn slot(&self, index: u16) -> u64 {
        self.slots + u64::from(index) * SLOT_BYTES
    }

    pub(super) fn describe(
        &self,
        memory: &GuestMemoryMmap,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = GuestAddress(self.base + 16 * u64::from(index));
        memory.write_slice(&bytes, at).unwrap();
    }

    /// Offers the chain that starts at `head`.
    pub(super) fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let at = self.base + AVAIL + 4 + 2 * u64::from(self.avail % ENTRIES);
        memory.write_obj(head.to_le(), GuestAddress(at)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_index(memory, self.avail);
    }

    pub(super) fn set_avail_index(&self, memory: &GuestMemoryMmap, index: u16) {
        memory
            .write_obj(index.to_le(), GuestAddress(self.base + AVAIL + 2))
            .unwrap();
    }

    /// The next chain the device gave back: its head and the bytes written.
    pub(super) fn used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        if u16::from_le(index) == self.seen {
            return None;
        }
        let at = self.base + USED + 4 + 8 * u64::from(self.seen % ENTRIES);
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.seen = self.seen.wrapping_add(1);
        Some((u16::try_from(u32::from_le(head)).unwrap(), u32::from_le(len)))
    }
}

/// A guest's vsock driver.
pub(super) struct Driver {
    pub(super) memory: GuestMemoryMmap,
    pub(super) rx: DriverRing,
    pub(super) tx: DriverRing,
    next_tx: u16,
}

impl Driver {
    /// Zeroes the rings and offers every receive buffer.
    pub(super) fn new(memory: GuestMemoryMmap) -> Self {
        memory.write_slice(&[0; 0x8000], GuestAddress(0)).unwrap();
        let rx = DriverRing::new(RX_BASE, BUFFERS);
        let tx = DriverRing::new(TX_BASE, BUFFERS + SLOT_BYTES * u64::from(ENTRIES));
        let mut driver = Driver {
            memory,
            rx,
            tx,
            next_tx: 0,
        };
        for index in 0..ENTRIES {
            driver.refill(index);
        }
        driver
    }

    fn refill(&mut self, index: u16) {
        let slot = self.rx.slot(index);
        self.rx
            .describe(&self.memory, index, (slot, RX_BUFFER_BYTES, WRITE, 0));
        self.rx.offer(&self.memory, index);
    }

    /// The next packet from the host; its buffer is offered again unless `keep`.
    pub(super) fn receive(&mut self, keep: bool) -> Option<(Header, Vec<u8>)> {
        let (index, len) = self.rx.used(&self.memory)?;
        let mut bytes = vec![0; len as usize];
        self.memory
            .read_slice(&mut bytes, GuestAddress(self.rx.slot(index)))
            .unwrap();
        if !keep {
            self.refill(index);
        }
        let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap());
        let payload = bytes.split_off(HEADER_BYTES);
        assert_eq!(payload.len(), header.len as usize);
        Some((header, payload))
    }

    /// Sends raw bytes as one chain of one descriptor.
    pub(super) fn send_raw(&mut self, bytes: &[u8]) {
        let index = self.next_tx;
        self.next_tx = (self.next_tx + 1) % ENTRIES;
        let slot = self.tx.slot(index);
        self.memory.write_slice(bytes, GuestAddress(slot)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.tx.describe(&self.memory, index, (slot, len, 0, 0));
        self.tx.offer(&self.memory, index);
        while self.tx.used(&self.memory).is_some() {}
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: u32::try_from(payload.len()).unwrap(),
            ..header
        };
        self.send_raw(&[&header.encode()[..], payload].concat());
    }
}

/// A packet of the guest that answers `heard`.
pub(super) fn answer(heard: &Header, op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: heard.dst_port,
        dst_port: heard.src_port,
        len: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buf_alloc: 64 * 1024,
        fwd_cnt: 0,
    }
}
