//! Floor 2: what the machine around a private network leaves by is the guests' way out, and what it gains they gain.
//!
//! ```text
//!  one  198.18.1.1 ── out1 198.18.1.2 ┐
//!       fd00:1::1          fd00:1::2  ├ [the machine] ═ pasta ═ [private] bridge 192.168.100.1 ── guest .9
//!  two  198.18.2.1 ── out2 198.18.2.2 ┘                                   fd00:9::1               ::9
//! ```
//! Both routers have the service's address, so who answers tells which way was taken.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use sovereign_reconcile::gain::GAINED_MS;
use sovereign_tests::net::{Agent, SOON, User, World, for_both, signal, until};
use sovereign_tests::space::{Service, Space};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24,fd00:9::1/64 1500 sql=192.168.100.2 uplink=auto";
/// The service, by either router.
const FOUR: &str = "198.18.99.1";
const SIX: &str = "fd00:99::1";
const PORT: u16 = 8080;
/// Reconcile's `LASTING_MS`, with room for a slow machine: what takes longer than this is no flap.
const FLAP: Duration = Duration::from_millis(80);
/// Attempts at a flap that is short enough, on a busy machine.
const FLAPS: usize = 50;
/// Moves to the other router and back.
const MOVES: usize = 12;
/// A route of IPv6 that serves nothing but to be seen.
const MARKER: &str = "ip -6 route replace default via";

/// What guests are told, IPv4 first.
type Told = [Option<u64>; 2];

/// A machine between two routers, its agent, and who looks out from inside.
struct Seat {
    world: World,
    machine: Space,
    _routers: [(Space, Service); 2],
}

impl Seat {
    /// Both links are up and have addresses; no way is there yet.
    fn new(user: User) -> Result<Self> {
        let world = World::new(Path::new(AGENT), user, "666")?;
        let machine = world.machine()?;
        let router = |number: u8, name: &str| -> Result<(Space, Service)> {
            let space = Space::new()?;
            machine.ip(&format!(
                "link add out{number} type veth peer name eth0 netns {}\nlink set out{number} up\n\
                 address add 198.18.{number}.2/24 dev out{number}\n",
                space.pid()
            ))?;
            space.ip(&format!(
                "link set eth0 up\naddress add 198.18.{number}.1/24 dev eth0\naddress add {FOUR}/32 dev lo\n\
                 address add fd00:{number}::1/64 dev eth0 nodad\naddress add {SIX}/128 dev lo nodad\n"
            ))?;
            let service = space.serve_tcp(at("::", PORT)?, name)?;
            Ok((space, service))
        };
        let routers = [router(1, "one")?, router(2, "two")?];
        Ok(Self {
            world,
            machine,
            _routers: routers,
        })
    }

    fn sh(&self, line: &str) -> Result<()> {
        self.machine.sh(line).map(drop).with_context(|| line.to_owned())
    }

    /// What is kept of a family: the link and the number.
    fn kept(&self, family: &str) -> Option<(String, u64)> {
        let text = std::fs::read(self.world.path("ways.json")).ok()?;
        let kept: Value = serde_json::from_slice(&text).ok()?;
        let link = kept[family]["way"]["link"].as_str()?;
        Some((link.to_owned(), kept[family]["number"].as_u64()?))
    }

    /// Waits until the way of a family is by this link, and what its number is.
    fn keeps(&self, family: &str, link: &str) -> Result<u64> {
        let begun = Instant::now();
        loop {
            let kept = self.kept(family);
            match kept {
                Some((by, number)) if by == link => return Ok(number),
                kept => ensure!(
                    begun.elapsed() < SOON,
                    "{family} by {link}: {kept:?} in {}",
                    std::fs::read_to_string(self.world.path("ways.json")).unwrap_or_default()
                ),
            }
            std::thread::sleep(Duration::from_millis(10)); // reads a file, waits for nothing else
        }
    }

