//! What people read about the file, made from its keys: the file that `init` writes, and the table in docs/.

use super::keys::{ALL, Absent, NOTHING, Shown};

/// What stands above everything.
const HEAD: &str = "\
# What `sovereign up` makes true. Every key, its default and its limits: docs/configuration.md.
# Change something and run `sovereign up` again; `sovereign down` stops everything, data stays.
";
/// A second guest, which needs the first.
const TAIL: &str = "
# [guest.web]                     # a second guest, whose service needs the first one's; `up web` brings up both
# [guest.web.service.miniflux]
# kind = \"miniflux\"               # a feed reader; log in as admin with what `sovereign secret web/miniflux` prints
# requires = \"sql/postgres\"       # GUEST/SERVICE: starts when that is ready, with a database of its own there
# [[guest.web.forward]]
# name = \"miniflux\"
# listen = \"127.0.0.1:18080\"
";
/// Where a comment begins beside a key.
const COMMENT_COLUMN: usize = 33;

/// A commented configuration with one guest, valid as it is.
pub(crate) fn template() -> String {
    let mut text = HEAD.to_owned();
    let mut keys = ALL.iter().peekable();
    let mut open: Option<String> = None;
    while let Some(key) = keys.next() {
        let (table, name) = place(key.path);
        match &key.shown {
            Shown::Table(lines) => {
                text += &format!("\n[{table}.{name}]  # {}\n", key.about);
                lines.iter().for_each(|line| text += &format!("{line}\n"));
                open = None;
            }
            Shown::ExampleTable => {
                text += &format!("\n# [{table}.{name}]  # {}\n", key.about);
                open = None;
            }
            Shown::Elsewhere => {}
            Shown::Set(value) | Shown::Example(value) => {
                if open.as_ref() != Some(&table) {
                    // A table of examples only is an example itself.
                    let rest = std::iter::once(key)
                        .chain(keys.clone().take_while(|next| place(next.path).0 == table));
                    let is_set = { rest }.any(|key| matches!(key.shown, Shown::Set(_)));
                    text += &format!(
                        "\n{}{}\n",
                        if is_set { "" } else { "# " },
                        header(key.path, &table)
                    );
                    open = Some(table);
                }
                let mark = if matches!(key.shown, Shown::Example(_)) {
                    "# "
                } else {
                    ""
                };
                let line = format!("{mark}{name} = {value}");
                let without = match key.absent {
                    Absent::Words(words) if words != NOTHING && !mark.is_empty() => {
                        format!("; without it: {words}")
                    }
                    _ => String::new(),
                };
                text += &format!("{line:<COMMENT_COLUMN$} # {}{without}\n", key.about);
            }
        }
    }
    text + TAIL
}

/// The table of a key in the example, and the key in it.
fn place(path: &str) -> (String, &str) {
    let (table, name) = path.rsplit_once('.').unwrap_or(("", path));
    let table = table.replace("NAME", "sql").replace("SERVICE", "postgres");
    (table.replace("[]", ""), name)
}

fn header(path: &str, table: &str) -> String {
    if path.contains("[]") {
        format!("[[{table}]]")
    } else {
        format!("[{table}]")
    }
}

/// The table of all keys.
#[cfg(test)]
pub(super) fn table() -> String {
    let mut text = "| key | default | accepted | what it is |\n|---|---|---|---|\n".to_owned();
    for key in ALL {
        let default = match key.absent {
            Absent::Value(value) => format!("`{value}`"),
            Absent::Words(words) => words.to_owned(),
            Absent::Needed => "needed".to_owned(),
        };
        text += &format!(
            "| `{}` | {default} | {} | {} |\n",
            key.path,
            key.accepted(),
            key.about
        );
    }
    text
}

#[cfg(test)]
#[path = "reference_tests.rs"]
mod tests;
