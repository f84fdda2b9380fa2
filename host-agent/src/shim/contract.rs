//! What the host agent and a shim say to each other: JSON lines on a Unix socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::net::names::Mac;
use sovereign_protocol::handshake::BootKey;
use sovereign_protocol::layout::{Layout, SHIM_SOCKET};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, Image, Restart};
use sovereign_protocol::status::VmmStatus;

/// The [`ShimConfig`]'s name in a guest's run directory.
pub const SHIM_CONFIG: &str = "shim.json";

/// What one boot needs; written to a file by the agent, without any secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShimConfig {
    /// The guest.
    pub guest: Name,
    /// Memory of the VM, in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Size of the data disk, in MiB.
    pub data_mib: u32,
    /// What it boots.
    pub image: Image,
    /// Its network card; the TAP comes as the shim's standard input.
    #[serde(default)]
    pub card: Option<Card>,
    /// Files and sockets.
    pub paths: Paths,
}

/// A guest's network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Its hardware address.
    pub mac: Mac,
    /// Bytes of the largest packet.
    pub mtu: u32,
}

impl ShimConfig {
    /// The guest as far as its shim knows it: without services and forwards.
    #[must_use]
    pub fn bare_guest(&self) -> GuestConfig {
        GuestConfig {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            data_mib: self.data_mib,
            image: self.image.clone(),
            services: Vec::new(),
            forwards: Vec::new(),
            restart: Restart::default(),
            interface: None,
            tailscale: None,
        }
    }

    /// What cannot change while the VM runs.
    #[must_use]
    pub fn machine(&self) -> Machine {
        Machine {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            data_mib: self.data_mib,
            image: self.image.digest.clone(),
            card: self.card.is_some(),
        }
    }
}

/// The part of a guest that only another boot can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Memory, in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Size of the data disk, in MiB.
    pub data_mib: u32,
    /// Digest of the image.
    pub image: String,
    /// It has a network card.
    pub card: bool,
}

impl Machine {
    /// What a guest is wanted to boot with.
    #[must_use]
    pub fn wanted(config: &GuestConfig, networked: bool) -> Self {
        Self {
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            data_mib: config.data_mib,
            image: config.image.digest.clone(),
            card: networked && config.interface.is_some(),
        }
    }

    /// What differs from `wanted`, in words; `None` when nothing does.
    #[must_use]
    pub fn differs(&self, wanted: &Self) -> Option<String> {
        let number =
            |what: &str, now: u64, then: u64| (now != then).then(|| format!("{what} {now} -> {then}"));
        let parts = [
            number("memory in MiB", self.memory_mib.into(), wanted.memory_mib.into()),
            number("vcpus", self.vcpus.into(), wanted.vcpus.into()),
            number("data disk in MiB", self.data_mib.into(), wanted.data_mib.into()),
            (self.image != wanted.image).then(|| "another image".to_owned()),
            (self.card != wanted.card).then(|| "network card".to_owned()),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// The files and sockets of one guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// The guest's run directory.
    pub run: PathBuf,
    /// The data disk.
    pub data_disk: PathBuf,
    /// The console ring.
    pub console: PathBuf,
    /// The exit record.
    pub exit_record: PathBuf,
    /// Where the verdict on KVM is kept.
    pub accel_cache: PathBuf,
}

impl Paths {
    /// The paths of `guest` in an instance.
    #[must_use]
    pub fn of(layout: &Layout, guest: &Name) -> Self {
        Self {
            run: layout.guest_run(guest),
            data_disk: layout.data_disk(guest),
            console: layout.console(guest),
            exit_record: layout.exit_record(guest),
            accel_cache: layout.state.join("accel.json"),
        }
    }

    /// The shim's own socket.
    #[must_use]
    pub fn shim(&self) -> PathBuf {
        self.run.join(SHIM_SOCKET)
    }

    /// The hybrid Unix socket to the guest's vsock ports.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.run.join("vsock.sock")
    }

    /// The socket between QEMU and the vsock device.
    #[must_use]
    pub fn vhost(&self) -> PathBuf {
        self.run.join("vhost.sock")
    }

    /// QEMU's machine protocol.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    /// The [`ShimConfig`].
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.run.join(SHIM_CONFIG)
    }
}

/// The agent asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you, and the key of this boot.
    Identify,
    /// Press the ACPI power button.
    PowerDown,
    /// End the VMM at once.
    Kill,
}

/// The shim answers, and says by itself how it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// The answer to [`Request::Identify`].
    Identity {
        /// The boot id.
        boot_id: String,
        /// The key of this boot.
        key: BootKey,
        /// The virtual machine monitor.
        vmm: VmmStatus,
    },
    /// The VMM's state, at once after the identity and when it changes.
    State(VmmState),
    /// The VMM ended; the shim's last message.
    Exited(ExitRecord),
}

/// What a VMM does, seen from its shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmState {
    /// It was started and has not answered QMP yet.
    Starting,
    /// QMP's own word (`running`, `paused`, `io-error`, `internal-error`).
    Says(String),
    /// Its process is stopped (SIGSTOP, a debugger).
    Stopped,
    /// QMP does not answer; the letter is the process's state (proc_pid_stat(5)).
    Silent(char),
}

/// How a VMM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The boot.
    pub boot_id: String,
    /// Why, as far as it is known.
    pub reason: ExitReason,
    /// Exit status or signal, and what the VMM said last.
    pub evidence: String,
    /// When, in nanoseconds since 1970 UTC.
    pub wall_ns: i64,
}

/// Why a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset.
    GuestRebooted,
    /// The guest's kernel panicked.
    GuestPanicked,
    /// We ended it.
    Killed,
    /// It ended before the guest ran.
    StartFailed,
    /// It died by itself.
    Crashed,
    /// The shim was killed: no record was written.
    ShimDied,
}
