//! `build`: makes the image, or finds it in the cache.

use serde_json::json;

use crate::agent::Binaries;
use crate::cli::Build;
use crate::context::{Context, data};
use crate::error::CommandError;
use crate::{config, image};

pub(super) async fn run(context: &Context, args: &Build) -> Result<(), CommandError> {
    let settings = config::load(context)?;
    let binaries = Binaries::find()?;
    context.when_interrupted(
        "interrupted; what was fetched stays in the cache",
        "sovereign build",
    );
    let built = image::make(context, &settings, &binaries, args.locked).await?;
    let digest = &built.image.digest;
    let (reason, evidence) = match built.fresh {
        true => (
            "Built",
            format!("image {digest} with kernel {}", built.kernel_version),
        ),
        false => (
            "Cached",
            format!(
                "image {digest} with kernel {} was in the cache",
                built.kernel_version
            ),
        ),
    };
    if !context.json {
        return data(&evidence);
    }
    let image = json!({"digest": digest, "kernel_version": built.kernel_version, "files": built.image});
    context.done_with(reason, &evidence, "sovereign up", &[("image", image)])
}
