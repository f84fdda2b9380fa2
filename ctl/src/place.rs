//! Where an instance lies on this machine. The decision is pure; only [`Environment::read`] looks.

use std::env;
use std::path::{Path, PathBuf};

use sovereign_protocol::layout::Layout;
use sovereign_protocol::limits::SOCKET_PATH_BYTES;
use sovereign_protocol::name::Name;

use crate::error::{CommandError, Kind};

/// The longest name of a socket in a guest's run directory.
const LONGEST_SOCKET: &str = "vhost.sock";

/// What the choice of directories depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Environment {
    /// The effective user is root.
    pub(crate) root: bool,
    /// `XDG_RUNTIME_DIR`, if that directory exists and the user lingers.
    pub(crate) lasting_runtime: Option<PathBuf>,
    /// `XDG_STATE_HOME`, or its default.
    pub(crate) state_home: Option<PathBuf>,
    /// `XDG_CONFIG_HOME`, or its default.
    pub(crate) config_home: Option<PathBuf>,
    /// `XDG_CACHE_HOME`, or its default.
    pub(crate) cache_home: Option<PathBuf>,
    /// systemd manages this machine.
    pub(crate) systemd: bool,
    /// The user lingers: their services run without a session.
    pub(crate) lingers: bool,
    /// Where units of this user are written.
    pub(crate) unit_home: Option<PathBuf>,
    /// `SOVEREIGN_STATE_DIR`: the parent of all instances' state.
    pub(crate) state_override: Option<PathBuf>,
    /// `SOVEREIGN_RUN_DIR`: the parent of all instances' sockets.
    pub(crate) run_override: Option<PathBuf>,
}

impl Environment {
    /// Reads the variables, the user and the lingering mark.
    pub(crate) fn read() -> Self {
        let home = absolute("HOME");
        let xdg = |name: &str, below: &str| absolute(name).or_else(|| Some(home.as_ref()?.join(below)));
        let root = rustix::process::geteuid().is_root();
        let config_home = xdg("XDG_CONFIG_HOME", ".config");
        let lingers = lingers();
        Self {
            root,
            lasting_runtime: absolute("XDG_RUNTIME_DIR").filter(|dir| dir.is_dir() && lingers),
            state_home: xdg("XDG_STATE_HOME", ".local/state"),
            systemd: Path::new("/run/systemd/system").is_dir(), // sd_booted(3)
            lingers,
            unit_home: match root {
                true => Some("/etc/systemd/system".into()),
                false => config_home.as_ref().map(|home| home.join("systemd/user")),
            },
            config_home,
            cache_home: xdg("XDG_CACHE_HOME", ".cache"),
            state_override: absolute("SOVEREIGN_STATE_DIR"),
            run_override: absolute("SOVEREIGN_RUN_DIR"),
        }
    }

    /// Where images are kept; all instances share it.
    ///
    /// # Errors
    /// `Configuration` when neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub(crate) fn cache(&self) -> Result<PathBuf, CommandError> {
        Ok(known(self.cache_home.as_ref(), "cache", "XDG_CACHE_HOME")?.join("sovereign"))
    }
}

/// XDG asks that relative values be ignored; an empty one is as good as none.
fn absolute(name: &str) -> Option<PathBuf> {
    env::var_os(name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

/// Without lingering the runtime directory goes away with the user's last session.
fn lingers() -> bool {
    let user = env::var_os("USER").or_else(|| env::var_os("LOGNAME"));
    user.is_some_and(|user| Path::new("/var/lib/systemd/linger").join(user).exists())
}

fn known<'a>(path: Option<&'a PathBuf>, what: &str, variable: &str) -> Result<&'a PathBuf, CommandError> {
    path.ok_or_else(|| {
        let message = format!("no {what} directory: neither {variable} nor HOME is set to an absolute path");
        CommandError::new(Kind::Configuration, "NoDirectory", message)
            .next("set HOME, then run the command again")
    })
}

