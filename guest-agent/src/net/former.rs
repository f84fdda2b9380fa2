//! Ends the connections of a former way out, when the host says that the way is another one. What ends is decided in
//! `core::former`.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;
use sovereign_protocol::interface::InterfaceSpec;
use tokio::sync::{mpsc, watch};

use super::diag::{Diag, Listed};
use crate::core::former::{Ended, Ground, Heard, Moved, Socket, former};
use crate::core::world::Event;
use crate::engine::Request;
use crate::log;

/// Sockets that are ended before others have their turn: the agent has one thread.
const AT_ONCE: usize = 64;

/// Listens for ever; ends when nobody tells or nobody listens. `record` outlives the agent and is of one boot.
pub async fn run(
    record: PathBuf,
    mut told: watch::Receiver<Option<InterfaceSpec>>,
    requests: mpsc::Sender<Request>,
) {
    let mut heard = read(&record);
    while told.changed().await.is_ok() {
        let Some(interface) = told.borrow_and_update().clone() else {
            continue;
        };
        let before = heard.clone();
        let moved = heard.hear(&interface);
        if !moved.is_empty() {
            let ended = end(&before, &heard, moved).await;
            let verdict = ended.verdict();
            log::line(
                "the host's way out is another one",
                &[("what", &verdict.evidence)],
            );
            if requests
                .send(Request::Event(Event::FormerEnded(ended)))
                .await
                .is_err()
            {
                return;
            }
        }
        // Afterwards: an agent that ends in between finds the move again.
        if heard != before
            && let Err(error) = write(&record, &heard)
        {
            log::line(
                "what the host said of its way out is not kept",
                &[("error", &error)],
            );
        }
    }
}

/// Nothing was heard in this boot, if nothing can be read.
fn read(record: &Path) -> Heard {
    let text = fs::read(record).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn write(record: &Path, heard: &Heard) -> io::Result<()> {
    let new = record.with_extension("new");
    fs::write(&new, serde_json::to_vec(heard)?)?;
    fs::rename(new, record)
}

/// Ends what the move concerns; one that cannot be ended keeps no other.
async fn end(before: &Heard, now: &Heard, moved: Moved) -> Ended {
    let mut ended = Ended {
        moved,
        ended: 0,
        refused: Vec::new(),
    };
    let networks = [before.networks(), now.networks()].concat();
    let looked = Diag::open().and_then(|mut diag| Ok((diag.sockets()?, diag)));
    let (listed, mut diag) = match looked {
        Ok(looked) => looked,
        Err(error) => {
            ended
                .refused
                .push(format!("the connections cannot be listed: {error}"));
            return ended;
        }
    };
    let ground = Ground {
        networks,
        addresses: addresses(),
    };
    let sockets: Vec<Socket> = listed.iter().map(|listed| listed.socket).collect();
    let todo = former(&sockets, &ground, moved);
    for some in todo.chunks(AT_ONCE) {
        for listed in some.iter().filter_map(|at| listed.get(*at)) {
            match diag.destroy(listed) {
                Ok(was_there) => ended.ended += usize::from(was_there),
                Err(error) => ended.refused.push(refusal(listed, &error)),
            }
        }
        tokio::task::yield_now().await;
    }
    ended
}

fn refusal(listed: &Listed, error: &io::Error) -> String {
    let what = format!("{} to {}: {error}", listed.socket.local, listed.socket.remote);
    match error.raw_os_error() {
        Some(nix::libc::EOPNOTSUPP) => format!("{what}: the kernel lacks INET_DIAG_DESTROY"),
        _ => what,
    }
}

/// All addresses of this guest with their interfaces; none that cannot be told.
fn addresses() -> BTreeMap<IpAddr, u32> {
    let all = getifaddrs().into_iter().flatten();
    let address = |interface: nix::ifaddrs::InterfaceAddress| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        let v6 = address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip()));
        let index = if_nametoindex(interface.interface_name.as_str()).ok()?;
        Some((v4.or(v6)?, index))
    };
    all.filter_map(address).collect()
}
