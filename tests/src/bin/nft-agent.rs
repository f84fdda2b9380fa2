//! nf_tables of the namespace it runs in, for the tests of it; and programs that ask and answer over the network.
//!
//! `run TAG` prints one line for each thing that happened and takes one command a line on standard input.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
use sovereign_host_agent::net::conntrack::{Conntrack, Stale};
use sovereign_host_agent::net::nft::{FAMILIES, Nft, NftError, Ownership};
use sovereign_protocol::port::{Ports, Transport};
use sovereign_protocol::subnet::Subnet;
use sovereign_reconcile::answers::{LINKS, MASK};
use sovereign_reconcile::filter::{Filter, PortForward, Sender, WayOut};
use sovereign_reconcile::names::{LinkName, Mac};
use sovereign_reconcile::nft::{Tables, differences, tables};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::unix::pipe;

/// Bytes for news that were not read.
const RECEIVE_BUFFER: usize = 1 << 20;
/// An answer comes within this time or never; TCP asks a second time after one second.
const PATIENCE: Duration = Duration::from_millis(1_800);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["run", tag] => runtime()?.block_on(run(tag, RECEIVE_BUFFER)),
        ["run", tag, receive_buffer] => runtime()?.block_on(run(tag, receive_buffer.parse()?)),
        ["measure", tag, rounds] => measure(tag, rounds.parse()?),
        ["answer", "tcp", port] => answer_tcp(port.parse()?),
        ["answer", "udp", port] => answer_udp(port.parse()?),
        ["ask", transport, to, port] => ask(transport, SocketAddr::new(to.parse()?, port.parse()?), None),
        ["ask", transport, to, port, "from", own] => {
            let to = SocketAddr::new(to.parse()?, port.parse()?);
            ask(transport, to, Some(own.parse()?))
        }
        _ => bail!("unknown words: {words:?}"),
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("no runtime")
}

fn open() -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags,
        Some(netlink::NETFILTER),
    )?)
}

fn speak(tag: &str, receive_buffer: usize) -> Result<Nft> {
    Ok(Nft::over(open()?, open()?, receive_buffer, tag)?)
}

async fn run(tag: &str, receive_buffer: usize) -> Result<()> {
    let mut nft = speak(tag, receive_buffer)?;
    let input = rustix::io::dup(rustix::stdio::stdin())?;
    let mut lines = BufReader::new(pipe::Receiver::from_owned_fd(input)?).lines();
    let mut filter = filter(tag)?;
    say(&format!("runs {}", nft.port()))?;
    loop {
        tokio::select! {
            news = nft.wait() => {
                news?;
                let changes = nft.take()?;
                let by = changes.by.map(|by| format!("{} {}", by.pid, by.name)).unwrap_or_default();
                if changes.lost {
                    say("lost")?;
                }
                if changes.ours {
                    say(&format!("changed by {by}"))?;
                }
            }
            line = lines.next_line() => {
                let Some(line) = line? else { return Ok(()) };
                let words: Vec<&str> = line.split(' ').collect();
                let outcome = command(&mut nft, &mut filter, &words).await?;
                say(&format!("{}: {outcome}", words[0]))?;
            }
        }
    }
}

async fn command(nft: &mut Nft, filter: &mut Filter, words: &[&str]) -> Result<String> {
    let done = |outcome: Result<(), NftError>| match outcome {
        Ok(()) => "done".to_owned(),
        Err(error) => failed(&error),
    };
    Ok(match words {
        ["want", parts @ ..] => {
            want(filter, parts)?;
            "done".to_owned()
        }
        ["probe"] => match nft.probe().await {
            Ok(able) => format!("{:?}", able.ownership),
            Err(unavailable) => format!("{unavailable} ({:?})", unavailable.errno),
        },
        ["own"] => {
            nft.set_ownership(Ownership::Owned);
            "done".to_owned()
        }
        ["replace"] => done(nft.replace(&tables(filter)?, &FAMILIES.into()).await),
        ["replace", times] => {
            let mut outcome = Ok(());
            for _ in 0..times.parse::<u32>()? {
                outcome = outcome.and(nft.replace(&tables(filter)?, &FAMILIES.into()).await);
            }
            done(outcome)
        }
        ["remove"] => done(nft.remove().await),
        ["adopt"] => done(nft.adopt().await),
        ["observe"] => match nft.observe().await {
            Ok(there) if there == tables(filter)? => "as wanted".to_owned(),
            Ok(there) => {
                let all = differences(&tables(filter)?, &there);
                all.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
            }
            Err(error) => failed(&error),
        },
        ["leftovers"] => {
            let found = nft.leftovers().await?;
            let shown = found
                .iter()
                .map(|one| format!("{} {} {:?}", one.family, one.tag, one.held));
            shown.collect::<Vec<_>>().join("; ")
        }
        ["collect"] => {
            let mut removed = 0;
            for leftover in nft.leftovers().await? {
                removed += usize::from(nft.remove_leftover(&leftover).await.is_ok());
            }
            format!("removed {removed}")
        }
        ["flush", guests @ ..] => {
            let stale = Stale {
                forwards: filter.forwards.clone(),
                guests: guests.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?,
                ..Stale::default()
            };
            let removed = Conntrack::over(open()?)?.flush(&stale).await?;
            format!("removed {removed}")
        }
        _ => bail!("unknown command: {words:?}"),
    })
}

