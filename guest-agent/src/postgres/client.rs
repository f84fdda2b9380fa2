//! As much of PostgreSQL's protocol 3.0 as the agent speaks: log-in by who we are on a Unix socket, simple queries,
//! results as text. Strict and bounded: a probe also meets what only pretends to be PostgreSQL.
//!
//! Own code and not tokio-postgres: that crate adds 680 KB to a static binary with a budget of 2.5 MB (measured),
//! a third of it glibc's name resolution, and takes two round trips for what a simple query asks in one.

use std::io;
use std::path::Path;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Bytes of one message of the server.
pub const MESSAGE_BYTES: usize = 256 << 10;
/// Messages until the server is ready again: rows, notices, parameters.
pub const MESSAGES: usize = 10_000;
/// Bytes of all messages of one result; a probe's have hundreds.
pub const RESULT_BYTES: usize = 4 << 20;
/// Version 3.0, spoken since PostgreSQL 7.4.
const PROTOCOL: u32 = 3 << 16;

/// One row of a result; `None` is NULL.
pub type Row = Vec<Option<String>>;

/// Why there is no session or no result.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// Nobody listens, or not there.
    #[error("{path}: cannot connect")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection ended or failed.
    #[error("the connection failed")]
    Stream(#[source] io::Error),
    /// The server says no.
    #[error("{severity}: {message}")]
    Server {
        /// `ERROR`, `FATAL`.
        severity: String,
        /// SQLSTATE, such as `57P03`.
        code: String,
        /// What it says.
        message: String,
    },
    /// What comes is not this protocol, or more of it than is read here.
    #[error("no PostgreSQL as expected: {0}")]
    Protocol(&'static str),
}

impl PgError {
    /// The server's SQLSTATE.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Server { code, .. } => Some(code),
            Self::Connect { .. } | Self::Stream(_) | Self::Protocol(_) => None,
        }
    }
}

/// A session; ends when it is dropped.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
}

impl Client<UnixStream> {
    /// Connects to a socket and logs in.
    ///
    /// # Errors
    /// See [`PgError`].
    pub async fn connect(path: &Path, role: &str) -> Result<Self, PgError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| PgError::Connect {
                path: path.display().to_string(),
                source,
            })?;
        Self::log_in(stream, role).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    /// Logs in to the database `postgres`; a server that wants more than to know who we are is refused.
    ///
    /// # Errors
    /// See [`PgError`].
    pub async fn log_in(stream: S, role: &str) -> Result<Self, PgError> {
        let mut body = PROTOCOL.to_be_bytes().to_vec();
        for word in [
            "user",
            role,
            "database",
            "postgres",
            "application_name",
            "sovereign-guest",
            "",
        ] {
            body.extend_from_slice(word.as_bytes());
            body.push(0);
        }
        let mut client = Self { stream };
        client.send(None, &body).await?;
        for _ in 0..MESSAGES {
            match client.receive().await? {
                (b'R', body) if body == [0; 4] => {}
                (b'R', _) => return Err(PgError::Protocol("it asks for a password")),
                (b'S' | b'K' | b'N' | b'v', _) => {}
                (b'E', body) => return Err(refusal(&body)),
                (b'Z', _) => return Ok(client),
                _ => return Err(PgError::Protocol("a message that is no part of a log-in")),
            }
        }
        Err(PgError::Protocol("the log-in does not end"))
    }

    /// The rows of a simple query, which may be several statements.
    ///
    /// # Errors
    /// See [`PgError`]; after anything but [`PgError::Server`] the session is of no use any more.
    pub async fn query(&mut self, statements: &str) -> Result<Vec<Row>, PgError> {
        let mut body = statements.as_bytes().to_vec();
        body.push(0);
        self.send(Some(b'Q'), &body).await?;
        let (mut rows, mut failed, mut bytes) = (Vec::new(), None, 0);
        for _ in 0..MESSAGES {
            let message = self.receive().await?;
            bytes += message.1.len();
            if bytes > RESULT_BYTES {
                return Err(PgError::Protocol("a result over its limit"));
            }
            match message {
                (b'D', body) => {
                    rows.push(row(&body).ok_or(PgError::Protocol("a row that is longer than it says"))?);
                }
                (b'T' | b'C' | b'I' | b'N' | b'S', _) => {}
                (b'E', body) => failed = Some(refusal(&body)),
                (b'Z', _) => return failed.map_or(Ok(rows), Err),
                _ => return Err(PgError::Protocol("a message that is no part of a result")),
            }
        }
        Err(PgError::Protocol("the result does not end"))
    }

    async fn send(&mut self, kind: Option<u8>, body: &[u8]) -> Result<(), PgError> {
        let length = u32::try_from(body.len() + 4).map_err(|_| PgError::Protocol("too long a message"))?;
        let mut message: Vec<u8> = kind.into_iter().collect();
        message.extend(length.to_be_bytes());
        message.extend_from_slice(body);
        self.stream.write_all(&message).await.map_err(PgError::Stream)
    }

    async fn receive(&mut self) -> Result<(u8, Vec<u8>), PgError> {
        let kind = self.stream.read_u8().await.map_err(PgError::Stream)?;
        let length = self.stream.read_u32().await.map_err(PgError::Stream)?;
        let length = usize::try_from(length)
            .ok()
            .and_then(|length| length.checked_sub(4));
        let length = length.filter(|length| *length <= MESSAGE_BYTES);
        let mut body = vec![0; length.ok_or(PgError::Protocol("a message of an impossible length"))?];
        self.stream.read_exact(&mut body).await.map_err(PgError::Stream)?;
        Ok((kind, body))
    }
}

