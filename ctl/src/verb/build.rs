//! `build`: makes the image, or finds it in the cache.

use serde_json::json;

use crate::agent::Binaries;
use crate::cli::Build;
use crate::context::{Context, data};
use crate::error::CommandError;
use crate::image::LockUse;
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
    let kept = args.keep_lock && image::keep_lock(&settings, &built.lock)?;
    let digest = &built.image.digest;
    let (reason, made) = match built.fresh {
        true => ("Built", ""),
        false => ("Cached", " was in the cache"),
    };
    let mut evidence = format!("image {digest} with kernel {}{made}", built.kernel_version);
    let lock = match kept {
        true => image::kept_lock(&settings),
        false => built.lock.clone(),
    };
    match (kept, args.update, &built.change) {
        (true, ..) => evidence += &format!("; wrote {}", lock.display()),
        (false, true, Some(change)) => evidence += &format!("; {} is new: {change}", lock.display()),
        (false, true, None) => evidence += &format!("; {} has the same versions", lock.display()),
        (false, false, _) => {}
    }
    if !context.json {
        return data(&evidence);
    }
    let image = json!({"digest": digest, "kernel_version": built.kernel_version, "files": built.image});
    let more = [
        ("image", image),
        ("lock", json!({"path": lock, "change": built.change})),
    ];
    context.done_with(reason, &evidence, "sovereign up", &more)
}
