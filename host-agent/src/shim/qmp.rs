//! QEMU's machine protocol: as much of it as a shim needs.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::codec::{FramedRead, LinesCodec};

use super::contract::ExitReason;

/// QEMU opens its socket within this time.
const CONNECT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);
/// The longest line: events and the answers to what we ask are small. There is no other limit, as a boot may last years.
const LINE_BYTES: usize = 64 << 10;

/// The one client that QMP admits.
#[derive(Debug)]
pub struct Qmp {
    lines: FramedRead<OwnedReadHalf, LinesCodec>,
    write: OwnedWriteHalf,
}

/// The run state of a machine that waits for room on the host: of its own, QEMU stops for ENOSPC only (`werror=enospc`).
pub const IO_ERROR: &str = "io-error";

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
        let mut qmp = Self::over(stream);
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    fn over(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self {
            lines: FramedRead::new(read, LinesCodec::new_with_max_length(LINE_BYTES)),
            write,
        }
    }

    /// Sends a command; its answer comes among the events and is ignored.
    ///
    /// # Errors
    /// The socket's own.
    pub async fn execute(&mut self, command: &str) -> anyhow::Result<()> {
        let line = format!("{}\n", json!({ "execute": command }));
        self.write
            .write_all(line.as_bytes())
            .await
            .with_context(|| format!("cannot send {command} to QEMU"))
    }

    /// The next event; `None` when QEMU has closed, or sends no line within its limit. Cancel safe.
    pub async fn next(&mut self) -> Option<QmpEvent> {
        let line = self.lines.next().await?.ok()?;
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
        Some("BLOCK_IO_ERROR") if value["data"]["action"] == "stop" => QmpEvent::State(IO_ERROR.to_owned()),
        _ => QmpEvent::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two seconds apart, answers add up: a boot that lasts must not run into a limit.
    #[tokio::test]
    async fn lines_have_a_limit_and_their_number_has_none() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let mut qmp = Qmp::over(near);
        let speak = async {
            let mut line = vec![b' '; LINE_BYTES - 1];
            line.push(b'\n');
            for _ in 0..1_100 {
                far.write_all(&line).await.unwrap(); // 69 MiB
            }
            far.write_all(&vec![b'x'; 2 * LINE_BYTES]).await.unwrap();
        };
        let hear = async {
            let mut heard = 0;
            while let Some(event) = qmp.next().await {
                assert_eq!(event, QmpEvent::Other);
                heard += 1;
            }
            heard
        };
        let ((), heard) = tokio::join!(speak, hear);
        assert_eq!(heard, 1_100);
    }

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
        let error =
            |action: &str| json!({"event": "BLOCK_IO_ERROR", "data": {"action": action, "nospace": true}});
        assert_eq!(
            parse(&error("stop").to_string()),
            QmpEvent::State(IO_ERROR.into())
        );
        assert_eq!(parse(&error("report").to_string()), QmpEvent::Other, "it runs on");
        for line in ["", "{", "[]", r#"{"return":{}}"#, r#"{"QMP":{}}"#] {
            assert_eq!(parse(line), QmpEvent::Other);
        }
    }
}