/// Int16 count, then for each value Int32 length (-1: NULL) and bytes.
fn row(body: &[u8]) -> Option<Row> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut row = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let value = match usize::try_from(i32::from_be_bytes(*length)) {
            Ok(length) => {
                let (value, after) = after.split_at_checked(length)?;
                rest = after;
                Some(String::from_utf8_lossy(value).into_owned())
            }
            Err(_) => {
                rest = after;
                None
            }
        };
        row.push(value);
    }
    Some(row)
}

/// Fields: a letter and text with a final zero each; a zero at the end.
fn refusal(body: &[u8]) -> PgError {
    let field = |wanted: u8| {
        let mut fields = body
            .split(|byte| *byte == 0)
            .filter_map(|field| field.split_first());
        let found = fields.find(|(kind, _)| **kind == wanted);
        found.map(|(_, text)| String::from_utf8_lossy(text).into_owned())
    };
    let message = field(b'M').unwrap_or_else(|| "no message".to_owned());
    PgError::Server {
        severity: field(b'V')
            .or_else(|| field(b'S'))
            .unwrap_or_else(|| "ERROR".to_owned()),
        code: field(b'C').unwrap_or_default(),
        message: match field(b'D') {
            Some(detail) => format!("{message} ({detail})"),
            None => message,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::duplex;

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap().to_be_bytes();
        [&[kind], length.as_slice(), body].concat()
    }

    fn welcome() -> Vec<u8> {
        [
            message(b'R', &[0; 4]),
            message(b'S', b"a\0b\0"),
            message(b'K', &[0; 8]),
            message(b'Z', b"I"),
        ]
        .concat()
    }

    /// Logs in and asks one thing of a server that says these bytes and closes.
    async fn asked(bytes: &[u8]) -> Result<Vec<Row>, PgError> {
        let (near, mut far) = duplex(1 << 20);
        far.write_all(bytes).await.unwrap();
        far.shutdown().await.unwrap();
        let mut client = Client::log_in(near, "probe").await?;
        client.query("SELECT 1").await
    }

    async fn answered(result: &[u8]) -> Result<Vec<Row>, PgError> {
        asked(&[&welcome(), result].concat()).await
    }

    fn data(values: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            body.extend(
                value
                    .map_or(-1, |v| i32::try_from(v.len()).unwrap())
                    .to_be_bytes(),
            );
            body.extend(value.unwrap_or_default().bytes());
        }
        message(b'D', &body)
    }

    #[tokio::test]
    async fn rows_are_text_and_a_null_is_none() {
        let result = [
            message(b'T', b"whatever"),
            data(&[Some("1"), None, Some("")]),
            message(b'N', b"SNOTICE\0\0"),
            data(&[]),
            message(b'C', b"SELECT 2\0"),
            message(b'Z', b"I"),
        ];
        let rows = answered(&result.concat()).await.unwrap();
        assert_eq!(rows, [vec![Some("1".into()), None, Some(String::new())], vec![]]);
    }

    #[tokio::test]
    async fn a_refusal_has_code_and_message_and_the_session_goes_on() {
        let error = message(b'E', b"SFEHLER\0VERROR\0C42601\0Msyntax\0Dnear x\0\0");
        let result = [error, message(b'Z', b"I")].concat();
        let error = answered(&result).await.unwrap_err();
        assert_eq!(
            (error.code(), error.to_string().as_str()),
            (Some("42601"), "ERROR: syntax (near x)")
        );
        let fatal = message(b'E', b"VFATAL\0C57P03\0Mthe database system is starting up\0\0");
        let error = asked(&fatal).await.unwrap_err();
        assert_eq!(error.code(), Some("57P03"));
    }

    #[tokio::test]
    async fn what_is_not_the_protocol_is_told() {
        let password = message(b'R', &[0, 0, 0, 10, 0]);
        let cases: [(Vec<u8>, &str); 6] = [
            (password, "asks for a password"),
            (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "impossible length"),
            ([welcome(), message(b'G', b"")].concat(), "no part of a result"),
            (
                [welcome(), message(b'D', &[0, 9])].concat(),
                "longer than it says",
            ),
            (message(b'R', &[0; 4])[..5].to_vec(), "connection failed"),
            ([0x52, 0, 0, 0, 3].to_vec(), "impossible length"),
        ];
        for (bytes, why) in cases {
            let error = asked(&bytes).await.unwrap_err().to_string();
            assert!(error.contains(why), "{error}: {why}");
        }
        let endless = message(b'N', b"").repeat(MESSAGES + 1);
        let error = answered(&endless).await.unwrap_err().to_string();
        assert!(error.contains("does not end"), "{error}");
    }

    #[tokio::test]
    async fn a_result_has_a_limit_of_its_own() {
        let value = "x".repeat(200 << 10);
        let rows = |count: usize| [data(&[Some(&value)]).repeat(count), message(b'Z', b"I")].concat();
        let fit = RESULT_BYTES / (data(&[Some(&value)]).len() - 5);
        let (near, mut far) = duplex(16 << 20);
        far.write_all(&[welcome(), rows(fit), rows(fit + 1)].concat())
            .await
            .unwrap();
        let mut client = Client::log_in(near, "probe").await.unwrap();
        assert_eq!(client.query("SELECT 1").await.unwrap().len(), fit);
        let error = client.query("SELECT 2").await.unwrap_err().to_string();
        assert!(error.contains("over its limit"), "{error}");
    }

    proptest! {
        #[test]
        fn no_body_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = row(&bytes);
            let _ = refusal(&bytes);
        }
    }
}
