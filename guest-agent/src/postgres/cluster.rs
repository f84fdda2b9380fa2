//! The data directory: found, made once, never of another version.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::fcntl::OFlag;
use sovereign_protocol::secret::Secret;
use tokio::process::Command;

use super::conf::{SUPERUSER, SharedMemory};
use crate::core::service::LaunchError;
use crate::users::{self, User};
use crate::{log, places};

/// The user that PostgreSQL runs as.
pub const USER: &str = "postgres";
const PASSWORD_FILE: &str = "/run/sovereign/initdb-password";

/// The program of the image and the data directory that belongs to it.
#[derive(Debug)]
pub struct Cluster {
    bin: PathBuf,
    data: PathBuf,
    major: u32,
    initialised: bool,
    user: User,
}

/// What is to be done with the data directories that are there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// There is one of the image's version.
    Use,
    /// There is none.
    Init,
    /// There are only others.
    Mismatch(Vec<u32>),
}

/// Chooses; a directory of another version is never started and never hidden by a new one.
#[must_use]
pub fn choose(image: u32, found: &[u32]) -> Choice {
    if found.contains(&image) {
        Choice::Use
    } else if found.is_empty() {
        Choice::Init
    } else {
        Choice::Mismatch(found.to_vec())
    }
}

impl Cluster {
    /// Looks at image and data disk.
    ///
    /// # Errors
    /// Hopeless for another version, for an image without PostgreSQL, or without a data disk under the directory.
    pub fn find() -> Result<Self, LaunchError> {
        let hopeless = |reason, text: String| LaunchError::Hopeless(reason, text);
        let majors = numbered(Path::new(places::PG_VERSIONS), "bin/postgres");
        let major = *majors
            .last()
            .ok_or_else(|| hopeless("NoServer", format!("the image has no {}", places::PG_VERSIONS)))?;
        let user = users::lookup(USER).map_err(|error| hopeless("NoUser", error.to_string()))?;
        let device = |path: &str| {
            fs::metadata(path)
                .map(|m| m.dev())
                .map_err(|e| LaunchError::Failed(format!("{path}: {e}")))
        };
        if device(places::PG_DATA)? != device(places::DATA)? {
            return Err(LaunchError::Failed(format!(
                "{} is not on the data disk",
                places::PG_DATA
            )));
        }
        let found = numbered(Path::new(places::PG_DATA), "main/PG_VERSION");
        let initialised = match choose(major, &found) {
            Choice::Use => true,
            Choice::Init => false,
            Choice::Mismatch(found) => {
                let text = format!(
                    "the data disk holds PostgreSQL {found:?}, the image has {major}: upgrade the data or boot the older image"
                );
                return Err(hopeless("OtherVersion", text));
            }
        };
        let cluster = Self {
            bin: Path::new(places::PG_VERSIONS).join(major.to_string()).join("bin"),
            data: Path::new(places::PG_DATA).join(major.to_string()).join("main"),
            major,
            initialised,
            user,
        };
        cluster.check_version_file()?;
        Ok(cluster)
    }

    fn check_version_file(&self) -> Result<(), LaunchError> {
        if !self.initialised {
            return Ok(());
        }
        let path = self.data.join("PG_VERSION");
        let found = fs::read_to_string(&path)
            .map_err(|error| LaunchError::Failed(format!("{}: {error}", path.display())))?;
        if found.trim() == self.major.to_string() {
            return Ok(());
        }
        let text = format!(
            "{} says {:?}, the image has {}",
            path.display(),
            found.trim(),
            self.major
        );
        Err(LaunchError::Hopeless("OtherVersion", text))
    }

    /// The postmaster's process, if its file names one.
    #[must_use]
    pub fn main_pid(&self) -> Option<u32> {
        postmaster_line(&self.data, 0)?.parse().ok()
    }

    /// The user that PostgreSQL runs as.
    #[must_use]
    pub fn user_name(&self) -> String {
        self.user.name.clone()
    }

