//! The hybrid Unix socket in front of a device: `CONNECT <port>\n`, `OK <number>\n`, bytes.
//!
//! The dialect of Firecracker, Cloud Hypervisor and vhost-device-vsock. End of file before `OK`
//! means that nobody listens yet.

use std::pin::pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, Interest, copy_buf};
use tokio::net::unix::ReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Device;

/// Longest request line, newline included; a valid one has at most 19 bytes.
const LINE_BYTES: usize = 32;
/// How long a client may take for its request line.
const LINE_TIME: Duration = Duration::from_secs(2);
/// How long the guest may take to answer a dial.
const DIAL_TIME: Duration = Duration::from_secs(5);
/// Clients at once, those that have not asked yet included.
const CLIENTS: usize = 1024;
/// How often a client that half-closed is checked for being gone.
const GONE_PACE: Duration = Duration::from_secs(1);
/// Copy buffer, bytes each way.
const COPY_BYTES: usize = 32 * 1024;

/// Serves clients on `listener` until `cancel`; then every client's connection is closed.
///
/// A refused or unanswered dial, a line that is not a request, and a client too many are all
/// answered by closing the connection.
pub async fn serve_front(device: Device, listener: UnixListener, cancel: CancellationToken) {
    let mut clients = JoinSet::new();
    loop {
        // Each arm is cancel safe: accept and join_next lose nothing.
        let accepted = tokio::select! {
            () = cancel.cancelled() => break,
            Some(_) = clients.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((client, _)) if clients.len() < CLIENTS => {
                clients.spawn(serve_client(device.clone(), client));
            }
            Ok(_) => tracing::warn!("vsock front: too many clients"),
            Err(error) => {
                // Out of descriptors, most likely: let some clients end first.
                tracing::warn!(%error, "vsock front cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    clients.shutdown().await;
}

async fn serve_client(device: Device, mut client: UnixStream) {
    let line = tokio::time::timeout(LINE_TIME, read_request(&mut client)).await;
    let Ok(Some((port, early))) = line else { return };
    let dialed = tokio::time::timeout(DIAL_TIME, device.dial(port)).await;
    drop(device); // a client does not keep the device alive
    let Ok(Ok(mut stream)) = dialed else { return };
    let answer = format!("OK {}\n", stream.host_port());
    if client.write_all(answer.as_bytes()).await.is_ok() && stream.write_all(&early).await.is_ok() {
        // Either side's failure ends both; neither is worth a log line.
        let _ = copy(client, stream).await;
    }
}

/// Copies both ways and passes half-closes on, until both directions have ended, the one from the guest has failed, or the
/// client is gone altogether: a guest that ignores a half-close must not keep a stream. One that hears no more may have
/// said something before it closed, which is passed.
async fn copy(mut client: UnixStream, stream: impl AsyncRead + AsyncWrite) -> std::io::Result<()> {
    let (from_client, mut to_client) = client.split();
    let (from_guest, mut to_guest) = tokio::io::split(stream);
    let up = async {
        let mut from_client = BufReader::with_capacity(COPY_BYTES, from_client);
        if copy_buf(&mut from_client, &mut to_guest).await.is_ok() {
            let _ = to_guest.shutdown().await; // see above
        }
        from_client.into_inner()
    };
    let down = async {
        let mut from_guest = BufReader::with_capacity(COPY_BYTES, from_guest);
        copy_buf(&mut from_guest, &mut to_client).await?;
        to_client.shutdown().await
    };
    let (mut up, mut down) = (pin!(up), pin!(down));
    // The loser of the first race is awaited on; the loser of the second is no longer wanted.
    tokio::select! {
        from_client = &mut up => {
            tokio::select! {
                ended = down => ended,
                () = gone(&from_client) => Ok(()),
            }
        }
        ended = &mut down => {
            ended?;
            up.await;
            Ok(())
        }
    }
}

/// Resolves when the client has closed its socket, not merely shut one direction.
async fn gone(client: &ReadHalf<'_>) {
    // A closed peer shows only beside "writable", which is nearly always set: hence the pace.
    while client
        .ready(Interest::WRITABLE)
        .await
        .is_ok_and(|ready| !ready.is_write_closed())
    {
        tokio::time::sleep(GONE_PACE).await;
    }
}

/// Reads the request line, however many reads it takes. Returns the port and the bytes that came
/// behind the newline, which belong to the stream.
async fn read_request(client: &mut (impl AsyncReadExt + Unpin)) -> Option<(u32, Vec<u8>)> {
    let mut buffer = [0; LINE_BYTES];
    let mut filled = 0;
    loop {
        let bytes = client.read(&mut buffer[filled..]).await.ok()?;
        if bytes == 0 {
            return None; // end of file, or a line too long
        }
        filled += bytes;
        if let Some(end) = buffer[..filled].iter().position(|byte| *byte == b'\n') {
            return Some((parse_request(&buffer[..end])?, buffer[end + 1..filled].to_vec()));
        }
    }
}

fn parse_request(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None; // `parse` would take a sign
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines() {
        let cases: [(&[u8], Option<u32>); 8] = [
            (b"CONNECT 1", Some(1)),
            (b"CONNECT 4294967295", Some(u32::MAX)),
            (b"CONNECT 4294967296", None),
            (b"CONNECT +1", None),
            (b"CONNECT -1", None),
            (b"CONNECT ", None),
            (b"connect 1", None),
            (b"CONNECT 1\r", None),
        ];
        for (line, port) in cases {
            assert_eq!(parse_request(line), port, "{}", line.escape_ascii());
        }
    }

    #[tokio::test]
    async fn a_line_in_single_bytes_and_a_payload_behind_it() {
        let (mut client, mut server) = tokio::io::duplex(1);
        let writer = tokio::spawn(async move {
            client.write_all(b"CONNECT 52\n").await.unwrap();
            client
        });
        assert_eq!(read_request(&mut server).await, Some((52, vec![])));
        drop(writer);
        let (mut client, mut server) = tokio::io::duplex(64);
        client.write_all(b"CONNECT 52\nhello").await.unwrap();
        assert_eq!(read_request(&mut server).await, Some((52, b"hello".to_vec())));
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_refused_at_the_limit() {
        let (mut client, mut server) = tokio::io::duplex(64);
        client.write_all(&[b'C'; 40]).await.unwrap();
        assert_eq!(read_request(&mut server).await, None);
        let (client, mut server) = tokio::io::duplex(64);
        drop(client);
        assert_eq!(read_request(&mut server).await, None);
    }

    #[tokio::test]
    async fn a_half_close_passes_and_the_answer_still_comes() {
        let (mut client, served) = UnixStream::pair().unwrap();
        let (mut guest, stream) = tokio::io::duplex(64);
        let copying = tokio::spawn(copy(served, stream));
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        guest.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"question");
        guest.write_all(b"answer").await.unwrap();
        guest.shutdown().await.unwrap();
        heard.clear();
        client.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, b"answer");
        copying.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_a_guest_said_before_it_closed_is_passed_also_when_it_takes_nothing_any_more() {
        // Which direction is looked at first is up to chance.
        for _ in 0..64 {
            let (mut client, served) = UnixStream::pair().unwrap();
            let (mut guest, stream) = tokio::io::duplex(64);
            guest.write_all(b"exit code 7").await.unwrap();
            drop(guest);
            client.write_all(b"input that nobody reads").await.unwrap();
            let copying = tokio::spawn(copy(served, stream));
            let mut heard = Vec::new();
            client.read_to_end(&mut heard).await.unwrap();
            assert_eq!(heard, b"exit code 7");
            drop(client);
            copying.await.unwrap().unwrap();
        }
    }

    #[tokio::test]
    async fn a_client_that_is_gone_ends_the_stream_of_a_silent_guest() {
        let (mut client, served) = UnixStream::pair().unwrap();
        let (mut guest, stream) = tokio::io::duplex(64);
        let copying = tokio::spawn(copy(served, stream));
        client.write_all(b"last words").await.unwrap();
        drop(client);
        let mut heard = [0; 10];
        guest.read_exact(&mut heard).await.unwrap();
        copying.await.unwrap().unwrap(); // though `guest` neither writes nor closes
        assert!(guest.write_all(b"x").await.is_err());
    }
}
