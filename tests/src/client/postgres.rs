//! As much of PostgreSQL's protocol 3.0 as a test asks for: a log-in with a password, simple queries, text.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result, bail, ensure};
use sovereign_protocol::handshake::random_hex;

use super::scram;

/// `SSLRequest`: a server that speaks the protocol answers with one byte.
const HAS_TLS: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const MOST_BYTES: usize = 1 << 20;

/// Whether PostgreSQL is at the other end, and takes a new connection.
///
/// # Errors
/// The connection's own.
pub fn answers(mut stream: TcpStream) -> Result<bool> {
    stream.write_all(&HAS_TLS)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    Ok(answer == *b"N")
}

/// A session of the user `postgres`.
pub struct Session {
    stream: TcpStream,
}

impl Session {
    /// Logs in.
    ///
    /// # Errors
    /// The connection's own, or what the server said.
    pub fn new(stream: TcpStream, password: &str) -> Result<Self> {
        let mut session = Self { stream };
        let mut hello = (3u32 << 16).to_be_bytes().to_vec();
        hello.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
        session.send(None, &hello)?;
        let (nonce, mut expected) = (random_hex::<16>()?, None);
        loop {
            let (kind, body) = session.receive()?;
            let (method, rest) = body.split_first_chunk().unwrap_or((&[0; 4], &[]));
            match (kind, u32::from_be_bytes(*method)) {
                (b'R', 0) => ensure!(
                    expected.is_none(),
                    "the server did not prove that it knows the password"
                ),
                (b'R', 10) => {
                    let first = scram::first(&nonce);
                    let mut body = b"SCRAM-SHA-256\0".to_vec();
                    body.extend_from_slice(&u32::try_from(first.len())?.to_be_bytes());
                    body.extend_from_slice(first.as_bytes());
                    session.send(Some(b'p'), &body)?;
                }
                (b'R', 11) => {
                    let (said, answer) = scram::last(password, &nonce, std::str::from_utf8(rest)?)?;
                    expected = Some(answer);
                    session.send(Some(b'p'), said.as_bytes())?;
                }
                (b'R', 12) => ensure!(expected.take().is_some_and(|answer| answer.as_bytes() == rest)),
                (b'S' | b'K' | b'N', _) => {}
                (b'Z', _) => return Ok(session),
                (b'E', _) => bail!("{}", refusal(&body)),
                (kind, method) => bail!("{:?} {method} is no part of a log-in", char::from(kind)),
            }
        }
    }

    /// The first column of each row of a query.
    ///
    /// # Errors
    /// The connection's own, or what the server said.
    pub fn query(&mut self, text: &str) -> Result<Vec<String>> {
        self.send(Some(b'Q'), format!("{text}\0").as_bytes())?;
        let (mut rows, mut failed) = (Vec::new(), None);
        loop {
            let (kind, body) = self.receive()?;
            match kind {
                b'D' => rows.push(first_column(&body).context("no row")?),
                b'E' => failed = Some(refusal(&body)),
                b'Z' => break,
                _ => {} // how many, of which types, notices
            }
        }
        match failed {
            Some(said) => bail!("{text}: {said}"),
            None => Ok(rows),
        }
    }

    fn send(&mut self, kind: Option<u8>, body: &[u8]) -> Result<()> {
        let mut message: Vec<u8> = kind.into_iter().collect();
        message.extend_from_slice(&u32::try_from(body.len() + 4)?.to_be_bytes());
        message.extend_from_slice(body);
        Ok(self.stream.write_all(&message)?)
    }

    fn receive(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        ensure!((4..MOST_BYTES).contains(&length), "a message of {length} bytes");
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body)?;
        Ok((kind, body))
    }
}

/// The message of an `ErrorResponse`.
fn refusal(body: &[u8]) -> String {
    let fields = body.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    let wanted = fields.filter(|field| field.starts_with(['S', 'C', 'M']));
    wanted
        .map(|field| field[1..].to_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Of a `DataRow`; empty for NULL.
fn first_column(body: &[u8]) -> Option<String> {
    let (length, rest) = body.get(2..)?.split_first_chunk()?;
    let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
    Some(String::from_utf8_lossy(rest.get(..length)?).into_owned())
}
