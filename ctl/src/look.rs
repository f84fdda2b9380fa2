//! The network namespace that ctl is in, as `sovereign-host look` sees it: for plans while no host agent runs.

use std::process::Stdio;

use sovereign_reconcile::view::NetworkLook;
use sovereign_reconcile::wanted::NetworkSpec;
use tokio::io::AsyncWriteExt;

use crate::agent::Binaries;
use crate::context::{Context, escaped};
use crate::error::{CommandError, Kind};

/// Looks at what `spec` is about; without one, at what is left when nothing is wanted. Changes nothing.
///
/// # Errors
/// `Internal` with what the program said.
pub(crate) async fn look(
    context: &Context,
    binaries: &Binaries,
    spec: Option<&NetworkSpec>,
) -> Result<NetworkLook, CommandError> {
    let failed = |error: String| {
        CommandError::new(
            Kind::Internal,
            "NotSeen",
            "this machine's network cannot be looked at",
        )
        .because(std::io::Error::other(error))
        .next("sudo sovereign plan")
    };
    let layout = &context.layout;
    let mut child = tokio::process::Command::new(&binaries.host)
        .args(["look", "--instance", layout.instance.as_str(), "--switched"])
        .arg(layout.switched())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let document = serde_json::to_vec(&spec).map_err(|error| failed(error.to_string()))?;
    if let Some(mut input) = child.stdin.take() {
        let _ = input.write_all(&document).await; // one that ended says why itself
    }
    let output = child.wait_with_output().await;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(escaped(&String::from_utf8_lossy(&output.stderr))));
    }
    serde_json::from_slice(&output.stdout).map_err(|error| failed(error.to_string()))
}