/// The directories of an instance.
///
/// # Errors
/// `Configuration` when a directory is unknown or the control socket's path would be too long.
pub(crate) fn layout(environment: &Environment, instance: Name) -> Result<Layout, CommandError> {
    let id = instance.as_str();
    let state = match &environment.state_override {
        Some(parent) => parent.join(id),
        None if environment.root => Path::new("/var/lib/sovereign").join(id),
        None => known(environment.state_home.as_ref(), "state", "XDG_STATE_HOME")?
            .join("sovereign")
            .join(id),
    };
    let run = match (&environment.run_override, &environment.lasting_runtime) {
        (Some(parent), _) => parent.join(id),
        (None, _) if environment.root && environment.state_override.is_none() => {
            Path::new("/run/sovereign").join(id)
        }
        (None, Some(runtime)) if environment.state_override.is_none() => runtime.join("sovereign").join(id),
        (None, _) => state.join("run"),
    };
    let layout = Layout { instance, run, state };
    fits(&layout.control())?;
    Ok(layout)
}

/// Checks the longest socket of a guest.
///
/// # Errors
/// `Configuration`, with the path, its length and the limit.
pub(crate) fn check_guest_sockets(layout: &Layout, guest: &Name) -> Result<(), CommandError> {
    fits(&layout.guest_run(guest).join(LONGEST_SOCKET))
}

fn fits(path: &Path) -> Result<(), CommandError> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH_BYTES {
        return Ok(());
    }
    let message = format!(
        "the socket path {} has {length} bytes; the kernel takes {SOCKET_PATH_BYTES}",
        path.display()
    );
    Err(
        CommandError::new(Kind::Configuration, "SocketPathTooLong", message)
            .next("set SOVEREIGN_RUN_DIR to a shorter directory, or use shorter names"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Environment {
        Environment {
            state_home: Some("/home/u/.local/state".into()),
            ..Environment::default()
        }
    }

    fn places(environment: &Environment) -> (String, String) {
        let layout = layout(environment, Name::parse("test").unwrap()).unwrap();
        (
            layout.state.display().to_string(),
            layout.run.display().to_string(),
        )
    }

    #[test]
    fn each_user_has_its_places() {
        let root = Environment { root: true, ..user() };
        assert_eq!(
            places(&root),
            ("/var/lib/sovereign/test".into(), "/run/sovereign/test".into())
        );
        let state = "/home/u/.local/state/sovereign/test";
        assert_eq!(places(&user()), (state.into(), format!("{state}/run")));
        let lasting = Environment {
            lasting_runtime: Some("/run/user/7".into()),
            ..user()
        };
        assert_eq!(
            places(&lasting),
            (state.into(), "/run/user/7/sovereign/test".into())
        );
    }

    #[test]
    fn overrides_win_and_a_lone_state_override_keeps_the_sockets_beside_it() {
        let state = Environment {
            root: true,
            state_override: Some("/tmp/s".into()),
            ..user()
        };
        assert_eq!(places(&state), ("/tmp/s/test".into(), "/tmp/s/test/run".into()));
        let both = Environment {
            run_override: Some("/tmp/r".into()),
            ..state
        };
        assert_eq!(places(&both), ("/tmp/s/test".into(), "/tmp/r/test".into()));
    }

    #[test]
    fn a_socket_path_over_the_limit_is_a_configuration_error() {
        let deep = Environment {
            run_override: Some(format!("/{}", "x".repeat(100)).into()),
            ..user()
        };
        let error = layout(&deep, Name::parse("test").unwrap()).unwrap_err();
        assert_eq!(
            (error.kind, error.reason.as_str()),
            (Kind::Configuration, "SocketPathTooLong")
        );
        let edge = Environment {
            run_override: Some(format!("/{}", "x".repeat(80)).into()),
            ..user()
        };
        let layout = layout(&edge, Name::parse("test").unwrap()).unwrap();
        assert!(check_guest_sockets(&layout, &Name::parse("sql").unwrap()).is_ok());
        assert!(check_guest_sockets(&layout, &Name::parse("a-rather-long-name").unwrap()).is_err());
    }
}