fn failed(error: &NftError) -> String {
    let cause = std::error::Error::source(error);
    format!(
        "{error}{}",
        cause.map(|cause| format!(": {cause}")).unwrap_or_default()
    )
}

fn filter(tag: &str) -> Result<Filter> {
    Ok(Filter {
        tag: tag.to_owned(),
        bridge: LinkName::parse(tag.get(..15).unwrap_or(tag)).context("a tag that is no link's name")?,
        subnets: [Subnet::parse("10.9.0.0/24")?, Subnet::parse("fd00:9::/64")?].into(),
        way_out: WayOut::None,
        forwards: [].into(),
        answers: [].into(),
        senders: [].into(),
    })
}

/// `out`, `closed`, `no-forwards`, `forward=tcp,LISTEN or *,PORTS,TO,PORT`, `answers=LINK,...`, `sender=LINK,MAC,IP...`, `senders=COUNT`,
/// `forwards=COUNT`.
fn want(filter: &mut Filter, parts: &[&str]) -> Result<()> {
    for part in parts {
        let (what, rest) = part.split_once('=').unwrap_or((part, ""));
        let fields: Vec<&str> = rest.split(',').collect();
        match (what, &fields[..]) {
            ("out", _) => filter.way_out = WayOut::Masquerade,
            ("closed", _) => filter.way_out = WayOut::None,
            ("no-forwards", _) => filter.forwards.clear(),
            ("forward", [transport, listen, ports, to, to_port]) => {
                filter.forwards.insert(PortForward {
                    transport: transport_of(transport)?,
                    listen: (*listen != "*").then(|| listen.parse()).transpose()?,
                    ports: Ports::parse(ports)?,
                    to: to.parse()?,
                    to_port: to_port.parse()?,
                });
            }
            ("answers", links) => {
                for (link, number) in links.iter().zip(1..=LINKS) {
                    let link = LinkName::parse(link).context("no link's name")?;
                    filter.answers.insert(link, number << MASK.trailing_zeros());
                }
            }
            ("sender", [link, mac, addresses @ ..]) => {
                let mac: Vec<u8> = mac
                    .split(':')
                    .map(|byte| u8::from_str_radix(byte, 16))
                    .collect::<Result<_, _>>()?;
                let mac = Mac(mac.try_into().ok().context("no MAC")?);
                let addresses = addresses.iter().map(|ip| ip.parse()).collect::<Result<_, _>>()?;
                let link = LinkName::parse(link).context("no link")?;
                filter.senders.insert(link, Sender { mac, addresses });
            }
            ("senders", [count]) => senders(filter, count.parse()?)?,
            ("forwards", [count]) => forwards(filter, count.parse()?)?,
            _ => bail!("unknown part: {part}"),
        }
    }
    Ok(())
}

fn transport_of(text: &str) -> Result<Transport> {
    match text {
        "tcp" => Ok(Transport::Tcp),
        "udp" => Ok(Transport::Udp),
        _ => bail!("unknown transport: {text}"),
    }
}

fn senders(filter: &mut Filter, count: u16) -> Result<()> {
    for number in 0..count {
        let [high, low] = number.to_be_bytes();
        let link = LinkName::parse(&format!("svm-{number}")).context("no link")?;
        let addresses = [
            IpAddr::from([10, 9, high, low]),
            IpAddr::from([0xfd00, 9, 0, 0, 0, 0, 0, number]),
        ];
        let sender = Sender {
            mac: Mac([2, 0, 0, 0, high, low]),
            addresses: addresses.into(),
        };
        filter.senders.insert(link, sender);
    }
    Ok(())
}

fn forwards(filter: &mut Filter, count: u16) -> Result<()> {
    for number in 0..count {
        filter.forwards.insert(PortForward {
            transport: Transport::Tcp,
            listen: None,
            ports: Ports::one(10_000 + number).context("no port")?,
            to: [10, 9, 0, 2].into(),
            to_port: 80,
        });
    }
    Ok(())
}

/// Another thread removes the tables over a socket of its own, again and again; how long until all is there again.
fn measure(tag: &str, rounds: usize) -> Result<()> {
    let (go, deleter) = removes_when_told(tag)?;
    let runtime = runtime()?;
    let one = |name: &str, parts: &[&str], rounds: usize| -> Result<()> {
        let mut filter = filter(tag)?;
        want(&mut filter, parts)?;
        let wanted = tables(&filter)?;
        let figures = runtime.block_on(repairs(tag, &wanted, rounds, &go, &deleter))?;
        let rules: usize = wanted.iter().map(|table| table.rules()).sum();
        say(&format!("{name} ({rules} rules, {rounds} rounds): {figures}"))
    };
    one("one table", &["out", "forward=tcp,*,80,10.9.0.2,8080"], rounds)?;
    one("1,000 forwards", &["out", "forwards=1000"], rounds.div_ceil(10))?;
    one(
        "100 guests' senders",
        &["out", "senders=100"],
        rounds.div_ceil(10),
    )?;
    runtime.block_on(async {
        let mut nft = speak(tag, RECEIVE_BUFFER)?;
        nft.remove().await?;
        Ok(())
    })
}

