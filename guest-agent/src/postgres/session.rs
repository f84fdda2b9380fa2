//! Sessions with PostgreSQL: the readiness probe, and the adjustment of a running server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sovereign_protocol::secret::Secret;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Error, NoTls};

use super::conf::{PROBE_ROLE, SUPERUSER};
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

/// A session whose connection task ends with it.
struct Session {
    client: Client,
    connection: AbortHandle,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Logs in as the probe's role, asks, and tells what that means. Cancel safe.
pub async fn probe(target: &Target) -> Probe {
    match timeout(PROBE, ask(target)).await {
        Err(_) => Probe::Silent(format!("no answer within {} s", PROBE.as_secs())),
        Ok(Ok((1, false, version))) => Probe::Ready(format!(
            "PostgreSQL {version}: log-in as {PROBE_ROLE} and SELECT 1 answered, not in recovery"
        )),
        Ok(Ok((1, true, _))) => Probe::Recovering("it answers but is in recovery".to_owned()),
        Ok(Ok((other, ..))) => Probe::Broken(format!("SELECT 1 answered {other}")),
        Ok(Err(error)) => judge(&error),
    }
}

/// SELECT 1, whether it is in recovery, and its version such as `17.6`.
async fn ask(target: &Target) -> Result<(i32, bool, String), Error> {
    let session = match log_in(target, PROBE_ROLE).await {
        Err(error) if error.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => {
            create_probe_role(target).await?;
            log_in(target, PROBE_ROLE).await?
        }
        other => other?,
    };
    let query = "SELECT 1, pg_is_in_recovery(), split_part(current_setting('server_version'), ' ', 1)";
    let row = session.client.query_one(query, &[]).await?;
    Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?))
}

fn judge(error: &Error) -> Probe {
    let text = chain(error);
    if let Some(code) = error.code() {
        return if *code == SqlState::CANNOT_CONNECT_NOW {
            Probe::Recovering(text)
        } else {
            Probe::Broken(format!("{} {text}", code.code()))
        };
    }
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<io::Error>());
    match cause.map(io::Error::kind) {
        Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Probe::Refused(text),
        _ => Probe::Broken(text),
    }
}

async fn create_probe_role(target: &Target) -> Result<(), Error> {
    let session = log_in(target, SUPERUSER).await?;
    session
        .client
        .batch_execute(&format!("CREATE ROLE {PROBE_ROLE} LOGIN"))
        .await
}

async fn log_in(target: &Target, role: &str) -> Result<Session, Error> {
    let mut config = Config::new();
    config
        .host_path(&target.sockets)
        .port(target.port)
        .user(role)
        .dbname("postgres");
    connect(&config).await
}

async fn connect(config: &Config) -> Result<Session, Error> {
    let mut config = config.clone();
    config.application_name("sovereign-guest").connect_timeout(PROBE);
    let (client, connection) = config.connect(NoTls).await?;
    let task = tokio::spawn(async move {
        // Its error also reaches the query that waits for the answer.
        let _ = connection.await;
    });
    Ok(Session {
        client,
        connection: task.abort_handle(),
    })
}

/// Makes a running server as its secret and, with `reload`, its generated files say.
///
/// # Errors
/// What stands in the way, in words without secrets.
pub async fn adjust(target: &Target, password: Option<&Secret>, reload: bool) -> Result<Adjusted, String> {
    let adjusted = async {
        if let Some(password) = password {
            set_password(target, password)
                .await
                .map_err(|error| format!("set the password of {SUPERUSER}: {}", chain(&error)))?;
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

/// Looks first whether the password already works, so that a restart of the agent writes nothing.
async fn set_password(target: &Target, password: &Secret) -> Result<(), Error> {
    let mut config = Config::new();
    config
        .host("127.0.0.1")
        .port(target.port)
        .user(SUPERUSER)
        .dbname("postgres")
        .password(password.reveal());
    if connect(&config).await.is_ok() {
        return Ok(());
    }
    // The verifier and not the password: a failing statement is logged.
    let verifier = postgres_protocol::password::scram_sha_256(password.reveal().as_bytes());
    let session = log_in(target, SUPERUSER).await?;
    session
        .client
        .batch_execute(&format!("ALTER ROLE {SUPERUSER} PASSWORD '{verifier}'"))
        .await
}

async fn reload(target: &Target) -> Result<Result<Adjusted, String>, Error> {
    let session = log_in(target, SUPERUSER).await?;
    session.client.batch_execute("SELECT pg_reload_conf()").await?;
    sleep(RELOAD).await;
    // A new backend starts from what the postmaster has read.
    let session = log_in(target, SUPERUSER).await?;
    let pending = names(
        &session,
        "SELECT name FROM pg_settings WHERE pending_restart ORDER BY 1",
    )
    .await?;
    if !pending.is_empty() {
        return Ok(Ok(Adjusted::Restart(format!(
            "these settings need a restart: {}",
            pending.join(", ")
        ))));
    }
    let wrong = names(&session, "SELECT coalesce(name, 'line ' || sourceline) || ': ' || error FROM pg_file_settings WHERE error IS NOT NULL ORDER BY seqno").await?;
    if wrong.is_empty() {
        Ok(Ok(Adjusted::Done))
    } else {
        Ok(Err(wrong.join("; ")))
    }
}

async fn names(session: &Session, query: &str) -> Result<Vec<String>, Error> {
    session
        .client
        .query(query, &[])
        .await?
        .iter()
        .map(|row| row.try_get(0))
        .collect()
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
