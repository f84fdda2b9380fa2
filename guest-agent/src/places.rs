//! Where things are in a guest. The image and both binaries agree on these.

/// What PID 1 and the agent share; tmpfs.
pub const RUN: &str = "/run/sovereign";
/// What PID 1 found and did.
pub const FACTS: &str = "/run/sovereign/boot-facts.json";
/// The last exit statuses that PID 1 reaped.
pub const EXITS: &str = "/run/sovereign/exits";
/// What the host said of its way out.
pub const WAYS: &str = "/run/sovereign/ways.json";
/// Targets of the links in /etc.
pub const ETC: &str = "/run/sovereign/etc";
/// The data disk.
pub const DATA: &str = "/run/sovereign/data";
/// The agent disk.
pub const AGENT: &str = "/opt/sovereign";
/// The agent itself.
pub const GUEST: &str = "/opt/sovereign/sovereign-guest";
/// The cgroup that holds one cgroup per service.
pub const CGROUP: &str = "/sys/fs/cgroup/sovereign";
/// The versions of PostgreSQL in the image, one directory each.
pub const PG_VERSIONS: &str = "/usr/lib/postgresql";
/// PostgreSQL's data directories: `<major>/main`.
pub const PG_DATA: &str = "/var/lib/postgresql";
/// The generated configuration of PostgreSQL.
pub const RUN_POSTGRES: &str = "/run/sovereign/postgres";
/// Miniflux's configuration, its process and what it says.
pub const RUN_MINIFLUX: &str = "/run/sovereign/miniflux";
/// The directory of PostgreSQL's Unix socket.
pub const PG_SOCKETS: &str = "/run/postgresql";
/// Search path of everything that is started here.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
