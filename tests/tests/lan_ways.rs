//! Floor 3: the machine of a real guest leaves by another uplink. What the guest had opened by the former one ends within
//! seconds, and what others opened to the guest goes on.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sovereign_tests::net::{can_run, inside};
use sovereign_tests::space::Space;
use sovereign_tests::{Instance, Who};

/// The forwarded port on the LAN.
const PORT: u16 = 15_998;
/// A machine beyond both uplinks.
const FAR: &str = "203.0.113.9:7777";
/// What takes a moment in an emulated guest.
const SOON: Duration = Duration::from_secs(30);
/// Beyond both links, with a service; `PID` is its namespace.
const LINKS: &str = "ip link add lan0 type veth peer name lan0 netns PID; ip link add lan1 type veth peer name lan1 netns PID; \
    ip address add 10.9.0.1/24 dev lan0; ip address add 10.8.0.1/24 dev lan1; ip link set lan0 up; ip link set lan1 up; \
    ip route add default via 10.9.0.2 dev lan0 metric 100; ip route add default via 10.8.0.2 dev lan1 metric 200";
const PREFER_LAN1: &str = "ip route replace default via 10.8.0.2 dev lan1 metric 50";

fn until(what: &str, mut is: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is()? {
        ensure!(begun.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(100)); // asks a program, waits for nothing else
    }
    Ok(())
}

/// A command in the guest that holds a connection to the far machine until it ends.
struct Held {
    command: Child,
    _stream: TcpStream,
    from: String,
}

impl Held {
    fn open(instance: &Instance, far: &TcpListener, name: &str) -> Result<Self> {
        let (host, port) = FAR.split_once(':').context("no port")?;
        let line = format!("mkfifo /tmp/{name}; busybox nc {host} {port} 0<>/tmp/{name}; echo ended");
        let mut command = instance.command(&["exec", "sql", "--", "sh", "-c", &line]);
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut held = None;
        until("nobody comes out of the guest", || {
            match far.accept() {
                Ok(accepted) => held = Some(accepted),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => bail!(error),
            }
            Ok(held.is_some())
        })?;
        let (mut stream, from) = held.context("accepted")?;
        // Debian 12's pasta ends by itself, after 24 s, what nobody ever said anything over.
        stream.write_all(b"\n")?;
        Ok(Self {
            command,
            _stream: stream,
            from: from.ip().to_string(),
        })
    }

    fn lives(&mut self) -> Result<bool> {
        Ok(self.command.try_wait()?.is_none())
    }

    /// Its holder hears of the end.
    fn ends(mut self) -> Result<()> {
        until("the connection of the former way goes on", || Ok(!self.lives()?))?;
        let output = self.command.wait_with_output()?;
        let (said, why) = (output.stdout, output.stderr);
        let said = String::from_utf8_lossy(&said);
        ensure!(said.trim() == "ended", "{said}{}", String::from_utf8_lossy(&why));
        Ok(())
    }
}

/// A log-in that PostgreSQL has answered, by way of the kernel's forward.
fn session(peer: &Space) -> Result<TcpStream> {
    let mut stream = peer.enter(|| TcpStream::connect(("10.9.0.1", PORT)))??;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"\0\0\0\x29\0\x03\0\0user\0postgres\0database\0postgres\0\0")?;
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    ensure!(head[0] == b'R', "no question for a password: {head:?}");
    let rest = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) - 4;
    stream.read_exact(&mut vec![0; rest as usize])?;
    Ok(stream)
}

/// The same session goes on: a wrong password is answered with an error.
fn goes_on(mut stream: TcpStream) -> Result<()> {
    stream.write_all(b"p\0\0\0\x08nay\0")?;
    let mut first = [0];
    stream
        .read_exact(&mut first)
        .context("the session of others has ended")?;
    ensure!(first == *b"E", "{first:?}");
    Ok(())
}

#[test]
fn connections_of_the_former_uplink_end_and_others_sessions_go_on() -> Result<()> {
    if !can_run("connections_of_the_former_uplink_end") {
        return Ok(());
    }
    Instance::run_by(Who::OurselvesOnAnotherMachine)?.go_through(another_uplink)
}

