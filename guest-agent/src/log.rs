//! Lines on the console: `name: what key=value`. Owns no file; text from elsewhere is escaped.

use std::fmt::{self, Write as _};
use std::io::Write as _;

/// Longest line in characters; the console is slow and its log on the host is a ring.
const LINE_CHARS: usize = 1_000;

/// Writes one line: what happened, then its values as fields.
pub fn line(what: &str, fields: &[(&str, &dyn fmt::Display)]) {
    let text = format_line(what, fields);
    // The console may be gone; there is nobody left to tell.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

fn format_line(what: &str, fields: &[(&str, &dyn fmt::Display)]) -> String {
    let mut text = format!("sovereign: {what}");
    for (key, value) in fields {
        let _ = write!(text, " {key}={}", quoted(&value.to_string()));
    }
    let mut text: String = text.chars().take(LINE_CHARS).collect();
    text.push('\n');
    text
}

fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,+@".contains(c);
    if !value.is_empty() && value.chars().all(plain) {
        value.to_owned()
    } else {
        format!("{value:?}")
    }
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let _ = write!(text, ": {next}");
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_fields_and_cannot_forge_a_line_or_move_the_cursor() {
        let text = format_line("mounted", &[("disk", &"vda"), ("said", &"a\nb \x1b[2J")]);
        assert_eq!(text, "sovereign: mounted disk=vda said=\"a\\nb \\u{1b}[2J\"\n");
    }

    #[test]
    fn a_line_has_a_limit() {
        assert_eq!(
            format_line("x", &[("y", &"z".repeat(5_000))]).chars().count(),
            LINE_CHARS + 1
        );
    }
}