    /// What guests were told, once that is all that is kept of both families.
    fn said(&self, agent: &mut Agent) -> Result<Told> {
        let begun = Instant::now();
        loop {
            let number = |family| self.kept(family).map(|(_, number)| number);
            let kept = [number("v4"), number("v6")];
            let last = agent.last("ways ");
            if let (Some(line), [Some(_), Some(_)]) = (&last, kept)
                && numbers(line)? == kept
            {
                return Ok(kept);
            }
            ensure!(begun.elapsed() < SOON, "{kept:?} is kept, and told was {last:?}");
            std::thread::sleep(Duration::from_millis(10)); // reads a file and a pipe
        }
    }

    /// The only change that guests hear of IPv4 after `before` is that it leaves by this link.
    fn moves(&self, agent: &mut Agent, before: Told, link: &str) -> Result<Told> {
        let now = news(agent, before)?;
        let number = self.keeps("v4", link)?;
        ensure!(
            Some(number) == now[0] && now[0] > before[0],
            "{number} is kept, {now:?} was told after {before:?}"
        );
        ensure!(now[1] == before[1], "{now:?} after {before:?}");
        Ok(now)
    }

    /// Another gateway of IPv6, told after all that happened before it, and with IPv4 as it was.
    fn nothing_happened(&self, agent: &mut Agent, before: Told, marker: &mut u16) -> Result<Told> {
        *marker += 1;
        self.sh(&format!("{MARKER} fd00:1::{marker} dev out1 metric 100"))?;
        let now = news(agent, before)?;
        ensure!(
            now[1] > before[1] && now[0] == before[0],
            "{now:?} after {before:?}"
        );
        Ok(now)
    }
}

fn at(address: &str, port: u16) -> Result<SocketAddr> {
    Ok(SocketAddr::new(address.parse::<IpAddr>()?, port))
}

/// The next that the agent tells.
fn told(agent: &mut Agent) -> Result<Told> {
    numbers(&agent.expect("ways ")?)
}

fn numbers(line: &str) -> Result<Told> {
    let mut numbers = line.split(' ').skip(1).map(|word| {
        let digits = word.strip_prefix("Some(").and_then(|word| word.strip_suffix(')'));
        digits.and_then(|digits| digits.parse().ok())
    });
    let mut next = || numbers.next().with_context(|| line.to_owned());
    Ok([next()?, next()?])
}

/// The next that is other than this.
fn news(agent: &mut Agent, before: Told) -> Result<Told> {
    loop {
        let now = told(agent)?;
        if now != before {
            return Ok(now);
        }
    }
}

/// Waits until the guest is answered by that router.
fn leaves_by(guest: &Space, to: &str, router: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        match guest.ask_tcp(at(to, PORT)?, Duration::from_secs(2)) {
            Ok(said) if said.starts_with(&format!("{router} sees")) => return Ok(()),
            last => ensure!(begun.elapsed() < SOON, "{to} by {router}: {last:?}"),
        }
        std::thread::sleep(Duration::from_millis(20)); // polls what may refuse at once
    }
}

/// The default route goes and comes back within some 20 ms, as DHCP clients have it; whether it was so quick.
fn flap(seat: &Seat) -> Result<bool> {
    let begun = Instant::now();
    seat.sh(
        "ip route del default via 198.18.1.1 dev out1 metric 100; sleep 0.02; \
         ip route add default via 198.18.1.1 dev out1 metric 100",
    )?;
    Ok(begun.elapsed() < FLAP)
}

