//! Sessions with PostgreSQL: the readiness probe, and the adjustment of a running server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sovereign_protocol::mesh::Role;
use sovereign_protocol::secret::Secret;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::client::{Client, PgError, Row};
use super::conf::{PROBE_ROLE, SUPERUSER};
use super::scram;
use crate::core::service::{Adjusted, Probe};
use crate::log::chain;

/// A whole probe must end within this time.
pub const PROBE: Duration = Duration::from_secs(2);
/// An adjustment must end within this time.
const ADJUST: Duration = Duration::from_secs(15);
/// What the postmaster needs at most to read its configuration again.
const RELOAD: Duration = Duration::from_millis(300);

/// Where a server listens.
#[derive(Debug, Clone)]
pub struct Target {
    /// The directory of its Unix socket.
    pub sockets: PathBuf,
    /// Its port.
    pub port: u16,
}

/// SQLSTATE: the server starts, stops or recovers.
const CANNOT_CONNECT_NOW: &str = "57P03";
/// SQLSTATE: there is no such role, or we are not it.
const INVALID_AUTHORIZATION: &str = "28000";

/// Logs in as the probe's role, asks, and tells what that means. Cancel safe.
pub async fn probe(target: &Target) -> Probe {
    match timeout(PROBE, ask(target)).await {
        Err(_) => Probe::Silent(format!("no answer within {} s", PROBE.as_secs())),
        Ok(Ok(row)) => read(&row),
        Ok(Err(error)) => judge(&error),
    }
}

/// The row of [`ask`]: 1, whether it is in recovery, and its version such as `17.6`.
fn read(row: &Row) -> Probe {
    let values: Vec<&str> = row
        .iter()
        .map(|value| value.as_deref().unwrap_or("NULL"))
        .collect();
    match values[..] {
        ["1", "f", version] => Probe::Ready(format!(
            "PostgreSQL {version}: log-in as {PROBE_ROLE} and SELECT 1 answered, not in recovery"
        )),
        ["1", "t", _] => Probe::Recovering("it answers but is in recovery".to_owned()),
        _ => Probe::Broken(format!("SELECT 1 answered {values:?}")),
    }
}

async fn ask(target: &Target) -> Result<Row, PgError> {
    let mut client = match log_in(target, PROBE_ROLE).await {
        Err(error) if error.code() == Some(INVALID_AUTHORIZATION) => {
            let mut superuser = log_in(target, SUPERUSER).await?;
            superuser
                .query(&format!("CREATE ROLE {PROBE_ROLE} LOGIN"))
                .await?;
            log_in(target, PROBE_ROLE).await?
        }
        other => other?,
    };
    let query = "SELECT 1, pg_is_in_recovery(), split_part(current_setting('server_version'), ' ', 1)";
    let rows = client.query(query).await?;
    rows.into_iter()
        .next()
        .ok_or(PgError::Protocol("SELECT 1 answered nothing"))
}

fn judge(error: &PgError) -> Probe {
    let text = chain(error);
    match error {
        PgError::Server { code, .. } if code == CANNOT_CONNECT_NOW => Probe::Recovering(text),
        PgError::Server { code, .. } => Probe::Broken(format!("{code} {text}")),
        PgError::Connect { source, .. } => match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Probe::Refused(text),
            _ => Probe::Broken(text),
        },
        PgError::Stream(_) | PgError::Protocol(_) => Probe::Broken(text),
    }
}

async fn log_in(target: &Target, role: &str) -> Result<Client<UnixStream>, PgError> {
    let path = target.sockets.join(format!(".s.PGSQL.{}", target.port));
    Client::connect(&path, role).await
}

/// Makes a running server as its secret and, with `reload`, its generated files say.
///
/// # Errors
/// What stands in the way, in words without secrets.
pub async fn adjust(
    target: &Target,
    password: Option<&Secret>,
    grants: &[Grant],
    reload: bool,
) -> Result<Adjusted, String> {
    let adjusted = async {
        if let Some(password) = password {
            let mut superuser = log_in(target, SUPERUSER).await.map_err(|error| chain(&error))?;
            set_password(&mut superuser, SUPERUSER, password)
                .await
                .map_err(|error| format!("set the password of {SUPERUSER}: {}", chain(&error)))?;
        }
        for wanted in grants {
            grant(target, wanted)
                .await
                .map_err(|error| format!("make role and database {}: {}", wanted.role, chain(&error)))?;
        }
        if !reload {
            return Ok(Adjusted::Done);
        }
        self::reload(target)
            .await
            .map_err(|error| format!("reload the configuration: {}", chain(&error)))?
    };
    timeout(ADJUST, adjusted)
        .await
        .unwrap_or_else(|_| Err(format!("no end within {} s", ADJUST.as_secs())))
}

/// Looks first whether it is that password, so that a restart of the agent writes nothing.
async fn set_password(
    superuser: &mut Client<UnixStream>,
    role: &str,
    password: &Secret,
) -> Result<(), PgError> {
    let query = format!("SELECT rolpassword FROM pg_authid WHERE rolname = '{role}'");
    let kept = superuser.query(&query).await?;
    let mut kept = kept.into_iter().flatten().flatten();
    if kept.any(|verifier| scram::matches(&verifier, password.reveal())) {
        return Ok(());
    }
    let mut salt = [0; scram::SALT_BYTES];
    getrandom::fill(&mut salt).map_err(|error| PgError::Stream(io::Error::other(error)))?;
    // The verifier and not the password: a failing statement is logged.
    let verifier = scram::verifier(password.reveal(), &salt);
    let statement = format!("ALTER ROLE \"{role}\" PASSWORD '{verifier}'");
    superuser.query(&statement).await.map(drop)
}

