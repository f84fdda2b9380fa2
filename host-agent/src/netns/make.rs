//! Inside the helper: the namespace, its loopback, and what is opened in it.

use std::io;

use netlink_packet_route::RouteNetlinkMessage;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::LinkUnspec;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::contract::{At, Kind, NETFILTERS, Stage, StageFailure, TUNS};
use crate::net::kernel::{Kernel, KernelError};
use crate::net::tun;

/// A set of descriptors, each with what it is.
pub(super) type Set = Vec<(Kind, OwnedFd)>;

/// Which user namespace owns the network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// The one that the agent runs in: it is root.
    Ours,
    /// One that the helper made: the agent is an ordinary user.
    Own,
}

/// Moves this process into namespaces of its own. The process must have one thread only.
///
/// An ordinary user needs a user namespace around the network namespace, in which he is root.
pub(super) fn unshare_network() -> Result<Owner, StageFailure> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    let owner = if user.is_root() {
        Owner::Ours
    } else {
        unshare(CloneFlags::CLONE_NEWUSER).at(Stage::UnshareUser)?;
        map_ids(user.as_raw(), group.as_raw()).at(Stage::MapIds)?;
        Owner::Own
    };
    unshare(CloneFlags::CLONE_NEWNET).at(Stage::UnshareNet)?;
    Ok(owner)
}

fn map_ids(user: u32, group: u32) -> io::Result<()> {
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/gid_map", format!("0 {group} 1"))?;
    std::fs::write("/proc/self/uid_map", format!("0 {user} 1"))
}

/// Moves this process into the namespaces of a helper that is gone.
pub(super) fn join_network(set: &Set) -> Result<Owner, StageFailure> {
    let find = |kind| set.iter().find(|(k, _)| *k == kind).map(|(_, fd)| fd);
    let user = find(Kind::User);
    if let Some(user) = user {
        setns(user.as_fd(), CloneFlags::CLONE_NEWUSER).at(Stage::Join)?;
    }
    let net = find(Kind::Net).ok_or_else(|| StageFailure::new(Stage::Join, "no namespace was passed"))?;
    setns(net.as_fd(), CloneFlags::CLONE_NEWNET).at(Stage::Join)?;
    Ok(if user.is_some() { Owner::Own } else { Owner::Ours })
}

/// Sets `lo` up; the first use of the capabilities that the namespace gives (where AppArmor
/// takes them away again, unsharing worked and this does not).
pub(super) async fn loopback_up() -> Result<(), StageFailure> {
    let message = LinkUnspec::new_with_name("lo").up().build();
    let mut kernel = Kernel::over(route_socket()?);
    let changed = kernel.change(RouteNetlinkMessage::SetLink(message), 0).await;
    changed.map_err(|error| refused(Stage::Loopback, error))
}

pub(super) fn refused(stage: Stage, error: KernelError) -> StageFailure {
    match error {
        KernelError::Refused(error) => StageFailure::io(stage, &error),
        other => StageFailure::new(stage, other.to_string()),
    }
}

pub(crate) fn route_socket() -> Result<OwnedFd, StageFailure> {
    netlink_socket(None) // NETLINK_ROUTE is protocol 0
}

pub(crate) fn netfilter_socket() -> Result<OwnedFd, StageFailure> {
    netlink_socket(Some(rustix::net::netlink::NETFILTER))
}

fn netlink_socket(protocol: Option<rustix::net::Protocol>) -> Result<OwnedFd, StageFailure> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol).at(Stage::Netlink)
}

/// Opens one set: only opens, changes nothing.
pub(super) fn open_set(owner: Owner) -> Result<Set, StageFailure> {
    let mut set = vec![
        (Kind::Requests, route_socket()?),
        (Kind::Events, route_socket()?),
        (
            Kind::Sysctl,
            open_path("/proc/sys/net", OFlags::PATH | OFlags::DIRECTORY)?,
        ),
        (Kind::Net, open_path("/proc/self/ns/net", OFlags::RDONLY)?),
    ];
    if owner == Owner::Own {
        set.push((Kind::User, open_path("/proc/self/ns/user", OFlags::RDONLY)?));
    }
    // The files themselves: one below the directory above would be that of the agent's namespace, whoever opened the
    // directory (fs/proc/proc_sysctl.c, sysctl_follow_link). Where they cannot be written, nothing leaves.
    for (kind, switch) in [
        (Kind::ForwardV4, "/proc/sys/net/ipv4/ip_forward"),
        (Kind::ForwardV6, "/proc/sys/net/ipv6/conf/all/forwarding"),
    ] {
        set.extend(open_path(switch, OFlags::RDWR).map(|file| (kind, file)));
    }
    // A kernel without netfilter has no such sockets: then nothing is filtered, and the agent says so.
    set.extend((0..NETFILTERS).map_while(|_| Some((Kind::Netfilter, netfilter_socket().ok()?))));
    for _ in 0..TUNS {
        set.push((Kind::Tun, tun::open_unattached().at(Stage::OpenTun)?));
    }
    Ok(set)
}

fn open_path(path: &str, flags: OFlags) -> Result<OwnedFd, StageFailure> {
    open(path, flags | OFlags::CLOEXEC, Mode::empty()).at(Stage::Proc)
}
