//! One GET over HTTP/1.1: strict, bounded, for a server in the guest that we ask and do not trust.
//!
//! Own code and not hyper, whose client adds 253 KB to a static binary (measured) with a budget of 2.5 MB.
//! The request says `Connection: close`; nothing is ever reused.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Status line and headers, and trailers, in bytes.
pub const HEAD_BYTES: usize = 8 << 10;
/// A body, in bytes.
pub const BODY_BYTES: usize = 256 << 10;
/// A line that says how long a chunk is, in bytes.
pub const CHUNK_LINE_BYTES: usize = 256;

/// What the server answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The status, such as 200.
    pub status: u16,
    /// The body without its transfer encoding.
    pub body: Vec<u8>,
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The stream failed.
    #[error("the connection failed")]
    Stream(#[source] io::Error),
    /// It ended too early.
    #[error("the answer ends in the middle")]
    Cut,
    /// It is no answer of HTTP/1.1, or one that says two things at once.
    #[error("no answer of HTTP/1.1: {0}")]
    Malformed(&'static str),
    /// It is longer than anything that is read here.
    #[error("{what} is longer than {most} bytes")]
    TooLong {
        /// The part.
        what: &'static str,
        /// Its limit.
        most: usize,
    },
}

/// Sends a GET and reads the whole answer. Has no time limit of its own. Cancel safe: the stream is gone with it.
///
/// # Errors
/// See [`HttpError`].
pub async fn get<S>(mut stream: S, host: &str, target: &str) -> Result<Reply, HttpError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let request = format!(
        "GET {target} HTTP/1.1\r\nHost: {host}\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
    );
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(HttpError::Stream)?;
    let mut reader = Reader::default();
    let mut chunk = vec![0; 4 << 10];
    loop {
        let length = stream.read(&mut chunk).await.map_err(HttpError::Stream)?;
        if length == 0 {
            return reader.end();
        }
        if let Some(reply) = reader.take(&chunk[..length])? {
            return Ok(reply);
        }
    }
}

/// Puts an answer together from pieces of any size.
#[derive(Debug, Default)]
pub struct Reader {
    waiting: Vec<u8>,
    state: State,
    status: u16,
    body: Vec<u8>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Head,
    /// So many bytes of the body are missing.
    Body(usize),
    /// The body ends with the stream.
    ToEnd,
    ChunkLine,
    /// So many bytes of the chunk are missing, and the line end after it.
    Chunk(usize),
    ChunkEnd,
    Trailers,
}

impl Reader {
    /// Takes a piece; the reply when it is whole.
    ///
    /// # Errors
    /// [`HttpError::Malformed`] and [`HttpError::TooLong`].
    pub fn take(&mut self, piece: &[u8]) -> Result<Option<Reply>, HttpError> {
        self.waiting.extend_from_slice(piece);
        loop {
            let before = (self.waiting.len(), self.state);
            if self.step()? {
                return Ok(Some(Reply {
                    status: self.status,
                    body: std::mem::take(&mut self.body),
                }));
            }
            if (self.waiting.len(), self.state) == before {
                return Ok(None);
            }
        }
    }

    /// The stream ended.
    ///
    /// # Errors
    /// [`HttpError::Cut`] unless that is how the body ends.
    pub fn end(self) -> Result<Reply, HttpError> {
        if self.state == State::ToEnd {
            return Ok(Reply {
                status: self.status,
                body: self.body,
            });
        }
        Err(HttpError::Cut)
    }

    /// One step as far as the bytes allow; true at the end of the answer.
    fn step(&mut self) -> Result<bool, HttpError> {
        match self.state {
            State::Head => self.head(),
            State::Body(0) => Ok(true),
            State::Body(missing) => {
                let taken = self.fill_body(missing)?;
                self.state = State::Body(missing - taken);
                Ok(false)
            }
            State::ToEnd => self.fill_body(usize::MAX).map(|_| false),
            State::ChunkLine => {
                if let Some(line) = self.line("a chunk's length", CHUNK_LINE_BYTES)? {
                    let length = chunk_length(&line)?;
                    self.state = if length == 0 {
                        State::Trailers
                    } else {
                        State::Chunk(length)
                    };
                }
                Ok(false)
            }
            State::Chunk(0) => {
                self.state = State::ChunkEnd;
                Ok(false)
            }
            State::Chunk(missing) => {
                let taken = self.fill_body(missing)?;
                self.state = State::Chunk(missing - taken);
                Ok(false)
            }
            State::ChunkEnd => {
                if let Some(line) = self.line("the end of a chunk", 2)? {
                    if !line.is_empty() {
                        return Err(HttpError::Malformed("a chunk is longer than it says"));
                    }
                    self.state = State::ChunkLine;
                }
                Ok(false)
            }
            State::Trailers => self.trailers(),
        }
    }

