//! A host agent that runs a private network and nothing else, for the tests of it.
//!
//! It prints one line for each event and takes one command a line on standard input; at the
//! end of its input it ends like an agent that is restarted: the network stays.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use sovereign_host_agent::net::{Network, NetworkConfig, NetworkEvent, NetworkSpec};
use sovereign_host_agent::netns::{self, HelperConfig, Origin};
use sovereign_protocol::name::Name;
use sovereign_protocol::subnet::HostAddress;
use sovereign_tests::guard;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, watch};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [netns::VERB, _, "--socket", socket] => helper(socket, Origin::Fresh),
        [netns::VERB, _, "--socket", socket, "--passed"] => helper(socket, Origin::Passed),
        [netns::probe::VERB] => Ok(netns::probe::run()?),
        ["probe"] => probe(),
        ["probe", "--refuse-unshare"] => {
            guard::refuse_unshare();
            probe()
        }
        ["run", directory, instance, receive_buffer] => {
            let log = std::io::stderr;
            tracing_subscriber::fmt().with_writer(log).with_ansi(false).init();
            let config = HelperConfig {
                instance: Name::parse(instance)?,
                program: std::env::current_exe()?,
                socket: PathBuf::from(directory).join("netns.sock"),
            };
            let mut config = NetworkConfig::new(config);
            if receive_buffer != "-" {
                config.receive_buffer = receive_buffer.parse()?;
            }
            runtime()?.block_on(run(config))
        }
        _ => bail!("unknown words: {words:?}"),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("no runtime")
}

/// As `sovereign-host netns` does it.
fn helper(socket: &str, origin: Origin) -> Result<()> {
    rustix::process::setsid()?;
    netns::run(socket.as_ref(), origin)
}

fn probe() -> Result<()> {
    let program = std::env::current_exe()?;
    match runtime()?.block_on(netns::probe(&program)) {
        Ok(()) => say("works"),
        Err(failure) => say(&format!("{:?} {:?}: {failure}", failure.stage, failure.errno)),
    }
}

async fn run(config: NetworkConfig) -> Result<()> {
    let (specs, spec) = watch::channel(NetworkSpec::default());
    let (sender, mut events) = mpsc::channel(4);
    let input = rustix::io::dup(rustix::stdio::stdin())?;
    let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(input)?).lines();
    // The first line is the first spec: an agent knows what is wanted before it starts.
    let first = lines.next_line().await?.context("no first spec")?;
    specs.send_replace(parse(&first)?);
    let mut network = Some(Network::start(config, spec, sender));
    let mut open = BTreeMap::new();
    loop {
        tokio::select! {
            Some(event) = events.recv() => say(&shown(&event))?,
            line = lines.next_line() => {
                let Some(line) = line? else { return Ok(()) };
                let running = network.as_ref().context("the network was ended")?;
                match line.split_once(' ') {
                    Some(("open", guest)) => {
                        let guest = Name::parse(guest)?;
                        match running.open_tap(&guest).await {
                            Ok(tap) => { open.insert(guest.clone(), tap); say(&format!("opened {guest}"))?; }
                            Err(error) => say(&format!("not opened: {error}"))?,
                        }
                    }
                    Some(("close", guest)) => drop(open.remove(&Name::parse(guest)?)),
                    Some(("want", _)) => drop(specs.send_replace(parse(&line)?)),
                    None if line == "end" => {
                        open.clear();
                        let network = network.take().context("the network was ended")?;
                        match network.end().await {
                            Ok(()) => say("ended")?,
                            Err(failure) => say(&format!("not ended: {failure}"))?,
                        }
                    }
                    _ => bail!("unknown command: {line}"),
                }
            }
        }
    }
}

/// `want ADDRESS MTU GUEST...`
fn parse(line: &str) -> Result<NetworkSpec> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["want", address, mtu, guests @ ..] = &words[..] else {
        bail!("no spec: {line}");
    };
    Ok(NetworkSpec {
        addresses: address
            .split(',')
            .map(HostAddress::parse)
            .collect::<Result<_, _>>()?,
        mtu: mtu.parse()?,
        guests: guests.iter().map(|g| Name::parse(g)).collect::<Result<_, _>>()?,
    })
}

fn shown(event: &NetworkEvent) -> String {
    match event {
        NetworkEvent::Ready { guests } => {
            let guests: Vec<&str> = guests.iter().map(Name::as_str).collect();
            format!("ready {}", guests.join(" "))
        }
        NetworkEvent::Failed { step, evidence } => format!("failed {step}: {evidence}"),
        NetworkEvent::Carrier { guest, attached } => format!("carrier {guest} {attached}"),
        NetworkEvent::Repaired { what } => format!("repaired {}", what.join("; ")),
        NetworkEvent::Fight { what, repairs } => format!("fight {repairs} {}", what.join("; ")),
    }
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