/// pasta's sockets on the machine are what ends; nothing inside moves.
#[test]
fn connections_of_a_private_network_end_when_the_machine_around_it_leaves_by_another_uplink() -> Result<()> {
    if !can_run("connections_of_a_private_network_end") {
        return Ok(());
    }
    Instance::run_by(Who::OurselvesOnAnotherMachine)?.go_through(another_uplink_outside)
}

fn another_uplink_outside(instance: &Instance) -> Result<()> {
    let (_peer, far) = beyond(instance)?;
    instance.configure_network("namespace = \"private\"\nuplink = \"pasta\"", "")?;
    instance.ok(&["up"])?;
    has_heard_of_a_way(instance)?;
    let held = Held::open(instance, &far, "before")?;
    ensure!(held.from == "10.9.0.1", "by {}", held.from);
    inside(instance.machine()?, PREFER_LAN1)?;
    held.ends()?;
    tells_of_it(instance)?;
    let mut after = Held::open(instance, &far, "after")?;
    ensure!(after.from == "10.8.0.1" && after.lives()?, "by {}", after.from);
    instance.wait("the guest is ready", SOON, |guest| guest["ready"] == "True")?;
    after.command.kill()?; // the client; the guest goes down with what is left
    after.command.wait()?;
    instance.ok(&["down"]).map(drop)
}

fn has_heard_of_a_way(instance: &Instance) -> Result<()> {
    let heard = || instance.ok(&["exec", "sql", "--", "cat", "/run/sovereign/ways.json"]);
    until("the guest has heard of no way", || {
        Ok(heard().is_ok_and(|text| text.contains("\"v4\"")))
    })
}

fn tells_of_it(instance: &Instance) -> Result<()> {
    until("no event tells of it", || {
        let events = instance.events()?;
        let ended = |event: &serde_json::Value| event.to_string().contains("ConnectionsEnded");
        Ok(events.iter().any(ended))
    })
}

/// Who is beyond both links, and what listens there.
fn beyond(instance: &Instance) -> Result<(Space, TcpListener)> {
    let peer = Space::new()?;
    let machine = instance.machine()?;
    inside(machine, &LINKS.replace("PID", &peer.pid().to_string()))?;
    peer.ip(
        "address add 10.9.0.2/24 dev lan0\naddress add 10.8.0.2/24 dev lan1\naddress add 203.0.113.9/32 dev lo\n\
         link set lan0 up\nlink set lan1 up\n",
    )?;
    let far = peer.enter(|| TcpListener::bind(FAR))??;
    far.set_nonblocking(true)?;
    Ok((peer, far))
}

fn another_uplink(instance: &Instance) -> Result<()> {
    let (peer, far) = beyond(instance)?;
    instance.write(&format!(
        "[network]\nnamespace = \"host\"\n\n[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n\n\
         [[guest.sql.forward]]\nname = \"lan\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:{PORT}\"\nvia = \"kernel\"\n\n\
         [guest.sql.service.postgres]\nkind = \"postgres\"\n"
    ))?;
    instance.ok(&["up"])?;
    has_heard_of_a_way(instance)?;
    let mut sessions = None;
    until("the forward does not answer", || {
        sessions = session(&peer).ok();
        Ok(sessions.is_some())
    })?;
    let theirs = sessions.context("answered")?;
    let mut held = Held::open(instance, &far, "before")?;
    ensure!(held.from == "10.9.0.1" && held.lives()?, "by {}", held.from);

    inside(instance.machine()?, PREFER_LAN1)?;
    held.ends()?;
    tells_of_it(instance)?;
    let mut after = Held::open(instance, &far, "after")?;
    ensure!(after.from == "10.8.0.1", "by {}", after.from);
    goes_on(theirs)?;
    ensure!(after.lives()?, "what was opened by the new way");
    instance.wait("the guest is ready", SOON, |guest| guest["ready"] == "True")?;
    after.command.kill()?; // the client; the guest goes down with what is left
    after.command.wait()?;
    instance.ok(&["down"]).map(drop)
}