    /// Makes directories, and the data directory when there is none.
    ///
    /// # Errors
    /// What failed, with the last line that initdb said.
    pub async fn prepare(&self, password: Option<&Secret>) -> Result<(), LaunchError> {
        let failed = |what: &str, error: io::Error| LaunchError::Failed(format!("{what}: {error}"));
        self.directory(Path::new(places::PG_SOCKETS), 0o755)
            .map_err(|e| failed(places::PG_SOCKETS, e))?;
        if self.initialised {
            return Ok(());
        }
        let parent = self.data.parent().unwrap_or(Path::new(places::PG_DATA));
        self.directory(Path::new(places::PG_DATA), 0o755)
            .map_err(|e| failed(places::PG_DATA, e))?;
        self.directory(parent, 0o755)
            .map_err(|e| failed("data directory", e))?;
        self.initdb(password).await.map_err(|e| failed("initdb", e))
    }

    fn directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        give_directory(path, (self.user.uid, self.user.gid), mode)
    }

    /// Into a directory of another name, so that a cut leaves nothing that looks finished.
    async fn initdb(&self, password: Option<&Secret>) -> io::Result<()> {
        let new = self.data.with_extension("new");
        match fs::remove_dir_all(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        if let Some(password) = password {
            self.write_password(password)?;
        }
        log::line("making the data directory", &[("path", &self.data.display())]);
        let output = self
            .as_server(
                &self.bin.join("initdb"),
                &initdb_arguments(&new, password.is_some()),
            )
            .await;
        let _ = fs::remove_file(PASSWORD_FILE);
        output?;
        fs::rename(&new, &self.data)?;
        let parent = self.data.parent().unwrap_or(&self.data);
        fs::File::open(parent)?.sync_all()
    }

    fn write_password(&self, password: &Secret) -> io::Result<()> {
        let _ = fs::remove_file(PASSWORD_FILE);
        let mut file = fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(PASSWORD_FILE)?;
        chown(PASSWORD_FILE, Some(self.user.uid), Some(self.user.gid))?;
        file.write_all(password.reveal().as_bytes())
    }

    /// Lets postgres read the configuration in this directory without starting.
    ///
    /// # Errors
    /// Hopeless, with what postgres said.
    pub async fn check_settings(&self, directory: &Path) -> Result<(), LaunchError> {
        let mut args = self.arguments(directory);
        args.extend(["-C".into(), "port".into()]);
        let checked = self.as_server(&self.bin.join("postgres"), &args).await;
        checked.map_err(|error| LaunchError::Hopeless("BadSettings", error.to_string()))
    }

    /// Program and arguments of the server.
    #[must_use]
    pub fn command(&self) -> (PathBuf, Vec<OsString>) {
        let directory = Path::new(places::RUN_POSTGRES);
        (self.bin.join("postgres"), self.arguments(directory))
    }

    fn arguments(&self, directory: &Path) -> Vec<OsString> {
        let config = format!("config_file={}/postgresql.conf", directory.display());
        vec!["-D".into(), self.data.clone().into(), "-c".into(), config.into()]
    }

    /// Runs a program as the server's user to its end.
    async fn as_server(&self, program: &Path, args: &[OsString]) -> io::Result<()> {
        let output = Command::new(program)
            .args(args)
            .env_clear()
            .env("PATH", places::PATH)
            .env("LANG", "C.UTF-8")
            .uid(self.user.uid)
            .gid(self.user.gid)
            .current_dir("/")
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await?;
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        Err(io::Error::other(format!(
            "{}: {}",
            output.status,
            last_lines(&String::from_utf8_lossy(&said))
        )))
    }
}

fn initdb_arguments(data: &Path, password: bool) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["-D".into(), data.into(), "-U".into(), SUPERUSER.into()];
    let fixed = [
        "--auth-local=peer",
        "--auth-host=scram-sha-256",
        "--encoding=UTF8",
        "--locale-provider=builtin",
        "--locale=C.UTF-8",
        "--no-instructions",
    ];
    args.extend(fixed.map(OsString::from));
    // initdb writes what it saw on its way; say it (FACTS section 8).
    let memory = SharedMemory::probe(Path::new("/dev/shm")).as_str();
    args.extend([
        "-c".into(),
        "shared_buffers=16MB".into(),
        "-c".into(),
        format!("dynamic_shared_memory_type={memory}").into(),
    ]);
    if password {
        args.push(format!("--pwfile={PASSWORD_FILE}").into());
    }
    args
}

