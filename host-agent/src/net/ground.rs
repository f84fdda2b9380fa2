//! Which network namespace a network is in, and what is opened there.

use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};

use crate::netns::{HelperConfig, Stage, StageFailure, netfilter_socket, route_socket};

/// Set while tests run: the machine's own network is out of bounds then.
const TEST: &str = "SOVEREIGN_TEST";

/// Where a network is.
#[derive(Debug, Clone)]
pub enum Ground {
    /// In a namespace of our own, held by this helper.
    Private(HelperConfig),
    /// In the namespace that this process is in.
    Host,
}

/// What a session speaks through.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) requests: OwnedFd,
    pub(super) events: OwnedFd,
    /// For requests and for news of the packet filter.
    pub(super) netfilter: Option<(OwnedFd, OwnedFd)>,
    pub(super) sysctl: OwnedFd,
    pub(super) tuns: Vec<OwnedFd>,
}

/// Opens the namespace that this process is in.
///
/// # Errors
/// The step that failed; the machine's own namespace is refused while [`TEST`] is set.
pub(super) fn open_own() -> Result<Opened, StageFailure> {
    if std::env::var_os(TEST).is_some() && is_machines_own().unwrap_or(true) {
        let evidence = format!("{TEST} is set, and this is the machine's own network");
        return Err(StageFailure::new(Stage::Proc, evidence));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let sysctl = open("/proc/sys/net", flags, Mode::empty())
        .map_err(|error| StageFailure::io(Stage::Proc, &error.into()))?;
    Ok(Opened {
        requests: route_socket()?,
        events: route_socket()?,
        netfilter: Some((netfilter_socket()?, netfilter_socket()?)),
        sysctl,
        tuns: Vec::new(),
    })
}

/// Whether the first process of the machine is in the same network namespace.
fn is_machines_own() -> io::Result<bool> {
    let number = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net"));
    Ok(number("self")? == number("1")?)
}
