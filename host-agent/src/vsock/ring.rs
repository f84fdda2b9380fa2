//! One virtqueue of the guest: taking chains, giving them back, asking for and giving notice.
//!
//! A guest that breaks the rules of its ring gets [`Broken`]; the ring is then left alone until
//! its driver sets it up again.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;

use tokio::task::AbortHandle;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::header::{HEADER_BYTES, Header};

/// Most entries a ring may have; Linux and QEMU use 128.
pub(super) const MAX_ENTRIES: u16 = 1024;

/// Why a ring is not served any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The ring's indices or tables cannot be read or do not make sense.
    #[error("the ring is unreadable: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The ring claims entries that cannot be read.
    #[error("the ring announces entries that cannot be read")]
    Entries,
    /// A receive buffer has no room for a header and one byte.
    #[error("a receive buffer is too small")]
    Small,
    /// Guest memory could not be written.
    #[error("guest memory is not writable: {0}")]
    Copy(#[from] std::io::Error),
}

/// A packet the guest sent.
pub(super) enum Packet {
    /// A header, and its payload in the caller's buffer.
    Whole(Header),
    /// A header that promises more bytes than follow, or more than a connection may hold.
    Malformed(Header),
    /// Shorter than a header: there is nobody to answer.
    Short,
}

/// One virtqueue and the descriptors that go with it.
#[derive(Debug)]
pub(super) struct Ring {
    pub(super) queue: Queue,
    /// Interrupts the guest.
    pub(super) call: Option<File>,
    /// The task that waits for the guest's kicks.
    pub(super) task: Option<AbortHandle>,
    /// SET_VRING_ENABLE, or no protocol features.
    pub(super) enabled: bool,
    pub(super) broken: bool,
    used: bool,
}

impl Ring {
    pub(super) fn new() -> Self {
        let queue = Queue::new(MAX_ENTRIES).expect("1024 is a power of two");
        Ring {
            queue,
            call: None,
            task: None,
            enabled: false,
            broken: false,
            used: false,
        }
    }

    /// May be touched.
    pub(super) fn running(&self) -> bool {
        self.queue.ready() && self.enabled && !self.broken
    }

    /// Stops serving; addresses and positions stay for GET_VRING_BASE.
    pub(super) fn stop(&mut self) {
        self.queue.set_ready(false);
        self.used = false;
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// Takes the position of the used ring from guest memory, which outlives a restart of ours.
    pub(super) fn adopt_used(&mut self, memory: &GuestMemoryMmap) {
        if let Ok(index) = self.queue.used_idx(memory, Ordering::Acquire) {
            self.queue.set_next_used(index.0);
        }
    }

    /// The next chain, or `None` if the guest offers none.
    fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Broken> {
        // None from the iterator means "empty" and "unreadable" alike: None twice with more in
        // between is a broken ring.
        for _ in 0..2 {
            if let Some(chain) = self.queue.iter(memory)?.next() {
                return Ok(Some(chain));
            }
            if self.queue.avail_idx(memory, Ordering::Acquire)?.0 == self.queue.next_avail() {
                return Ok(None);
            }
        }
        Err(Broken::Entries)
    }

    /// [`Self::pop`], asking for a kick before it says `None`.
    fn pop_or_ask<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, Broken> {
        loop {
            if let Some(chain) = self.pop(memory)? {
                return Ok(Some(chain));
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(None);
            }
        }
    }

    fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), Broken> {
        self.queue.add_used(memory, head, len)?;
        self.used = true;
        Ok(())
    }

    /// Takes the guest's next packet, its payload into `payload` (at most `limit` bytes).
    /// `None`: nothing there, and a kick will come.
    pub(super) fn take_packet(
        &mut self,
        memory: &GuestMemoryMmap,
        payload: &mut Vec<u8>,
        limit: usize,
    ) -> Result<Option<Packet>, Broken> {
        payload.clear();
        let Some(chain) = self.pop_or_ask(memory)? else {
            return Ok(None);
        };
        let head = chain.head_index();
        let mut reader = chain.reader(memory)?;
        let mut bytes = [0; HEADER_BYTES];
        let packet = if reader.read_exact(&mut bytes).is_err() {
            Packet::Short
        } else {
            let header = Header::decode(&bytes);
            let len = header.len as usize;
            if len > limit || len > reader.available_bytes() {
                Packet::Malformed(header)
            } else {
                payload.resize(len, 0);
                reader.read_exact(payload)?;
                Packet::Whole(header)
            }
        };
        self.give_back(memory, head, 0)?;
        Ok(Some(packet))
    }

    /// Puts one packet into the guest's next receive buffer, as much of `payload` as fits.
    /// Returns the payload bytes taken; `None`: no buffer, and a kick will come.
    pub(super) fn put_packet(
        &mut self,
        memory: &GuestMemoryMmap,
        mut header: Header,
        payload: &[u8],
    ) -> Result<Option<usize>, Broken> {
        let Some(chain) = self.pop_or_ask(memory)? else {
            return Ok(None);
        };
        let head = chain.head_index();
        let mut writer = chain.writer(memory)?;
        let room = writer.available_bytes();
        if room <= HEADER_BYTES {
            return Err(Broken::Small);
        }
        let bytes = payload.len().min(room - HEADER_BYTES);
        header.len = u32::try_from(bytes).unwrap_or(0);
        writer.write_all(&header.encode())?;
        writer.write_all(&payload[..bytes])?;
        self.give_back(memory, head, HEADER_BYTES as u32 + header.len)?;
        Ok(Some(bytes))
    }

    /// Interrupts the guest if chains were given back and it wants to know.
    pub(super) fn signal(&mut self, memory: &GuestMemoryMmap) {
        if !std::mem::take(&mut self.used) || !self.running() {
            return;
        }
        if self.queue.needs_notification(memory).unwrap_or(true)
            && let Some(mut call) = self.call.as_ref()
        {
            // The only possible failure is a counter at its limit: the guest has been told.
            let _ = call.write(&1u64.to_ne_bytes());
        }
    }
}
