//! The one error of the command line: its kind fixes the exit code, and it always knows the next command.

use std::error::Error;

use serde::Serialize;

/// What sort of failure it was. The exit codes are a promise (docs/exit-codes.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The wanted state is not reached.
    NotReached,
    /// The command line itself is wrong.
    Usage,
    /// Configuration or lock file.
    Configuration,
    /// No agent answers.
    Unreachable,
    /// The time is over.
    TimedOut,
    /// Refused, or in conflict with something else.
    Refused,
    /// Not the user's doing.
    Internal,
    /// Ctrl-C.
    Interrupted,
}

impl Kind {
    /// Every kind, for tests and documents.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 8] = [
        Self::NotReached,
        Self::Usage,
        Self::Configuration,
        Self::Unreachable,
        Self::TimedOut,
        Self::Refused,
        Self::Internal,
        Self::Interrupted,
    ];

    /// The exit code.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::NotReached => 1,
            Self::Usage => 2,
            Self::Configuration => 3,
            Self::Unreachable => 4,
            Self::TimedOut => 5,
            Self::Refused => 6,
            Self::Internal => 70,
            Self::Interrupted => 130,
        }
    }

    fn default_next(self) -> &'static str {
        match self {
            Self::Usage => "sovereign --help",
            Self::Configuration => "edit the file, then: sovereign up",
            Self::Unreachable => "sovereign up",
            Self::NotReached | Self::TimedOut | Self::Refused | Self::Internal | Self::Interrupted => {
                "sovereign status"
            }
        }
    }
}

/// A failure of a verb.
#[derive(Debug)]
pub(crate) struct CommandError {
    /// Fixes the exit code.
    pub(crate) kind: Kind,
    /// The layer that is broken, when it is known.
    pub(crate) layer: Option<String>,
    /// A code for programs, in CamelCase.
    pub(crate) reason: String,
    message: String,
    source: Option<Box<dyn Error + Send + Sync>>,
    next: String,
}

/// What every failing verb says with `--json`.
#[derive(Debug, Serialize)]
struct Object<'a> {
    ok: bool,
    layer: Option<&'a str>,
    reason: &'a str,
    evidence: String,
    next: &'a str,
}

impl CommandError {
    /// A failure: its code for programs, and what was attempted on what.
    pub(crate) fn new(kind: Kind, reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind,
            layer: None,
            reason: reason.into(),
            message: message.into(),
            source: None,
            next: kind.default_next().to_owned(),
        }
    }

    /// Names the cause; its text is printed below the message.
    pub(crate) fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Names the broken layer.
    pub(crate) fn in_layer(mut self, layer: impl ToString) -> Self {
        self.layer = Some(layer.to_string());
        self
    }

    /// Names the next command to run.
    pub(crate) fn next(mut self, next: impl Into<String>) -> Self {
        self.next = next.into();
        self
    }

    /// Rewrites the next command, so that it names the instance and configuration of this run.
    pub(crate) fn spelled(mut self, spell: impl Fn(&str) -> String) -> Self {
        self.next = spell(&self.next);
        self
    }

    /// For people, on stderr: the message, its causes, the next command.
    pub(crate) fn human(&self) -> String {
        let word = if self.kind == Kind::Interrupted {
            ""
        } else {
            "error: "
        };
        let mut text = format!("{word}{}\n", self.message);
        for cause in self.causes() {
            text += &format!("  because: {cause}\n");
        }
        text + &format!("next: {}\n", self.next)
    }

    /// For programs, on stdout: one object on one line.
    pub(crate) fn json(&self) -> String {
        let evidence = self
            .causes()
            .fold(self.message.clone(), |text, cause| format!("{text}: {cause}"));
        let object = Object {
            ok: false,
            layer: self.layer.as_deref(),
            reason: &self.reason,
            evidence,
            next: &self.next,
        };
        serde_json::to_string(&object).expect("strings and a bool always serialise")
    }

    fn causes(&self) -> impl Iterator<Item = String> {
        let mut cause: Option<&(dyn Error + 'static)> = self.source.as_deref().map(|source| source as _);
        std::iter::from_fn(move || {
            let now = cause?;
            cause = now.source();
            Some(now.to_string())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_promised_exit_code() {
        let codes: Vec<u8> = Kind::ALL.iter().map(|kind| kind.exit_code()).collect();
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 70, 130]);
        let document = include_str!("../../docs/exit-codes.md");
        for code in codes {
            assert!(
                document.contains(&format!("| {code} |")),
                "docs/exit-codes.md does not name {code}"
            );
        }
    }

    #[test]
    fn both_forms_carry_the_whole_chain_and_the_next_command() {
        let io = std::io::Error::other("disk full");
        let error = CommandError::new(Kind::Internal, "Io", "cannot write x")
            .because(io)
            .in_layer("disk")
            .next("sovereign logs sql");
        assert_eq!(
            error.human(),
            "error: cannot write x\n  because: disk full\nnext: sovereign logs sql\n"
        );
        assert_eq!(
            error.json(),
            r#"{"ok":false,"layer":"disk","reason":"Io","evidence":"cannot write x: disk full","next":"sovereign logs sql"}"#
        );
    }

    #[test]
    fn every_failure_has_a_next_command() {
        for kind in Kind::ALL {
            assert!(CommandError::new(kind, "X", "x").human().contains("next: "));
        }
    }
}
