//! The whole device over its socket: a vhost-user front end, a memfd, eventfds, a driver.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{AVAIL, CID, Driver, ENTRIES, MEMORY_BYTES, RX_BASE, TX_BASE, USED, answer};
use crate::vsock::header::{Header, Op, SHUTDOWN_BOTH};
use crate::vsock::{Device, DialError, Limits, Stream};

/// QEMU and the guest in one.
struct Machine {
    front_end: Frontend,
    driver: Driver,
    kicks: [EventFd; 2],
    /// Keeps the eventfds of the device open on this side.
    calls: [EventFd; 2],
    file: File,
}

/// Any address will do for the front end's view of memory; it is only translated back.
const USER_BASE: u64 = 0x7000_0000_0000;

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

impl Machine {
    fn start(path: &Path) -> Machine {
        let fd: OwnedFd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(MEMORY_BYTES as u64).unwrap();
        let mapped = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), MEMORY_BYTES, Some(mapped))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let front_end = Frontend::connect(path, 3).unwrap();
        let driver = Driver::new(memory);
        let (kicks, calls) = ([eventfd(), eventfd()], [eventfd(), eventfd()]);
        let mut machine = Machine {
            front_end,
            driver,
            kicks,
            calls,
            file,
        };
        machine.negotiate();
        machine.start_rings([0, 0]);
        machine
    }

    fn negotiate(&mut self) {
        let front_end = &mut self.front_end;
        front_end.set_owner().unwrap();
        let features = front_end.get_features().unwrap();
        assert_eq!(
            features & (1 << 32 | 1 << 30 | 1 << 29),
            1 << 32 | 1 << 30 | 1 << 29
        );
        let protocol = front_end.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        front_end.set_protocol_features(protocol).unwrap();
        let (_, config) = front_end
            .get_config(0, 8, VhostUserConfigFlags::WRITABLE, &[0; 8])
            .unwrap();
        assert_eq!(config, CID.to_le_bytes());
        front_end.set_features(1 << 32 | 1 << 30).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        front_end.set_mem_table(&[region]).unwrap();
    }

    fn start_rings(&mut self, bases: [u16; 2]) {
        for (index, base) in [RX_BASE, TX_BASE].into_iter().enumerate() {
            let addresses = VringConfigData {
                queue_max_size: ENTRIES,
                queue_size: ENTRIES,
                flags: 0,
                desc_table_addr: USER_BASE + base,
                used_ring_addr: USER_BASE + base + USED,
                avail_ring_addr: USER_BASE + base + AVAIL,
                log_addr: None,
            };
            self.front_end.set_vring_num(index, ENTRIES).unwrap();
            self.front_end.set_vring_base(index, bases[index]).unwrap();
            self.front_end.set_vring_addr(index, &addresses).unwrap();
            self.front_end.set_vring_call(index, &self.calls[index]).unwrap();
            self.front_end.set_vring_kick(index, &self.kicks[index]).unwrap();
            self.front_end.set_vring_enable(index, true).unwrap();
        }
    }

    /// As QEMU 7.2 does: first disables both, then takes them.
    fn stop_rings(&mut self) -> [u16; 2] {
        for index in [0, 1] {
            self.front_end.set_vring_enable(index, false).unwrap();
        }
        [0, 1].map(|index| u16::try_from(self.front_end.get_vring_base(index).unwrap()).unwrap())
    }

    async fn hear(&mut self) -> (Header, Vec<u8>) {
        // A ring has no wake-up of its own here; the interval only bounds the test's speed.
        for _ in 0..5000 {
            if let Some(packet) = self.driver.receive(false) {
                self.kicks[0].write(1).unwrap();
                return packet;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("the device says nothing");
    }

    fn tell(&mut self, header: Header, payload: &[u8]) {
        self.driver.send(header, payload);
        self.kicks[1].write(1).unwrap();
    }

    /// Dials and accepts; returns the stream and the request's header.
    async fn connect(&mut self, device: &Device) -> (Stream, Header) {
        let dialer = device.clone();
        let dial = tokio::spawn(async move { dialer.dial(100).await });
        let (request, _) = self.hear().await;
        assert_eq!(
            (request.op, request.dst_port, request.dst_cid),
            (Op::Request, 100, CID)
        );
        self.tell(answer(&request, Op::Response), &[]);
        (dial.await.unwrap().unwrap(), request)
    }
}

async fn start() -> (tempfile::TempDir, Device, Machine) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let device = Device::start(&path, CID, Limits::default()).unwrap();
    assert_eq!(device.dial(1).await.err(), Some(DialError::NotReady));
    let mut status = device.status();
    let machine = tokio::task::spawn_blocking(move || Machine::start(&path))
        .await
        .unwrap();
    status.wait_for(|status| status.driver_up).await.unwrap();
    (directory, device, machine)
}

