//! The configuration files of PostgreSQL, generated on /run at each start: the data directory holds none of ours.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use sovereign_protocol::mesh::Client;

use crate::places;

/// The role that the readiness probe logs in as; it may do what every role may do.
pub const PROBE_ROLE: &str = "sovereign_probe";
/// The superuser role.
pub const SUPERUSER: &str = "postgres";
/// The name of the map in pg_ident.conf.
const MAP: &str = "sovereign";

const HBA: &str = "pg_hba.conf";
/// What the server has read: a copy, so that an adopting agent need not ask it to read again.
const LOADED: &str = "loaded";

/// What varies between guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The TCP port and the suffix of the Unix socket.
    pub port: u16,
    /// How backends share memory.
    pub shared_memory: SharedMemory,
    /// The specification's own settings.
    pub lines: BTreeMap<String, String>,
    /// Services of other guests that log in.
    pub clients: Vec<Client>,
    /// Everybody who reaches the guest may log in by password.
    pub open: bool,
    /// It listens on every address, not on the loopback's alone; a change of that needs a restart of the server.
    pub everywhere: bool,
}

/// Where a server listens that others log in to.
const EVERYWHERE: &str = "listen_addresses = '*'";

/// dynamic_shared_memory_type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedMemory {
    /// Files in /dev/shm.
    Posix,
    /// Files in the data directory: where /dev/shm does not work.
    Mmap,
}

impl SharedMemory {
    /// Tries to create a file where shm_open would.
    #[must_use]
    pub fn probe(dev_shm: &Path) -> Self {
        let path = dev_shm.join(format!("sovereign-probe-{}", std::process::id()));
        let works = fs::write(&path, "x").is_ok();
        let _ = fs::remove_file(&path);
        if works { Self::Posix } else { Self::Mmap }
    }

    /// As it stands in postgresql.conf.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Posix => "posix",
            Self::Mmap => "mmap",
        }
    }
}

/// postgresql.conf: ours, then the specification's lines, of which the last wins.
#[must_use]
pub fn postgresql_conf(directory: &Path, settings: &Settings) -> String {
    let port = settings.port.to_string();
    let hba = directory.join("pg_hba.conf").display().to_string();
    let ident = directory.join("pg_ident.conf").display().to_string();
    // Every address: that of the card may come, go and change while the server runs. Who comes by it is let in by
    // pg_hba.conf alone.
    let addresses = if settings.everywhere { "*" } else { "127.0.0.1" };
    let ours = [
        ("hba_file", hba.as_str()),
        ("ident_file", ident.as_str()),
        ("port", port.as_str()),
        ("listen_addresses", addresses),
        ("unix_socket_directories", places::PG_SOCKETS),
        ("dynamic_shared_memory_type", settings.shared_memory.as_str()),
        ("shared_buffers", "16MB"),
        ("max_connections", "50"),
        ("password_encryption", "scram-sha-256"),
        ("jit", "off"),
        ("logging_collector", "off"),
        ("log_destination", "stderr"),
    ];
    let mut text = "# Written by sovereign-guest at each start and change.\n".to_owned();
    let theirs = settings
        .lines
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_str()));
    for (key, value) in ours.into_iter().chain(theirs) {
        let _ = writeln!(text, "{key} = {}", quote(value));
    }
    text
}

/// pg_hba.conf: users of the guest by who they are, everybody else by password; from other guests only who needs it,
/// from its own addresses, as its own role, to its own database.
#[must_use]
pub fn pg_hba(clients: &[Client], open: bool) -> String {
    let mut text = format!(
        "local all all peer map={MAP}\nhost all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n"
    );
    for Client { role, from } in clients {
        for address in from {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            let _ = writeln!(text, "host \"{role}\" \"{role}\" {address}/{bits} scram-sha-256");
        }
    }
    if open {
        text.push_str("host all all all scram-sha-256\n");
    }
    text
}

/// pg_ident.conf: root is the agent; every other user is the role of the same name.
#[must_use]
pub fn pg_ident(server_user: &str) -> String {
    format!(
        "{MAP} root {PROBE_ROLE}\n{MAP} root {SUPERUSER}\n{MAP} {server_user} {SUPERUSER}\n{MAP} /^(.*)$ \\1\n"
    )
}

fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

/// Writes all files, each whole or not at all.
///
/// # Errors
/// The system's own.
pub fn write(directory: &Path, settings: &Settings, server_user: &str) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let files = [
        (HBA, pg_hba(&settings.clients, settings.open)),
        ("pg_ident.conf", pg_ident(server_user)),
        ("postgresql.conf", postgresql_conf(directory, settings)),
    ];
    for (name, text) in files {
        let new = directory.join(format!("{name}.new"));
        fs::write(&new, text)?;
        fs::rename(new, directory.join(name))?;
    }
    Ok(())
}

/// Notes that the server has read the configuration as it is now.
///
/// # Errors
/// The system's own.
pub fn mark_loaded(directory: &Path) -> io::Result<()> {
    fs::write(directory.join(LOADED), readable(directory)?)
}

/// What a server reads again when it is asked to.
fn readable(directory: &Path) -> io::Result<Vec<u8>> {
    let (conf, hba) = (directory.join("postgresql.conf"), directory.join(HBA));
    let mut all = fs::read(conf)?;
    all.extend(match fs::read(hba) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        hba => hba?,
    });
    Ok(all)
}

/// Notes that the server is about to read another configuration.
///
/// # Errors
/// The system's own.
pub fn forget_loaded(directory: &Path) -> io::Result<()> {
    match fs::remove_file(directory.join(LOADED)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// True when a server was started in this boot.
#[must_use]
pub fn was_loaded(directory: &Path) -> bool {
    directory.join("postgresql.conf").exists()
}

/// True when the server was last told to listen on every address.
#[must_use]
pub fn is_everywhere(directory: &Path) -> bool {
    let text = fs::read_to_string(directory.join("postgresql.conf")).unwrap_or_default();
    text.lines().any(|line| line == EVERYWHERE)
}

/// True when the files hold these settings already.
#[must_use]
pub fn is_written(directory: &Path, settings: &Settings) -> bool {
    let has = |name: &str, wanted: String| {
        fs::read(directory.join(name)).is_ok_and(|text| text == wanted.as_bytes())
    };
    has("postgresql.conf", postgresql_conf(directory, settings))
        && has(HBA, pg_hba(&settings.clients, settings.open))
}

/// True when the server has read the configuration as it is now.
#[must_use]
pub fn is_loaded(directory: &Path) -> bool {
    let wanted = readable(directory).ok();
    wanted.is_some() && wanted == fs::read(directory.join(LOADED)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settings(lines: &[(&str, &str)]) -> Settings {
        Settings {
            port: 5433,
            shared_memory: SharedMemory::Mmap,
            lines: lines
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            clients: Vec::new(),
            open: false,
            everywhere: false,
        }
    }

    #[test]
    fn the_specification_comes_last_and_is_quoted() {
        let text = postgresql_conf(
            Path::new("/run/x"),
            &settings(&[("shared_buffers", "32MB"), ("search_path", r"'a\b'")]),
        );
        assert!(text.contains("port = '5433'\n"));
        assert!(text.contains("dynamic_shared_memory_type = 'mmap'\n"));
        assert!(text.contains("hba_file = '/run/x/pg_hba.conf'\n"));
        assert!(
            text.ends_with("search_path = '''a\\\\b'''\nshared_buffers = '32MB'\n"),
            "{text}"
        );
    }

    fn client(from: &str) -> Client {
        serde_json::from_str(&format!(r#"{{"role":"web_mini-flux","from":["{from}"]}}"#)).unwrap()
    }

    #[test]
    fn another_guest_is_let_in_from_its_address_to_its_own_database_alone() {
        let mut with = settings(&[]);
        assert!(postgresql_conf(Path::new("/x"), &with).contains("listen_addresses = '127.0.0.1'\n"));
        with.clients = vec![client("10.0.0.3"), client("fd00::3")];
        with.everywhere = true;
        assert!(postgresql_conf(Path::new("/x"), &with).contains("listen_addresses = '*'\n"));
        assert!(pg_hba(&with.clients, true).ends_with("\nhost all all all scram-sha-256\n"));
        let text = pg_hba(&with.clients, false);
        let more = text.strip_prefix(&pg_hba(&[], false)).unwrap();
        assert_eq!(
            more,
            "host \"web_mini-flux\" \"web_mini-flux\" 10.0.0.3/32 scram-sha-256\n\
             host \"web_mini-flux\" \"web_mini-flux\" fd00::3/128 scram-sha-256\n"
        );
        // A changed address changes only this file, and is to be read all the same.
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &with, "postgres").unwrap();
        mark_loaded(directory.path()).unwrap();
        assert!(is_loaded(directory.path()) && is_written(directory.path(), &with));
        assert!(is_everywhere(directory.path()));
        with.clients[0] = client("10.0.0.4");
        assert!(!is_written(directory.path(), &with));
        write(directory.path(), &with, "postgres").unwrap();
        assert!(!is_loaded(directory.path()));
        write(directory.path(), &settings(&[]), "postgres").unwrap();
        assert!(!is_everywhere(directory.path()));
    }

    #[test]
    fn nobody_is_let_in_by_trust() {
        assert!(
            pg_hba(&[client("10.0.0.3")], false)
                .lines()
                .all(|line| line.ends_with("scram-sha-256") || line.contains(" peer "))
        );
        assert_eq!(
            pg_ident("postgres").lines().next(),
            Some("sovereign root sovereign_probe")
        );
    }

    #[test]
    fn shared_memory_falls_back_where_no_file_can_be_made() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(SharedMemory::probe(directory.path()), SharedMemory::Posix);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(
            SharedMemory::probe(&directory.path().join("missing")),
            SharedMemory::Mmap
        );
    }

    #[test]
    fn a_changed_configuration_is_not_a_loaded_one() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!is_loaded(directory.path()));
        write(directory.path(), &settings(&[]), "postgres").unwrap();
        assert!(!is_loaded(directory.path()));
        mark_loaded(directory.path()).unwrap();
        write(directory.path(), &settings(&[]), "postgres").unwrap();
        assert!(is_loaded(directory.path()));
        let changed = settings(&[("work_mem", "5MB")]);
        assert!(!is_written(directory.path(), &changed));
        write(directory.path(), &changed, "postgres").unwrap();
        assert!(is_written(directory.path(), &changed) && !is_loaded(directory.path()));
        // A server that was asked to read it and did not say how it went is not where it was.
        forget_loaded(directory.path()).unwrap();
        write(directory.path(), &settings(&[]), "postgres").unwrap();
        assert!(!is_loaded(directory.path()));
        forget_loaded(directory.path()).unwrap();
    }

    proptest! {
        #[test]
        fn no_value_leaves_its_quotes(value in "[^\n\r\0]{0,40}") {
            let quoted = quote(&value);
            let inner = &quoted[1..quoted.len() - 1];
            let undone = inner.replace("''", "'").replace("\\\\", "\\");
            // Every quote inside is doubled and every backslash too.
            prop_assert!(!inner.replace("''", "").contains('\''));
            prop_assert!(!inner.replace("\\\\", "").contains('\\'));
            prop_assert_eq!(undone.len(), value.len());
        }
    }

    /// Who may log in as whom: a change here is a change of the promise.
    #[test]
    fn users_of_the_guest_are_who_they_are_and_everybody_else_has_a_password() {
        assert_eq!(
            pg_hba(&[], false),
            "local all all peer map=sovereign\nhost all all 127.0.0.1/32 scram-sha-256\nhost all all ::1/128 scram-sha-256\n"
        );
    }

    #[test]
    fn a_configuration_that_was_read_is_remembered_until_it_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(!was_loaded(path) && !is_loaded(path));
        std::fs::write(path.join("postgresql.conf"), "port = 1").unwrap();
        assert!(was_loaded(path) && !is_loaded(path));
        mark_loaded(path).unwrap();
        assert!(is_loaded(path));
        forget_loaded(path).unwrap();
        forget_loaded(path).unwrap();
        assert!(!is_loaded(path));
        std::fs::create_dir(path.join(LOADED)).unwrap();
        assert!(forget_loaded(path).is_err(), "what cannot be forgotten is told");
    }
}
