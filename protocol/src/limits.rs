//! Every limit of the contract, in one place.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Largest RPC frame, in bytes, without its length header.
pub const FRAME_BYTES: usize = 1 << 20;
/// Largest handshake frame, in bytes, without its length header.
pub const HELLO_BYTES: usize = 4 << 10;
/// The whole handshake must end within this time.
pub const HANDSHAKE: Duration = Duration::from_secs(2);
/// Connections that have not yet shown the boot key, per listener.
pub const UNAUTHENTICATED: usize = 64;
/// Requests that one connection may have in flight.
pub const IN_FLIGHT: usize = 64;
/// The longest deadline that a peer may ask for.
pub const DEADLINE: Duration = Duration::from_secs(3600);
/// A stream must be open within this time.
pub const DIAL: Duration = Duration::from_secs(2);
/// What the outer timeout grants beyond a call's own deadline before the connection counts as dead.
pub const CALL_GRACE: Duration = Duration::from_millis(250);
/// The default deadline of a call.
pub const CALL: Duration = Duration::from_secs(5);
/// The longest time a `watch` is held open.
pub const WATCH_HOLD: Duration = Duration::from_secs(8);
/// Subjects that a feed remembers after their removal.
pub const TOMBSTONES: usize = 1_024;
/// Conditions that a feed holds if it is not told another number.
pub const CONDITIONS: usize = 4_096;
/// Conditions that a host holds: those of a thousand guests and its own.
pub const HOST_CONDITIONS: usize = 1_024 * GUEST_CONDITIONS;
/// Conditions that a host takes from one guest.
pub const GUEST_CONDITIONS: usize = 256;
/// Characters of a condition's subject; on the host the guest's name stands before it.
pub const SUBJECT_CHARS: usize = 256;
/// Characters of a condition's reason.
pub const REASON_CHARS: usize = 64;
/// Characters of a condition's evidence.
pub const EVIDENCE_CHARS: usize = 512;
/// Bytes of the path of a Unix socket (`sun_path` without its final zero).
pub const SOCKET_PATH_BYTES: usize = 107;
/// Characters of a name.
pub const NAME_CHARS: usize = 32;
/// Services of other guests that log in to one service; each has a database of its own.
pub const CLIENTS: usize = 64;
/// Characters of a role and its database; PostgreSQL cuts what is longer (NAMEDATALEN).
pub const ROLE_CHARS: usize = 63;
/// Bytes of `boot.json`.
pub const BOOT_RECORD_BYTES: usize = 64 << 10;
/// Bytes of the line that a hybrid Unix socket sends or answers.
pub const HYBRID_LINE_BYTES: usize = 32;
/// Payload bytes of one bulk frame.
pub const BULK_CHUNK_BYTES: usize = 64 << 10;
/// Bytes of the JSON that opens a bulk stream.
pub const BULK_OPEN_BYTES: usize = 64 << 10;
/// Bulk streams that one guest serves at once.
pub const BULK_STREAMS: usize = 256;
/// A bulk stream's target must answer within this time.
pub const BULK_OPEN: Duration = Duration::from_secs(5);
/// Events that a guest keeps.
pub const GUEST_EVENTS: usize = 1_024;
/// Events that a host agent keeps.
pub const HOST_EVENTS: usize = 10_000;
/// Events in one answer.
pub const EVENTS_BATCH: usize = 256;
/// Addresses of a guest's interface.
pub const ADDRESSES: usize = 8;
/// Name servers of a guest; resolv.conf(5) reads no more (MAXNS).
pub const NAME_SERVERS: usize = 3;
/// Domains that a guest searches; older resolvers read no more (MAXDNSRCH).
pub const SEARCH: usize = 6;
/// Results of operations that are kept.
pub const OPERATIONS: usize = 64;
/// For how long.
pub const OPERATION_KEPT: Duration = Duration::from_secs(600);
/// Memory of a guest, in MiB.
pub const MEMORY_MIB: RangeInclusive<u32> = 96..=1 << 20;
/// Virtual CPUs of a guest.
pub const VCPUS: RangeInclusive<u32> = 1..=64;
/// Size of a guest's data disk, in MiB.
pub const DATA_MIB: RangeInclusive<u32> = 64..=16 << 20;
/// Memory that a service may be limited to, in MiB.
pub const SERVICE_MEMORY_MIB: RangeInclusive<u32> = 16..=1 << 20;
/// Processor time that a service may be limited to, in percent of one CPU.
pub const SERVICE_CPU_PERCENT: RangeInclusive<u32> = 1..=6_400;
/// Processes and threads that a service may be limited to.
pub const SERVICE_TASKS: RangeInclusive<u32> = 16..=1 << 22;