#[tokio::test]
async fn reserved_cids_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let started = Device::start(Path::new("/nonexistent/vsock"), cid, Limits::default());
        assert!(matches!(started, Err(crate::vsock::Error::Cid(_))), "{cid}");
    }
}

#[tokio::test]
async fn bytes_go_both_ways_and_the_close_is_heard() {
    let (directory, device, mut machine) = start().await;
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(directory.path().join("vsock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let (mut stream, request) = machine.connect(&device).await;
    assert_eq!(request.buf_alloc, 256 * 1024);
    stream.write_all(b"to the guest").await.unwrap();
    let (data, payload) = machine.hear().await;
    assert_eq!((data.op, payload.as_slice()), (Op::Data, &b"to the guest"[..]));
    machine.tell(answer(&request, Op::Data), b"to the host");
    let mut heard = [0; 11];
    stream.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"to the host");
    drop(stream);
    let (close, _) = machine.hear().await;
    assert_eq!((close.op, close.flags), (Op::Shutdown, SHUTDOWN_BOTH));
}

#[tokio::test]
async fn a_refused_dial() {
    let (_directory, device, mut machine) = start().await;
    let dial = tokio::spawn(async move { device.dial(9).await.err() });
    let (request, _) = machine.hear().await;
    machine.tell(answer(&request, Op::Reset), &[]);
    assert_eq!(dial.await.unwrap(), Some(DialError::Refused));
}

#[tokio::test]
async fn a_guest_that_dials_is_refused() {
    let (_directory, _device, mut machine) = start().await;
    let stray = Header {
        src_port: 4000,
        dst_port: 22,
        ..super::hostile::request()
    };
    machine.tell(stray, &[]);
    let (reset, _) = machine.hear().await;
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (Op::Reset, 22, 4000));
}

#[tokio::test]
async fn a_reset_ends_streams_and_a_pause_does_not() {
    let (_directory, device, mut machine) = start().await;
    let (mut stream, request) = machine.connect(&device).await;
    let bases = machine.stop_rings();
    assert_eq!(device.dial(100).await.err(), Some(DialError::NotReady));
    machine.start_rings(bases);
    machine.front_end.get_features().unwrap(); // answered only after all before it
    stream.write_all(b"still here").await.unwrap();
    assert_eq!(machine.hear().await.1, b"still here");
    machine.tell(answer(&request, Op::Data), b"unread");
    let read = tokio::spawn(async move {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).await.map_err(|error| error.kind())
    });
    machine.stop_rings();
    assert_eq!(device.status().borrow().resets, 0, "it may be a pause");
    machine.start_rings([0, 0]);
    assert_eq!(read.await.unwrap(), Err(ErrorKind::ConnectionReset));
    assert_eq!(device.status().borrow().resets, 1);
}

#[tokio::test]
async fn the_next_front_end_is_served_and_the_end_is_clean() {
    let (directory, device, mut machine) = start().await;
    let (mut stream, _) = machine.connect(&device).await;
    drop(machine);
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let path = directory.path().join("vsock");
    let mut status = device.status();
    let mut machine = tokio::task::spawn_blocking(move || Machine::start(&path))
        .await
        .unwrap();
    status.wait_for(|status| status.driver_up).await.unwrap();
    let (mut stream, _) = machine.connect(&device).await;
    drop(device);
    let error = stream.write_all(b"x").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    assert!(!directory.path().join("vsock").exists());
}
