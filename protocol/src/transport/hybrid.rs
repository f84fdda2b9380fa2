//! Hybrid Unix sockets: `CONNECT <port>\n` answered by `OK <number>\n` (Firecracker's form).

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{Address, DialError, unix};
use crate::limits::HYBRID_LINE_BYTES;

pub(super) async fn dial(path: &Path, port: u32, address: &Address) -> Result<UnixStream, DialError> {
    let mut stream = unix::dial(path, address).await?;
    let request = format!("CONNECT {port}\n"); // one write: some devices drop it in two
    stream
        .write_all(request.as_bytes())
        .await
        .map_err(|e| broken(e, address))?;
    let line = read_line(&mut stream).await.map_err(|e| broken(e, address))?;
    if is_ok(&line) {
        Ok(stream)
    } else {
        let text = String::from_utf8_lossy(&line).into_owned();
        Err(DialError::Protocol(address.clone(), text))
    }
}

/// Byte by byte: what follows the newline already belongs to the stream.
async fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(HYBRID_LINE_BYTES);
    while line.len() < HYBRID_LINE_BYTES {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            break;
        }
        line.push(byte);
    }
    Ok(line)
}

fn is_ok(line: &[u8]) -> bool {
    line.strip_prefix(b"OK ")
        .is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit))
}

/// An end before OK: the device is there, the guest's port is not.
fn broken(error: io::Error, address: &Address) -> DialError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            DialError::NotListening(address.clone())
        }
        _ => DialError::Io(address.clone(), error),
    }
}
