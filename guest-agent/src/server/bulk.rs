//! Bulk streams: a TCP port of the guest's loopback, or a command.

use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use sovereign_protocol::bulk::{
    Answer, Frame, LANE_ERR, LANE_MAIN, LANE_OUT, Open, carry, read_frame, read_message, write_frame,
    write_message,
};
use sovereign_protocol::limits::{BULK_CHUNK_BYTES, BULK_OPEN};
use sovereign_protocol::operation::{Begun, OperationId, Operations};
use sovereign_protocol::transport::BoxStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use crate::users::{self, User};
use crate::{clock, log, places};

/// Frames of a command's output that may wait for the stream.
const FRAMES: usize = 8;
/// After a command's end its outputs may stay open this long in processes that it left.
const DRAIN: Duration = Duration::from_secs(1);

/// Serves one stream to its end.
pub(super) async fn serve(mut stream: BoxStream, places: &Arc<Semaphore>, commands: &Commands) {
    let opened = timeout(BULK_OPEN, read_message::<Open, _>(&mut stream)).await;
    let open = match opened {
        Ok(Ok(open)) => open,
        Ok(Err(error)) => return log::line("a bulk stream opened badly", &[("error", &error)]),
        Err(_) => return log::line("a bulk stream did not say what it is for", &[]),
    };
    let Ok(_place) = places.clone().try_acquire_owned() else {
        return refuse(stream, "too many bulk streams".to_owned()).await;
    };
    match open {
        Open::Tcp { port } => tcp(stream, port).await,
        Open::Exec {
            operation,
            argv,
            user,
        } => match begin(commands, &operation) {
            Begun::Fresh => {
                let status = exec(stream, &argv, user.as_deref()).await;
                keep(commands, &operation, status);
            }
            Begun::Running => refuse(stream, format!("operation {operation} still runs")).await,
            Begun::Ended(status) => tell_end(stream, status).await,
        },
        Open::Guest { .. } => refuse(stream, "a guest has no guests".to_owned()).await,
    }
}

/// Commands that run, and the exit codes of the last ones.
pub(super) type Commands = Mutex<Operations<u32>>;

fn begin(commands: &Commands, operation: &OperationId) -> Begun<u32> {
    let mut commands = commands.lock().unwrap_or_else(PoisonError::into_inner);
    commands.begin(operation, clock::boot_ms())
}

fn keep(commands: &Commands, operation: &OperationId, status: Option<u32>) {
    let mut commands = commands.lock().unwrap_or_else(PoisonError::into_inner);
    match status {
        Some(status) => commands.ended(operation, status, clock::boot_ms()),
        None => commands.never_ran(operation),
    }
}

/// The command is not run again; its outputs went with its own stream.
async fn tell_end(mut stream: BoxStream, status: u32) {
    let told = async {
        write_message(&mut stream, &Answer::Opened).await?;
        write_frame(&mut stream, &Frame::Exit { status }).await?;
        stream.shutdown().await
    };
    let _ = timeout(BULK_OPEN, told).await; // a peer that is gone asks again
}

async fn refuse(mut stream: BoxStream, reason: String) {
    // A peer that is gone needs no reason.
    let _ = timeout(BULK_OPEN, write_message(&mut stream, &Answer::Refused { reason })).await;
}

async fn tcp(mut stream: BoxStream, port: u16) {
    let connected = timeout(BULK_OPEN, TcpStream::connect((Ipv4Addr::LOCALHOST, port))).await;
    let mut local = match connected {
        Ok(Ok(local)) => local,
        Ok(Err(error)) => return refuse(stream, format!("127.0.0.1:{port}: {error}")).await,
        Err(_) => {
            return refuse(
                stream,
                format!("127.0.0.1:{port}: no answer within {} s", BULK_OPEN.as_secs()),
            )
            .await;
        }
    };
    let _ = local.set_nodelay(true);
    if write_message(&mut stream, &Answer::Opened).await.is_err()
        || carry(&mut local, &mut stream).await.is_err()
    {
        let _ = local.set_zero_linger(); // the service sees a reset, not an end
    }
}

/// Runs a command to its end; its exit code, or `None` when it could not be begun.
async fn exec(mut stream: BoxStream, argv: &[String], user: Option<&str>) -> Option<u32> {
    let mut child = match spawn(argv, user) {
        Ok(child) => child,
        Err(reason) => {
            refuse(stream, reason).await;
            return None;
        }
    };
    let group = Group::of(&child);
    let carried = async {
        write_message(&mut stream, &Answer::Opened).await?;
        carry_command(stream, &mut child).await
    };
    if let Err(error) = carried.await {
        log::line("a command was cut off", &[("error", &error)]);
    }
    drop(group);
    Some(child.wait().await.map_or(255, exit_code))
}

