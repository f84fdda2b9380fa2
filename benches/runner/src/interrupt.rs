//! Ctrl-C and SIGTERM stop what would outlive this program: the host agent of the measured instance.
//!
//! Everything else that is started here dies with this process (`sovereign-host become-vmm`).

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

/// What stops the instance, and its directory.
type Stop = (Command, PathBuf);

static STOP: Mutex<Option<Stop>> = Mutex::new(None);

/// What is run and removed when a signal comes; `None` when there is nothing to stop.
pub(crate) fn stop_with(stop: Option<Stop>) {
    *STOP.lock().unwrap_or_else(PoisonError::into_inner) = stop;
}

/// Waits for a signal on a thread of its own.
///
/// # Errors
/// The system's own.
pub(crate) fn watch() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        let told = runtime.block_on(async {
            let mut terminate = signal(SignalKind::terminate())?;
            tokio::select! {
                told = tokio::signal::ctrl_c() => told,
                _ = terminate.recv() => Ok(()),
            }
        });
        if told.is_ok() {
            let stop = STOP.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some((mut command, dir)) = stop {
                eprintln!("interrupted: stopping the measured instance");
                // Nobody is left to be told of a failure.
                let _ = command.stdout(Stdio::null()).status();
                let _ = std::fs::remove_dir_all(dir);
            }
            std::process::exit(130);
        }
    });
    Ok(())
}
