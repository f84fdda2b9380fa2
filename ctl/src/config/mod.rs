//! `sovereign.toml`: as written, validated, and turned into what the host agent is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use sovereign_protocol::interface::InterfaceSpec;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{
    self, Forward, GuestConfig, HostNetwork, HostSpec, Image, Restart, Service, ServiceKind, TailscaleSpec,
};

use crate::context::Context;
use crate::error::{CommandError, Kind};

mod addresses;
pub(crate) mod edit;
mod keys;
mod limits;
mod mesh;
mod network;
mod reference;
mod source;
mod validate;
mod values;
mod written;

pub(crate) use reference::template;
pub(crate) use validate::contract;

/// The file's name wherever it is looked for.
pub(crate) const FILE: &str = "sovereign.toml";
/// The largest file that is read, in bytes.
const FILE_BYTES: u64 = 1 << 20;
/// The recipe of a guest with PostgreSQL, or with nothing.
pub(crate) const RECIPE: &str = "postgresql-17";
/// The recipe of a guest with Miniflux.
pub(crate) const MINIFLUX: &str = "miniflux";

/// A valid configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Where it was read.
    pub(crate) path: PathBuf,
    /// The package mirror that it names.
    pub(crate) mirror: Option<String>,
    /// The snapshot service that has what the mirror no longer carries.
    pub(crate) snapshot: Option<String>,
    /// The recipe of the image of guests with PostgreSQL.
    pub(crate) recipe: String,
    /// The network that the guests share.
    pub(crate) network: Option<HostNetwork>,
    /// The guests by name.
    pub(crate) guests: BTreeMap<Name, Guest>,
}

/// One guest, without the image that it will boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) memory_mib: u32,
    pub(crate) vcpus: u8,
    pub(crate) data_mib: u32,
    pub(crate) services: Vec<Service>,
    pub(crate) forwards: Vec<Forward>,
    pub(crate) restart: Restart,
    pub(crate) interface: Option<InterfaceSpec>,
    pub(crate) tailscale: Option<TailscaleSpec>,
}

impl Settings {
    /// The recipe of the image that a guest boots: its services say it.
    fn recipe_of(&self, guest: &Guest) -> &str {
        let miniflux = |service: &Service| matches!(service.kind, ServiceKind::Miniflux { .. });
        match guest.services.iter().any(miniflux) {
            true => MINIFLUX,
            false => &self.recipe,
        }
    }

    /// The recipes of all images that the guests boot; never none.
    pub(crate) fn recipes(&self) -> BTreeSet<&str> {
        let guests = self.guests.values();
        guests.map(|guest| self.recipe_of(guest)).collect()
    }

    /// The document for the host agent: all guests, or those in `only`.
    pub(crate) fn host_spec(&self, images: &Images, only: Option<&BTreeSet<Name>>) -> HostSpec {
        let wanted = self
            .guests
            .iter()
            .filter(|(name, _)| only.is_none_or(|only| only.contains(*name)));
        HostSpec {
            version: spec::VERSION,
            network: self.network.clone(),
            guests: wanted
                .map(|(name, guest)| (name.clone(), guest.with(images.of(self.recipe_of(guest)))))
                .collect(),
        }
    }
}

/// The images that guests boot, by recipe.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    first: Image,
    others: BTreeMap<String, Image>,
}

impl Images {
    /// These images by their recipes; what is not among them boots the first.
    pub(crate) fn new(first: Image, others: BTreeMap<String, Image>) -> Self {
        Self { first, others }
    }

    fn of(&self, recipe: &str) -> &Image {
        self.others.get(recipe).unwrap_or(&self.first)
    }
}

impl From<Image> for Images {
    fn from(image: Image) -> Self {
        Self::new(image, BTreeMap::new())
    }
}

impl Guest {
    fn with(&self, image: &Image) -> GuestConfig {
        GuestConfig {
            memory_mib: self.memory_mib,
            vcpus: self.vcpus,
            data_mib: self.data_mib,
            image: image.clone(),
            services: self.services.clone(),
            forwards: self.forwards.clone(),
            restart: self.restart,
            interface: self.interface.clone(),
            tailscale: self.tailscale.clone(),
        }
    }
}

/// A problem with the file, at its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}:{column}: {key}: {problem}{}{}", file.display(), Hint("did you mean", nearest.as_deref()), Hint("accepted:", accepted.as_deref()))]
pub(crate) struct Problem {
    /// The file.
    pub(crate) file: PathBuf,
    /// Its line, from 1.
    pub(crate) line: usize,
    /// The column in it, from 1.
    pub(crate) column: usize,
    /// The key, with its tables.
    pub(crate) key: String,
    /// A code for programs.
    pub(crate) reason: &'static str,
    /// What is wrong.
    pub(crate) problem: String,
    /// The nearest key or value that would be right.
    pub(crate) nearest: Option<String>,
    /// What would be right.
    pub(crate) accepted: Option<String>,
}

struct Hint<'a>(&'static str, Option<&'a str>);

impl std::fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self(words, Some(text)) => write!(f, "; {words} {text}"),
            Self(_, None) => Ok(()),
        }
    }
}

impl From<Box<Problem>> for CommandError {
    fn from(problem: Box<Problem>) -> Self {
        let next = format!(
            "edit {} line {}, then: sovereign up",
            problem.file.display(),
            problem.line
        );
        Self::new(Kind::Configuration, problem.reason, problem.to_string()).next(next)
    }
}

/// Where the configuration is: the named file, else the first that exists.
pub(crate) fn find(context: &Context) -> Option<PathBuf> {
    if context.config.is_some() {
        return context.config.clone();
    }
    let xdg = context
        .environment
        .config_home
        .as_ref()
        .map(|home| home.join("sovereign").join(FILE));
    [Some(PathBuf::from(FILE)), xdg]
        .into_iter()
        .flatten()
        .find(|path| path.exists())
}

/// Reads and validates the configuration.
///
/// # Errors
/// `Configuration`: there is none, it cannot be read, or the first problem in it.
pub(crate) fn load(context: &Context) -> Result<Settings, CommandError> {
    let path = find(context).ok_or_else(|| {
        let message = "there is no sovereign.toml here and none in XDG_CONFIG_HOME/sovereign";
        CommandError::new(Kind::Configuration, "NoConfiguration", message).next("sovereign init")
    })?;
    let text = read(&path)?;
    Ok(parse(&path, &text)?)
}

/// The text of a configuration.
///
/// # Errors
/// `Configuration` when it cannot be read, or is too large to be one.
pub(crate) fn read(path: &Path) -> Result<String, CommandError> {
    let unreadable = |error: std::io::Error| {
        let next = if error.kind() == std::io::ErrorKind::NotFound {
            "sovereign init"
        } else {
            "make the file readable, then: sovereign up"
        };
        let message = format!("cannot read the configuration {}", path.display());
        CommandError::new(Kind::Configuration, "ConfigurationUnreadable", message)
            .because(error)
            .next(next)
    };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > FILE_BYTES {
        let message = format!(
            "{} has {length} bytes; a configuration has at most {FILE_BYTES}",
            path.display()
        );
        return Err(CommandError::new(
            Kind::Configuration,
            "ConfigurationTooLarge",
            message,
        ));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// Parses and validates a configuration.
///
/// # Errors
/// The first problem.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Settings, Box<Problem>> {
    let source = source::Source::read(path, text)?;
    let written = source.written()?;
    validate::settings(&source, written)
}

#[cfg(test)]
mod tests;
