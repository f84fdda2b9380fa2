//! `sovereign`: talks to the host agent, the terminal and the build crates.
//!
//! Owns: the configuration file as written and what it means, the verbs, the exit codes.
//! Never changes the host itself (the host agent does) and never asks without a terminal.
//! stdout is data, stderr is talk.

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

mod agent;
mod cli;
mod clock;
mod config;
mod context;
mod doctor;
mod error;
#[cfg(test)]
mod fake_host;
mod forward;
mod image;
mod link;
mod look;
mod picture;
mod place;
mod plan;
mod progress;
#[cfg(test)]
mod schema;
mod shims;
mod short_form;
mod systemd;
mod unit;
mod verb;

use cli::Cli;
use context::Context;
use error::{CommandError, Kind};

fn main() -> ExitCode {
    let args = short_form::expand(std::env::args_os().collect(), &Cli::command());
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.global.json;
    let code = match Context::new(cli.global.config, json, cli.global.instance) {
        Ok(context) => run(&context, cli.verb),
        Err(error) => fail(json, &error),
    };
    // A blocking read of stdin or an image build may still be under way; nobody waits for it.
    std::process::exit(i32::from(code));
}

fn run(context: &Context, verb: cli::Verb) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let error =
                CommandError::new(Kind::Internal, "Runtime", "cannot start the runtime").because(error);
            return fail(context.json, &error);
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            // Losing a verb half way is safe: what it asked for is the agent's by then, and files are renamed into place.
            result = verb::run(context, verb) => result,
            () = interrupted() => Err(context.interrupted()),
        }
    });
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => fail(context.json, &error.spelled(|next| context.spell(next))),
    }
}

/// Ends at the first Ctrl-C or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = int.recv() => {}
        _ = term.recv() => {}
    }
}

/// Prints a failure where it belongs and returns its exit code.
fn fail(json: bool, error: &CommandError) -> u8 {
    if error.reason == context::PIPE_CLOSED {
        return 0;
    }
    if json {
        // A closed stdout leaves the exit code, which says it too.
        let _ = context::data(&error.json());
    } else {
        context::talk(error.human().trim_end());
    }
    error.kind.exit_code()
}

/// Help and version are data; all else that clap says is a usage error.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let json = std::env::args()
        .take_while(|arg| arg != "--")
        .any(|arg| arg == "--json");
    if json {
        let text = error.to_string();
        let first = text
            .lines()
            .next()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_owned();
        return ExitCode::from(fail(true, &CommandError::new(Kind::Usage, "Usage", first)));
    }
    let _ = error.print();
    ExitCode::from(Kind::Usage.exit_code())
}
