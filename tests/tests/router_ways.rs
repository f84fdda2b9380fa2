//! Floor 2: guests are told when the way out of their host is another one, and of nothing less.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sovereign_tests::android::{Phone, Uplink, Vpn};
use sovereign_tests::lan::{GUEST, GUEST6, INTERNET, INTERNET6, Lan, Nic};
use sovereign_tests::net::{Agent, Filter, Hosted, Router as Seat, SOON, can_run};
use sovereign_tests::space::SILENCE;

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const BOTH: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2 host uplink=auto";
/// The guest has an address of each family: the kernel is asked with them.
const SIX: &str = "six=fd00:64::2";
const PHONE: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=auto";
/// Reconcile's `LASTING_MS`, with room for a slow machine: what takes longer than this is no flap.
const FLAP: Duration = Duration::from_millis(80);
/// Attempts at a flap that is short enough, on a busy machine.
const FLAPS: usize = 50;

/// The port of a flow that goes on, as WireGuard's.
const STEADY: u16 = 51_820;

/// What guests are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    v4: Option<u64>,
    v6: Option<u64>,
}

/// The next that the agent tells.
fn told(agent: &mut Agent) -> Result<Told> {
    let line = agent.expect("ways ")?;
    let mut numbers = line.split(' ').skip(1).map(|word| {
        let digits = word.strip_prefix("Some(").and_then(|word| word.strip_suffix(')'));
        digits.and_then(|digits| digits.parse().ok())
    });
    let mut next = || numbers.next().with_context(|| line.clone());
    Ok(Told {
        v4: next()?,
        v6: next()?,
    })
}

/// The next that is other than this: what is kept is told a moment later.
fn news(agent: &mut Agent, before: Told) -> Result<Told> {
    loop {
        let now = told(agent)?;
        if now != before {
            return Ok(now);
        }
    }
}

/// What it keeps of a family.
fn kept(hosted: &Hosted, family: &str) -> Result<(String, Option<u64>)> {
    let text = std::fs::read(hosted.record().with_file_name("ways.json"))?;
    let kept: Value = serde_json::from_slice(&text)?;
    let link = kept[family]["way"]["link"].as_str().unwrap_or_default();
    Ok((link.to_owned(), kept[family]["number"].as_u64()))
}

/// What was told first, which may be before the agent says that it is ready.
fn first(hosted: &Hosted, families: &[&str]) -> Result<Told> {
    let begun = Instant::now();
    loop {
        let number = |family| kept(hosted, family).ok().and_then(|(_, number)| number);
        if families.iter().all(|family| number(family).is_some()) {
            return Ok(Told {
                v4: number("v4"),
                v6: number("v6"),
            });
        }
        ensure!(begun.elapsed() < SOON, "nothing is kept of {families:?}");
        std::thread::sleep(Duration::from_millis(10)); // reads a file, waits for nothing else
    }
}

/// The next that is told is the way by this link, and nothing was told before it: another number would be kept.
fn leaves_by(agent: &mut Agent, hosted: &Hosted, before: Told, link: &str) -> Result<Told> {
    let now = news(agent, before)?;
    let begun = Instant::now();
    loop {
        let (kept_link, number) = kept(hosted, "v4")?;
        if kept_link == link {
            ensure!(number == now.v4, "{number:?} after {now:?}: told more than once");
            ensure!(now.v4 > before.v4, "{now:?} after {before:?}");
            return Ok(now);
        }
        ensure!(begun.elapsed() < SOON, "{now:?}, and kept is {kept_link}");
        std::thread::sleep(Duration::from_millis(10)); // reads a file, waits for nothing else
    }
}

/// Another way of IPv6, told after all that happened before it, and with IPv4 as it was.
fn nothing_happened(seat: &mut Seat, before: Told, gateway: &mut bool) -> Result<Told> {
    *gateway = !*gateway;
    let host = if *gateway { "77" } else { "1" };
    let line = format!("ip -6 route replace default via fd10:1::{host} dev eth0 proto ra metric 100");
    seat.lan.machine().sh(&line)?;
    let now = news(seat.agent()?, before)?;
    ensure!(
        now.v6 > before.v6 && now.v4 == before.v4,
        "{now:?} after {before:?}"
    );
    Ok(now)
}

/// The default route goes and comes back within some 20 ms, as DHCP clients have it.
fn flap(lan: &Lan) -> Result<bool> {
    let begun = Instant::now();
    lan.machine()
        .sh("ip route del default via 10.1.0.1 dev eth0; sleep 0.02; \
         ip route add default via 10.1.0.1 dev eth0 proto dhcp metric 100")?;
    Ok(begun.elapsed() < FLAP)
}

/// Runs a test on a machine that is not as before afterwards; nothing of the agent's is left there.
fn run(name: &str, want: &str, body: fn(&mut Seat) -> Result<()>) -> Result<()> {
    run_with(Filter::Owned, name, want, body)
}

