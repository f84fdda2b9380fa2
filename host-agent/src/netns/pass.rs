//! Descriptors over a Unix stream: one line, with the descriptors beside its first byte.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

use rustix::cmsg_space;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::contract::{DESCRIPTORS, LINE_BYTES};

const SPACE: usize = cmsg_space!(ScmRights(DESCRIPTORS));

/// Sends a line and its descriptors. Not cancel safe: the peer may have got a part of the line.
pub(super) async fn send(stream: &UnixStream, line: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    if descriptors.len() > DESCRIPTORS || line.is_empty() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut sent = 0;
    while sent < line.len() {
        let with = if sent == 0 { &borrowed[..] } else { &[] };
        sent += stream
            .async_io(Interest::WRITABLE, || send_some(stream, &line[sent..], with))
            .await?;
    }
    Ok(())
}

fn send_some(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// Receives one line and the descriptors beside it; they are closed on exec.
///
/// # Errors
/// `UnexpectedEof` when the peer closed before the end of the line; `InvalidData` when the
/// line is over [`LINE_BYTES`] or descriptors were lost on the way.
pub(super) async fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut line, mut descriptors) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let got = stream
            .async_io(Interest::READABLE, || {
                receive_some(stream, &mut line, &mut descriptors)
            })
            .await?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.len() > LINE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the line has no end"));
        }
    }
    Ok((line, descriptors))
}

fn receive_some(
    stream: &UnixStream,
    line: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut bytes = [0; LINE_BYTES];
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        let text = "descriptors were lost (limit of open files?)";
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    line.extend_from_slice(&bytes[..got.bytes]);
    Ok(got.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn descriptors_arrive_and_work() {
        let (a, b) = UnixStream::pair().unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        send(&a, b"one\n", &[OwnedFd::from(write)]).await.unwrap();
        let (line, mut got) = receive(&b).await.unwrap();
        assert_eq!((line.as_slice(), got.len()), (&b"one\n"[..], 1));
        let mut file = std::fs::File::from(got.remove(0));
        file.write_all(b"x").unwrap();
        drop(file);
        let mut all = String::new();
        read.read_to_string(&mut all).unwrap();
        assert_eq!(all, "x");
    }

    #[tokio::test]
    async fn a_peer_that_lies_gets_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        drop(a);
        assert_eq!(
            receive(&b).await.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[b'x'; LINE_BYTES + 1]).await.unwrap();
        assert_eq!(receive(&b).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
