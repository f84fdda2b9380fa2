//! `init`: writes a commented configuration where none is.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use crate::config;
use crate::context::{Context, talk};
use crate::error::{CommandError, Kind};

pub(super) fn run(context: &Context) -> Result<(), CommandError> {
    let path = config::find(context).unwrap_or_else(|| PathBuf::from(config::FILE));
    let shown = path.display();
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .and_then(|mut file| file.write_all(config::template().as_bytes()));
    let (reason, evidence) = match written {
        Ok(()) => ("Written", format!("wrote {shown}")),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            ("Exists", format!("{shown} is there already and stays as it is"))
        }
        Err(error) => {
            let message = format!("cannot write {shown}");
            return Err(
                CommandError::new(Kind::Configuration, "ConfigurationUnwritable", message)
                    .because(error)
                    .next("sovereign init --config FILE"),
            );
        }
    };
    talk(&evidence);
    context.done(reason, &evidence, "sovereign up")
}
