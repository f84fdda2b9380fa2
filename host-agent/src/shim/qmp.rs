//! QEMU's machine protocol: as much of it as a shim needs.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines, Take};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::contract::ExitReason;

/// QEMU opens its socket within this time.
const CONNECT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);
/// A QEMU that reads takes a command at once; one that is stopped never does.
const TAKEN: Duration = Duration::from_secs(2);
/// One message may have so many bytes; events and answers are small.
const LINE_BYTES: u64 = 64 << 10;

/// The one client that QMP admits.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines<BufReader<Take<OwnedReadHalf>>>,
    write: OwnedWriteHalf,
}

/// What QEMU told by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QmpEvent {
    /// The machine ends, for this reason.
    Shutdown(ExitReason),
    /// The run state, because it changed or was asked for.
    State(String),
    /// Nothing for us.
    Other,
}

impl Qmp {
    /// Connects as soon as QEMU listens, and leaves the negotiation mode.
    ///
    /// # Errors
    /// When QEMU does not listen in time or says something else.
    pub async fn connect(path: &Path) -> anyhow::Result<Self> {
        let connecting = async {
            loop {
                if let Ok(stream) = UnixStream::connect(path).await {
                    return stream;
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        let stream = tokio::time::timeout(CONNECT, connecting)
            .await
            .context("QEMU opened no QMP socket in time")?;
        let (read, write) = stream.into_split();
        let mut qmp = Self {
            lines: BufReader::new(read.take(LINE_BYTES)).lines(),
            write,
        };
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    /// Sends a command; its answer comes among the events and is ignored.
    ///
    /// # Errors
    /// The socket's own, and when QEMU does not take it within 2 s: whoever asks must go on to what ends it.
    pub async fn execute(&mut self, command: &str) -> anyhow::Result<()> {
        let line = format!("{}\n", json!({ "execute": command }));
        let taken = tokio::time::timeout(TAKEN, self.write.write_all(line.as_bytes())).await;
        taken
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .with_context(|| format!("cannot send {command} to QEMU"))
    }

    /// The next event; `None` when QEMU has closed, or sends no line within its limit. Cancel safe.
    pub async fn next(&mut self) -> Option<QmpEvent> {
        let line = self.lines.next_line().await.ok()??;
        self.lines.get_mut().get_mut().set_limit(LINE_BYTES);
        Some(parse(&line))
    }
}

/// What a line says; nonsense is [`QmpEvent::Other`].
#[must_use]
pub fn parse(line: &str) -> QmpEvent {
    let Ok(value) = serde_json::from_str::<Value>(line) else {
        return QmpEvent::Other;
    };
    if let Some(status) = value["return"]["status"].as_str() {
        return QmpEvent::State(status.to_owned());
    }
    match value["event"].as_str() {
        Some("SHUTDOWN") => QmpEvent::Shutdown(match value["data"]["reason"].as_str() {
            Some("guest-shutdown") => ExitReason::PoweredOff,
            Some("guest-reset") => ExitReason::GuestRebooted,
            Some("guest-panic") => ExitReason::GuestPanicked,
            Some("host-qmp-quit" | "host-signal" | "host-ui") => ExitReason::Killed,
            _ => ExitReason::Crashed,
        }),
        Some("STOP") => QmpEvent::State("paused".to_owned()),
        Some("RESUME") => QmpEvent::State("running".to_owned()),
        Some("BLOCK_IO_ERROR") => QmpEvent::State("io-error".to_owned()),
        _ => QmpEvent::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_nonsense_is_ignored() {
        let shutdown =
            |reason: &str| parse(&json!({"event": "SHUTDOWN", "data": {"reason": reason}}).to_string());
        assert_eq!(
            shutdown("guest-reset"),
            QmpEvent::Shutdown(ExitReason::GuestRebooted)
        );
        assert_eq!(
            shutdown("guest-shutdown"),
            QmpEvent::Shutdown(ExitReason::PoweredOff)
        );
        assert_eq!(
            shutdown("new in QEMU 99"),
            QmpEvent::Shutdown(ExitReason::Crashed)
        );
        assert_eq!(parse(r#"{"event":"STOP"}"#), QmpEvent::State("paused".into()));
        let asked = r#"{"return": {"status": "io-error", "singlestep": false, "running": false}}"#;
        assert_eq!(parse(asked), QmpEvent::State("io-error".into()));
        for line in ["", "{", "[]", r#"{"return":{}}"#, r#"{"QMP":{}}"#] {
            assert_eq!(parse(line), QmpEvent::Other);
        }
    }

    /// A guest that runs for weeks is asked for its state a million times.
    #[tokio::test]
    async fn a_line_has_a_limit_and_the_boot_has_none() {
        const ANSWER: &[u8] = b"{\"return\": {\"status\": \"running\"}}\n";
        const ANSWERS: u64 = 3 * LINE_BYTES / ANSWER.len() as u64;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let qemu = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for _ in 0..ANSWERS {
                stream.write_all(ANSWER).await.unwrap();
            }
            let _ = stream.write_all(&vec![b'x'; 3 * LINE_BYTES as usize]).await;
        });
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let mut answers = 0;
        while let Some(QmpEvent::State(_)) = qmp.next().await {
            answers += 1;
        }
        assert_eq!(answers, ANSWERS);
        drop(qmp);
        qemu.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_qemu_that_takes_nothing_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let mut qmp = Qmp::connect(&path).await.unwrap();
        let _silent = listener.accept().await.unwrap();
        let patience = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                if let Err(error) = qmp.execute("query-status").await {
                    return error;
                }
            }
        });
        let error = format!("{:#}", patience.await.unwrap());
        assert!(error.contains("cannot send query-status"), "{error}");
    }
}