fn spawn(argv: &[String], user: Option<&str>) -> Result<Child, String> {
    let [program, args @ ..] = argv else {
        return Err("argv is empty".to_owned());
    };
    let mut command = Command::new(program);
    command.args(args).env_clear().current_dir("/").process_group(0);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
        .env("PATH", search_path())
        .env("LANG", "C.UTF-8")
        .env("TERM", "dumb");
    if let Some(name) = user {
        let User { name, uid, gid, home } = users::lookup(name).map_err(|error| error.to_string())?;
        command.uid(uid).gid(gid).env("USER", name).env("HOME", home);
    } else {
        command.env("USER", "root").env("HOME", "/root");
    }
    command.spawn().map_err(|error| format!("{program}: {error}"))
}

/// The image's PostgreSQL programs are found too.
fn search_path() -> String {
    let versions = std::fs::read_dir(places::PG_VERSIONS)
        .into_iter()
        .flatten()
        .flatten();
    let mut path = places::PATH.to_owned();
    for version in versions {
        path = format!("{}/bin:{path}", version.path().display());
    }
    path
}

/// A command's process group; what is left of it when this is dropped is killed.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        Self(
            child
                .id()
                .and_then(|pid| i32::try_from(pid).ok())
                .map(Pid::from_raw),
        )
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL); // ESRCH: all of it has ended
        }
    }
}

async fn carry_command(stream: BoxStream, child: &mut Child) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(stream);
    let (frames, queue) = mpsc::channel(FRAMES);
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // Losing the input arm is the command's end, losing the output arm is the stream's.
    tokio::select! {
        sent = output(writer, queue, run_to_end(child, stdout, stderr, frames)) => sent,
        failed = input(reader, stdin) => failed,
    }
}

/// Writes frames until all are sent; `run` makes them.
async fn output(
    mut writer: WriteHalf<BoxStream>,
    mut queue: mpsc::Receiver<Frame>,
    run: impl Future<Output = ()>,
) -> io::Result<()> {
    let send = async {
        while let Some(frame) = queue.recv().await {
            write_frame(&mut writer, &frame).await?;
        }
        writer.shutdown().await
    };
    let (sent, ()) = tokio::join!(send, run);
    sent
}

/// Both outputs and then the exit status, as frames.
async fn run_to_end(
    child: &mut Child,
    stdout: Option<impl AsyncRead + Unpin>,
    stderr: Option<impl AsyncRead + Unpin>,
    frames: mpsc::Sender<Frame>,
) {
    let outputs = async {
        tokio::join!(lane(stdout, LANE_OUT, &frames), lane(stderr, LANE_ERR, &frames));
    };
    tokio::pin!(outputs);
    let status = tokio::select! {
        () = &mut outputs => child.wait().await,
        status = child.wait() => {
            // What it wrote is still in the pipes; what its heirs write later is theirs.
            let _ = timeout(DRAIN, outputs).await;
            status
        }
    };
    let status = status.map_or(255, exit_code);
    let _ = frames.send(Frame::Exit { status }).await;
}

async fn lane(output: Option<impl AsyncRead + Unpin>, lane: u8, frames: &mpsc::Sender<Frame>) {
    let Some(mut output) = output else { return };
    let mut chunk = vec![0; BULK_CHUNK_BYTES];
    while let Ok(length @ 1..) = output.read(&mut chunk).await {
        let bytes = chunk[..length].to_vec();
        if frames.send(Frame::Data { lane, bytes }).await.is_err() {
            return; // the stream is gone
        }
    }
    let _ = frames.send(Frame::End { lane }).await;
}

/// Feeds the command; returns only when the peer ended or misbehaved.
async fn input(mut reader: ReadHalf<BoxStream>, mut stdin: Option<ChildStdin>) -> io::Result<()> {
    loop {
        match read_frame(&mut reader).await? {
            Frame::Data {
                lane: LANE_MAIN,
                bytes,
            } => {
                if let Some(open) = &mut stdin
                    && open.write_all(&bytes).await.is_err()
                {
                    stdin = None; // the command reads no more; its exit is what counts
                }
            }
            Frame::End { lane: LANE_MAIN } => stdin = None,
            Frame::Abort { code } => {
                return Err(io::Error::other(format!("the peer aborted with errno {code}")));
            }
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a frame of another lane in a command's input",
                ));
            }
        }
    }
}

fn exit_code(status: ExitStatus) -> u32 {
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    code.unsigned_abs()
}
