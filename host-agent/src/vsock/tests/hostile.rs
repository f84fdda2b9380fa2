//! Guests that lie: the rings' code driven directly, without sockets or tasks.

use std::sync::Arc;
use std::time::Instant;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::driver::{
    AVAIL, CID, Driver, ENTRIES, INDIRECT, MEMORY_BYTES, NEXT, RX_BASE, TX_BASE, USED, WRITE, answer,
};
use crate::vsock::Limits;
use crate::vsock::connection::{End, Phase};
use crate::vsock::guest::{Guest, Id, LINGER, RX, TX};
use crate::vsock::header::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};

const LIMITS: Limits = Limits {
    connections: 8,
    buffer_bytes: 4096,
    total_bytes: 8192,
};

pub(super) fn request() -> Header {
    let nobody = Header {
        src_cid: HOST_CID,
        dst_cid: CID,
        src_port: 1,
        dst_port: 2,
        len: 0,
        kind: TYPE_STREAM,
        op: Op::Reset,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    answer(&nobody, Op::Request)
}

fn start() -> (Guest, Driver) {
    let ranges = [(GuestAddress(0), MEMORY_BYTES)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let driver = Driver::new(memory.clone());
    let mut guest = Guest::new(CID, LIMITS);
    for (index, base) in [(RX, RX_BASE), (TX, TX_BASE)] {
        let ring = &mut guest.rings[index];
        ring.queue.try_set_size(ENTRIES).unwrap();
        ring.queue.try_set_desc_table_address(GuestAddress(base)).unwrap();
        ring.queue
            .try_set_avail_ring_address(GuestAddress(base + AVAIL))
            .unwrap();
        ring.queue
            .try_set_used_ring_address(GuestAddress(base + USED))
            .unwrap();
        ring.queue.set_ready(true);
        ring.enabled = true;
    }
    guest.memory = Some(Arc::new(memory));
    assert!(guest.ready());
    (guest, driver)
}

fn run(guest: &mut Guest) {
    while guest.take_batch() {}
    guest.settle();
}

fn open(guest: &mut Guest, driver: &mut Driver) -> (Id, Header) {
    let id = guest.open(100).unwrap();
    guest.settle();
    let (request, _) = driver.receive(false).unwrap();
    driver.send(answer(&request, Op::Response), &[]);
    run(guest);
    assert_eq!(guest.connections[&id].phase, Phase::Open);
    (id, request)
}

#[test]
fn a_chain_that_loops_or_leaves_memory_never_panics() {
    let chains: [&[(u64, u32, u16, u16)]; 7] = [
        &[(0x10000, 8, NEXT, 0)],                        // its own successor
        &[(0x10000, 8, NEXT, 1), (0x10000, 8, NEXT, 0)], // a circle
        &[(0x10000, 8, NEXT, 9999)],                     // a successor outside the table
        &[(u64::MAX - 4, 64, 0, 0)],                     // an address that overflows
        &[(MEMORY_BYTES as u64 - 8, 64, 0, 0)],          // an end outside memory
        &[(0x10000, u32::MAX, NEXT, 1), (0x10000, u32::MAX, 0, 0)],
        &[(TX_BASE, 16, INDIRECT, 0)], // an indirect table that is itself
    ];
    for chain in chains {
        let (mut guest, mut driver) = start();
        for (index, entry) in chain.iter().enumerate() {
            driver
                .tx
                .describe(&driver.memory, u16::try_from(index).unwrap(), *entry);
        }
        driver.tx.offer(&driver.memory, 0);
        run(&mut guest);
        assert!(guest.held == 0, "{chain:?}");
    }
}

#[test]
fn a_head_outside_the_table_stops_the_ring_and_ends_streams() {
    let (mut guest, mut driver) = start();
    let (id, _) = open(&mut guest, &mut driver);
    driver.tx.offer(&driver.memory, 500);
    run(&mut guest);
    assert!(guest.rings[TX].broken && !guest.ready());
    assert_eq!(guest.connections[&id].phase, Phase::Dead(End::GuestReset));
}

#[test]
fn an_index_too_far_ahead_stops_the_ring() {
    let (mut guest, driver) = start();
    driver.tx.set_avail_index(&driver.memory, ENTRIES + 1);
    run(&mut guest);
    assert!(guest.rings[TX].broken);
}

#[test]
fn receive_buffers_that_are_small_read_only_or_outside_stop_the_ring() {
    for entry in [
        (0x10000, HEADER_BYTES as u32, WRITE, 0),
        (0x10000, 4096, 0, 0),
        (MEMORY_BYTES as u64 - 8, 4096, WRITE, 0),
    ] {
        let (mut guest, driver) = start();
        for index in 0..ENTRIES {
            driver.rx.describe(&driver.memory, index, entry);
        }
        let id = guest.open(100).unwrap();
        guest.settle();
        assert!(guest.rings[RX].broken, "{entry:?}");
        assert_eq!(guest.connections[&id].phase, Phase::Dead(End::GuestReset));
    }
}

#[test]
fn short_packets_and_foreign_addresses_are_dropped() {
    let (mut guest, mut driver) = start();
    driver.send_raw(&[0; HEADER_BYTES - 1]);
    driver.send(
        Header {
            src_cid: 8,
            ..request()
        },
        &[],
    );
    driver.send(
        Header {
            dst_cid: 3,
            ..request()
        },
        &[],
    );
    run(&mut guest);
    assert!(guest.ready());
    assert!(driver.receive(false).is_none());
}

#[test]
fn unknown_types_and_ports_are_reset_but_resets_are_not() {
    let (mut guest, mut driver) = start();
    driver.send(Header { kind: 2, ..request() }, &[]);
    driver.send(
        Header {
            op: Op::Unknown(77),
            ..request()
        },
        &[],
    );
    driver.send(
        Header {
            op: Op::Reset,
            ..request()
        },
        &[],
    );
    run(&mut guest);
    let (reset, _) = driver.receive(false).unwrap();
    assert_eq!((reset.op, reset.kind), (Op::Reset, 2));
    assert_eq!(driver.receive(false).unwrap().0.op, Op::Reset);
    assert!(driver.receive(false).is_none());
}

#[test]
fn a_length_beyond_the_packet_resets_the_connection() {
    for len in [1, 4097, u32::MAX] {
        let (mut guest, mut driver) = start();
        let (id, request) = open(&mut guest, &mut driver);
        let lie = Header {
            len,
            ..answer(&request, Op::Data)
        };
        driver.send_raw(&lie.encode());
        run(&mut guest);
        assert_eq!(guest.connections[&id].phase, Phase::Dead(End::Reset));
        assert_eq!(driver.receive(false).unwrap().0.op, Op::Reset);
        assert!(guest.ready());
    }
}

#[test]
fn memory_over_all_connections_is_bounded() {
    let (mut guest, mut driver) = start();
    let connections: Vec<_> = (0..4).map(|_| open(&mut guest, &mut driver)).collect();
    for (_, request) in &connections {
        driver.send(answer(request, Op::Data), &[1; 4096]);
        run(&mut guest);
        assert!(guest.held <= LIMITS.total_bytes);
    }
    let phases: Vec<_> = connections
        .iter()
        .map(|(id, _)| guest.connections[id].phase)
        .collect();
    let cut = Phase::Dead(End::Reset);
    assert_eq!(phases, [Phase::Open, Phase::Open, cut, cut]);
    for (id, _) in connections {
        guest.release(id, Instant::now());
        guest.settle();
        while driver.receive(false).is_some() {}
    }
    assert_eq!(guest.held, 0);
    guest.settle();
    assert!(guest.connections.is_empty());
}

#[test]
fn connections_are_bounded_and_lingering_ends() {
    let (mut guest, mut driver) = start();
    let ids: Vec<Id> = (0..LIMITS.connections)
        .map(|_| open(&mut guest, &mut driver).0)
        .collect();
    assert_eq!(guest.open(100), None);
    let now = Instant::now();
    for id in &ids {
        guest.release(*id, now);
    }
    guest.settle();
    assert_eq!(guest.open(100), None); // they linger
    assert_eq!(guest.sweep(now), Some(now + LINGER));
    while driver.receive(false).is_some() {}
    assert_eq!(guest.sweep(now + LINGER), None);
    guest.settle();
    assert!(guest.connections.is_empty());
    let ops: Vec<Op> = std::iter::from_fn(|| driver.receive(false))
        .map(|(h, _)| h.op)
        .collect();
    assert_eq!(ops, [Op::Reset; LIMITS.connections]);
}

#[test]
fn a_guest_that_takes_nothing_holds_its_own_packets_back() {
    let (mut guest, mut driver) = start();
    let mut sent = 0;
    for _ in 0..400 {
        driver.send(request(), &[]);
        run(&mut guest);
        sent += 1;
        if guest.rings[TX].queue.next_avail() != sent {
            break;
        }
    }
    // 16 receive buffers, 128 resets kept, and then the ring is left alone.
    assert_eq!(sent, 16 + 128 + 1);
    while driver.receive(false).is_some() {}
    guest.settle();
    assert!(guest.tx_due);
    run(&mut guest);
    assert_eq!(guest.rings[TX].queue.next_avail(), sent);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Valid rings, any descriptors, any header: no panic, no more memory than allowed.
    #[test]
    fn hostile_descriptors(
        chains in prop::collection::vec(
            (
                prop::collection::vec((0u64..0x12_0000, 0u32..6000, 0u16..8, 0u16..20), 1..6),
                0u16..17,
                any::<[u8; 32]>(),
                0u16..9,
                (any::<u32>(), any::<u32>()),
            ),
            1..12,
        )
    ) {
        let (mut guest, mut driver) = start();
        let (id, heard) = open(&mut guest, &mut driver);
        for (entries, head, junk, op, (buf_alloc, fwd_cnt)) in chains {
            let mut bytes = Header { buf_alloc, fwd_cnt, ..answer(&heard, Op::Data) }.encode();
            bytes[24..28].copy_from_slice(&junk[..4]);
            bytes[26] &= 0;
            bytes[27] &= 0;
            bytes[30] = u8::try_from(op).unwrap();
            for (index, (address, len, flags, next)) in entries.into_iter().enumerate() {
                if address + 64 < MEMORY_BYTES as u64 && address > 0x8000 {
                    driver.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
                }
                let index = u16::try_from(index).unwrap();
                driver.tx.describe(&driver.memory, index, (address, len, flags, next));
            }
            driver.tx.offer(&driver.memory, head);
            run(&mut guest);
            while driver.receive(false).is_some() {}
            prop_assert!(guest.held <= LIMITS.buffer_bytes as usize);
        }
        guest.release(id, Instant::now());
        guest.settle();
        prop_assert_eq!(guest.held, 0);
    }
}
