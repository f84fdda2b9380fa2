//! A vhost-user vsock device of our own, for hosts without `/dev/vhost-vsock`.
//!
//! Owns one guest's vhost-user socket, its rings and its streams. QEMU connects
//! (`-device vhost-user-vsock-pci`), the host dials guest ports with [`Device::dial`], and
//! [`serve_front`] offers the same to other processes as a hybrid Unix socket. It never opens an
//! AF_VSOCK socket, never accepts a connection the guest starts (refused with RST), and never
//! buffers host-to-guest bytes: a write goes straight into the guest's receive ring.
//!
//! One mutex per guest (`guest::Guest`), held for one batch and never across an await. One
//! blocking thread speaks vhost-user, one task per ring waits for the guest's kicks, one task
//! ends streams that linger.
//!
//! The guest is not trusted: its descriptors, headers and counters may say anything. A broken
//! ring stops the device until the driver sets it up again; a connection that breaks the
//! protocol gets RST; memory is bounded by [`Limits`].

mod backend;
mod connection;
mod front;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod guest;
mod header;
mod ring;
mod stream;

use std::future::poll_fn;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use connection::{End, Phase};
use guest::{Guest, RINGS, RX, TX};

pub use front::serve_front;
pub use stream::Stream;

/// What one guest may cost the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once, lingering ones included.
    pub connections: usize,
    /// Receive buffer of one connection, bytes; advertised to the guest.
    pub buffer_bytes: u32,
    /// Bytes held for readers over all connections. A guest that sends more loses the
    /// connection it sent on.
    pub total_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 1024,
            buffer_bytes: 256 * 1024,
            total_bytes: 64 * 1024 * 1024,
        }
    }
}

/// Why a device could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// CIDs 0, 1, 2 and those above 2^32-2 cannot belong to a guest.
    #[error("vsock CID {0} cannot be a guest's")]
    Cid(u64),
    /// The vhost-user socket could not be made.
    #[error("cannot listen for QEMU on {path}")]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The thread that serves QEMU could not be started.
    #[error("cannot start the vhost-user thread")]
    Thread(#[source] io::Error),
    /// [`Device::start`] was called outside a tokio runtime.
    #[error("a vsock device needs a tokio runtime")]
    Runtime(#[from] tokio::runtime::TryCurrentError),
}

/// Why a dial failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// QEMU is not connected, its guest's driver is not up, or the guest is paused. Retry.
    #[error("the guest's vsock driver is not up")]
    NotReady,
    /// Nothing listens on the port, or its backlog is full.
    #[error("the guest refused the connection")]
    Refused,
    /// The guest was reset while the dial was under way.
    #[error("the guest was reset")]
    Reset,
    /// [`Limits::connections`] is reached.
    #[error("too many connections to the guest")]
    TooMany,
}

/// The device as its guest sees it now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The guest's driver is up: a dial can be answered.
    pub driver_up: bool,
    /// How often a new driver came, or QEMU went away, since the device started; each ended all streams.
    pub resets: u64,
}

/// A handle on a guest's device; clones refer to the same one.
///
/// The device ends when the last handle is dropped: its socket is removed, QEMU's connection
/// closed, and every stream reset.
#[derive(Clone, Debug)]
pub struct Device {
    owner: Arc<Owner>,
}

/// Behind every [`Stream`] and task; does not keep the device alive.
#[derive(Debug)]
struct Shared {
    guest: Mutex<Guest>,
    /// QEMU's connection, to be shut down from outside.
    front_end: Mutex<FrontEnd>,
    due: [Notify; RINGS],
    linger: Notify,
    status: watch::Sender<Status>,
}

#[derive(Debug, Default)]
struct FrontEnd {
    socket: Option<UnixStream>,
    stopped: bool,
}

#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
    listener: UnixListener,
    path: PathBuf,
    linger: AbortHandle,
}

