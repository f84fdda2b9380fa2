//! The command line as people type it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use sovereign_protocol::name::Name;

use crate::forward::{Mapping, Via};
use crate::image::LockUse;

/// The instance when none is named.
pub(crate) const DEFAULT_INSTANCE: &str = "default";

/// Runs small Linux guests that hold your own services.
#[derive(Debug, Parser)]
#[command(
    name = "sovereign",
    version,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "Examples:\n  sovereign init && sovereign up\n  sovereign status\n  sovereign psql sql -c 'select 1'\n\n\
Exit codes: 0 done, 1 wanted state not reached, 2 usage, 3 configuration or lock,\n\
4 agent not reachable, 5 timed out, 6 refused, 70 internal, 130 interrupted."
)]
pub(crate) struct Cli {
    /// The flags of every verb.
    #[command(flatten)]
    pub(crate) global: Global,
    /// What to do.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// The flags of every verb.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The configuration file [default: ./sovereign.toml, then XDG_CONFIG_HOME/sovereign/sovereign.toml]
    #[arg(long, global = true, value_name = "FILE", env = "SOVEREIGN_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// The instance: everything is kept apart by its name
    #[arg(long, global = true, value_name = "NAME", env = "SOVEREIGN_INSTANCE", default_value = DEFAULT_INSTANCE)]
    pub(crate) instance: Name,
    /// Data as JSON, and one JSON object at the end
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Write a commented sovereign.toml, if there is none
    #[command(after_help = "Example:\n  sovereign init")]
    Init,
    /// Build the guest image, or find it in the cache
    #[command(
        after_help = "Examples:\n  sovereign build\n  sovereign build --keep-lock && git add sovereign.lock\n  sovereign build --locked\n  sovereign build --update && sovereign down && sovereign up"
    )]
    Build(Build),
    /// Bring guests up as the configuration says, and wait until they are ready
    #[command(after_help = "Examples:\n  sovereign up\n  sovereign up sql --timeout 30")]
    Up(Up),
    /// Print what `up` would change, and change nothing
    #[command(after_help = "Examples:\n  sovereign plan\n  sovereign plan --json | jq .steps")]
    Plan(Plan),
    /// Stop all guests in order, then the host agent; or one guest
    #[command(after_help = "Examples:\n  sovereign down\n  sovereign down sql\n  sovereign down --dry-run")]
    Down(Down),
    /// Remove links, routes, rules and packet filters that dead host agents left on this machine
    #[command(
        after_help = "Examples:\n  sovereign gc --dry-run\n  sovereign gc --all   # of every instance that is not in use\n\n\
They are found by their marks; nothing else is touched. Switches that are still as they set them are put back. Private networks leave nothing."
    )]
    Gc(Gc),
    /// Remove a stopped guest's data disk, logs and secrets
    #[command(after_help = "Example:\n  sovereign down && sovereign destroy sql --yes")]
    Destroy(Destroy),
    /// Show what is true now: a picture on a terminal, JSON in a pipe
    #[command(
        after_help = "Examples:\n  sovereign status\n  sovereign status --check   # exit 1 unless all guests are ready\n  sovereign status --json | jq .guests[0].ready"
    )]
    Status(Status),
    /// Explain what is broken: evidence, a counter-test and the next command
    #[command(
        after_help = "Examples:\n  sovereign doctor\n  sovereign doctor --json | jq '.findings[] | {layer, code, fix}'\n  \
sovereign doctor --fix=rule-lookup-main --dry-run\n\n\
Without --fix it changes nothing and exits 0 whatever it finds; `sovereign test` exits 1 with a finding."
    )]
    Doctor(Doctor),
    /// As doctor, but exit 1 with a finding
    #[command(after_help = "Example:\n  sovereign test > /dev/null && echo healthy")]
    Test,
    /// Print each event when it happens, until Ctrl-C
    #[command(after_help = "Example:\n  sovereign watch --json")]
    Watch,
    /// Print what happened; works with nothing running, too
    #[command(after_help = "Examples:\n  sovereign events --last 20\n  sovereign events --guest sql --json")]
    Events(Events),
    /// Print what a guest's console said
    #[command(after_help = "Example:\n  sovereign logs sql")]
    Logs(Guest),
    /// Run a command in a guest; its exit code is ours
    #[command(after_help = "Example:\n  sovereign exec sql -- uname -a")]
    Exec(Exec),
    /// Run the guest's psql as its superuser; its exit code is ours
    #[command(after_help = "Examples:\n  sovereign psql sql -c 'select 1'\n  sovereign psql sql < dump.sql")]
    Psql(Psql),
    /// Lead ports of this machine to a guest's services; without a verb, list them
    #[command(
        after_help = "Examples:\n  sovereign forward add sql 15433:5432\n  sovereign forward list\n  sovereign forward remove sql 15433"
    )]
    Forward(Forward),
    /// The host agent itself: show it, end it, or have it started at boot
    #[command(
        after_help = "Examples:\n  sovereign host status\n  sovereign host stop      # guests run on; the next `up` adopts them\n  sovereign host install"
    )]
    Host(Host),
    /// Print one secret's value, alone
    #[command(
        after_help = "Example:\n  PGPASSWORD=$(sovereign secret sql/postgres) psql -h 127.0.0.1 -p 15432 -U postgres"
    )]
    Secret(Secret),
    /// Print a script that completes verbs and flags in a shell
    #[command(
        after_help = "Examples:\n  sovereign completions bash > ~/.local/share/bash-completion/completions/sovereign\n  sovereign completions zsh > ~/.zfunc/_sovereign\n  sovereign completions fish > ~/.config/fish/completions/sovereign.fish"
    )]
    Completions(Completions),
}

