//! What the guest agent and PID 1 read of daemons, servers and disks.

use std::pin::Pin;
use std::task::{Context, Poll};

use sovereign_guest_agent::exits;
use sovereign_guest_agent::http::Reader;
use sovereign_guest_agent::init::disks::{self, Content, Plan};
use sovereign_guest_agent::net::diag::{self, Message};
use sovereign_guest_agent::postgres::client::Client;
use sovereign_guest_agent::tailscale::status;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The answer in pieces of any size is the answer at once.
pub(crate) fn localapi_http(data: &[u8]) {
    let (size, data) = data
        .split_first()
        .map_or((1, data), |(size, rest)| (usize::from(*size).max(1), rest));
    let read = |pieces: &mut dyn Iterator<Item = &[u8]>| {
        let mut reader = Reader::default();
        for piece in pieces {
            match reader.take(piece) {
                Ok(None) => {}
                Ok(Some(reply)) => return Some((reply.status, reply.body)),
                Err(_) => return None,
            }
        }
        reader.end().ok().map(|reply| (reply.status, reply.body))
    };
    let pieces = read(&mut data.chunks(size));
    let whole = read(&mut std::iter::once(data));
    assert_eq!(pieces, whole);
}

pub(crate) fn tailscale_status(data: &[u8]) {
    let (verdict, health) = status::judge(&status::parse(data));
    assert!(!verdict.reason.is_empty() && health.is_none_or(|health| !health.reason.is_empty()));
}

/// Says what is in the corpus and swallows what it is told.
struct Server<'a>(&'a [u8]);

impl AsyncRead for Server<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let (now, later) = self.0.split_at(self.0.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.0 = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Server<'_> {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

pub(crate) fn postgres(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(async {
        if let Ok(mut client) = Client::log_in(Server(data), "probe").await {
            while client.query("SELECT 1").await.is_ok() {}
        }
    });
}

/// Only zeros at both ends are blank, and only what is blank is ever formatted.
pub(crate) fn disk_signature(data: &[u8]) {
    let (head, tail) = data.split_at(data.len() / 2);
    let content = disks::classify(head, tail);
    let blank = data.iter().all(|byte| *byte == 0);
    assert_eq!(content == Content::Blank, blank);
    for bytes in [0, 1 << 20, 64 << 20, u64::MAX] {
        for may_format in [false, true] {
            let formats = disks::plan(&content, bytes, may_format) == Plan::Format;
            assert!(!formats || (blank && may_format));
        }
    }
}

pub(crate) fn exit_records(data: &[u8]) {
    for pid in [0, 1, u32::MAX] {
        if let Some(exit) = exits::find(data, pid) {
            assert_eq!(exit.pid, pid);
            let _ = exit.describe();
        }
    }
}

/// What the kernel names is ended under the same name, and nothing is read twice.
pub(crate) fn sock_diag(data: &[u8]) {
    const HEADER: usize = 16;
    let messages = diag::parse(data);
    assert!(messages.len() <= data.len() / HEADER);
    for (sequence, message) in messages {
        if let Message::Socket(listed) = message {
            let request = diag::destroy(&listed, sequence);
            assert!(data.windows(48).any(|name| name == &request[HEADER + 8..]));
        }
    }
}
