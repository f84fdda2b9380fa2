//! PID 1 of a guest that is measured: the project's modules, the real agent's server, and raw vsock ports.
//!
//! `/init` of an initramfs that runs on the project's kernel; it mounts no disk. It opens AF_VSOCK and is
//! therefore for guests only: it refuses to be anything but PID 1.
//!
//! Ports: [`ECHO`] sends back what comes; [`SINK`] reads a length and that many bytes, then answers one byte;
//! [`SOURCE`] reads a length and sends that many bytes; the agent's server listens where the product has it.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::Path;

use anyhow::Context;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use sovereign_guest_agent::core::world::World;
use sovereign_guest_agent::engine;
use sovereign_guest_agent::facts::BootFacts;
use sovereign_guest_agent::server::Server;
use sovereign_protocol::boot::AGENT_PORT;
use sovereign_protocol::feed::Feed;
use sovereign_protocol::handshake::{BootKey, Identity};
use sovereign_protocol::limits::GUEST_EVENTS;
use sovereign_protocol::transport::vsock::Listener;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Sends back what comes.
const ECHO: u32 = 5000;
/// Takes bytes.
const SINK: u32 = 5001;
/// Gives bytes.
const SOURCE: u32 = 5002;
/// Bytes of one read or write.
const CHUNK: usize = 64 << 10;

fn main() {
    if std::process::id() != 1 {
        eprintln!("probe is PID 1 of a measured guest and nothing else: it opens AF_VSOCK");
        std::process::exit(2);
    }
    if let Err(error) = run() {
        eprintln!("probe: {error:#}"); // the end of PID 1 is the end of the guest
    }
}

fn run() -> anyhow::Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target); // the initramfs may have it
        mount(Some(kind), target, Some(kind), MsFlags::MS_NOSUID, None::<&str>)
            .with_context(|| format!("cannot mount {target}"))?;
    }
    load_modules()?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve())
}

/// As sovereign-init does, in the order that the image gives.
fn load_modules() -> anyhow::Result<()> {
    let order = fs::read_to_string("/modules.order").context("no list of modules")?;
    for line in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let name = Path::new(line).file_name().context("no module name")?;
        let file = File::open(Path::new("/modules").join(name)).with_context(|| line.to_owned())?;
        if let Err(error) = finit_module(file, &CString::default(), ModuleInitFlags::empty()) {
            eprintln!("probe: {line}: {error}"); // such as one that is built in
        }
    }
    Ok(())
}

async fn serve() -> anyhow::Result<()> {
    let identity = Identity {
        boot_id: "bench".to_owned(),
        key: BootKey::none(),
    };
    let (_engine, handle) = engine::new(World::new(Feed::new(1, GUEST_EVENTS), BootFacts::default()));
    tokio::spawn(port(SINK, |stream| async { sink(stream).await }));
    tokio::spawn(port(SOURCE, |stream| async { source(stream).await }));
    tokio::spawn(port(ECHO, |stream| async { echo(stream).await }));
    println!("probe: ready");
    Server::new(identity, handle).run_vsock(AGENT_PORT).await;
    Ok(())
}

async fn port<F>(number: u32, each: fn(Box<dyn Stream>) -> F)
where
    F: Future<Output = std::io::Result<()>> + Send + 'static,
{
    let mut listener = match Listener::bind(number) {
        Ok(listener) => listener,
        Err(error) => return eprintln!("probe: port {number}: {error}"),
    };
    loop {
        match listener.accept().await {
            Ok(stream) => drop(tokio::spawn(each(Box::new(stream)))),
            Err(error) => return eprintln!("probe: port {number}: {error}"),
        }
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn echo(mut stream: Box<dyn Stream>) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while let length @ 1.. = stream.read(&mut chunk).await? {
        stream.write_all(&chunk[..length]).await?;
    }
    Ok(())
}

async fn sink(mut stream: Box<dyn Stream>) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let mut left = stream.read_u64().await?;
        while left > 0 {
            let length = stream.read(&mut chunk).await?;
            if length == 0 {
                return Ok(());
            }
            left = left.saturating_sub(length as u64);
        }
        stream.write_u8(1).await?;
    }
}

async fn source(mut stream: Box<dyn Stream>) -> std::io::Result<()> {
    let chunk = vec![7; CHUNK];
    loop {
        let mut left = stream.read_u64().await?;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
            stream.write_all(&chunk[..length]).await?;
            left -= length as u64;
        }
    }
}
