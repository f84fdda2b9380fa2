//! What every verb is given: the global flags, where things lie, and how to speak.

use std::cell::RefCell;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Value, json};
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;

use crate::error::{CommandError, Kind};
use crate::place::{self, Environment};

/// The context of one run.
#[derive(Debug)]
pub(crate) struct Context {
    /// The configuration file that was named, if any.
    pub(crate) config: Option<PathBuf>,
    /// Data is to be JSON.
    pub(crate) json: bool,
    /// Where the instance keeps its files.
    pub(crate) layout: Layout,
    /// The environment as it was read at the start.
    pub(crate) environment: Environment,
    /// What to say when Ctrl-C ends the verb.
    interruption: RefCell<Interruption>,
}

#[derive(Debug, Clone)]
struct Interruption {
    message: String,
    next: String,
}

impl Context {
    /// Works out the directories of an instance.
    ///
    /// # Errors
    /// `Configuration` when a directory is unknown or a socket path would be too long.
    pub(crate) fn new(config: Option<PathBuf>, json: bool, instance: Name) -> Result<Self, CommandError> {
        let environment = Environment::read();
        Ok(Self {
            config,
            json,
            layout: place::layout(&environment, instance)?,
            environment,
            interruption: RefCell::new(Interruption {
                message: "interrupted".to_owned(),
                next: "sovereign status".to_owned(),
            }),
        })
    }

    /// A context whose files all lie in a test's directory.
    #[cfg(test)]
    pub(crate) fn in_dir(dir: &std::path::Path) -> Self {
        let environment = Environment {
            state_override: Some(dir.join("state")),
            run_override: Some(dir.to_owned()),
            ..Environment::default()
        };
        let instance = Name::parse("t").expect("a name");
        let layout = place::layout(&environment, instance).expect("a short directory");
        std::fs::create_dir_all(&layout.run).expect("a directory of the test's own");
        Self {
            config: Some(dir.join(crate::config::FILE)),
            json: false,
            layout,
            environment,
            interruption: RefCell::new(Interruption {
                message: String::new(),
                next: String::new(),
            }),
        }
    }

    /// Sets what Ctrl-C says from here on.
    pub(crate) fn when_interrupted(&self, message: impl Into<String>, next: impl Into<String>) {
        *self.interruption.borrow_mut() = Interruption {
            message: message.into(),
            next: next.into(),
        };
    }

    /// The error that Ctrl-C makes.
    pub(crate) fn interrupted(&self) -> CommandError {
        let Interruption { message, next } = self.interruption.borrow().clone();
        CommandError::new(Kind::Interrupted, "Interrupted", message).next(next)
    }

    /// A command with the flags that lead to this instance and configuration.
    pub(crate) fn spell(&self, command: &str) -> String {
        let mut flags = String::new();
        if self.layout.instance.as_str() != crate::cli::DEFAULT_INSTANCE {
            flags += &format!(" --instance {}", self.layout.instance);
        }
        if let Some(config) = &self.config {
            flags += &format!(" --config {}", config.display());
        }
        match command.find("sovereign ") {
            Some(at) => format!("{}{flags}{}", &command[..at + 9], &command[at + 9..]),
            None => command.to_owned(),
        }
    }

    /// True when data goes to a program: `--json`, or stdout is no terminal.
    pub(crate) fn wants_data(&self) -> bool {
        self.json || !io::stdout().is_terminal()
    }

    /// Ends a verb that has no data of its own: one object with `--json`, else nothing.
    pub(crate) fn done(&self, reason: &str, evidence: &str, next: &str) -> Result<(), CommandError> {
        self.done_with(reason, evidence, next, &[])
    }

    /// As [`Context::done`], with further fields of the verb's own.
    pub(crate) fn done_with(
        &self,
        reason: &str,
        evidence: &str,
        next: &str,
        more: &[(&str, Value)],
    ) -> Result<(), CommandError> {
        if !self.json {
            return Ok(());
        }
        let mut object = json!({
            "ok": true, "layer": null, "reason": reason, "evidence": evidence, "next": self.spell(next),
        });
        for (key, value) in more {
            object[*key] = value.clone();
        }
        data_json(&object)
    }
}

/// Writes one line of data.
pub(crate) fn data(line: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(output_failed)
}

/// Writes one JSON value as one line of data.
pub(crate) fn data_json(value: &impl Serialize) -> Result<(), CommandError> {
    let text = serde_json::to_string(value).map_err(|error| {
        CommandError::new(Kind::Internal, "Json", "cannot write the answer as JSON").because(error)
    })?;
    data(&text)
}

/// Says something to the person; nobody listening is no failure.
pub(crate) fn talk(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// The reason when the reader of stdout has gone: it had enough, which is no failure.
pub(crate) const PIPE_CLOSED: &str = "PipeClosed";

/// A failure to write to stdout.
pub(crate) fn output_failed(error: io::Error) -> CommandError {
    let reason = if error.kind() == io::ErrorKind::BrokenPipe {
        PIPE_CLOSED
    } else {
        "Output"
    };
    CommandError::new(Kind::NotReached, reason, "cannot write to standard output").because(error)
}

/// Foreign text for a terminal: control characters but newline and tab become visible.
pub(crate) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.replace("\r\n", "\n").chars() {
        match c {
            '\n' | '\t' => safe.push(c),
            c if c.is_control() => safe.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::escaped;

    #[test]
    fn control_characters_of_a_guest_never_reach_the_terminal() {
        assert_eq!(
            escaped("a\r\nb\t\x1b[31m\x07\r\u{9b}c"),
            "a\nb\t\\x1b[31m\\x07\\x0d\\x9bc"
        );
    }
}
