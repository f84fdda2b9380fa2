//! The verbs, one file each. A verb returns its exit code, or the error that fixes it.

use crate::cli::Verb;
use crate::context::Context;
use crate::error::CommandError;

mod build;
mod completions;
mod destroy;
mod doctor;
mod down;
mod down_plan;
mod events;
mod exec;
mod forward;
mod gc;
mod host;
mod init;
mod leftover;
mod logs;
mod plan;
mod psql;
mod secret;
mod status;
mod up;
mod watch;

/// Runs a verb.
pub(crate) async fn run(context: &Context, verb: Verb) -> Result<u8, CommandError> {
    match verb {
        Verb::Init => init::run(context).map(done),
        Verb::Build(args) => build::run(context, &args).await.map(done),
        Verb::Up(args) => up::run(context, args).await.map(done),
        Verb::Plan(args) => plan::run(context, &args).await.map(done),
        Verb::Down(args) => down::run(context, &args).await.map(done),
        Verb::Gc(args) => gc::run(context, &args).await.map(done),
        Verb::Destroy(args) => destroy::run(context, &args).await.map(done),
        Verb::Status(args) => status::run(context, &args).await,
        Verb::Doctor(args) if args.fix.iter().any(|name| !name.is_empty()) => {
            leftover::run(context, &args).await.map(done)
        }
        Verb::Doctor(args) if !args.fix.is_empty() => doctor::fix(context, args.dry_run).await,
        Verb::Doctor(_) => doctor::run(context, doctor::Mode::Tell).await,
        Verb::Test => doctor::run(context, doctor::Mode::Test).await,
        Verb::Watch => watch::run(context).await.map(done),
        Verb::Events(args) => events::run(context, &args).await.map(done),
        Verb::Forward(args) => forward::run(context, args.verb).await.map(done),
        Verb::Host(args) => host::run(context, &args.verb).await.map(done),
        Verb::Logs(args) => logs::run(context, &args.name).map(done),
        Verb::Exec(args) => exec::run(context, &args.name, args.command, args.user).await,
        Verb::Psql(args) => psql::run(context, args).await,
        Verb::Completions(args) => completions::run(context, &args).map(done),
        Verb::Secret(args) => secret::run(context, &args.secret).map(done),
    }
}

fn done((): ()) -> u8 {
    0
}
