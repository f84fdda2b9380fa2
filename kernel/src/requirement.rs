//! The kernel contract: every symbol a guest kernel needs, why, and what stops working without it.
//!
//! One table, used to write a config fragment, to check a config and to explain a running kernel.

/// One thing a guest kernel must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requirement {
    /// Kconfig symbol without `CONFIG_`.
    pub symbol: &'static str,
    /// Why it is needed, as the end of the sentence "needed to …".
    pub why: &'static str,
    /// Services that do not work without it.
    pub breaks: &'static [&'static str],
    /// How a running kernel shows that it has it.
    pub proof: Proof,
}

/// How a running kernel shows that it has a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// This path exists.
    Path(&'static str),
    /// `/proc/filesystems` lists this name.
    Filesystem(&'static str),
    /// This module is loaded or built in (`/proc/modules`, `/sys/module`, `modules.builtin`).
    Module(&'static str),
}

/// Name of the PostgreSQL service in [`Requirement::breaks`].
const POSTGRESQL: &str = "postgresql";
/// Name of the Tailscale service in [`Requirement::breaks`].
const TAILSCALE: &str = "tailscale";
/// What ends connections of a former way out; a guest is ready without it, and its journal then says what stays open.
const WAYS: &str = "ways";
/// Name of the guest agent in [`Requirement::breaks`].
const AGENT: &str = "agent";

/// Everything a guest kernel must have, in the order in which it is reported.
pub const REQUIREMENTS: &[Requirement] = &[
    Requirement {
        symbol: "SYSVIPC",
        why: "lock the data directory (PostgreSQL does so with every shared_memory_type)",
        breaks: &[POSTGRESQL],
        proof: Proof::Path("/proc/sysvipc/shm"),
    },
    Requirement {
        symbol: "SHMEM",
        why: "back POSIX shared memory",
        breaks: &[POSTGRESQL],
        proof: Proof::Filesystem("tmpfs"),
    },
    Requirement {
        symbol: "TMPFS",
        why: "mount /run and /dev/shm",
        breaks: &[AGENT, POSTGRESQL, TAILSCALE],
        proof: Proof::Filesystem("tmpfs"),
    },
    Requirement {
        symbol: "CGROUPS",
        why: "end a service with all its processes (cgroup2)",
        breaks: &[AGENT],
        proof: Proof::Filesystem("cgroup2"),
    },
    Requirement {
        symbol: "TUN",
        why: "carry tailnet packets",
        breaks: &[TAILSCALE],
        proof: Proof::Path("/sys/devices/virtual/misc/tun"),
    },
    Requirement {
        symbol: "NF_TABLES",
        why: "filter and masquerade tailnet packets",
        breaks: &[TAILSCALE],
        proof: Proof::Module("nf_tables"),
    },
    Requirement {
        symbol: "EXT4_FS",
        why: "mount the data disk",
        breaks: &[POSTGRESQL, TAILSCALE],
        proof: Proof::Filesystem("ext4"),
    },
    Requirement {
        symbol: "EROFS_FS",
        why: "mount the root and agent disks",
        breaks: &[AGENT, POSTGRESQL, TAILSCALE],
        proof: Proof::Filesystem("erofs"),
    },
    Requirement {
        symbol: "VIRTIO_BLK",
        why: "see any disk",
        breaks: &[AGENT, POSTGRESQL, TAILSCALE],
        proof: Proof::Path("/sys/bus/virtio/drivers/virtio_blk"),
    },
    Requirement {
        symbol: "VIRTIO_NET",
        why: "reach the network",
        breaks: &[TAILSCALE],
        proof: Proof::Path("/sys/bus/virtio/drivers/virtio_net"),
    },
    Requirement {
        symbol: "INET_DIAG_DESTROY",
        why: "end connections of a way out that the host has left",
        breaks: &[WAYS],
        // The switch itself shows only when it is used; what it is a part of loads by itself then.
        proof: Proof::Module("tcp_diag"),
    },
    Requirement {
        symbol: "VIRTIO_VSOCKETS",
        why: "talk to the host",
        breaks: &[AGENT],
        proof: Proof::Path("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"),
    },
];

/// The requirements that a kernel config (`/boot/config-*`, `.config`) does not meet; `=y` and `=m` both meet one.
#[must_use]
pub fn missing(config_text: &str) -> Vec<&'static Requirement> {
    let enabled: std::collections::BTreeSet<&str> = config_text.lines().filter_map(enabled_symbol).collect();
    REQUIREMENTS
        .iter()
        .filter(|requirement| !enabled.contains(requirement.symbol))
        .collect()
}

fn enabled_symbol(line: &str) -> Option<&str> {
    let (symbol, value) = line.trim().strip_prefix("CONFIG_")?.split_once('=')?;
    matches!(value, "y" | "m").then_some(symbol)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full_config() -> String {
        REQUIREMENTS
            .iter()
            .map(|requirement| format!("CONFIG_{}=y\n", requirement.symbol))
            .collect()
    }

    #[test]
    fn built_in_and_module_both_meet_a_requirement() {
        assert!(missing(&full_config()).is_empty());
        assert!(missing(&full_config().replace("=y", "=m")).is_empty());
    }

    #[test]
    fn absent_disabled_and_look_alike_symbols_are_missing() {
        let cases = [
            ("CONFIG_TUN=y\n", ""),
            ("CONFIG_TUN=y\n", "# CONFIG_TUN is not set\n"),
            ("CONFIG_TUN=y\n", "CONFIG_TUN=n\n"),
            ("CONFIG_TUN=y\n", "CONFIG_TUN_VNET_CROSS_LE=y\n"),
            ("CONFIG_TUN=y\n", "CONFIG_NET_TUN=y\n"),
        ];
        for (from, to) in cases {
            let symbols: Vec<_> = missing(&full_config().replace(from, to))
                .iter()
                .map(|r| r.symbol)
                .collect();
            assert_eq!(symbols, ["TUN"], "{to:?}");
        }
    }

    #[test]
    fn every_requirement_says_what_it_breaks_and_is_listed_once() {
        let symbols: std::collections::BTreeSet<_> = REQUIREMENTS.iter().map(|r| r.symbol).collect();
        assert_eq!(symbols.len(), REQUIREMENTS.len());
        assert!(
            REQUIREMENTS
                .iter()
                .all(|r| !r.breaks.is_empty() && !r.why.is_empty())
        );
    }
}
