//! What is said to systemd. It is asked for nothing but what `host install` and an installed agent need.

use std::process::{Command, Stdio};

use crate::context::escaped;
use crate::error::{CommandError, Kind};
use crate::place::Environment;
use crate::unit;

/// Says something to the manager that has this user's units, and waits for its answer.
///
/// # Errors
/// `Refused` with systemctl's own words.
pub(crate) fn tell(environment: &Environment, words: &[&str]) -> Result<(), CommandError> {
    let argv = unit::systemctl(environment, words);
    let shown = argv.join(" ");
    let failed = || CommandError::new(Kind::Refused, "SystemctlFailed", format!("`{shown}` failed"));
    let output = Command::new(&argv[0])
        .args(&argv[1..])
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|error| failed().because(error).next(shown.clone()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(failed().because(escaped(said.trim())).next(shown.clone()))
}
