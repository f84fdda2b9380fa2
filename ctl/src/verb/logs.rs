//! `logs`: what a guest's console printed, safe for a terminal.

use std::io::ErrorKind;

use serde_json::json;
use sovereign_protocol::name::Name;

use crate::context::{Context, data, escaped};
use crate::error::{CommandError, Kind};

pub(super) fn run(context: &Context, name: &Name) -> Result<(), CommandError> {
    let path = context.layout.console(name);
    let bytes = std::fs::read(&path).map_err(|error| {
        if error.kind() == ErrorKind::NotFound {
            let message = format!(
                "guest {name} has no console log: it never ran here ({})",
                path.display()
            );
            CommandError::new(Kind::NotReached, "NoLog", message).next(format!("sovereign up {name}"))
        } else {
            let message = format!("cannot read {}", path.display());
            CommandError::new(Kind::Internal, "Io", message).because(error)
        }
    })?;
    let text = escaped(&String::from_utf8_lossy(&bytes));
    if context.json {
        return context.done_with(
            "Read",
            "",
            "sovereign status",
            &[("guest", json!(name)), ("console", json!(text))],
        );
    }
    if text.is_empty() {
        Ok(())
    } else {
        data(text.trim_end_matches('\n'))
    }
}