    fn head(&mut self) -> Result<bool, HttpError> {
        let Some(end) = find(&self.waiting, b"\r\n\r\n") else {
            return limit("the head", self.waiting.len(), HEAD_BYTES).map(|()| false);
        };
        limit("the head", end, HEAD_BYTES)?;
        let head: Vec<u8> = self.waiting.drain(..end + 4).take(end).collect();
        let head = std::str::from_utf8(&head).map_err(|_| HttpError::Malformed("its head is no text"))?;
        let mut lines = head.split("\r\n");
        self.status = status(lines.next().unwrap_or_default())?;
        self.state = framing(lines)?;
        Ok(false)
    }

    /// Nothing in trailers is of interest; the first empty line is the end.
    fn trailers(&mut self) -> Result<bool, HttpError> {
        match self.line("the trailers", HEAD_BYTES)? {
            Some(line) => Ok(line.is_empty()),
            None => Ok(false),
        }
    }

    fn fill_body(&mut self, most: usize) -> Result<usize, HttpError> {
        let taken = most.min(self.waiting.len());
        limit("the body", self.body.len() + taken, BODY_BYTES)?;
        self.body.extend(self.waiting.drain(..taken));
        Ok(taken)
    }

    fn line(&mut self, what: &'static str, most: usize) -> Result<Option<Vec<u8>>, HttpError> {
        let Some(end) = find(&self.waiting, b"\r\n") else {
            return limit(what, self.waiting.len(), most).map(|()| None);
        };
        limit(what, end, most)?;
        Ok(Some(self.waiting.drain(..end + 2).take(end).collect()))
    }
}

fn limit(what: &'static str, length: usize, most: usize) -> Result<(), HttpError> {
    if length <= most {
        Ok(())
    } else {
        Err(HttpError::TooLong { what, most })
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// `HTTP/1.1 200 OK`; an interim answer (1xx) was not asked for.
fn status(line: &str) -> Result<u16, HttpError> {
    let rest = line
        .strip_prefix("HTTP/1.1 ")
        .or_else(|| line.strip_prefix("HTTP/1.0 "));
    let rest = rest.ok_or(HttpError::Malformed("it does not begin with HTTP/1.1"))?;
    let (code, after) = rest.split_at_checked(3).unwrap_or((rest, ""));
    let code = number(code, 10).filter(|_| after.is_empty() || after.starts_with(' '));
    match code {
        Some(code @ 200..=599) => u16::try_from(code).map_err(|_| HttpError::Malformed("no status")),
        _ => Err(HttpError::Malformed("no status that ends an answer")),
    }
}

/// How the body ends; a server that says it in two ways is not believed.
fn framing<'a>(lines: impl Iterator<Item = &'a str>) -> Result<State, HttpError> {
    let mut length = None;
    let mut chunked = false;
    for line in lines {
        let (name, value) = line
            .split_once(':')
            .ok_or(HttpError::Malformed("a header without a colon"))?;
        if name.is_empty() || name.contains([' ', '\t']) {
            return Err(HttpError::Malformed("a header without a name, or a folded one"));
        }
        let value = value.trim_matches([' ', '\t']);
        if name.eq_ignore_ascii_case("content-length") {
            let said = number(value, 10).ok_or(HttpError::Malformed("a length that is no number"))?;
            if length.is_some_and(|length| length != said) {
                return Err(HttpError::Malformed("two lengths"));
            }
            length = Some(said);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") || chunked {
                return Err(HttpError::Malformed("another transfer encoding than chunked"));
            }
            chunked = true;
        }
    }
    match (length, chunked) {
        (Some(_), true) => Err(HttpError::Malformed("a length and chunks")),
        (Some(length), false) => {
            limit("the body", length, BODY_BYTES)?;
            Ok(State::Body(length))
        }
        (None, true) => Ok(State::ChunkLine),
        (None, false) => Ok(State::ToEnd),
    }
}

/// The length is hexadecimal; what comes after a semicolon is an extension.
fn chunk_length(line: &[u8]) -> Result<usize, HttpError> {
    let text = std::str::from_utf8(line).map_err(|_| HttpError::Malformed("a chunk's length is no text"))?;
    let digits = text
        .split(';')
        .next()
        .unwrap_or_default()
        .trim_end_matches([' ', '\t']);
    let length = number(digits, 16).ok_or(HttpError::Malformed("a chunk's length is no number"))?;
    limit("the body", length, BODY_BYTES)?;
    Ok(length)
}

/// Digits only: no sign, no space, no overflow.
fn number(text: &str, radix: u32) -> Option<usize> {
    let plain = !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
    usize::from_str_radix(text, radix).ok().filter(|_| plain)
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
