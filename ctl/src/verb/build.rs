//! `build`: makes the guests' images, or finds them in the cache.

use std::path::Path;

use serde_json::json;

use crate::agent::Binaries;
use crate::cli::Build;
use crate::context::{Context, data};
use crate::error::CommandError;
use crate::image::{Built, LockUse};
use crate::{config, image};

pub(super) async fn run(context: &Context, args: &Build) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    let binaries = Binaries::find()?;
    context.when_interrupted(
        "interrupted; what was fetched stays in the cache",
        "sovereign build",
    );
    let lock_use = match args.update {
        true => LockUse::Renewed,
        false => args.locked.lock_use(),
    };
    let built = image::make(context, &settings, &binaries, lock_use).await?;
    let mut made = Vec::new();
    for one in &built {
        let kept = args.keep_lock && image::keep_lock(&settings, &one.recipe, &one.lock)?;
        let lock = match kept {
            true => image::kept_lock(&settings, &one.recipe),
            false => one.lock.clone(),
        };
        let evidence = evidence(one, &lock, kept, args.update);
        if !context.json {
            data(&evidence)?;
        }
        made.push((one, lock, evidence));
    }
    let reason = match built.iter().any(|one| one.fresh) {
        true => "Built",
        false => "Cached",
    };
    let evidence: Vec<&str> = made.iter().map(|(.., evidence)| evidence.as_str()).collect();
    let images: Vec<_> = made
        .iter()
        .map(|(one, lock, _)| {
            json!({
                "recipe": one.recipe, "digest": one.image.digest, "kernel_version": one.kernel_version,
                "files": one.image, "lock": {"path": lock, "change": one.change},
            })
        })
        .collect();
    // `image` and `lock` are the last one's: that of PostgreSQL, wherever there is one.
    let last = images.last().cloned().unwrap_or_default();
    let more = [
        ("image", last.clone()),
        ("lock", last["lock"].clone()),
        ("images", json!(images)),
    ];
    context.done_with(reason, &evidence.join("; "), "sovereign up", &more)
}

/// What was made, in words.
fn evidence(built: &Built, lock: &Path, kept: bool, update: bool) -> String {
    let digest = &built.image.digest;
    let from = if built.fresh { "" } else { " was in the cache" };
    let recipe = &built.recipe;
    let made = format!(
        "image {digest} ({recipe}) with kernel {}{from}",
        built.kernel_version
    );
    match (kept, update, &built.change) {
        (true, ..) => format!("{made}; wrote {}", lock.display()),
        (false, true, Some(change)) => format!("{made}; {} is new: {change}", lock.display()),
        (false, true, None) => format!("{made}; {} has the same versions", lock.display()),
        (false, false, _) => made,
    }
}
