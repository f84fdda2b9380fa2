//! The text of the file, and where in it each key stands.

use std::ops::Range;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::Problem;
use super::written::Written;

/// How alike two keys must be (Jaro-Winkler) for one to be proposed for the other.
const ALIKE: f64 = 0.75;

/// A file that is TOML; what stands in it may still be wrong.
pub(super) struct Source<'a> {
    file: &'a Path,
    text: &'a str,
    tree: Spanned<DeTable<'a>>,
}

impl<'a> Source<'a> {
    pub(super) fn read(file: &'a Path, text: &'a str) -> Result<Self, Box<Problem>> {
        match DeTable::parse(text) {
            Ok(tree) => Ok(Self { file, text, tree }),
            Err(error) => {
                let start = error.span().map_or(0, |span| span.start);
                let key = line_key(text, start);
                Err(problem_at(
                    file,
                    text,
                    start,
                    key,
                    "NotToml",
                    first_line(error.message()),
                ))
            }
        }
    }

    /// The file's path.
    pub(super) fn file(&self) -> &Path {
        self.file
    }

    /// The file by its known keys.
    pub(super) fn written(&self) -> Result<Written, Box<Problem>> {
        toml::from_str(self.text).map_err(|error| self.rejected(&error))
    }

    /// A problem with the key at `path`, or with the nearest table above it that exists.
    pub(super) fn problem(
        &self,
        path: &[&str],
        reason: &'static str,
        text: impl Into<String>,
    ) -> Box<Problem> {
        let start = (0..=path.len())
            .rev()
            .find_map(|depth| locate(self.tree.get_ref(), &path[..depth]));
        let start = start.map_or(0, |span| span.start);
        problem_at(self.file, self.text, start, path.join("."), reason, text.into())
    }

    /// serde names the key and the known ones in its message only.
    fn rejected(&self, error: &toml::de::Error) -> Box<Problem> {
        let start = error.span().map_or(0, |span| span.start);
        let key = path_at(self.tree.get_ref(), start).unwrap_or_else(|| line_key(self.text, start));
        let message = first_line(error.message());
        let Some(rest) = message.strip_prefix("unknown field ") else {
            let reason = if message.starts_with("missing field") {
                "MissingKey"
            } else {
                "WrongType"
            };
            return problem_at(self.file, self.text, start, key, reason, message);
        };
        let mut quoted = rest.split('`').skip(1).step_by(2);
        let unknown = quoted.next().unwrap_or_default();
        let known: Vec<&str> = quoted.collect();
        let mut problem = problem_at(
            self.file,
            self.text,
            start,
            key,
            "UnknownKey",
            "unknown key".to_owned(),
        );
        problem.nearest = nearest(unknown, &known).map(|key| format!("{key:?}"));
        problem.accepted = Some(match known.as_slice() {
            [] => "no key".to_owned(), // of a table that says all by being there
            known => known.join(", "),
        });
        problem
    }
}

impl Problem {
    /// Adds what would be right.
    pub(super) fn accepts(mut self: Box<Self>, accepted: impl Into<String>) -> Box<Self> {
        self.accepted = Some(accepted.into());
        self
    }

    /// Adds the nearest of what would be right.
    pub(super) fn near(mut self: Box<Self>, written: &str, known: &[&str]) -> Box<Self> {
        self.nearest = nearest(written, known).map(|near| format!("{near:?}"));
        self
    }
}

/// The most similar known word, if any is similar at all.
pub(super) fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    let rated = known
        .iter()
        .map(|known| (strsim::jaro_winkler(word, known), *known));
    let best = rated.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ALIKE).then_some(best.1)
}

fn problem_at(
    file: &Path,
    text: &str,
    start: usize,
    key: String,
    reason: &'static str,
    problem: String,
) -> Box<Problem> {
    let before = text.get(..start).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Box::new(Problem {
        file: file.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        key,
        reason,
        problem,
        nearest: None,
        accepted: None,
    })
}

fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or_default().to_owned()
}

/// What stands before the `=` of a line, for text that has no tree.
fn line_key(text: &str, start: usize) -> String {
    let line_start = text
        .get(..start)
        .and_then(|before| before.rfind('\n'))
        .map_or(0, |at| at + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let key = line.split('=').next().unwrap_or_default().trim();
    if key.is_empty() {
        "(end of file)".to_owned()
    } else {
        key.to_owned()
    }
}

/// The place of a key: for a key its name's, for an element of an array its own.
fn locate(table: &DeTable<'_>, path: &[&str]) -> Option<Range<usize>> {
    let (first, rest) = path.split_first()?;
    let (key, value) = table.iter().find(|(key, _)| key.get_ref().as_ref() == *first)?;
    locate_in(value, rest).or_else(|| rest.is_empty().then(|| key.span()))
}

fn locate_in(value: &Spanned<DeValue<'_>>, path: &[&str]) -> Option<Range<usize>> {
    let (first, rest) = path.split_first()?;
    match value.get_ref() {
        DeValue::Table(table) => locate(table, path),
        DeValue::Array(array) => {
            let element = array.get(first.parse::<usize>().ok()?)?;
            if rest.is_empty() {
                Some(element.span())
            } else {
                locate_in(element, rest)
            }
        }
        _ => None,
    }
}

/// The dotted key whose name or plain value stands at `at`.
fn path_at(table: &DeTable<'_>, at: usize) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        if key.span().contains(&at) {
            return Some(name.to_string());
        }
        path_in(value, at).map(|rest| {
            if rest.is_empty() {
                name.to_string()
            } else {
                format!("{name}.{rest}")
            }
        })
    })
}

/// As [`path_at`], below a value; empty when it is the value itself.
fn path_in(value: &Spanned<DeValue<'_>>, at: usize) -> Option<String> {
    let below = match value.get_ref() {
        DeValue::Table(table) => path_at(table, at),
        DeValue::Array(array) => array.iter().enumerate().find_map(|(index, element)| {
            let rest = path_in(element, at)?;
            Some(if rest.is_empty() {
                index.to_string()
            } else {
                format!("{index}.{rest}")
            })
        }),
        _ => None,
    };
    below.or_else(|| value.span().contains(&at).then(String::new))
}