#[test]
fn guests_hear_when_the_machine_around_leaves_by_another_way() -> Result<()> {
    for_both("guests_hear_when_the_machine_leaves_by_another_way", |user| {
        let seat = Seat::new(user)?;
        seat.sh(
            "ip -6 address add fd00:1::2/64 dev out1 nodad; ip route add default via 198.18.1.1 dev out1 metric 100; \
             ip route add default via 198.18.2.1 dev out2 metric 200; \
             ip -6 route add default via fd00:1::1 dev out1 metric 100",
        )?;
        let mut agent = seat.world.agent(WANT)?;
        agent.expect("works Filter")?;
        let mut now = seat.said(&mut agent)?;
        // Again and again: the kernel's news of the private namespace, which soon end, could have woken the agent.
        for round in 0..MOVES {
            seat.sh("ip route add default via 198.18.2.1 dev out2 metric 50")?;
            now = seat.moves(&mut agent, now, "out2").context(round)?;
            seat.sh("ip route del default via 198.18.2.1 dev out2 metric 50")?;
            now = seat.moves(&mut agent, now, "out1").context(round)?;
        }
        let guest = seat.world.guest()?;
        leaves_by(&guest, FOUR, "one")?;
        leaves_by(&guest, SIX, "one")?;
        let pasta = seat.world.pasta().context("no pasta")?;

        let mut marker = 100;
        seat.sh("ip address add 198.18.1.77/24 dev out1; ip link set out1 mtu 1400")?;
        now = seat
            .nothing_happened(&mut agent, now, &mut marker)
            .context("an alias and an mtu")?;
        for attempt in 0.. {
            ensure!(attempt < FLAPS, "no flap was short enough on this machine");
            if flap(&seat)? {
                now = seat
                    .nothing_happened(&mut agent, now, &mut marker)
                    .context("a flap")?;
                break;
            }
            // Too long for one: what it was is told, or nothing is, before the next begins.
            marker += 1;
            seat.sh(&format!("{MARKER} fd00:1::{marker} dev out1 metric 100"))?;
            let last = now[1];
            while now[1] == last {
                now = told(&mut agent)?;
            }
        }

        seat.sh("ip route add default via 198.18.2.1 dev out2 metric 50")?;
        now = seat.moves(&mut agent, now, "out2").context("another uplink")?;
        leaves_by(&guest, FOUR, "two")?;
        seat.sh("ip route del default via 198.18.2.1 dev out2 metric 50")?;
        now = seat.moves(&mut agent, now, "out1").context("and back")?;
        leaves_by(&guest, FOUR, "one")?;
        // As a phone or a VPN has it: by a rule about packets of the machine's own.
        seat.sh(
            "ip route add default via 198.18.2.1 dev out2 table 77; ip rule add pref 100 iif lo lookup 77",
        )?;
        now = seat.moves(&mut agent, now, "out2").context("by a rule")?;
        leaves_by(&guest, FOUR, "two")?;
        ensure!(seat.world.pasta() == Some(pasta), "pasta was started anew");

        // Another agent says the same, and what moved while none ran.
        agent.restart_ends()?;
        let mut agent = seat.world.agent(WANT)?;
        ensure!(told(&mut agent)? == now, "the same, at once");
        agent.restart_ends()?;
        seat.sh("ip rule del pref 100")?;
        let mut agent = seat.world.agent(WANT)?;
        ensure!(told(&mut agent)? == now, "what guests know");
        now = seat
            .moves(&mut agent, now, "out1")
            .context("while no agent ran")?;

        // pasta itself: what it knew is gone.
        ensure!(seat.world.pasta() == Some(pasta), "pasta was started anew");
        signal(pasta, Signal::KILL)?;
        let before = now;
        while now[0] <= before[0] || now[1] <= before[1] {
            now = told(&mut agent).context("pasta was killed")?;
        }
        leaves_by(&guest, FOUR, "one")?;

        drop(guest);
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()
    })
}