/// When the removal began and when it was done.
type Removed = Result<(Instant, Instant), String>;

fn removes_when_told(tag: &str) -> Result<(mpsc::Sender<()>, mpsc::Receiver<Removed>)> {
    let (go, told) = mpsc::channel();
    let (sender, removed) = mpsc::channel();
    let tag = tag.to_owned();
    std::thread::spawn(move || {
        let all = || -> Result<()> {
            runtime()?.block_on(async {
                let mut nft = speak(&tag, RECEIVE_BUFFER)?;
                while told.recv().is_ok() {
                    let begun = Instant::now();
                    let outcome = nft.remove().await.map(|()| (begun, Instant::now()));
                    let _ = sender.send(outcome.map_err(|error| error.to_string()));
                }
                Ok(())
            })
        };
        if let Err(error) = all() {
            let _ = sender.send(Err(error.to_string())); // nobody may listen any more
        }
    });
    Ok((go, removed))
}

async fn repairs(
    tag: &str,
    wanted: &Tables,
    rounds: usize,
    go: &mpsc::Sender<()>,
    removed: &mpsc::Receiver<Removed>,
) -> Result<String> {
    let mut nft = speak(tag, RECEIVE_BUFFER)?;
    nft.replace(wanted, &FAMILIES.into()).await?;
    let (mut seen, mut whole, mut replaced, mut looked) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        go.send(())?;
        loop {
            nft.wait().await?;
            if nft.take()?.ours {
                break;
            }
        }
        let told = Instant::now();
        nft.replace(wanted, &FAMILIES.into()).await?;
        let done = Instant::now();
        let (begun, gone) = removed.recv()?.map_err(anyhow::Error::msg)?;
        seen.push(done.saturating_duration_since(gone));
        whole.push(done.saturating_duration_since(begun));
        replaced.push(done - told);
        let begun = Instant::now();
        anyhow::ensure!(nft.observe().await? == *wanted, "not as wanted");
        looked.push(begun.elapsed());
    }
    let mut shown = String::new();
    for (name, mut times) in [
        ("removal done -> replaced", seen),
        ("removal begun -> replaced", whole),
        ("replace", replaced),
        ("observe", looked),
    ] {
        times.sort();
        let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1e3;
        shown.push_str(&format!("{name} p50 {:.3} p99 {:.3} ms; ", at(50), at(99)));
    }
    Ok(shown)
}

fn answer_tcp(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    say("answers")?;
    loop {
        let (mut stream, from) = listener.accept()?;
        let _ = write!(stream, "{}", from.ip().to_canonical()); // the asker may be gone
    }
}

fn answer_udp(port: u16) -> Result<()> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    say("answers")?;
    loop {
        let (_, from) = socket.recv_from(&mut [0; 16])?;
        let _ = socket.send_to(from.ip().to_canonical().to_string().as_bytes(), from);
    }
}

fn ask(transport: &str, to: SocketAddr, own: Option<IpAddr>) -> Result<()> {
    let begun = Instant::now();
    let answer = match transport_of(transport)? {
        Transport::Tcp => ask_tcp(to, own),
        Transport::Udp => ask_udp(to, own),
    };
    match answer {
        Ok(text) => say(&format!("answered {text}")),
        Err(error) if [ErrorKind::TimedOut, ErrorKind::WouldBlock].contains(&error.kind()) => say("silence"),
        Err(error) => say(&format!(
            "refused {:?} {}",
            error.kind(),
            begun.elapsed().as_millis()
        )),
    }
}

fn ask_tcp(to: SocketAddr, own: Option<IpAddr>) -> std::io::Result<String> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if let Some(own) = own {
        rustix::net::bind(&socket, &SocketAddr::new(own, 0))?;
    }
    for timeout in [Timeout::Send, Timeout::Recv] {
        set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
    }
    rustix::net::connect(&socket, &to).map_err(|error| match error {
        rustix::io::Errno::INPROGRESS => ErrorKind::TimedOut.into(),
        error => std::io::Error::from(error),
    })?;
    let mut text = String::new();
    std::net::TcpStream::from(socket).read_to_string(&mut text)?;
    Ok(text)
}

fn ask_udp(to: SocketAddr, own: Option<IpAddr>) -> std::io::Result<String> {
    let any: IpAddr = if to.is_ipv4() {
        [0, 0, 0, 0].into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    // Always the same port: to the kernel it is the same conversation.
    let socket = UdpSocket::bind((own.unwrap_or(any), 40_000))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"?")?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
