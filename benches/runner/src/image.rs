//! The image that the product would boot, and whether KVM runs it.

use std::path::Path;
use std::process::Command;

use anyhow::Context;
use serde_json::Value;
use sovereign_host_agent::shim::accel::{self, Accel};
use sovereign_host_agent::shim::contract::{Paths, ShimConfig};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::Image;

use crate::places::Places;

/// Builds the default image, or finds it in this user's cache.
pub(crate) fn build(places: &Places) -> anyhow::Result<Image> {
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("sovereign.toml");
    std::fs::write(
        &config,
        "[guest.sql]\n[guest.sql.service.postgres]\nkind = \"postgres\"\nport = 5432\n",
    )?;
    let output = Command::new(places.product.join("sovereign"))
        .arg("--config")
        .arg(&config)
        .args(["build", "--json"])
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let done: Value =
        serde_json::from_str(&said).with_context(|| format!("sovereign build said {said:?}"))?;
    anyhow::ensure!(output.status.success(), "sovereign build: {done}");
    Ok(serde_json::from_value(done["image"]["files"].clone())?)
}

/// What the product would boot this image with.
pub(crate) async fn accel(dir: &Path, image: &Image) -> anyhow::Result<Accel> {
    let layout = Layout {
        instance: Name::parse("bench")?,
        run: dir.join("run"),
        state: dir.join("state"),
    };
    let guest = Name::parse("probe")?;
    let config = ShimConfig {
        paths: Paths::of(&layout, &guest),
        guest,
        memory_mib: 128,
        vcpus: 1,
        data_mib: 64,
        card: None,
        image: image.clone(),
    };
    Ok(accel::choose(&config).await.accel)
}
