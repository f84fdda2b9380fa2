//! What `sovereign status --json` says: schema `sovereign.status/1` (docs/status.schema.json).

use serde::{Deserialize, Serialize};

use crate::condition::{Layer, Status};
use crate::name::Name;

/// The schema's name.
pub const SCHEMA: &str = "sovereign.status/1";

/// One instance and all its guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// [`SCHEMA`].
    pub schema: String,
    /// The instance's name.
    pub instance: Name,
    /// The revision of the wanted state.
    pub revision: u64,
    /// Guests in name order.
    pub guests: Vec<GuestStatus>,
    /// What is true of the network that they share, lowest layer first; nothing where it leads nowhere.
    #[serde(default)]
    pub network: Vec<ConditionStatus>,
}

/// One guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its name.
    pub name: Name,
    /// Where it is in its life.
    pub phase: Phase,
    /// All that it needs, together.
    pub ready: Status,
    /// RFC 3339 UTC of the last change of `ready`.
    pub since: String,
    /// The present boot.
    pub boot_id: Option<String>,
    /// The revision that is wanted.
    pub spec_revision: u64,
    /// The revision that the guest took over.
    pub applied_revision: u64,
    /// The virtual machine monitor.
    pub vmm: Option<VmmStatus>,
    /// All conditions, lowest layer first.
    pub conditions: Vec<ConditionStatus>,
    /// Port forwards.
    pub forwards: Vec<ForwardStatus>,
    /// What its services need of other guests.
    #[serde(default)]
    pub requires: Vec<RequiredStatus>,
}

/// Where a guest is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// No VMM runs and none is wanted.
    Stopped,
    /// A VMM is being started, or runs and its agent has not answered yet.
    Starting,
    /// The guest agent has answered.
    Running,
    /// It was told to stop.
    Stopping,
    /// The VMM ended or could not start; another start waits for its pause.
    Failed,
    /// It failed too often: no more starts by itself.
    CrashLoop,
}

/// The virtual machine monitor of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmStatus {
    /// Such as `qemu`.
    pub kind: String,
    /// `kvm` or `tcg`.
    pub accel: String,
    /// Why this acceleration.
    pub why: String,
    /// Its process.
    pub pid: u32,
}

/// A condition with times for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConditionStatus {
    /// The layer.
    pub layer: Layer,
    /// The subject in it.
    pub subject: String,
    /// Whether it holds.
    pub status: Status,
    /// Code for programs.
    pub reason: String,
    /// What was seen.
    pub evidence: String,
    /// RFC 3339 UTC of the last change of status.
    pub since: String,
    /// Milliseconds since the observation.
    pub age_ms: u64,
    /// Milliseconds of validity.
    pub valid_ms: u64,
}

/// What a service needs of another guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequiredStatus {
    /// The service that needs it.
    pub service: Name,
    /// What it needs, `guest/service`.
    pub of: String,
    /// Whether it can be used; the condition `service.requires` says why.
    pub status: Status,
}

/// A port forward.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardStatus {
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub listen: String,
    /// Where it leads, `guest:port`.
    pub target: String,
    /// Whether it listens now.
    pub status: Status,
}
