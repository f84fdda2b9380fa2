//! Our own program, run again.

use std::path::PathBuf;

use tokio::process::Command;

/// The running program itself: also when the file it came from was replaced since (proc_pid_exe(5)).
pub const ITSELF: &str = "/proc/self/exe";

/// A command that runs this very program; process lists show where it came from.
#[must_use]
pub fn command() -> Command {
    let mut command = Command::new(ITSELF);
    if let Some(path) = path() {
        command.arg0(path);
    }
    command
}

/// Where the program came from.
fn path() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?;
    let text = path.to_str()?;
    Some(PathBuf::from(text.strip_suffix(" (deleted)").unwrap_or(text)))
}
