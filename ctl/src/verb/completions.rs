//! `completions`: a script for a shell, made from the definition of the command line itself.

use clap::CommandFactory;
use clap_complete::{Shell, generate};

use crate::cli::{Cli, Completions, ForShell};
use crate::context::{Context, data};
use crate::error::CommandError;

pub(super) fn run(context: &Context, args: &Completions) -> Result<(), CommandError> {
    let script = script(args.shell);
    if context.json {
        let next = "write `script` to where the shell looks: sovereign completions --help";
        return context.done_with("Completions", "made", next, &[("script", script.into())]);
    }
    data(script.trim_end())
}

fn script(shell: ForShell) -> String {
    let shell = match shell {
        ForShell::Bash => Shell::Bash,
        ForShell::Zsh => Shell::Zsh,
        ForShell::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "sovereign", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_learns_every_verb_and_flag() {
        for shell in [ForShell::Bash, ForShell::Zsh, ForShell::Fish] {
            let script = script(shell);
            for verb in Cli::command().get_subcommands() {
                assert!(script.contains(verb.get_name()), "{shell:?}: {}", verb.get_name());
            }
            for flag in ["dry-run", "temporary", "instance"] {
                assert!(script.contains(flag), "{shell:?}: {flag}");
            }
        }
    }
}
