//! `watch`: each event when it happens, until Ctrl-C.

use sovereign_protocol::event::Start;

use super::events;
use crate::context::Context;
use crate::error::CommandError;
use crate::link::Link;

pub(super) async fn run(context: &Context) -> Result<(), CommandError> {
    let link = Link::connect(&context.layout).await?;
    context.when_interrupted("watch ended", "sovereign status");
    events::follow(context, &link, Start::Last(0), None).await
}
