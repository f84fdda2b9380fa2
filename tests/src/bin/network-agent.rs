//! A host agent that runs a private network and nothing else, for the tests of it.
//!
//! It prints one line for each event and takes one command a line on standard input; at the
//! end of its input it ends like an agent that is restarted: the network stays.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags};
use rustix::io::FdFlags;
use sovereign_host_agent::net::names::Mac;
use sovereign_host_agent::net::{
    ExamineError, FilterChoice, Ground, Network, NetworkConfig, NetworkEvent, NetworkSpec, Place, Removal,
    RemoveMode, card, gc, look, pasta,
};
use sovereign_host_agent::netns::{self, HelperConfig, Origin};
use sovereign_protocol::link_name::LinkName;
use sovereign_protocol::name::Name;
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::spec::{Uplink, Vpn};
use sovereign_protocol::subnet::HostAddress;
use sovereign_reconcile::filter::PortForward;
use sovereign_reconcile::finding::{Cards, FindingsView};
use sovereign_tests::guard;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};

/// How long `hold` holds a TAP.
const MOMENT: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [netns::VERB, _, "--socket", socket] => helper(socket, Origin::Fresh),
        [netns::VERB, _, "--socket", socket, "--passed"] => helper(socket, Origin::Passed),
        [netns::probe::VERB] => Ok(netns::probe::run()?),
        ["probe"] => probe(),
        [
            pasta::VERB,
            _,
            "--record",
            record,
            "--parent",
            parent,
            "--attachment",
            attachment,
            "--",
            ..,
        ] => {
            let argv: Vec<OsString> = arguments[9..].iter().map(OsString::from).collect();
            pasta::launch(record.as_ref(), parent.parse()?, attachment.to_owned(), &argv)
                .map(|never| match never {})
        }
        ["gc-dry", instance] => {
            let instance = Name::parse(instance)?;
            let found = runtime()?.block_on(gc::collect(Some(&instance), Vec::new(), gc::Mode::Dry))?;
            found
                .removed
                .iter()
                .chain(&found.failed)
                .try_for_each(|line| say(line))
        }
        ["look", directory, instance, want] => {
            let instance = Name::parse(instance)?;
            let spec = Some(want)
                .filter(|want| *want != "nothing")
                .map(parse)
                .transpose()?;
            let record = PathBuf::from(directory).join("switched.json");
            let seen = runtime()?.block_on(look::look(&instance, spec.as_ref(), record))?;
            let plan = seen.plan(&instance, spec.as_ref())?;
            plan.to_string().lines().try_for_each(say)
        }
        ["probe", "--refuse-unshare"] => {
            guard::refuse_unshare();
            probe()
        }
        ["gc-all", states] => {
            let records = gc::dead_records(states.as_ref());
            let collected = runtime()?.block_on(gc::collect(None, records, gc::Mode::Remove))?;
            collected.removed.iter().try_for_each(|line| say(line))?;
            collected
                .left
                .iter()
                .try_for_each(|line| say(&format!("left {line}")))?;
            say(&format!("failed {:?}", collected.failed))
        }
        ["gc", directory, instance] => {
            let record = PathBuf::from(directory).join("switched.json");
            let instance = Name::parse(instance)?;
            let collected = gc::collect(Some(&instance), vec![record], gc::Mode::Remove);
            let collected = runtime()?.block_on(collected)?;
            collected.removed.iter().try_for_each(|line| say(line))?;
            say(&format!("failed {:?}", collected.failed))
        }
        ["run", directory, instance, receive_buffer] => {
            let log = std::io::stderr;
            tracing_subscriber::fmt().with_writer(log).with_ansi(false).init();
            let instance = Name::parse(instance)?;
            let directory = PathBuf::from(directory);
            let ground = match std::env::var_os("NETWORK_AGENT_HOST") {
                Some(_) => Ground::Host,
                None => Ground::Private(HelperConfig {
                    instance: instance.clone(),
                    program: std::env::current_exe()?,
                    socket: directory.join("netns.sock"),
                }),
            };
            let mut config = NetworkConfig::new(instance, ground, directory.join("switched.json"));
            config.filter = match std::env::var("NETWORK_AGENT_FILTER").as_deref() {
                Ok("plain") => FilterChoice::PlainNft,
                Ok("iptables") => FilterChoice::Iptables,
                _ => FilterChoice::Auto,
            };
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
    let (mut open, mut vmms) = (BTreeMap::new(), BTreeMap::new());
    // In the order in which they were asked; who takes events must not wait for an answer.
    let mut asked: Vec<Asked> = Vec::new();
    loop {
        tokio::select! {
            line = answer(asked.first_mut()) => {
                asked.remove(0);
                say(&line?)?;
            }
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
                    Some(("hold", guest)) => {
                        let tap = running.open_tap(&Name::parse(guest)?).await?;
                        say(&format!("holds {guest}"))?;
                        tokio::spawn(async move {
                            tokio::time::sleep(MOMENT).await; // as a VMM that is killed does
                            drop(tap);
                        });
                    }
                    Some(("arp", guest)) => {
                        let tap = running.open_tap(&Name::parse(guest)?).await?;
                        say(&tokio::task::spawn_blocking(|| ask_for_the_bridge(tap)).await??)?;
                    }
                    Some(("vmm", guest)) => {
                        let guest = Name::parse(guest)?;
                        let tap = running.open_tap(&guest).await?;
                        vmms.insert(guest.clone(), vmm(tap)?);
                        say(&format!("vmm {guest} runs"))?;
                    }
                    Some(("kill", guest)) => drop(vmms.remove(&Name::parse(guest)?)),
                    Some(("close", guest)) => drop(open.remove(&Name::parse(guest)?)),
                    Some(("findings", cards)) => {
                        asked.push(Asked::Findings(running.findings(known(cards)?)));
                    }
                    Some(("remove", names)) => {
                        let names = names.split(' ').map(str::to_owned).collect();
                        asked.push(Asked::Removal(running.remove_leftovers(names, RemoveMode::Remove)));
                    }
                    Some(("remove-dry", names)) => {
                        let names = names.split(' ').map(str::to_owned).collect();
                        asked.push(Asked::Removal(running.remove_leftovers(names, RemoveMode::Dry)));
                    }
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

/// A question to who looks at what others did.
enum Asked {
    Findings(oneshot::Receiver<Result<FindingsView, ExamineError>>),
    Removal(oneshot::Receiver<Result<Removal, ExamineError>>),
}

/// The answer to a question, as one line of JSON or with its error; for ever where there is none. Cancel safe.
async fn answer(asked: Option<&mut Asked>) -> Result<String> {
    match asked {
        Some(Asked::Findings(answer)) => Ok(match answer.await? {
            Ok(view) => format!("found {}", serde_json::to_string(&view)?),
            Err(error) => format!("not-looked {error}"),
        }),
        Some(Asked::Removal(answer)) => Ok(match answer.await? {
            Ok(removal) => format!("removal {}", serde_json::to_string(&removal)?),
            Err(error) => format!("not-removed {error}"),
        }),
        None => std::future::pending().await,
    }
}

/// `sql web=1400`: sql's VMM holds a card, and web keeps to an MTU.
fn known(cards: &str) -> Result<Cards> {
    let mut known = Cards::default();
    for word in cards.split(' ').filter(|word| !word.is_empty()) {
        match word.split_once('=') {
            Some((name, mtu)) => drop(known.mtu.insert(Name::parse(name)?, mtu.parse()?)),
            None => drop(known.held.insert(Name::parse(word)?)),
        }
    }
    Ok(known)
}

/// `want ADDRESS[,ADDRESS] MTU GUEST[=ADDRESS[,ADDRESS]]... [host] [uplink=auto|LINK,LINK] [vpn=block|bypass] [isolated]
/// [forward=tcp:8080:TO:80]... [resolver=ADDRESS]...`
fn parse(line: &str) -> Result<NetworkSpec> {
    let words: Vec<&str> = line.split(' ').collect();
    let ["want", address, mtu, rest @ ..] = &words[..] else {
        bail!("no spec: {line}");
    };
    let mut spec = NetworkSpec {
        addresses: address
            .split(',')
            .map(HostAddress::parse)
            .collect::<Result<_, _>>()?,
        mtu: mtu.parse()?,
        ..NetworkSpec::default()
    };
    for word in rest {
        match word.split_once('=') {
            None if *word == "host" => spec.place = Place::Host,
            None if *word == "isolated" => spec.isolated = true,
            Some(("uplink", "auto")) => spec.uplink = Uplink::Auto,
            Some(("uplink", names)) => {
                let name = |name| LinkName::parse(name).context("no name of a link");
                spec.uplink = Uplink::Named(names.split(',').map(name).collect::<Result<_>>()?);
            }
            Some(("forward", forward)) => drop(spec.forwards.insert(forward_of(forward)?)),
            Some(("resolver", address)) => drop(spec.resolvers.insert(address.parse()?)),
            Some(("vpn", "block")) => spec.vpn = Vpn::Block,
            Some(("vpn", "bypass")) => spec.vpn = Vpn::Bypass,
            Some((guest, address)) => {
                let addresses = address.split(',').map(str::parse).collect::<Result<_, _>>()?;
                spec.guests.insert(Name::parse(guest)?, addresses);
            }
            None => drop(spec.guests.insert(Name::parse(word)?, BTreeSet::new())),
        }
    }
    Ok(spec)
}

/// `udp:5000-5010:ADDRESS:PORT`: everywhere here, to that address.
fn forward_of(text: &str) -> Result<PortForward> {
    let (begin, to_port) = text.rsplit_once(':').context("no port to forward to")?; // an IPv6 address has colons
    let [transport, ports, to] = begin.splitn(3, ':').collect::<Vec<_>>()[..] else {
        bail!("no forward: {text}");
    };
    Ok(PortForward {
        transport: if transport == "udp" {
            Transport::Udp
        } else {
            Transport::Tcp
        },
        listen: None,
        ports: Ports::parse(ports)?,
        to: to.parse()?,
        to_port: to_port.parse()?,
    })
}

/// QEMU with a card on the TAP, its processor stopped; our copy of the TAP is closed on return.
fn vmm(tap: OwnedFd) -> Result<Child> {
    rustix::io::fcntl_setfd(&tap, FdFlags::empty())?;
    let card = card::arguments(tap.as_raw_fd(), Mac([2, 0, 0, 0, 0, 9]), 1500);
    let child = tokio::process::Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-S"])
        .args(["-machine", "q35,accel=tcg", "-m", "64M"])
        .args(card)
        .kill_on_drop(true)
        .spawn()?;
    Ok(child)
}

/// Asks for 192.168.100.1 as a guest would, until the bridge answers: frames pass.
fn ask_for_the_bridge(tap: OwnedFd) -> Result<String> {
    const VNET_HEADER: usize = 10;
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]); // to everybody
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]); // ARP: Ethernet, IPv4, request
    frame.extend([2, 0, 0, 0, 0, 9, 192, 168, 100, 9]);
    frame.extend([0, 0, 0, 0, 0, 0, 192, 168, 100, 1]);
    let begun = Instant::now();
    let pause = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    while begun.elapsed() < Duration::from_secs(10) {
        rustix::io::write(&tap, &frame)?;
        let mut ready = [PollFd::new(&tap, PollFlags::IN)];
        while rustix::event::poll(&mut ready, Some(&pause))? > 0 {
            let mut answer = [0; 2048];
            let length = rustix::io::read(&tap, &mut answer)?;
            let answer = &answer[VNET_HEADER..length];
            let is_reply = answer.get(12..14) == Some(&[8, 6]) && answer.get(20..22) == Some(&[0, 2]);
            if is_reply && answer.get(28..32) == Some(&[192, 168, 100, 1]) {
                return Ok(format!(
                    "arp answered after {:?} by {:02x?}",
                    begun.elapsed(),
                    &answer[22..28]
                ));
            }
        }
    }
    Ok("arp: no answer".to_owned())
}

