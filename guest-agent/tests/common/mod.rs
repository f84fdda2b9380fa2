//! Tests that need a kernel of their own to break: each runs again inside fresh namespaces.

#![allow(dead_code)] // every test file uses its own part

use std::process::Command;

/// Set in the process inside the namespaces.
const INSIDE: &str = "SOVEREIGN_TEST_INSIDE";

/// Runs the test of this name in a network and a mount namespace of its own; true when this is already there.
///
/// `unshare` (util-linux) and not the system call: a process with threads cannot enter a user namespace,
/// which is what makes this work without being root.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some_and(|name| name == test) {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--cgroup"]);
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let status = command
        .arg(std::env::current_exe().expect("this program has a path"))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, test)
        .status()
        .expect("unshare runs");
    assert!(status.success(), "{test} inside its namespaces: {status}");
    false
}
