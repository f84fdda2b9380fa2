//! Bytes led both ways between ctl and a guest.

use std::io;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, split};

/// Leads all that each side says to the other, until both have ended.
///
/// A guest that hears no more may have something to say still: a command that has ended reads no input, and its exit
/// code must pass. What cannot be said to ctl ends both ways: nobody waits for it.
///
/// # Errors
/// Those of hearing the guest and telling ctl.
pub(crate) async fn splice<C, G>(ctl: C, guest: G) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite,
    G: AsyncRead + AsyncWrite,
{
    let ((mut from_ctl, mut to_ctl), (mut from_guest, mut to_guest)) = (split(ctl), split(guest));
    let input = async {
        let _ = copy(&mut from_ctl, &mut to_guest).await; // see above
        let _ = to_guest.shutdown().await;
        Ok(())
    };
    let outputs = async {
        copy(&mut from_guest, &mut to_ctl).await?;
        to_ctl.shutdown().await
    };
    tokio::try_join!(input, outputs).map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn what_a_guest_said_before_it_closed_is_heard_also_when_it_takes_nothing_any_more() {
        let ((mut ctl, near), (far, mut guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        guest.write_all(b"exit code 7").await.unwrap();
        drop(guest);
        ctl.write_all(b"input that nobody reads").await.unwrap();
        let mut heard = Vec::new();
        let (led, read) = tokio::join!(splice(near, far), async {
            let read = ctl.read_to_end(&mut heard).await;
            drop(ctl);
            read
        });
        assert_eq!(read.unwrap(), 11);
        assert_eq!(heard, b"exit code 7");
        led.unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn both_ways_pass_and_each_end_is_told() {
        let ((mut ctl, near), (far, mut guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let led = tokio::spawn(splice(near, far));
        ctl.write_all(b"input").await.unwrap();
        ctl.shutdown().await.unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "input");
        guest.write_all(b"output").await.unwrap();
        drop(guest);
        let mut heard = String::new();
        ctl.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "output");
        led.await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_ctl_that_is_gone_ends_it() {
        let ((ctl, near), (far, mut guest)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        drop(ctl);
        let led = tokio::spawn(splice(near, far));
        assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
        guest.write_all(b"for nobody").await.unwrap();
        led.await.unwrap().unwrap_err();
        assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
    }
}
