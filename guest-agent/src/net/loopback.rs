//! The interface `lo`: brought up by init, dialled to see whether it works.

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use sovereign_protocol::condition::Verdict;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::kernel::{Files, Kernel};
use crate::core::net::{self, Change};

/// A loopback dial must answer within this time.
pub const DIAL: Duration = Duration::from_secs(1);

/// Brings `lo` up with 127.0.0.1/8 and ::1/128; right to do when it is already so.
///
/// # Errors
/// The system's own, of the first change that failed.
pub fn raise() -> io::Result<()> {
    let mut kernel = Kernel::open(Files::default())?;
    let seen = kernel.look()?;
    let outcomes: Vec<io::Result<()>> = net::plan_loopback(&seen)
        .iter()
        .map(|change| kernel.act(change))
        .collect();
    outcomes.into_iter().collect()
}

/// Connects to a listener of its own on 127.0.0.1 and passes one byte through.
///
/// # Errors
/// What stood in the way; `TimedOut` after [`DIAL`] is how a down `lo` looks with a default route.
pub async fn dial() -> io::Result<()> {
    let through = async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let mut near = TcpStream::connect(listener.local_addr()?).await?;
        let (mut far, _) = listener.accept().await?;
        near.write_all(b"?").await?;
        far.read_u8().await
    };
    match timeout(DIAL, through).await {
        Ok(answered) => answered.map(drop),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer within {} ms", DIAL.as_millis()),
        )),
    }
}

/// The dial is the proof; what could not be repaired explains it.
#[must_use]
pub fn judge(rest: &[Change], errors: &[String], dialled: io::Result<()>) -> Verdict {
    match (net::lacking(rest), dialled) {
        (None, Ok(())) => Verdict::yes("Answers", "a byte went through 127.0.0.1"),
        (Some((reason, lacks)), _) => Verdict::no(reason, format!("{lacks}; {}", errors.join("; "))),
        (None, Err(error)) => {
            let text = format!("lo is up with 127.0.0.1 and a dial of it does not get through: {error}");
            Verdict::no("NoAnswer", text)
        }
    }
}

#[cfg(test)]
mod tests {
    use sovereign_reconcile::observed::Observed;

    use super::*;

    #[tokio::test]
    async fn a_working_loopback_answers() {
        assert_eq!(judge(&[], &[], dial().await).reason, "Answers");
    }

    #[test]
    fn what_cannot_be_repaired_is_named_and_the_dial_counts_alone() {
        let down = net::plan_loopback(&net::Seen {
            network: Observed::fresh(),
            ..net::Seen::default()
        });
        let verdict = judge(&down[..1], &["EPERM".into()], Ok(()));
        assert_eq!(
            (verdict.reason.as_str(), verdict.evidence.as_str()),
            ("Down", "lo is down; EPERM")
        );
        let verdict = judge(&[], &[], Err(io::ErrorKind::TimedOut.into()));
        assert_eq!(verdict.reason, "NoAnswer");
    }
}
