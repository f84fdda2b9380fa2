//! `exec`: a command in a guest; input, outputs and exit code pass through.

use std::io::{self, Write};

use serde_json::json;
use sovereign_protocol::bulk::{self, Frame, LANE_ERR, LANE_MAIN, LANE_OUT, Open};
use sovereign_protocol::limits::BULK_CHUNK_BYTES;
use sovereign_protocol::name::Name;
use sovereign_protocol::operation::OperationId;
use sovereign_protocol::transport::BoxStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use crate::context::Context;
use crate::error::{CommandError, Kind};
use crate::link;

/// With `--json` each output is kept up to this many bytes.
const KEPT_BYTES: usize = 1 << 20;
/// What a shell reports for a command that SIGPIPE ended.
const PIPE_CLOSED: u8 = 141;

pub(super) async fn run(
    context: &Context,
    name: &Name,
    argv: Vec<String>,
    user: Option<String>,
) -> Result<u8, CommandError> {
    let operation = OperationId::generate().map_err(|error| {
        CommandError::new(Kind::Internal, "NoRandomness", "cannot name the command").because(error)
    })?;
    let open = Open::Guest {
        guest: name.clone(),
        open: Box::new(Open::Exec {
            operation,
            argv,
            user,
        }),
    };
    let stream = match link::open_bulk(&context.layout, &open).await {
        // It is the same operation: should it run already, it does not run twice.
        Err(error) if error.reason == link::LOST => link::open_bulk(&context.layout, &open).await?,
        opened => opened?,
    };
    context.when_interrupted(
        "interrupted; the connection to the command is closed",
        "sovereign status",
    );
    let mut sink = if context.json {
        Sink::Kept(Kept::default())
    } else {
        Sink::Through
    };
    let status = match converse(stream, tokio::io::stdin(), &mut sink).await {
        Ok(status) => status,
        Err(error) => {
            let end = how_it_ended(context, &open).await;
            let message = format!("the command in {name} was cut off; {end}");
            return Err(CommandError::new(Kind::Unreachable, "Aborted", message)
                .because(error)
                .in_layer("session"));
        }
    };
    if let Sink::Kept(kept) = sink {
        let evidence = format!("the command ended with exit code {status}");
        let more = [
            ("exit", json!(status)),
            ("stdout", json!(String::from_utf8_lossy(&kept.out))),
            ("stderr", json!(String::from_utf8_lossy(&kept.err))),
            ("truncated", json!(kept.truncated)),
        ];
        context.done_with("Exited", &evidence, "sovereign status", &more)?;
    }
    Ok(status)
}

/// What became of a command whose stream broke: its guest keeps the exit code for a while.
async fn how_it_ended(context: &Context, open: &Open) -> String {
    let asked = async {
        let stream = link::open_bulk(&context.layout, open).await.ok()?;
        let mut nothing = Sink::Kept(Kept::default());
        converse(stream, tokio::io::empty(), &mut nothing).await.ok()
    };
    match asked.await {
        Some(status) => format!("it ended with exit code {status}"),
        None => "how it ended is not known".to_owned(),
    }
}

/// Where outputs go.
enum Sink {
    /// To our own stdout and stderr.
    Through,
    /// Into the JSON object at the end.
    Kept(Kept),
}

#[derive(Debug, Default)]
struct Kept {
    out: Vec<u8>,
    err: Vec<u8>,
    truncated: bool,
}

impl Sink {
    fn take(&mut self, lane: u8, bytes: &[u8]) -> io::Result<()> {
        match (self, lane) {
            (Self::Through, LANE_OUT) => pass(io::stdout().lock(), bytes),
            (Self::Through, LANE_ERR) => pass(io::stderr().lock(), bytes),
            (Self::Kept(kept), LANE_OUT | LANE_ERR) => {
                let into = if lane == LANE_OUT {
                    &mut kept.out
                } else {
                    &mut kept.err
                };
                let room = KEPT_BYTES.saturating_sub(into.len()).min(bytes.len());
                into.extend_from_slice(&bytes[..room]);
                kept.truncated |= room < bytes.len();
                Ok(())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("output on lane {lane}"),
            )),
        }
    }
}

fn pass(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// Carries one command to its end; its exit code.
async fn converse(stream: BoxStream, input: impl AsyncRead + Unpin, sink: &mut Sink) -> io::Result<u8> {
    let (mut from, mut to) = tokio::io::split(stream);
    let outputs = async {
        loop {
            match bulk::read_frame(&mut from).await? {
                Frame::Data { lane, bytes } => match sink.take(lane, &bytes) {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(PIPE_CLOSED),
                    taken => taken?,
                },
                Frame::End { .. } => {}
                Frame::Exit { status } => return Ok(u8::try_from(status).unwrap_or(u8::MAX)),
                Frame::Abort { code } => return Err(io::Error::from_raw_os_error(code.cast_signed())),
            }
        }
    };
    let input = async {
        // A command that reads no input may close its lane; its exit code still comes.
        let _ = feed(input, &mut to).await;
        std::future::pending().await
    };
    tokio::select! {
        ended = outputs => ended,
        never = input => never,
    }
}

async fn feed(mut input: impl AsyncRead + Unpin, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut chunk = vec![0; BULK_CHUNK_BYTES];
    loop {
        let count = input.read(&mut chunk).await?;
        if count == 0 {
            return bulk::write_frame(to, &Frame::End { lane: LANE_MAIN }).await;
        }
        let bytes = chunk[..count].to_vec();
        bulk::write_frame(
            to,
            &Frame::Data {
                lane: LANE_MAIN,
                bytes,
            },
        )
        .await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn input_outputs_and_exit_code_pass() {
        let (near, mut far) = tokio::io::duplex(1 << 10);
        let mut sink = Sink::Kept(Kept::default());
        let guest = async {
            assert_eq!(
                bulk::read_frame(&mut far).await.unwrap(),
                Frame::Data {
                    lane: LANE_MAIN,
                    bytes: b"in".to_vec()
                }
            );
            assert_eq!(
                bulk::read_frame(&mut far).await.unwrap(),
                Frame::End { lane: LANE_MAIN }
            );
            for (lane, text) in [(LANE_OUT, "out"), (LANE_ERR, "err")] {
                bulk::write_frame(
                    &mut far,
                    &Frame::Data {
                        lane,
                        bytes: text.into(),
                    },
                )
                .await
                .unwrap();
                bulk::write_frame(&mut far, &Frame::End { lane }).await.unwrap();
            }
            bulk::write_frame(&mut far, &Frame::Exit { status: 7 })
                .await
                .unwrap();
        };
        let (status, ()) = tokio::join!(converse(Box::new(near), &b"in"[..], &mut sink), guest);
        let Sink::Kept(kept) = sink else { panic!() };
        assert_eq!(
            (status.unwrap(), kept.out, kept.err),
            (7, b"out".to_vec(), b"err".to_vec())
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_abort_and_a_silent_end_are_errors() {
        for abort in [true, false] {
            let (near, mut far) = tokio::io::duplex(1 << 10);
            if abort {
                bulk::write_frame(&mut far, &Frame::Abort { code: 104 })
                    .await
                    .unwrap();
            }
            drop(far);
            let error = converse(Box::new(near), tokio::io::empty(), &mut Sink::Through)
                .await
                .unwrap_err();
            assert_eq!(error.kind() == io::ErrorKind::ConnectionReset, abort);
        }
    }
}
