//! One namespace with one keeper in it: takes a number of rounds a line, and prints their times.

use std::io::{BufRead, Write};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use netlink_sys::protocols::NETLINK_NETFILTER;
use sovereign_host_agent::net::names::Mark;
use sovereign_host_agent::net::nft::{Nft, messages_of};
use sovereign_protocol::name::Name;

use super::agent::{Agent, INSTANCE};
use super::change::{Change, INET, Observer};
use super::{ground, keepers};

/// Guests in the namespace.
const GUESTS: usize = 2;
/// Between two rounds: the keeper has looked at what it did, and sleeps again.
const REST: Duration = Duration::from_millis(3);

/// Runs `KEEPER CHANGE [loaded]`.
pub(super) fn run(words: &[&str]) -> Result<()> {
    let directory = tempfile::tempdir()?;
    // Where the host agent's log goes, too.
    let log = std::fs::File::create(directory.path().join("log"))?;
    tracing_subscriber::fmt().with_ansi(false).with_writer(log).init();
    ground::uplink()?;
    let [keeper, change, load @ ..] = words else {
        bail!("unknown words: {words:?}");
    };
    if load == ["loaded"] {
        ground::load()?;
    }
    let mut agent = Agent::start(directory.path(), ground::spec(GUESTS)?, |_| ())?;
    agent.settle()?;
    let tag = Mark::of(&Name::parse(INSTANCE)?).prefix;
    let change = || match *change {
        "rule" => Change::rule(),
        _ => Ok(Change::Table(INET, tag.clone())),
    };
    if *keeper == "ours" {
        let mut observer = Observer::of(change()?)?;
        return serve(|| {
            agent.hear();
            observer.round()
        });
    }
    agent.end()?; // all that it made stays
    let mut script = None;
    let mut observed = change()?;
    match *keeper {
        "bare" => keepers::bare(change()?, &tables(&tag)?)?,
        "script" => script = Some(keepers::script(&observed, directory.path())?),
        "iptables" => {
            let (change, running) = keepers::iptables(directory.path())?;
            (observed, script) = (change, Some(running));
        }
        _ => bail!("no keeper {keeper}"),
    }
    let mut observer = Observer::of(observed)?;
    serve(|| observer.round())?;
    drop(script);
    Ok(())
}

/// What our agent made, as the messages that make it.
fn tables(tag: &str) -> Result<Vec<u8>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let tables = runtime.block_on(async {
        let mut nft = Nft::over(raw_socket()?, raw_socket()?, 1 << 20, tag)?;
        anyhow::Ok(nft.observe().await?)
    })?;
    let inet = tables.into_iter().filter(|table| table.family.number() == INET);
    messages_of(&inet.collect(), 1).context("too long for a message")
}

fn raw_socket() -> Result<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};
    let protocol = u32::try_from(NETLINK_NETFILTER)?;
    let protocol = std::num::NonZeroU32::new(protocol).map(Protocol::from_raw);
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?)
}

/// Does as many rounds as each line of input says, until it ends.
fn serve(mut round: impl FnMut() -> Result<Duration>) -> Result<()> {
    for _ in 0..5 {
        round()?; // caches, modules
        std::thread::sleep(REST);
    }
    say(&Vec::new())?;
    for line in std::io::stdin().lock().lines() {
        let mut times = Vec::new();
        for _ in 0..line?.parse()? {
            times.push(round()?.as_secs_f64() * 1e6);
            std::thread::sleep(REST);
        }
        say(&times)?;
    }
    Ok(())
}

fn say(times: &Vec<f64>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(times)?)?;
    Ok(out.flush()?)
}
