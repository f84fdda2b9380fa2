//! Devices in processes of their own: ours as the shim has it, and the peer.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sovereign_host_agent::vsock::{Device, Limits, serve_front};
use sovereign_protocol::transport::bind_unix;
use tokio_util::sync::CancellationToken;

use crate::places::Places;

/// The argument that makes this program a device: `serve-device VHOST FRONT`.
pub(crate) const VERB: &str = "serve-device";

/// A device's process; ended when dropped.
pub(crate) struct Helper(Child);

impl Helper {
    /// Our device and its front, as this same program.
    pub(crate) fn ours(places: &Places, vhost: &Path, front: &Path) -> anyhow::Result<Self> {
        let mut command = tied(places, &std::env::current_exe()?);
        command.arg(VERB).arg(vhost).arg(front);
        Self::start(command, vhost)
    }

    /// vhost-device-vsock behind its Unix socket; its AF_VSOCK back end is not chosen, and the guard would refuse it.
    pub(super) fn peer(places: &Places, vhost: &Path, front: &Path) -> anyhow::Result<Self> {
        let mut command = tied(places, &places.device);
        command
            .args(["--guest-cid", "3", "--tx-buffer-size", "32768"])
            .arg("--socket")
            .arg(vhost)
            .arg("--uds-path")
            .arg(front);
        Self::start(command, vhost)
    }

    fn start(mut command: Command, vhost: &Path) -> anyhow::Result<Self> {
        let helper = Self(command.stdin(Stdio::null()).spawn()?);
        let begun = Instant::now();
        while !vhost.exists() {
            anyhow::ensure!(begun.elapsed().as_secs() < 5, "no {}", vhost.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(helper)
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill(); // it may have ended
        let _ = self.0.wait();
    }
}

/// A program that dies with this thread.
fn tied(places: &Places, program: &Path) -> Command {
    let mut command = Command::new(places.product.join("sovereign-host"));
    command.arg("become-vmm").arg(std::process::id().to_string());
    command.arg("--").arg(program);
    command
}

/// Serves a device until it is ended.
pub(crate) fn serve(vhost: &Path, front: &Path) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let device = Device::start(vhost, 3, Limits::default())?;
        serve_front(device, bind_unix(front)?, CancellationToken::new()).await;
        Ok(())
    })
}
