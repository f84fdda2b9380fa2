//! The host's end of a connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Shared;
use super::connection::{Connection, End, Phase};
use super::guest::{Guest, Id, header};
use super::header::Op;

/// Most packets one `poll_write` puts into the ring: with Linux's 4 KiB buffers, 64 KiB.
const BURST: usize = 16;

/// A stream to a port of the guest.
///
/// Writes go straight into the guest's receive ring, so nothing is buffered on this side and
/// `flush` does nothing. A write that returned is with the guest's kernel, not yet with its
/// program. `shutdown` ends the host-to-guest direction only. Dropping the stream closes it:
/// with unread bytes by a reset, otherwise in order, waiting at most 5 s for the guest in the
/// background. When the guest's driver is reset every read and write fails with
/// [`io::ErrorKind::ConnectionReset`] at once.
#[derive(Debug)]
pub struct Stream {
    pub(super) shared: Arc<Shared>,
    pub(super) id: Id,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

impl Stream {
    /// The port the guest sees as this stream's origin.
    pub fn host_port(&self) -> u32 {
        self.host_port
    }

    /// The port in the guest.
    pub fn guest_port(&self) -> u32 {
        self.guest_port
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.with(|guest| guest.release(self.id, Instant::now()));
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|guest| guest.poll_read(self.id, cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.shared.with(|guest| guest.poll_write(self.id, cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|guest| {
            if let Some(connection) = guest.connections.get_mut(&self.id) {
                connection.shut_sending();
                guest.touch(self.id);
            }
        });
        Poll::Ready(Ok(()))
    }
}

impl Guest {
    /// What became of the dial: pending, or the phase it ended in.
    pub(super) fn poll_dial(&mut self, id: Id, cx: &mut Context<'_>) -> Poll<Phase> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Poll::Ready(Phase::Dead(End::GuestReset));
        };
        if connection.phase == Phase::Dialing {
            remember(&mut connection.writer, cx);
            return Poll::Pending;
        }
        Poll::Ready(connection.phase)
    }

    fn poll_read(&mut self, id: Id, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Poll::Ready(Err(reset()));
        };
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if connection.held() > 0 {
            self.held -= connection.read(buf.remaining(), |bytes| buf.put_slice(bytes));
            self.touch(id);
            return Poll::Ready(Ok(()));
        }
        if connection.read_finished() {
            return Poll::Ready(Ok(()));
        }
        if matches!(connection.phase, Phase::Dead(_)) {
            return Poll::Ready(Err(reset()));
        }
        remember(&mut connection.reader, cx);
        Poll::Pending
    }

    fn poll_write(&mut self, id: Id, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut written = 0;
        for _ in 0..BURST {
            let cid = self.cid;
            let Some(connection) = self.connections.get_mut(&id) else {
                return Poll::Ready(Err(reset()));
            };
            if let Err(error) = writable(connection) {
                return if written > 0 {
                    Poll::Ready(Ok(written))
                } else {
                    Poll::Ready(Err(error))
                };
            }
            let rest = &bytes[written..];
            let allowed = rest.len().min(connection.credit() as usize);
            if rest.is_empty() {
                return Poll::Ready(Ok(written));
            }
            if allowed == 0 {
                return self.wait_to_write(id, cx, written, false);
            }
            let packet = header(cid, connection, Op::Data, 0);
            match self.put(packet, &rest[..allowed]) {
                None => return self.wait_to_write(id, cx, written, true),
                Some(taken) => {
                    written += taken;
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.wrote(u32::try_from(taken).unwrap_or(u32::MAX));
                    }
                }
            }
        }
        Poll::Ready(Ok(written))
    }

    /// Nothing more can be written now: reports what was, or waits for a buffer or for credit.
    fn wait_to_write(
        &mut self,
        id: Id,
        cx: &mut Context<'_>,
        written: usize,
        for_buffer: bool,
    ) -> Poll<io::Result<usize>> {
        let Some(connection) = self.connections.get_mut(&id) else {
            return Poll::Ready(Err(reset()));
        };
        if written > 0 {
            return Poll::Ready(Ok(written));
        }
        if let Err(error) = writable(connection) {
            return Poll::Ready(Err(error)); // the ring broke under this very write
        }
        remember(&mut connection.writer, cx);
        if for_buffer {
            if !connection.waiting {
                connection.waiting = true;
                self.waiters.push_back(id);
            }
        } else {
            connection.stall();
            self.touch(id);
        }
        Poll::Pending
    }
}

fn writable(connection: &Connection) -> io::Result<()> {
    if connection.write_finished() {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    match connection.phase {
        Phase::Open => Ok(()),
        Phase::Dialing => Err(io::ErrorKind::NotConnected.into()),
        Phase::Dead(_) => Err(reset()),
    }
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

fn remember(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}
