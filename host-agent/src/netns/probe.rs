//! Whether a private namespace works here: tried in a process that is thrown away.

use std::io::Write;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::LinkBridge;
use tokio::io::AsyncReadExt;
use tokio::process::Child;

use super::contract::{At, LINE_BYTES, Report, Stage, StageFailure};
use super::{make, serve};
use crate::net::kernel::Kernel;
use crate::net::names::LinkName;
use crate::net::tun;

/// The word after the program's name that makes it run [`run`].
pub const VERB: &str = "netns-probe";
/// The whole try must end within this time.
const LIMIT: Duration = Duration::from_secs(10);
const BRIDGE: &str = "svprobe";
const TAP: &str = "svprobe-tap";

/// Tries every step that a private network needs, in a child: unshare, add a link, open
/// `/dev/net/tun`, make a TAP. Changes nothing that outlives the call. `program` is ours.
///
/// # Errors
/// The first step that failed.
pub async fn probe(program: &Path) -> Result<(), StageFailure> {
    let child = tokio::process::Command::new(program)
        .arg(VERB)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = child.at(Stage::Start)?;
    let report = tokio::time::timeout(LIMIT, async {
        let report = first_line(&mut child).await;
        let _ = child.wait().await; // its namespace is gone when we answer
        report
    });
    let late = || StageFailure::new(Stage::Answer, format!("the probe took over {LIMIT:?}"));
    report.await.map_err(|_| late())?.map(drop)
}

/// The report that a child writes as its first line.
pub(super) async fn first_line(child: &mut Child) -> Result<Vec<super::contract::Kind>, StageFailure> {
    let mut line = Vec::new();
    let mut out = child
        .stdout
        .take()
        .ok_or_else(|| StageFailure::new(Stage::Answer, "no pipe"))?;
    while line.last() != Some(&b'\n') && line.len() < LINE_BYTES {
        match out.read_u8().await {
            Ok(byte) => line.push(byte),
            Err(_) => {
                let status = child.wait().await.at(Stage::Start)?;
                let evidence = format!("it ended with {status} and said nothing");
                return Err(StageFailure::new(Stage::Start, evidence));
            }
        }
    }
    Report::parse(&line)
}

/// Runs in the child. The process must have one thread only.
///
/// # Errors
/// When the report could not be written.
pub fn run() -> std::io::Result<()> {
    let report = Report::from(steps().map(|()| Vec::new()));
    std::io::stdout().write_all(&report.line())
}

fn steps() -> Result<(), StageFailure> {
    let owner = make::unshare_network()?;
    serve::runtime()?.block_on(async {
        make::loopback_up().await?;
        add_bridge().await?;
        drop(make::open_set(owner)?);
        add_tap()
    })
}

async fn add_bridge() -> Result<(), StageFailure> {
    let message = RouteNetlinkMessage::NewLink(LinkBridge::new(BRIDGE).build());
    let mut kernel = Kernel::over(make::route_socket()?);
    let added = kernel.change(message, NLM_F_CREATE | NLM_F_EXCL).await;
    added.map_err(|error| make::refused(Stage::AddLink, error))
}

fn add_tap() -> Result<(), StageFailure> {
    let unattached = tun::open_unattached().at(Stage::OpenTun)?;
    let name = LinkName::parse(TAP).ok_or_else(|| StageFailure::new(Stage::AttachTun, TAP))?;
    tun::create(&unattached, &name).at(Stage::AttachTun)
}
