//! The vhost-user side: QEMU sets memory and rings up, and takes them away again.
//!
//! Served by one blocking thread, one QEMU after another. A request that fails ends that QEMU's
//! connection (and with QEMU 7.2 its device); the next one starts afresh.

use std::fs::File;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tokio::net::unix::pipe::Receiver;
use tokio::runtime::Handle;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandler,
};
use virtio_queue::QueueT;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::Shared;
use super::guest::{Guest, RINGS, RX, Region, TX};

/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Body of the thread "vsock-vhost". Ends when the device is stopped.
pub(super) fn serve(shared: &Arc<Shared>, listener: &UnixListener, runtime: &Handle) {
    while let Ok((socket, _)) = listener.accept() {
        if !shared.adopt_front_end(&socket) {
            return;
        }
        serve_one(shared, socket, runtime);
        shared.with(Guest::disconnect);
        shared.forget_front_end();
    }
}

fn serve_one(shared: &Arc<Shared>, socket: UnixStream, runtime: &Handle) {
    tracing::info!("vsock front end connected");
    let backend = Arc::new(Backend {
        shared: Arc::clone(shared),
        runtime: runtime.clone(),
    });
    let mut handler = BackendReqHandler::from_stream(socket, backend);
    loop {
        match handler.handle_request() {
            Ok(()) | Err(VhostError::SocketRetry(_)) => {}
            Err(VhostError::Disconnected) => {
                tracing::info!("vsock front end went away");
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "vsock front end dropped");
                return;
            }
        }
    }
}

struct Backend {
    shared: Arc<Shared>,
    runtime: Handle,
}

fn ring_index(index: u32) -> VhostResult<usize> {
    usize::try_from(index)
        .ok()
        .filter(|index| *index < RINGS)
        .ok_or(VhostError::InvalidParam)
}

fn unsupported<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

/// Where QEMU's address lies in guest memory.
fn translate(regions: &[Region], user: u64) -> VhostResult<u64> {
    regions
        .iter()
        .find(|region| user >= region.user && user - region.user < region.bytes)
        .map(|region| region.guest + (user - region.user))
        .ok_or(VhostError::InvalidParam)
}

fn map_region(region: &VhostUserMemoryRegion, file: File) -> Option<GuestRegionMmap> {
    let bytes = usize::try_from(region.memory_size).ok()?;
    let file = FileOffset::new(file, region.mmap_offset);
    let mapping = MmapRegion::from_file(file, bytes).ok()?;
    GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr))
}

impl Backend {
    /// Waits for kicks of ring `index` until the ring is stopped.
    fn watch_kicks(&self, guest: &mut Guest, index: usize, kick: File) -> VhostResult<()> {
        let io = |error: std::io::Error| VhostError::ReqHandlerError(error);
        set_nonblocking(&kick).map_err(io)?;
        let _context = self.runtime.enter();
        // An eventfd reads like a pipe; this is the one safe way tokio has to poll a descriptor.
        let kicks = Receiver::from_file_unchecked(kick).map_err(io)?;
        let task = self
            .runtime
            .spawn(serve_ring(Arc::clone(&self.shared), index, kicks));
        guest.rings[index].task = Some(task.abort_handle());
        Ok(())
    }

    /// Lets the ring tasks look at rings that just came up.
    fn rings_changed(&self, guest: &mut Guest) {
        guest.tx_due = true;
        guest.wake_writers();
    }
}

fn set_nonblocking(file: &File) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(
        file,
        flags | rustix::fs::OFlags::NONBLOCK,
    )?)
}

/// The task of one ring. Aborted by [`super::ring::Ring::stop`].
async fn serve_ring(shared: Arc<Shared>, index: usize, kicks: Receiver) {
    loop {
        if index == TX {
            while shared.with(Guest::take_batch) {
                tokio::task::yield_now().await;
            }
        } else {
            shared.with(Guest::wake_writers);
        }
        // Both arms only wake: losing either is made good by the look at the ring above.
        tokio::select! {
            kicked = kicks.readable() => if kicked.is_err() { return },
            () = shared.ring_due(index) => {}
        }
        while kicks.try_read(&mut [0; 8]).is_ok_and(|bytes| bytes > 0) {}
    }
}

impl VhostUserBackendReqHandler for Backend {
    fn set_owner(&self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&self) -> VhostResult<()> {
        self.shared.with(Guest::disconnect);
        Ok(())
    }

    fn reset_device(&self) -> VhostResult<()> {
        self.reset_owner()
    }

    fn get_features(&self) -> VhostResult<u64> {
        Ok(VERSION_1 | EVENT_IDX | PROTOCOL_FEATURES)
    }

    fn set_features(&self, features: u64) -> VhostResult<()> {
        self.shared.with(|guest| {
            for ring in &mut guest.rings {
                ring.queue.set_event_idx(features & EVENT_IDX != 0);
                if features & PROTOCOL_FEATURES == 0 {
                    ring.enabled = true; // such a front end never sends SET_VRING_ENABLE
                }
            }
        });
        Ok(())
    }