/// Arguments of `host`.
#[derive(Debug, Args)]
pub(crate) struct Host {
    /// What to do
    #[command(subcommand)]
    pub(crate) verb: HostVerb,
}

/// What can be done with the host agent.
#[derive(Debug, Subcommand)]
pub(crate) enum HostVerb {
    /// Have systemd start the host agent at boot, and keep it over `down`
    #[command(
        after_help = "Examples:\n  sovereign host install\n  sovereign host install --print\n\n\
root: a system unit. Other users: a unit of their own, which needs `loginctl enable-linger`.\n\
Only systemd is supported: without it nothing is changed (exit 6), and --print shows the command for another init.\n\
To take it back: systemctl disable --now sovereign-INSTANCE, and remove the unit's file."
    )]
    Install {
        /// Only print the unit
        #[arg(long)]
        print: bool,
    },
    /// Show the running host agent: process, version, since when, sockets, store, network
    #[command(
        after_help = "Examples:\n  sovereign host status\n  sovereign host status --json | jq .host.pid"
    )]
    Status,
    /// End the host agent; its guests run on and are adopted by the next one
    #[command(
        after_help = "Example:\n  sovereign host stop && sovereign up\n\nTo stop the guests, too: sovereign down. Forwards refuse connections while no host agent runs."
    )]
    Stop,
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: ForShell,
}

/// The shells that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ForShell {
    /// GNU bash.
    Bash,
    /// zsh.
    Zsh,
    /// fish.
    Fish,
}

/// Whether the lock must be followed exactly.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct Locked {
    /// Fail (exit 3) where a locked package is gone, rather than take its successor
    #[arg(long)]
    pub(crate) locked: bool,
}

impl Locked {
    /// How the lock is treated.
    pub(crate) fn lock_use(self) -> LockUse {
        if self.locked {
            LockUse::Exact
        } else {
            LockUse::Followed
        }
    }
}

/// Arguments of `build`.
#[derive(Debug, Args)]
pub(crate) struct Build {
    /// As for `up`
    #[command(flatten)]
    pub(crate) locked: Locked,
    /// Take the archive's present packages and write the lock anew; running guests take the image at their next boot
    #[arg(long, conflicts_with = "locked")]
    pub(crate) update: bool,
    /// Write sovereign.lock beside the configuration, if there is none: from then on builds follow it
    #[arg(long)]
    pub(crate) keep_lock: bool,
}

/// Arguments of `up`.
#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Only this guest, beside those that run already; `--sql` and `--forge` are short for those names
    pub(crate) name: Option<Name>,
    /// Only print what would change, as `plan` does
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// How long to wait for readiness, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) timeout: u64,
    /// As for `build`
    #[command(flatten)]
    pub(crate) locked: Locked,
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// As for `up`: only this guest; `--sql` and `--forge` are short for those names
    pub(crate) name: Option<Name>,
}

/// Arguments of `down`.
#[derive(Debug, Args)]
pub(crate) struct Down {
    /// Only this guest, which the next `up` starts again; `--sql` and `--forge` are short for those names
    pub(crate) name: Option<Name>,
    /// Print what would change, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Arguments of `gc`.
#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// Those of every instance that is not in use, not only of this one
    #[arg(long)]
    pub(crate) all: bool,
    /// Print what would be removed, and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Apply the fixes that are automatic; with a NAME, remove this leftover of a script instead (a finding tells its name)
    #[arg(long, value_name = "NAME", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub(crate) fix: Vec<String>,
    /// Print what --fix would do, and change nothing
    #[arg(long, requires = "fix")]
    pub(crate) dry_run: bool,
}

/// Arguments of `destroy`.
#[derive(Debug, Args)]
pub(crate) struct Destroy {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) name: Name,
    /// Do not ask
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Exit 1 unless all guests are ready
    #[arg(long)]
    pub(crate) check: bool,
}

