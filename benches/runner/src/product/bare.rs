//! The bare shell init that the product's boot is held against.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use sovereign_host_agent::shim::accel::Accel;
use sovereign_protocol::spec::Image;

use super::Product;
use crate::places::Places;
use crate::vm::{Extra, Plan};
use crate::vsock::Helper;

/// What it tells: all modules are loaded, PostgreSQL is started, its socket is there, `select 1` was answered.
pub(super) const STEPS: [&str; 4] = ["modules", "started", "socket", "ready"];
/// It must answer within this time.
const LIMIT: Duration = Duration::from_secs(60);

/// A machine that can be booted again and again.
pub(super) struct Bare {
    plan: Plan,
    accel: Accel,
}

impl Bare {
    pub(super) fn new(
        places: &Places,
        dir: &Path,
        image: &Image,
        product: &Product,
        kvm: bool,
    ) -> anyhow::Result<Self> {
        ensure!(places.product.is_dir(), "no {}", places.product.display());
        let extras = [
            Extra {
                path: "init",
                bytes: include_bytes!("bare-init.sh").to_vec(),
            },
            Extra {
                path: "busybox",
                bytes: busybox(dir, image)?,
            },
        ];
        let disk = product.instance.state().join("guests/sql/data.img");
        ensure!(disk.is_file(), "no {}", disk.display());
        let plan = Plan::new(dir, image, &extras)?.with_data(disk);
        let accel = if kvm { Accel::Kvm } else { Accel::Tcg };
        Ok(Self { plan, accel })
    }

    /// From the start of the VMM to each of [`STEPS`]; returns when the machine has powered off.
    pub(super) fn boot(&self, places: &Places) -> anyhow::Result<[Duration; STEPS.len()]> {
        let _device = Helper::ours(places, &self.plan.vhost(), &self.plan.front())?;
        let vm = self.plan.start(places, self.accel)?;
        let mut times = [Duration::ZERO; STEPS.len()];
        for (time, step) in times.iter_mut().zip(STEPS) {
            *time = vm.wait(&format!("bare: {step}"), LIMIT)?;
        }
        vm.ended(LIMIT)?; // its disk is clean then
        Ok(times)
    }
}

/// The static busybox of the image itself.
fn busybox(dir: &Path, image: &Image) -> anyhow::Result<Vec<u8>> {
    let root: PathBuf = dir.join("root");
    let status = Command::new("fsck.erofs")
        .arg(format!("--extract={}", root.display()))
        .arg("--no-preserve")
        .arg(&image.root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .context("cannot run fsck.erofs")?;
    ensure!(status.success(), "fsck.erofs: {status}");
    let bytes = std::fs::read(root.join("usr/bin/busybox")).context("the image has no busybox")?;
    std::fs::remove_dir_all(&root)?;
    Ok(bytes)
}
