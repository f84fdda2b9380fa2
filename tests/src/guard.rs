//! A seccomp filter that refuses socket(AF_VSOCK), for this process and all that it starts.
//!
//! On a build machine CID 2 is somebody else's host: no test may be able to reach it.

use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Installs the filter on all threads of this process, once.
///
/// # Panics
/// When it cannot be installed: no test may run without it.
pub fn refuse_vsock() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let program = filter().expect("the filter is well formed");
        seccompiler::apply_filter_all_threads(&program).expect("seccomp is available");
    });
}

/// Makes unshare() fail with EPERM in this process and all that it starts, as in many containers.
///
/// # Panics
/// When the filter cannot be installed.
pub fn refuse_unshare() {
    let refused = SeccompFilter::new(
        [(libc::SYS_unshare, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::try_from(std::env::consts::ARCH).expect("a known machine"),
    );
    let program: BpfProgram = refused
        .and_then(TryInto::try_into)
        .expect("the filter is well formed");
    seccompiler::apply_filter(&program).expect("seccomp is available");
}

fn filter() -> anyhow::Result<BpfProgram> {
    let vsock = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::AF_VSOCK as u64,
    )?;
    let rules = [(libc::SYS_socket, vec![SeccompRule::new(vec![vsock])?])];
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EACCES as u32),
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

    #[test]
    fn vsock_is_refused_here_and_in_threads_and_other_sockets_are_not() {
        refuse_vsock();
        assert_eq!(open(libc::AF_VSOCK), Err(rustix::io::Errno::ACCESS));
        let elsewhere = std::thread::spawn(|| open(libc::AF_VSOCK)).join().unwrap();
        assert_eq!(elsewhere, Err(rustix::io::Errno::ACCESS));
        assert_eq!(open(libc::AF_UNIX), Ok(()));
    }

    fn open(family: i32) -> rustix::io::Result<()> {
        let family = AddressFamily::from_raw(family as u16);
        socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None).map(drop)
    }
}