/// Arguments of `events`.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Only the last so many
    #[arg(long, value_name = "COUNT")]
    pub(crate) last: Option<u64>,
    /// Only this guest's; `--sql` and `--forge` are short for `--guest sql` and so on
    #[arg(long, value_name = "NAME")]
    pub(crate) guest: Option<Name>,
    /// Go on with what happens, until Ctrl-C
    #[arg(long)]
    pub(crate) follow: bool,
}

/// One guest.
#[derive(Debug, Args)]
pub(crate) struct Guest {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) name: Name,
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) name: Name,
    /// The guest's user that runs it [default: root]
    #[arg(long)]
    pub(crate) user: Option<String>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    pub(crate) command: Vec<String>,
}

/// Arguments of `psql`.
#[derive(Debug, Args)]
pub(crate) struct Psql {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) name: Name,
    /// Arguments for psql
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub(crate) args: Vec<String>,
}

/// Arguments of `forward`.
#[derive(Debug, Args)]
pub(crate) struct Forward {
    /// What to do
    #[command(subcommand)]
    pub(crate) verb: Option<ForwardVerb>,
}

/// What can be done with forwards.
#[derive(Debug, Subcommand)]
pub(crate) enum ForwardVerb {
    /// Write a forward into the configuration, and open it if the guest runs
    #[command(
        after_help = "Examples:\n  sovereign forward add sql 15433:5432\n  sovereign forward add sql 0.0.0.0:15433 --name lan\n  sovereign forward add sql 15434 --temporary\n  sovereign forward add sql 0.0.0.0:5432 --via kernel      # translated by the kernel, for other machines\n  sovereign forward add sql 0.0.0.0:8000-8010 --udp        # so are UDP and ranges\n\n\
Comments and order of the file stay. A port that somebody has is refused (exit 6), and nothing is written."
    )]
    Add(AddForward),
    /// Show forwards: in the configuration, and as they are now
    #[command(after_help = "Examples:\n  sovereign forward list\n  sovereign forward list sql --json")]
    List {
        /// Only this guest's; `--sql` and `--forge` are short for those names
        name: Option<Name>,
    },
    /// Take a forward out of the configuration, and close it
    #[command(
        after_help = "Examples:\n  sovereign forward remove sql postgres\n  sovereign forward remove sql 15433 --temporary\n  sovereign forward remove sql 8000-8010/udp"
    )]
    Remove(RemoveForward),
}

/// Arguments of `forward add`.
#[derive(Debug, Args)]
pub(crate) struct AddForward {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) guest: Name,
    /// Where this machine listens (127.0.0.1 unless an address is named), and the service's port in the guest
    #[arg(value_name = crate::forward::FORM)]
    pub(crate) mapping: Mapping,
    /// By what it leads there [default: vsock, and kernel for UDP and ranges]
    #[arg(long, value_enum)]
    pub(crate) via: Option<Via>,
    /// UDP instead of TCP
    #[arg(long)]
    pub(crate) udp: bool,
    /// The forward's name [default: the service's, with the port when that is taken]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<Name>,
    /// Only in the running host agent: the configuration stays as it is, and the next `up` takes it back
    #[arg(long)]
    pub(crate) temporary: bool,
}

/// Arguments of `forward remove`.
#[derive(Debug, Args)]
pub(crate) struct RemoveForward {
    /// The guest; `--sql` and `--forge` are short for those names
    pub(crate) guest: Name,
    /// The forward's name, its port or ports on this machine (PORT, FIRST-LAST, PORT/udp), or address and ports
    #[arg(value_name = "NAME|PORT")]
    pub(crate) which: String,
    /// Only in the running host agent: the configuration stays as it is, and the next `up` opens it again
    #[arg(long)]
    pub(crate) temporary: bool,
}

/// Arguments of `secret`.
#[derive(Debug, Args)]
pub(crate) struct Secret {
    /// The secret, as `GUEST/NAME`
    #[arg(value_name = "GUEST/NAME")]
    pub(crate) secret: String,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Cli;

    #[test]
    fn the_definition_is_consistent_and_every_verb_has_an_example() {
        Cli::command().debug_assert();
        let root = Cli::command();
        let nested = |verb: &clap::Command| {
            let own = verb.get_name().to_owned();
            let below = verb
                .get_subcommands()
                .map(|inner| (format!("{own} {}", inner.get_name()), inner.clone()));
            below.collect::<Vec<_>>()
        };
        let verbs = root
            .get_subcommands()
            .flat_map(|verb| std::iter::once((verb.get_name().to_owned(), verb.clone())).chain(nested(verb)));
        for (path, verb) in verbs {
            let help = verb.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                help.contains(&format!("sovereign {path}")),
                "{path} has no example"
            );
        }
    }
}