#[test]
fn a_family_that_the_machine_gains_is_its_guests_too() -> Result<()> {
    for_both("a_family_that_the_machine_gains", |user| {
        let seat = Seat::new(user)?;
        // With no way at all an older pasta ends at once, and a newer one waits.
        let mut agent = seat.world.agent(WANT)?;
        agent.expect("ready")?;
        seat.sh("ip route add default via 198.18.1.1 dev out1 metric 100")?;
        let guest = seat.world.guest()?;
        leaves_by(&guest, FOUR, "one")?;
        let four = seat.keeps("v4", "out1")?;

        seat.sh(
            "ip -6 address add fd00:1::2/64 dev out1 nodad; ip -6 route add default via fd00:1::1 dev out1 metric 100",
        )?;
        leaves_by(&guest, SIX, "one")?;
        leaves_by(&guest, FOUR, "one")?;
        let before = seat.said(&mut agent)?;
        ensure!(
            before[0] > Some(four),
            "what was opened by the one before it: {before:?} after {four}"
        );
        // One that waited for IPv4 was started anew for that, perhaps when IPv6 was there already.
        let line = agent.told("repaired pasta: start again")?;
        ensure!(line.contains(": this machine has IP"), "{line}");
        let pasta = until("no pasta", || seat.world.pasta())?;

        // It is lost, and comes back: that takes no other pasta.
        seat.sh("ip -6 route del default via fd00:1::1 dev out1 metric 100")?;
        seat.sh("ip route add default via 198.18.2.1 dev out2 metric 50")?;
        let now = seat.moves(&mut agent, before, "out2")?;
        seat.sh("ip -6 route add default via fd00:1::1 dev out1 metric 100")?;
        leaves_by(&guest, SIX, "one")?;
        seat.sh("ip route del default via 198.18.2.1 dev out2 metric 50")?;
        seat.moves(&mut agent, now, "out1")?;
        leaves_by(&guest, FOUR, "one")?;
        stays(&seat, pasta)?;

        drop(guest);
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()
    })
}

/// No other pasta is started while a family that came now would have lasted.
fn stays(seat: &Seat, pasta: u32) -> Result<()> {
    let lasts = Instant::now() + 2 * Duration::from_millis(GAINED_MS);
    while Instant::now() < lasts {
        let there = seat.world.pasta();
        ensure!(there == Some(pasta), "{there:?} in the place of {pasta}");
        std::thread::sleep(Duration::from_millis(20)); // polls for what must not come
    }
    Ok(())
}

#[test]
fn connections_are_not_ended_for_a_family_that_no_guest_has() -> Result<()> {
    for_both("a_family_that_no_guest_has", |user| {
        let seat = Seat::new(user)?;
        seat.sh("ip route add default via 198.18.1.1 dev out1 metric 100")?;
        let mut agent = seat
            .world
            .agent("want 192.168.100.1/24 1500 sql=192.168.100.2 uplink=auto")?;
        agent.expect("ready")?;
        let guest = seat.world.guest()?;
        leaves_by(&guest, FOUR, "one")?;
        let pasta = until("no pasta", || seat.world.pasta())?;
        seat.sh(
            "ip -6 address add fd00:1::2/64 dev out1 nodad; ip -6 route add default via fd00:1::1 dev out1 metric 100",
        )?;
        stays(&seat, pasta)?;
        leaves_by(&guest, FOUR, "one")?;
        drop(guest);
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()
    })
}

/// pasta speaks IPv6 under a link-local address of the machine's, which may come long after the route: no way changes then.
#[test]
fn a_family_is_gained_when_pasta_can_have_it() -> Result<()> {
    for_both("a_family_is_gained_when_pasta_can", |user| {
        let seat = Seat::new(user)?;
        seat.sh("ip link set out1 addrgenmode none; ip -6 address flush dev out1 scope link")?;
        seat.sh("ip route add default via 198.18.1.1 dev out1 metric 100")?;
        let mut agent = seat.world.agent(WANT)?;
        agent.expect("ready")?;
        let guest = seat.world.guest()?;
        leaves_by(&guest, FOUR, "one")?;
        let pasta = until("no pasta", || seat.world.pasta())?;
        seat.sh(
            "ip -6 address add fd00:1::2/64 dev out1 nodad; ip -6 route add default via fd00:1::1 dev out1 metric 100",
        )?;
        stays(&seat, pasta)?;
        seat.sh("ip -6 address add fe80::2/64 dev out1 nodad")?;
        let begun = Instant::now();
        until("no other pasta", || {
            seat.world.pasta().filter(|new| *new != pasta)
        })?;
        // Whatever else happens has everything looked at some time later.
        ensure!(begun.elapsed() < SOON / 2, "{:?}", begun.elapsed());
        leaves_by(&guest, SIX, "one")?;
        drop(guest);
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()
    })
}