fn run_with(filter: Filter, name: &str, want: &str, body: fn(&mut Seat) -> Result<()>) -> Result<()> {
    if !can_run(name) {
        return Ok(());
    }
    let (mut seat, _) = Seat::new(AGENT, filter, want, |_| Ok(()))?;
    if let Err(error) = body(&mut seat) {
        eprintln!("{}", seat.hosted.log());
        return Err(error);
    }
    let agent = seat.agent.take().context("no agent")?;
    seat.hosted.down(seat.lan.machine(), agent)?;
    let record = seat.hosted.record().with_file_name("ways.json");
    ensure!(!record.exists(), "what was told outlives those who heard it");
    Ok(())
}

fn small_things(seat: &mut Seat) -> Result<()> {
    let mut gateway = false;
    let mut now = first(&seat.hosted, &["v4", "v6"])?;
    let machine = |seat: &Seat, line: &str| seat.lan.machine().sh(line).map(drop);
    machine(
        seat,
        "ip address add 10.1.0.77/24 dev eth0; ip link set eth0 mtu 1400",
    )?;
    now = nothing_happened(seat, now, &mut gateway).context("an alias and an mtu")?;
    machine(
        seat,
        "ip address del 10.1.0.77/24 dev eth0; ip address add 10.77.0.2/24 dev eth0",
    )?;
    now = nothing_happened(seat, now, &mut gateway).context("another subnet")?;
    for attempt in 0.. {
        ensure!(attempt < FLAPS, "no flap was short enough on this machine");
        if flap(&seat.lan)? {
            now = nothing_happened(seat, now, &mut gateway).context("a flap")?;
            break;
        }
        // Too long for one: what it was is told, or nothing is.
        let host = if gateway { 1 } else { 77 };
        gateway = !gateway;
        let line = format!("ip -6 route replace default via fd10:1::{host} dev eth0 proto ra metric 100");
        machine(seat, &line)?;
        let last = now.v6;
        while now.v6 == last {
            now = told(seat.agent()?)?;
        }
    }
    // No way for IPv4 at all, and the same one again.
    machine(
        seat,
        "ip route del default via 10.2.0.1 dev eth1; ip route del default via 10.1.0.1 dev eth0",
    )?;
    now = nothing_happened(seat, now, &mut gateway).context("no way")?;
    machine(
        seat,
        "ip route add default via 10.1.0.1 dev eth0 metric 100; ip route add default via 10.2.0.1 dev eth1 metric 200",
    )?;
    nothing_happened(seat, now, &mut gateway)
        .context("back again")
        .map(drop)
}

#[test]
fn an_alias_an_mtu_a_flap_and_a_break_are_no_other_way() -> Result<()> {
    run("small_things", &format!("{BOTH} {SIX}"), small_things)
}

fn moves(seat: &mut Seat) -> Result<()> {
    let mut now = first(&seat.hosted, &["v4"])?;
    let Seat { lan, hosted, agent } = seat;
    let mut running = agent.take().context("no agent")?;
    for nic in [Nic::Eth1, Nic::Eth0] {
        lan.prefer(nic)?;
        now = leaves_by(&mut running, hosted, now, &nic.to_string())?;
    }
    // Another address of the same link, in one step of the kernel's: in between there would be another way.
    lan.machine()
        .sh("echo 1 > /proc/sys/net/ipv4/conf/eth0/promote_secondaries; \
         ip address add 10.1.0.3/24 dev eth0; ip address del 10.1.0.2/24 dev eth0")?;
    now = leaves_by(&mut running, hosted, now, "eth0").context("readdressed")?;
    // A VPN that takes all by two halves, which no default route shows.
    lan.machine().sh(
        "ip link add wg9 type veth peer name wg9-end; ip link set wg9-end up; ip link set wg9 up; \
         ip address add 10.8.0.2/32 dev wg9; ip route add 0.0.0.0/1 dev wg9; ip route add 128.0.0.0/1 dev wg9",
    )?;
    now = leaves_by(&mut running, hosted, now, "wg9").context("VPN on")?;
    lan.machine().sh("ip link del wg9")?;
    now = leaves_by(&mut running, hosted, now, "eth0").context("VPN off")?;

    // Another agent says the same, and what moved while none ran.
    running.restart_ends()?;
    let mut running = hosted.start(lan.machine(), PHONE)?;
    ensure!(told(&mut running)?.v4 == now.v4, "the same, at once");
    running.restart_ends()?;
    lan.prefer(Nic::Eth1)?;
    let mut running = hosted.start(lan.machine(), PHONE)?;
    ensure!(told(&mut running)?.v4 == now.v4, "what guests know");
    leaves_by(&mut running, hosted, now, "eth1").context("while no agent ran")?;
    *agent = Some(running);
    Ok(())
}

#[test]
fn another_uplink_address_or_vpn_is_another_way_for_every_agent() -> Result<()> {
    run("moves", PHONE, moves)
}

/// A program of the guest that always sends from the same port, and never stops for long.
struct Steady {
    socket: UdpSocket,
    to: SocketAddr,
}

