//! `psql`: the guest's own psql, as its superuser over its Unix socket.

use crate::cli::Psql;
use crate::context::Context;
use crate::error::CommandError;

const COMMAND: [&str; 5] = ["psql", "-U", "postgres", "-h", "/run/postgresql"];

pub(super) async fn run(context: &Context, args: Psql) -> Result<u8, CommandError> {
    let argv = COMMAND.into_iter().map(str::to_owned).chain(args.args).collect();
    super::exec::run(context, &args.name, argv, Some("postgres".to_owned())).await
}