fn shown(event: &NetworkEvent) -> String {
    match event {
        NetworkEvent::Ready { guests, lacking } => {
            let guests: Vec<&str> = guests.iter().map(Name::as_str).collect();
            let lacks = lacking
                .iter()
                .map(|(family, why)| format!(" without {family}: {why}"));
            format!("ready {}{}", guests.join(" "), lacks.collect::<String>())
        }
        NetworkEvent::Works {
            part,
            how,
            forwards,
            refused,
        } => {
            let how = how.as_deref().unwrap_or_default();
            let refused: Vec<String> = refused
                .iter()
                .map(|(forward, why)| format!(" refused {} {}: {why}", forward.transport, forward.ports))
                .collect();
            format!("works {part:?} {} {how}{}", forwards.len(), refused.concat())
        }
        NetworkEvent::Failed { part, step, evidence } => format!("failed {part:?} {step}: {evidence}"),
        NetworkEvent::Carrier { guest, attached } => format!("carrier {guest} {attached}"),
        NetworkEvent::Ways { ways } => format!("ways {:?} {:?}", ways.v4, ways.v6),
        NetworkEvent::Exits { exits, mtu } => format!("exits {exits:?} mtu {}", mtu.unwrap_or_default()),
        NetworkEvent::Repaired { what } => format!("repaired {}", what.join("; ")),
        NetworkEvent::Fight { what, repairs } => format!("fight {repairs} {}", what.join("; ")),
        NetworkEvent::Stopped { by } => {
            let by: Vec<String> = by
                .iter()
                .map(|stop| format!("{:?} {}: {}", stop.part, stop.code, stop.evidence))
                .collect();
            format!("stopped {}", by.join("; "))
        }
        NetworkEvent::Removed { what } => format!("removed {}", what.join("; ")),
    }
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