impl Device {
    /// Listens for QEMU on `path` (mode 0600; a socket left there is replaced) and serves it from
    /// a thread named "vsock-vhost" and tasks on the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::Cid`] for a reserved CID; the others when the kernel or the runtime refuse.
    pub fn start(path: &Path, guest_cid: u64, limits: Limits) -> Result<Device, Error> {
        if guest_cid <= header::HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(Error::Cid(guest_cid));
        }
        let runtime = Handle::try_current()?;
        let listen_error = |source| Error::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = listen_private(path).map_err(listen_error)?;
        let accepting = listener.try_clone().map_err(listen_error)?;
        let shared = Arc::new(Shared {
            guest: Mutex::new(Guest::new(guest_cid, limits)),
            front_end: Mutex::default(),
            due: std::array::from_fn(|_| Notify::new()),
            linger: Notify::new(),
            status: watch::Sender::default(),
        });
        let linger = runtime.spawn(end_lingering(Arc::clone(&shared))).abort_handle();
        let owner = Owner {
            shared: Arc::clone(&shared),
            listener,
            path: path.to_owned(),
            linger,
        };
        std::thread::Builder::new()
            .name("vsock-vhost".to_owned())
            .spawn(move || backend::serve(&shared, &accepting, &runtime))
            .map_err(Error::Thread)?;
        Ok(Device {
            owner: Arc::new(owner),
        })
    }

    /// Connects to a port of the guest. There is no deadline of its own: a guest that never
    /// answers is the caller's to time out.
    ///
    /// Cancel safe: dropping the future sends RST.
    ///
    /// # Errors
    /// See [`DialError`]; only [`DialError::NotReady`] comes without asking the guest.
    pub async fn dial(&self, port: u32) -> Result<Stream, DialError> {
        let shared = &self.owner.shared;
        let stream = shared.with(|guest| {
            if !guest.ready() {
                return Err(DialError::NotReady);
            }
            let id = guest.open(port).ok_or(DialError::TooMany)?;
            let host_port = guest.connections.get(&id).map_or(0, |new| new.host_port);
            Ok(Stream {
                shared: Arc::clone(shared),
                id,
                host_port,
                guest_port: port,
            })
        })?;
        match poll_fn(|cx| shared.with(|guest| guest.poll_dial(stream.id, cx))).await {
            Phase::Dead(End::Refused | End::Reset) => Err(DialError::Refused),
            Phase::Dead(End::GuestReset) => Err(DialError::Reset),
            Phase::Open | Phase::Dialing | Phase::Dead(End::Closed) => Ok(stream),
        }
    }

    /// The device's state, and every change of it. Copy the value out at once: while it is
    /// borrowed a change stops the device.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.owner.shared.status.subscribe()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let socket = {
            let mut front_end = lock(&self.shared.front_end);
            front_end.stopped = true;
            front_end.socket.take()
        };
        // Each may fail only because the other side was faster.
        if let Some(socket) = socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let _ = std::fs::remove_file(&self.path);
        // Wakes the thread out of accept() with EINVAL (Linux, AF_UNIX).
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        self.linger.abort();
        self.shared.with(|guest| {
            guest.stopped = true;
            guest.disconnect();
        });
    }
}

impl Shared {
    /// Runs one batch on the guest, then says what became due, interrupts the guest, and wakes
    /// tasks with the mutex released.
    fn with<T>(&self, batch: impl FnOnce(&mut Guest) -> T) -> T {
        let mut guest = lock(&self.guest);
        let result = batch(&mut guest);
        guest.settle();
        let wakes = std::mem::take(&mut guest.wakes);
        let tx_due = std::mem::take(&mut guest.tx_due);
        let linger_due = std::mem::take(&mut guest.linger_due);
        let now = Status {
            driver_up: guest.ready(),
            resets: guest.resets,
        };
        if std::mem::replace(&mut guest.told, now) != now {
            // Only on a change: sending waits for whoever borrows the value.
            self.status.send_replace(now);
        }
        drop(guest);
        if tx_due {
            self.due[TX].notify_one();
            self.due[RX].notify_one();
        }
        if linger_due {
            self.linger.notify_one();
        }
        wakes.into_iter().for_each(std::task::Waker::wake);
        result
    }

    async fn ring_due(&self, index: usize) {
        self.due[index].notified().await;
    }

    /// Remembers QEMU's connection. False: the device is stopped.
    fn adopt_front_end(&self, socket: &UnixStream) -> bool {
        let mut front_end = lock(&self.front_end);
        front_end.socket = socket.try_clone().ok();
        !front_end.stopped && front_end.socket.is_some()
    }

    fn forget_front_end(&self) {
        lock(&self.front_end).socket = None;
    }
}

/// A panic elsewhere must not take the device with it: the state is valid after every statement
/// that can panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends dropped streams the guest does not confirm. Aborted with the device.
async fn end_lingering(shared: Arc<Shared>) {
    loop {
        let next = shared.with(|guest| guest.sweep(Instant::now()));
        // Both arms only wake: the sweep above looks at everything.
        tokio::select! {
            () = shared.linger.notified() => {}
            () = async {
                match next {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            } => {}
        }
    }
}

/// A listening Unix socket that was never open to others: a socket's mode before bind is the
/// mode of its file (Linux).
fn listen_private(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::FileTypeExt;
    if std::fs::symlink_metadata(path).is_ok_and(|old| old.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let fd: OwnedFd = socket::socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&fd, Backlog::new(4)?)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests;
