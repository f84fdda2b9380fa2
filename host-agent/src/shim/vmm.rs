//! The VMM as a child that cannot outlive its shim.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context;
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use crate::program;

/// Runs in the child: dies with its parent, then becomes the VMM.
///
/// PR_SET_PDEATHSIG follows the *thread* that spawned us (FACTS section 11), so the shim
/// spawns from its main thread; a parent that died before the call is found by its pid.
///
/// # Errors
/// When the parent is gone already, or the program cannot be run.
pub fn become_vmm(parent: i32, argv: &[OsString]) -> anyhow::Result<std::convert::Infallible> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("cannot tie the VMM to its shim")?;
    let now = getppid().map(|pid| pid.as_raw_nonzero().get());
    anyhow::ensure!(now == Some(parent), "the shim {parent} is gone");
    let (program, arguments) = argv.split_first().context("no VMM program")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}

/// The command of the child that becomes the VMM.
#[must_use]
pub fn command(vmm: &str, arguments: Vec<OsString>) -> tokio::process::Command {
    let mut command = program::command();
    command
        .arg("become-vmm")
        .arg(std::process::id().to_string())
        .arg("--")
        .arg(vmm)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Where a program is in PATH.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}