/// A role of another guest's service, and the database of its name that it owns.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The role.
    pub role: Role,
    /// Its password.
    pub password: Secret,
}

/// Makes what is missing of a role and its database; changes nothing that is as it should be. What a role owns stays
/// when nobody is granted it any more: pg_hba.conf no longer lets it in.
async fn grant(target: &Target, wanted: &Grant) -> Result<(), PgError> {
    let role = wanted.role.as_str(); // no quote can be in it
    let mut superuser = log_in(target, SUPERUSER).await?;
    let there = |table: &str, column: &str| format!("SELECT 1 FROM {table} WHERE {column} = '{role}'");
    if superuser.query(&there("pg_roles", "rolname")).await?.is_empty() {
        superuser.query(&format!("CREATE ROLE \"{role}\" LOGIN")).await?;
    }
    set_password(&mut superuser, role, &wanted.password).await?;
    if superuser
        .query(&there("pg_database", "datname"))
        .await?
        .is_empty()
    {
        let statement = format!("CREATE DATABASE \"{role}\" OWNER \"{role}\"");
        superuser.query(&statement).await?;
    }
    Ok(())
}

async fn reload(target: &Target) -> Result<Result<Adjusted, String>, PgError> {
    log_in(target, SUPERUSER)
        .await?
        .query("SELECT pg_reload_conf()")
        .await?;
    sleep(RELOAD).await;
    // A new backend starts from what the postmaster has read.
    let mut superuser = log_in(target, SUPERUSER).await?;
    let pending = superuser
        .query("SELECT name FROM pg_settings WHERE pending_restart ORDER BY 1")
        .await?;
    if !pending.is_empty() {
        return Ok(Ok(Adjusted::Restart(format!(
            "these settings need a restart: {}",
            joined(pending, ", ")
        ))));
    }
    let wrong = superuser
        .query("SELECT coalesce(name, 'line ' || sourceline) || ': ' || error FROM pg_file_settings WHERE error IS NOT NULL ORDER BY seqno")
        .await?;
    Ok(if wrong.is_empty() {
        Ok(Adjusted::Done)
    } else {
        Err(joined(wrong, "; "))
    })
}

fn joined(rows: Vec<Row>, between: &str) -> String {
    let values: Vec<String> = rows.into_iter().flatten().flatten().collect();
    values.join(between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    // AuthenticationOk, ReadyForQuery (protocol 3.0)
    const WELCOME: &[u8] = b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I";

    fn refusal(code: &str) -> Vec<u8> {
        let fields = format!("SFATAL\0VFATAL\0C{code}\0Mno\0\0");
        let mut message = b"E".to_vec();
        message.extend(u32::try_from(fields.len() + 4).unwrap().to_be_bytes());
        message.extend(fields.bytes());
        message
    }

    /// A server that answers the start-up packet and nothing else.
    fn fake(answer: Vec<u8>, then_close: bool) -> (tempfile::TempDir, Target) {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap();
        tokio::spawn(async move {
            let mut kept = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut packet = [0; 512];
                let _ = stream.read(&mut packet).await;
                let _ = stream.write_all(&answer).await;
                if !then_close {
                    kept.push(stream);
                }
            }
        });
        let target = Target {
            sockets: directory.path().to_owned(),
            port: 5432,
        };
        (directory, target)
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_welcomes_and_then_says_nothing_is_not_ready() {
        let (_directory, target) = fake(WELCOME.to_vec(), false);
        assert!(matches!(probe(&target).await, Probe::Silent(_)));
        let (_directory, target) = fake(Vec::new(), false);
        assert!(matches!(probe(&target).await, Probe::Silent(_)));
    }

    #[tokio::test]
    async fn a_server_that_welcomes_and_closes_is_broken() {
        let (_directory, target) = fake(WELCOME.to_vec(), true);
        assert!(matches!(probe(&target).await, Probe::Broken(_)));
        let (_directory, target) = fake(b"HTTP/1.1 400\r\n\r\n".to_vec(), true);
        assert!(matches!(probe(&target).await, Probe::Broken(_)));
    }

    #[tokio::test]
    async fn errors_are_told_apart_by_their_codes() {
        let (_directory, target) = fake(refusal("57P03"), true);
        assert!(matches!(probe(&target).await, Probe::Recovering(_)));
        let (_directory, target) = fake(refusal("53300"), true);
        let Probe::Broken(text) = probe(&target).await else {
            panic!("not broken")
        };
        assert!(text.starts_with("53300"), "{text}");
    }

    #[tokio::test]
    async fn no_socket_and_a_dead_socket_are_refusals() {
        let directory = tempfile::tempdir().unwrap();
        let target = Target {
            sockets: directory.path().to_owned(),
            port: 5432,
        };
        assert!(matches!(probe(&target).await, Probe::Refused(_)));
        drop(std::os::unix::net::UnixListener::bind(directory.path().join(".s.PGSQL.5432")).unwrap());
        assert!(matches!(probe(&target).await, Probe::Refused(_)));
    }
}