/// The last lines that say something.
fn last_lines(said: &str) -> String {
    let lines: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

/// The numbers among a directory's entries that hold `inside`, ascending.
fn numbered(directory: &Path, inside: &str) -> Vec<u32> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut numbers: Vec<u32> = entries
        .filter(|entry| entry.path().join(inside).exists())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

/// A line of postmaster.pid: process, data directory, start time, port, ... (miscadmin.h).
fn postmaster_line(data: &Path, line: usize) -> Option<String> {
    let text = fs::read_to_string(data.join("postmaster.pid")).ok()?;
    text.lines().nth(line).map(|line| line.trim().to_owned())
}

fn running_line(line: usize) -> Option<String> {
    let major = numbered(Path::new(places::PG_DATA), "main/PG_VERSION").pop()?;
    postmaster_line(
        &Path::new(places::PG_DATA).join(major.to_string()).join("main"),
        line,
    )
}

/// The port of the server that runs, from its postmaster.pid.
#[must_use]
pub fn running_port() -> Option<u16> {
    running_line(3)?.parse().ok()
}

/// The process of the server that runs, from its postmaster.pid.
#[must_use]
pub fn any_main_pid() -> Option<u32> {
    running_line(0)?.parse().ok()
}

/// Makes a directory and gives it to a user. A link in its place is an error: its user may have planted it, and
/// what it leads to must not become his.
fn give_directory(path: &Path, (uid, gid): (u32, u32), mode: u32) -> io::Result<()> {
    fs::create_dir_all(path)?;
    let flags = OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY;
    let directory = fs::File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)?;
    fchown(&directory, Some(uid), Some(gid))?;
    directory.set_permissions(fs::Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_is_neither_used_nor_hidden() {
        assert_eq!(choose(17, &[]), Choice::Init);
        assert_eq!(choose(17, &[16, 17]), Choice::Use);
        assert_eq!(choose(17, &[16]), Choice::Mismatch(vec![16]));
        assert_eq!(choose(16, &[17]), Choice::Mismatch(vec![17]));
    }

    #[test]
    fn versions_are_directories_with_something_inside() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["9/main", "17/main", "notes/main", "18"] {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        assert_eq!(numbered(directory.path(), "main"), [9, 17]);
        assert!(numbered(&directory.path().join("missing"), "main").is_empty());
    }

    #[test]
    fn the_postmaster_file_is_read_by_line() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("postmaster.pid"),
            "123\n/data\n17\n5433\n/run\n",
        )
        .unwrap();
        assert_eq!(postmaster_line(directory.path(), 0).as_deref(), Some("123"));
        assert_eq!(postmaster_line(directory.path(), 3).as_deref(), Some("5433"));
        assert_eq!(postmaster_line(directory.path(), 9), None);
    }

    #[test]
    fn initdb_is_told_everything() {
        let args = initdb_arguments(Path::new("/d"), true);
        for want in [
            "--auth-host=scram-sha-256",
            "--locale-provider=builtin",
            "--pwfile=/run/sovereign/initdb-password",
        ] {
            assert!(args.iter().any(|arg| arg == want), "{want}");
        }
        assert!(
            !initdb_arguments(Path::new("/d"), false)
                .iter()
                .any(|arg| arg.to_string_lossy().contains("pwfile"))
        );
    }

    #[test]
    fn a_directory_is_given_and_what_a_link_leads_to_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let us = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        give_directory(&real, us, 0o700).unwrap();
        assert_eq!(mode(&real), 0o700);
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(give_directory(&link, us, 0o750).is_err());
        assert_eq!(mode(&real), 0o700);
    }
}
