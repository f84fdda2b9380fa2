//! `--sql` for `sql`: short forms of guest names, from before verbs took a name. Pure.
//!
//! They are turned into the name before clap reads the arguments, so no verb knows of them; clap could not tell
//! `exec --sql uname` from a guest `uname`.

use std::ffi::{OsStr, OsString};

use clap::Command;

/// The guests that have one.
const GUESTS: [&str; 2] = ["sql", "forge"];

/// The arguments with the short form, if there is one where the verb takes a guest's name, as that name.
pub(crate) fn expand(mut args: Vec<OsString>, root: &Command) -> Vec<OsString> {
    if let Some((at, name)) = place(&args, root) {
        args[at] = name;
    }
    args
}

/// Where the short form stands, and what stands for it: only flags of the verb may come between the two.
fn place(args: &[OsString], root: &Command) -> Option<(usize, OsString)> {
    let mut verb = root;
    let mut rest = args.iter().enumerate().skip(1);
    while let Some((at, arg)) = rest.next() {
        let arg = arg.to_str()?;
        if let Some(next) = verb.find_subcommand(arg) {
            verb = next;
        } else if let Some(name) = GUESTS
            .into_iter()
            .find(|name| arg.strip_prefix("--") == Some(name))
        {
            return Some((at, spelled(verb, name)?));
        } else if !arg.starts_with("--") || arg == "--" {
            return None;
        } else if takes_value(root, verb, arg) {
            rest.next();
        }
    }
    None
}

/// As its verb takes it: first of all, or after `--guest`.
fn spelled(verb: &Command, name: &str) -> Option<OsString> {
    let first = verb.get_positionals().next().map(|arg| arg.get_id().as_str());
    if matches!(first, Some("name" | "guest")) {
        return Some(name.into());
    }
    let by_flag = verb.get_arguments().any(|arg| arg.get_long() == Some("guest"));
    by_flag.then(|| format!("--guest={name}").into())
}

fn takes_value(root: &Command, verb: &Command, flag: &str) -> bool {
    let flag = OsStr::new(&flag[2..]);
    let mut all = root.get_arguments().chain(verb.get_arguments());
    let known = all.find(|arg| arg.get_long().is_some_and(|long| OsStr::new(long) == flag));
    known.is_some_and(|arg| arg.get_action().takes_values())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn expanded(line: &str) -> String {
        let args = line.split(' ').map(OsString::from).collect();
        let args = expand(args, &Cli::command());
        let words: Vec<&str> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        words.join(" ")
    }

    #[test]
    fn the_short_form_is_the_name_where_a_verb_takes_one() {
        for (short, long) in [
            ("sovereign up --sql", "sovereign up sql"),
            ("sovereign up --timeout 30 --sql", "sovereign up --timeout 30 sql"),
            (
                "sovereign --instance x up --json --sql",
                "sovereign --instance x up --json sql",
            ),
            ("sovereign down --forge", "sovereign down forge"),
            ("sovereign destroy --yes --forge", "sovereign destroy --yes forge"),
            (
                "sovereign exec --sql -- uname -a",
                "sovereign exec sql -- uname -a",
            ),
            ("sovereign psql --sql -c x", "sovereign psql sql -c x"),
            ("sovereign forward add --sql 1:2", "sovereign forward add sql 1:2"),
            ("sovereign forward list --sql", "sovereign forward list sql"),
            (
                "sovereign events --last 2 --sql",
                "sovereign events --last 2 --guest=sql",
            ),
        ] {
            assert_eq!(expanded(short), long);
        }
    }

    #[test]
    fn nothing_else_is_touched() {
        for line in [
            "sovereign",
            "sovereign --sql up",
            "sovereign status --sql",
            "sovereign up sql",
            "sovereign up --miniflux",
            "sovereign exec web -- tool --sql",
            "sovereign exec web tool --sql",
            "sovereign psql sql --sql",
            "sovereign --config --sql up",
            "sovereign exec -- --sql",
            "sovereign secret --sql",
        ] {
            assert_eq!(expanded(line), line);
        }
    }
}
