//! `secret`: one value, alone on stdout.

use std::collections::BTreeMap;
use std::io::ErrorKind;

use serde::Deserialize;
use serde_json::json;
use sovereign_protocol::layout::Layout;
use sovereign_protocol::name::Name;
use sovereign_protocol::secret::{self, Secret};

use crate::context::{Context, data};
use crate::error::{CommandError, Kind};

#[derive(Deserialize)]
struct Exposed(#[serde(with = "secret::expose")] Secret);

pub(super) fn run(context: &Context, name: &str) -> Result<(), CommandError> {
    let well_formed = name
        .split_once('/')
        .is_some_and(|(guest, rest)| Name::parse(guest).is_ok() && !rest.is_empty());
    if !well_formed {
        let message = format!("{name:?} is not of the form GUEST/NAME");
        return Err(
            CommandError::new(Kind::Usage, "BadSecretName", message).next("sovereign secret sql/postgres")
        );
    }
    let secrets = read(&context.layout)?;
    let Some(value) = secrets.get(name) else {
        let known: Vec<&str> = secrets.keys().map(String::as_str).collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        let message = format!("there is no secret {name:?}; there is {known} (the first `up` makes them)");
        return Err(CommandError::new(Kind::NotReached, "NoSuchSecret", message).next("sovereign up"));
    };
    if !context.json {
        return data(value.reveal());
    }
    context.done_with(
        "Read",
        "",
        "sovereign status",
        &[("secret", json!({"name": name, "value": value.reveal()}))],
    )
}

/// All secrets of an instance; none when the file is not there yet.
///
/// # Errors
/// `Configuration` when the file cannot be read; its content is never quoted.
pub(super) fn read(layout: &Layout) -> Result<BTreeMap<String, Secret>, CommandError> {
    let path = layout.secrets();
    let broken = |why: String| {
        let message = format!("cannot read {}: {why}", path.display());
        CommandError::new(Kind::Configuration, "SecretsUnreadable", message)
            .next(format!("ls -l {}", path.display()))
    };
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(broken(error.to_string())),
    };
    let secrets: BTreeMap<String, Exposed> = serde_json::from_slice(&bytes)
        .map_err(|error| broken(format!("no JSON object of texts (line {})", error.line())))?;
    Ok(secrets
        .into_iter()
        .map(|(name, Exposed(value))| (name, value))
        .collect())
}

/// True when a secret's name is of a guest.
pub(super) fn belongs(secret: &str, guest: &Name) -> bool {
    secret.split_once('/').is_some_and(|(of, _)| of == guest.as_str())
}

/// True when a guest has secrets.
///
/// # Errors
/// As [`read`].
pub(super) fn any_of(layout: &Layout, guest: &Name) -> Result<bool, CommandError> {
    Ok(read(layout)?.keys().any(|name| belongs(name, guest)))
}