impl Steady {
    fn new(lan: &Lan, to: SocketAddr) -> Result<Self> {
        let from: SocketAddr = match to {
            SocketAddr::V4(_) => (GUEST, STEADY).into(),
            SocketAddr::V6(_) => (GUEST6, STEADY).into(),
        };
        let socket = lan.guest().space().enter(|| UdpSocket::bind(from))??;
        socket.set_read_timeout(Some(SILENCE))?;
        Ok(Self { socket, to })
    }

    /// Sends on until the other side sees it under this address.
    fn is_seen_as(&self, address: &str) -> Result<()> {
        let (begun, sees) = (Instant::now(), format!("wan sees {address}:{STEADY}"));
        let mut bytes = [0; 256];
        loop {
            let sent = self.socket.send_to(b"hello", self.to); // no route, just now
            let answer = sent.and_then(|_| self.socket.recv(&mut bytes));
            let seen = answer.map(|length| String::from_utf8_lossy(&bytes[..length]).into_owned());
            if seen.as_ref().is_ok_and(|seen| *seen == sees) {
                return Ok(());
            }
            ensure!(begun.elapsed() < SOON, "not {sees}: {seen:?}");
            std::thread::sleep(Duration::from_millis(5)); // its pace
        }
    }
}

fn a_steady_flow_moves(seat: &mut Seat) -> Result<()> {
    first(&seat.hosted, &["v4", "v6"])?;
    let lan = &seat.lan;
    let outside: [SocketAddr; 2] = [(INTERNET, STEADY).into(), (INTERNET6, STEADY).into()];
    let serve = |at: SocketAddr| lan.internet().serve_udp(at, "wan"); // a wildcard's answers had another address
    let _services = [serve(outside[0])?, serve(outside[1])?];
    let flows = [Steady::new(lan, outside[0])?, Steady::new(lan, outside[1])?];
    let moved = |four: &str, six: &str| flows[0].is_seen_as(four).and_then(|()| flows[1].is_seen_as(six));
    moved("10.1.0.2", "[fd10:1::2]")?;
    // Of what leaves by another link the kernel forgets the translation by itself (nf_nat_oif_changed).
    lan.prefer(Nic::Eth1)?;
    moved("10.2.0.2", "[fd10:2::2]").context("another link")?;
    lan.prefer(Nic::Eth0)?;
    moved("10.1.0.2", "[fd10:1::2]").context("and back")?;
    // A router of another subnet on the same link, and a prefix that the provider takes back: it is deprecated, and stays.
    lan.internet().ip("address add 10.77.0.1/24 dev lan0\n")?;
    lan.machine().ip("address add 10.77.0.2/24 dev eth0\n\
         route replace default via 10.77.0.1 dev eth0 proto dhcp metric 100\n\
         -6 address add fd10:1::77/64 dev eth0 nodad\n\
         -6 address change fd10:1::2/64 dev eth0 preferred_lft 0 valid_lft forever\n")?;
    moved("10.77.0.2", "[fd10:1::77]").context("another address")
}

#[test]
fn datagrams_from_a_fixed_port_follow_to_another_uplink_or_address_with_tables() -> Result<()> {
    run("steady_tables", &format!("{BOTH} {SIX}"), a_steady_flow_moves)
}

#[test]
fn datagrams_from_a_fixed_port_follow_to_another_uplink_or_address_with_iptables() -> Result<()> {
    run_with(
        Filter::Iptables,
        "steady_iptables",
        &format!("{BOTH} {SIX}"),
        a_steady_flow_moves,
    )
}

fn on_a_phone(phone: &Phone, hosted: &Hosted, agent: &mut Agent) -> Result<()> {
    let mut now = first(hosted, &["v4"])?;
    phone.netd_restart()?; // all rules go and come back: no way is another one
    phone.set_vpn(Vpn::On)?;
    now = leaves_by(agent, hosted, now, "tun1").context("VPN on")?;
    phone.set_vpn(Vpn::Off)?;
    now = leaves_by(agent, hosted, now, "wlan0").context("VPN off")?;
    phone.switch_default(Uplink::Rmnet1)?;
    now = leaves_by(agent, hosted, now, "rmnet1").context("cellular")?;
    phone.switch_default(Uplink::Wlan0)?;
    leaves_by(agent, hosted, now, "wlan0")
        .context("Wi-Fi again")
        .map(drop)
}

#[test]
fn a_phones_vpn_and_its_other_network_are_other_ways() -> Result<()> {
    if !can_run("a_phones_vpn") {
        return Ok(());
    }
    let phone = Phone::new()?;
    let hosted = Hosted::new(AGENT, Filter::Iptables)?;
    let mut agent = hosted.up(phone.machine(), PHONE)?;
    phone.plug(&hosted.bridge())?;
    let outcome = on_a_phone(&phone, &hosted, &mut agent);
    if outcome.is_err() {
        eprintln!("{}", hosted.log());
    }
    outcome
}
