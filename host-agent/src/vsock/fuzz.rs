//! The device's parsers as plain functions for the fuzz workspace: what a guest writes into its memory.

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::connection::Connection;
use super::header::{HEADER_BYTES, Header};
use super::ring::Ring;

const BUFFER_BYTES: u32 = 4 << 10;
const MEMORY_BYTES: usize = 64 << 10;
const ENTRIES: u16 = 16;
/// Where a ring's parts lie; its descriptors begin at 0.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// Headers: each bit pattern is one, and is written the same.
pub fn header(data: &[u8]) {
    for bytes in data.as_chunks::<HEADER_BYTES>().0 {
        let header = Header::decode(bytes);
        assert_eq!(header.encode(), *bytes);
        let _ = header.reset_reply();
    }
}

/// Packets to one connection; after each header's length follow as many bytes, which are made up.
pub fn connection(data: &[u8]) {
    let mut connection = Connection::dialing(1, 2, BUFFER_BYTES);
    let payload = [7; 2 * BUFFER_BYTES as usize];
    for bytes in data.as_chunks::<HEADER_BYTES>().0 {
        for _ in 0..4 {
            if let Some(say) = connection.next_say() {
                connection.said(say);
            }
        }
        let header = Header::decode(bytes);
        let length = header.len as usize % payload.len();
        let _ = connection.receive(&header, &payload[..length], BUFFER_BYTES as usize);
        assert!(connection.held() <= BUFFER_BYTES as usize);
        connection.wrote(connection.credit().min(header.flags));
        if header.fwd_cnt.is_multiple_of(3) {
            connection.read(header.src_port as usize, |_| {});
        }
    }
    let held = connection.held();
    assert_eq!(
        connection.release(),
        held,
        "the guest's share of memory is given back"
    );
}

/// A ring and the memory around it, all written by the guest: packets out of it, then one into it.
pub fn ring(data: &[u8]) {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]);
    let memory = memory.expect("64 KiB of memory");
    let length = data.len().min(MEMORY_BYTES);
    memory
        .write_slice(&data[..length], GuestAddress(0))
        .expect("it fits");
    let mut ring = Ring::new();
    ring.queue.set_size(ENTRIES);
    ring.queue.set_desc_table_address(Some(0), Some(0));
    ring.queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    ring.queue.set_used_ring_address(Some(USED as u32), Some(0));
    ring.queue.set_event_idx(length % 2 == 1);
    ring.queue.set_ready(true);
    ring.enabled = true;
    ring.adopt_used(&memory);
    let mut payload = Vec::new();
    for _ in 0..2 * ENTRIES {
        match ring.take_packet(&memory, &mut payload, BUFFER_BYTES as usize) {
            Ok(Some(_)) => assert!(payload.len() <= BUFFER_BYTES as usize),
            Ok(None) | Err(_) => break,
        }
    }
    let header = Header::decode(&[1; HEADER_BYTES]);
    if let Ok(Some(taken)) = ring.put_packet(&memory, header, &[7; 100]) {
        assert!(taken <= 100);
    }
}
