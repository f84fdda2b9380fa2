//! Miniflux's configuration file: on /run, for its own user alone, because it holds passwords. Texts are pure.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::path::Path;
use std::{fs, io::ErrorKind};

use sovereign_protocol::mesh::Requirement;
use sovereign_protocol::secret::Secret;

use crate::users::User;

/// The file that it is started with.
pub const FILE: &str = "miniflux.conf";
/// What the running process was started with: a copy, so that an agent that adopts it can compare.
const STARTED: &str = "started.conf";
/// The account that is made at the first start.
const ADMIN: &str = "admin";

/// What varies between guests.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    /// Its own port.
    pub port: u16,
    /// The database.
    pub database: &'a Requirement,
    /// The database's password.
    pub password: &'a Secret,
    /// The password of the account `admin`, at the first start.
    pub admin: Option<&'a Secret>,
}

/// The text of the file. A line is `KEY=VALUE` up to its end.
///
/// There is no TLS to the database: both ends are guests of one host on a bridge of its own, and SCRAM sends no password.
#[must_use]
pub fn text(settings: &Settings<'_>) -> String {
    let Settings {
        port,
        database,
        password,
        admin,
    } = settings;
    let at = SocketAddr::new(database.address, database.port); // brackets around IPv6
    let (role, password) = (database.role.as_str(), percent(password.reveal()));
    let mut text = format!(
        "# Written by sovereign-guest at each start.\n\
         DATABASE_URL=postgres://{role}:{password}@{at}/{role}?sslmode=disable&connect_timeout=2\n\
         RUN_MIGRATIONS=1\n\
         LISTEN_ADDR=0.0.0.0:{port}\n"
    );
    if let Some(admin) = admin {
        // Looked at only when there is no such account yet.
        let _ = write!(
            text,
            "CREATE_ADMIN=1\nADMIN_USERNAME={ADMIN}\nADMIN_PASSWORD={}\n",
            admin.reveal()
        );
    }
    text
}

/// As a part of a URL: everything but letters and digits by its number.
fn percent(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            byte if byte.is_ascii_alphanumeric() => safe.push(char::from(byte)),
            byte => {
                let _ = write!(safe, "%{byte:02X}");
            }
        }
    }
    safe
}

/// Writes the file whole or not at all, readable for `user` alone.
///
/// # Errors
/// The system's own.
pub fn write(directory: &Path, text: &str, user: &User) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    private(directory, FILE, text, Some((user.uid, user.gid)))
}

/// Notes that a process was started with this text; root alone reads the copy.
///
/// # Errors
/// The system's own.
pub fn mark_started(directory: &Path, text: &str) -> io::Result<()> {
    private(directory, STARTED, text, None)
}

/// True when the process that runs was started with this text.
#[must_use]
pub fn is_started(directory: &Path, text: &str) -> bool {
    fs::read(directory.join(STARTED)).is_ok_and(|started| started == text.as_bytes())
}

fn private(directory: &Path, name: &str, text: &str, owner: Option<(u32, u32)>) -> io::Result<()> {
    let new = directory.join(format!("{name}.new"));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    if let Some((uid, gid)) = owner {
        fchown(&file, Some(uid), Some(gid))?;
    }
    file.write_all(text.as_bytes())?;
    fs::rename(new, directory.join(name))
}

/// Where the probe connects.
#[must_use]
pub fn own_address(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn requirement(address: &str) -> Requirement {
        let text = format!(
            r#"{{"of":"sql/postgres","status":"True","evidence":"","address":"{address}","port":5433,"role":"web_mini-flux"}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    fn text_for(address: &str, password: &str) -> String {
        text(&Settings {
            port: 8081,
            database: &requirement(address),
            password: &Secret::new(password.to_owned()),
            admin: Some(&Secret::new("s3cret".to_owned())),
        })
    }

    #[test]
    fn the_file_says_where_the_database_is_and_nothing_leaves_its_place() {
        assert_eq!(
            text_for("10.0.0.2", "ab12"),
            "# Written by sovereign-guest at each start.\n\
             DATABASE_URL=postgres://web_mini-flux:ab12@10.0.0.2:5433/web_mini-flux?sslmode=disable&connect_timeout=2\n\
             RUN_MIGRATIONS=1\nLISTEN_ADDR=0.0.0.0:8081\n\
             CREATE_ADMIN=1\nADMIN_USERNAME=admin\nADMIN_PASSWORD=s3cret\n"
        );
        assert!(text_for("fd00::2", "x").contains("@[fd00::2]:5433/"));
        assert!(text_for("10.0.0.2", "a@b/c?d%e f").contains(":a%40b%2Fc%3Fd%25e%20f@10.0.0.2"));
    }

    #[test]
    fn nobody_else_reads_it_and_a_change_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let user = User {
            name: "u".into(),
            uid: nix::unistd::getuid().as_raw(),
            gid: nix::unistd::getgid().as_raw(),
            home: "/".into(),
        };
        let path = directory.path();
        assert!(!is_started(path, "a"));
        write(path, "a", &user).unwrap();
        assert!(!is_started(path, "a"), "written is not started");
        mark_started(path, "a").unwrap();
        assert!(is_started(path, "a") && !is_started(path, "b"));
        for name in [FILE, STARTED] {
            let mode = fs::metadata(path.join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        write(path, "b", &user).unwrap();
        assert_eq!(fs::read_to_string(path.join(FILE)).unwrap(), "b");
    }
}
