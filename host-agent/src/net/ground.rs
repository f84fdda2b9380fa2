//! Which network namespace a network is in, and what is opened there.

use std::io;

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};

use super::switches::Place;
use crate::netns::{HelperConfig, Stage, StageFailure, netfilter_socket, route_socket};

/// Set while tests run: the machine's own network is out of bounds then. Its value is the number of that namespace, as
/// in `readlink /proc/self/ns/net`; with any other value it is that of the first process.
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
    /// For connections that the kernel remembers.
    pub(super) conntrack: Option<OwnedFd>,
    pub(super) switches: Place,
    pub(super) tuns: Vec<OwnedFd>,
}

/// Opens the namespace that this process is in.
///
/// # Errors
/// The step that failed; the machine's own namespace is refused while [`TEST`] is set.
pub(super) fn open_own() -> Result<Opened, StageFailure> {
    if let Some(evidence) = out_of_bounds() {
        return Err(StageFailure::new(Stage::Proc, evidence));
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let sysctl = open("/proc/sys/net", flags, Mode::empty())
        .map_err(|error| StageFailure::io(Stage::Proc, &error.into()))?;
    Ok(Opened {
        requests: route_socket()?,
        events: route_socket()?,
        netfilter: Some((netfilter_socket()?, netfilter_socket()?)),
        conntrack: Some(netfilter_socket()?),
        switches: Place::Directory(sysctl),
        tuns: Vec::new(),
    })
}

/// Why nothing may be done from the namespace that this process is in; `None` when it may.
pub(super) fn out_of_bounds() -> Option<String> {
    let value = std::env::var_os(TEST)?;
    let own = is_machines_own(&value.to_string_lossy()).unwrap_or(true);
    own.then(|| format!("{TEST} is set, and this is the machine's own network"))
}

fn is_machines_own(test: &str) -> io::Result<bool> {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net"));
    let ours = namespace("self")?;
    if test.parse::<u64>().is_ok() {
        return Ok(ours.as_os_str() == format!("net:[{test}]").as_str());
    }
    Ok(ours == namespace("1")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_network_is_known_by_its_number_or_its_first_process() {
        let ours = std::fs::read_link("/proc/self/ns/net").unwrap();
        let number = ours.to_string_lossy().replace(|c: char| !c.is_ascii_digit(), "");
        assert!(is_machines_own(&number).unwrap());
        assert!(!is_machines_own("1").unwrap());
        // The first process may not let itself be looked at: then nothing is said, and it counts as the machine's own.
        assert!(is_machines_own("yes").unwrap_or(true));
    }
}
