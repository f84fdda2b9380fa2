//! KVM where it works, else TCG: decided by what a machine did, not by what exists.
//!
//! `/dev/kvm` may be there and still be unable to run a stock kernel. The probe boots the
//! guest's own kernel without a root: a kernel that reaches its panic has run. The verdict
//! is kept for as long as host boot, host kernel, VMM binary and guest kernel stay the same.

use std::fmt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use super::{console, contract::ShimConfig, qemu, vmm};
use crate::files;

/// How the guest's instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// An accelerator and why it was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// The accelerator.
    pub accel: Accel,
    /// Why, in one line.
    pub why: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Cached {
    key: String,
    choice: Choice,
}

/// A kernel under a working KVM reaches its panic in well under this time.
const PROBE: Duration = Duration::from_secs(5);
/// Console bytes that a probe looks at.
const PROBE_BYTES: u64 = 256 << 10;

/// Chooses for this host and this guest kernel; asks the cache first.
pub async fn choose(config: &ShimConfig) -> Choice {
    if let Err(error) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        return Choice {
            accel: Accel::Tcg,
            why: format!("/dev/kvm cannot be opened: {error}"),
        };
    }
    let key = cache_key(&config.image.kernel);
    if let Some(choice) = cached(&config.paths.accel_cache, &key) {
        return choice;
    }
    let choice = judge(&probe(&config.image.kernel).await);
    let kept = Cached { key, choice };
    if let Ok(bytes) = serde_json::to_vec(&kept) {
        let _ = files::replace(&config.paths.accel_cache, &bytes); // without the cache the next boot probes again
    }
    kept.choice
}

fn cached(path: &Path, key: &str) -> Option<Choice> {
    let bytes = files::read_optional(path).ok()??;
    let kept: Cached = serde_json::from_slice(&bytes).ok()?;
    (kept.key == key).then_some(kept.choice)
}

fn cache_key(kernel: &Path) -> String {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let vmm = vmm::find_program(qemu::PROGRAM)
        .and_then(|path| std::fs::metadata(path).ok())
        .map_or(0, |m| m.len());
    format!(
        "{} {} {vmm} {}",
        read("/proc/sys/kernel/random/boot_id"),
        read("/proc/sys/kernel/osrelease"),
        kernel.display()
    )
}

/// The console of a kernel without a root under KVM, as far as it came.
async fn probe(kernel: &Path) -> Result<String, String> {
    let mut child = tokio::process::Command::new(qemu::PROGRAM)
        .args(qemu::probe_arguments(kernel, Accel::Kvm))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut text = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = tokio::time::timeout(PROBE, stdout.take(PROBE_BYTES).read_to_end(&mut text)).await;
    }
    let _ = child.kill().await; // it has ended, or will never end by itself
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn judge(console: &Result<String, String>) -> Choice {
    let (accel, why) = match console {
        Ok(text) if console::panic_line(text).is_some() => {
            (Accel::Kvm, "KVM ran the guest's kernel".to_owned())
        }
        Ok(text) => (
            Accel::Tcg,
            format!(
                "/dev/kvm is there, but the guest's kernel did not run under it (console ended after {} bytes)",
                text.len()
            ),
        ),
        Err(error) => (Accel::Tcg, format!("KVM could not be probed: {error}")),
    };
    Choice { accel, why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kernel_that_ran_proves_kvm() {
        let panicked = "Linux version 6.12\nKernel panic - not syncing: VFS: Unable to mount root fs\n";
        assert_eq!(judge(&Ok(panicked.into())).accel, Accel::Kvm);
        assert_eq!(judge(&Ok(String::new())).accel, Accel::Tcg);
        assert_eq!(judge(&Ok("Linux version 6.12\n".into())).accel, Accel::Tcg);
        assert!(judge(&Err("gone".into())).why.contains("gone"));
    }

    #[test]
    fn a_verdict_is_used_only_for_its_own_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("accel.json");
        assert_eq!(cached(&path, "a"), None);
        let choice = Choice {
            accel: Accel::Tcg,
            why: "x".into(),
        };
        let kept = Cached {
            key: "a".into(),
            choice: choice.clone(),
        };
        std::fs::write(&path, serde_json::to_vec(&kept).unwrap()).unwrap();
        assert_eq!(cached(&path, "a"), Some(choice));
        assert_eq!(cached(&path, "b"), None);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(cached(&path, "a"), None);
    }
}