    fn get_protocol_features(&self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ)
    }

    fn set_protocol_features(&self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&self) -> VhostResult<u64> {
        Ok(RINGS as u64)
    }

    fn set_mem_table(
        &self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        let mapped: Option<Vec<_>> = table
            .iter()
            .zip(files)
            .map(|(region, file)| map_region(region, file))
            .collect();
        let memory = mapped
            .and_then(|regions| GuestMemoryMmap::from_regions(regions).ok())
            .ok_or(VhostError::InvalidParam)?;
        let regions = table.iter().map(|region| Region {
            user: region.user_addr,
            guest: region.guest_phys_addr,
            bytes: region.memory_size,
        });
        self.shared.with(|guest| {
            guest.regions = regions.collect();
            guest.memory = Some(Arc::new(memory));
        });
        Ok(None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> VhostResult<()> {
        let index = ring_index(index)?;
        let num = u16::try_from(num).map_err(|_| VhostError::InvalidParam)?;
        self.shared
            .with(|guest| guest.rings[index].queue.try_set_size(num))
            .map_err(|_| VhostError::InvalidParam)
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let index = ring_index(index)?;
        self.shared.with(|guest| {
            let descriptor = GuestAddress(translate(&guest.regions, descriptor)?);
            let available = GuestAddress(translate(&guest.regions, available)?);
            let used = GuestAddress(translate(&guest.regions, used)?);
            let memory = guest.memory.clone().ok_or(VhostError::InvalidParam)?;
            let ring = &mut guest.rings[index];
            ring.queue
                .try_set_desc_table_address(descriptor)
                .and_then(|()| ring.queue.try_set_avail_ring_address(available))
                .and_then(|()| ring.queue.try_set_used_ring_address(used))
                .map_err(|_| VhostError::InvalidParam)?;
            // A restarted ring goes on where the guest saw it last.
            ring.adopt_used(&memory);
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> VhostResult<()> {
        let index = ring_index(index)?;
        let base = u16::try_from(base).map_err(|_| VhostError::InvalidParam)?;
        self.shared.with(|guest| guest.place_ring(index, base));
        Ok(())
    }

    fn get_vring_base(&self, index: u32) -> VhostResult<VhostUserVringState> {
        let position = ring_index(index)?;
        let base = self.shared.with(|guest| guest.stop_ring(position));
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = ring_index(u32::from(index))?;
        let kick = fd.ok_or(VhostError::InvalidParam)?;
        self.shared.with(|guest| {
            guest.rings[index].stop();
            let memory = guest.memory.clone().ok_or(VhostError::InvalidParam)?;
            let ring = &mut guest.rings[index];
            ring.broken = false;
            ring.queue.set_ready(true);
            if !ring.queue.is_valid(&*memory) {
                ring.queue.set_ready(false);
                return Err(VhostError::InvalidParam);
            }
            if index == RX || index == TX {
                self.watch_kicks(guest, index, kick)?;
            }
            self.rings_changed(guest);
            Ok(())
        })
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = ring_index(u32::from(index))?;
        if let Some(call) = &fd {
            set_nonblocking(call).map_err(VhostError::ReqHandlerError)?;
        }
        self.shared.with(|guest| guest.rings[index].call = fd);
        Ok(())
    }

    fn set_vring_err(&self, index: u8, _fd: Option<File>) -> VhostResult<()> {
        ring_index(u32::from(index)).map(|_| ())
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> VhostResult<()> {
        let index = ring_index(index)?;
        self.shared.with(|guest| {
            guest.rings[index].enabled = enable;
            self.rings_changed(guest);
        });
        Ok(())
    }

    /// The configuration space is the guest's CID, 64 bits little endian.
    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        let cid = self.shared.with(|guest| guest.cid).to_le_bytes();
        let mut rest = cid.get(offset as usize..).ok_or(VhostError::InvalidParam)?;
        let mut out = vec![0; (size as usize).min(cid.len())];
        let _ = rest.read(&mut out); // a slice: cannot fail
        out.resize(size as usize, 0);
        Ok(out)
    }

    fn set_config(&self, _offset: u32, _buf: &[u8], _f: VhostUserConfigFlags) -> VhostResult<()> {
        unsupported() // the CID is read-only
    }

    fn set_gpu_socket(&self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        unsupported()
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        unsupported()
    }

    fn get_inflight_fd(&self, _inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        unsupported()
    }

    fn get_max_mem_slots(&self) -> VhostResult<u64> {
        unsupported()
    }

    fn add_mem_region(
        &self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<vhost::VhostUserMemoryRegionBase>> {
        unsupported()
    }

    fn remove_mem_region(&self, _region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> VhostResult<Option<File>> {
        unsupported()
    }

    fn check_device_state(&self) -> VhostResult<()> {
        unsupported()
    }

    fn get_shmem_config(&self) -> VhostResult<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        unsupported()
    }
}
