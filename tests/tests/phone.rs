//! Floor 2: the lab's scenarios of Android's routing (S5 to S9) with our agent in the place of hand-made rules.
//!
//! After each of them the guest works again without anybody's help, and at the end nothing of the phone is as it was
//! not before.

use std::net::UdpSocket;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sovereign_tests::android::{APP, CHOSE_CELLULAR, Phone, Uplink, Vpn, Way};
use sovereign_tests::net::{Agent, Filter, Hosted, can_run};
use sovereign_tests::space::{ANSWER, SILENCE};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=auto";

/// A phone with an agent, and its guest.
struct Seat {
    phone: Phone,
    hosted: Hosted,
    agent: Option<Agent>,
    filter: Filter,
    want: String,
    bridge: String,
}

impl Seat {
    fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("no agent")
    }

    /// The guest works wherever its packets leave.
    fn works(&self) -> Result<()> {
        self.phone.answers(Way::PingOut)?;
        self.phone.answers(Way::TcpOut)?;
        self.phone.answers(Way::TcpIn)
    }

    /// It works soon, and the internet sees it come from here.
    fn leaves_by(&self, address: &str) -> Result<()> {
        let (until, sees) = (Instant::now() + ANSWER, format!("sees {address}:"));
        loop {
            let seen = self
                .phone
                .tcp_out(SILENCE)
                .unwrap_or_else(|error| error.to_string());
            if seen.contains(&sees) {
                return self.works();
            }
            ensure!(Instant::now() < until, "not by {address}: {seen}");
        }
    }

    /// An app that chose nothing, and one that chose cellular.
    fn others_are_where_they_were(&self, default: &str) -> Result<()> {
        let (app, chose) = (self.phone.route_of(APP)?, self.phone.route_of(CHOSE_CELLULAR)?);
        ensure!(app == default, "an app's packets leave by {app}");
        ensure!(chose == "rmnet1", "those of who chose cellular leave by {chose}");
        Ok(())
    }

    fn restart_agent(&mut self, meanwhile: impl FnOnce(&Phone) -> Result<()>) -> Result<()> {
        let agent = self.agent.take().context("no agent")?;
        agent.restart_ends()?;
        meanwhile(&self.phone)?;
        self.agent = Some(self.hosted.up(self.phone.machine(), &self.want)?);
        Ok(())
    }

    /// netd starts anew. Our tables cannot override its DROP (see [`netds_drop_is_stronger_than_our_tables`]), so a
    /// phone with nf_tables is one whose netd has none.
    fn netd_restart(&self) -> Result<()> {
        self.phone.netd_restart()?;
        without_drop(&self.phone, self.filter)
    }
}

fn without_drop(phone: &Phone, filter: Filter) -> Result<()> {
    if filter == Filter::Iptables {
        return Ok(());
    }
    phone
        .machine()
        .sh("iptables -D tetherctrl_FORWARD -j DROP")
        .map(drop)
}

const WLAN: &str = "10.0.0.5";
const CELL: &str = "10.64.0.5";
const TUNNEL: &str = "10.99.0.2";

/// Runs a scenario on a phone: the agent is started before it and takes everything away after it.
fn scenario(name: &str, filter: Filter, words: &str, body: impl Fn(&mut Seat) -> Result<()>) -> Result<()> {
    if !can_run(name) {
        return Ok(());
    }
    let phone = Phone::new()?;
    without_drop(&phone, filter)?;
    // netd has used all tables of both families, and the kernel never takes away one that was used.
    phone
        .machine()
        .sh("for table in filter nat mangle; do ip6tables-save -t $table; done")?;
    let hosted = Hosted::new(AGENT, filter)?;
    let before = phone.foreign_state(|_| false)?;
    let want = format!("{WANT} {words}").trim_end().to_owned();
    let agent = Some(hosted.up(phone.machine(), &want)?);
    let bridge = hosted.bridge();
    phone.plug(&bridge)?;
    let mut seat = Seat {
        phone,
        hosted,
        agent,
        bridge,
        filter,
        want,
    };
    let outcome = body(&mut seat);
    let Seat {
        phone, hosted, agent, ..
    } = seat;
    if outcome.is_err() {
        eprintln!(
            "{}\n{}",
            hosted.log(),
            phone.machine().sh("ip rule; nft list ruleset; iptables-save")?
        );
        return outcome;
    }
    hosted.down(phone.machine(), agent.context("no agent")?)?;
    let left = before.difference(&phone.foreign_state(|_| false)?);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

fn s5(seat: &mut Seat) -> Result<()> {
    seat.leaves_by(WLAN)?;
    seat.others_are_where_they_were("wlan0")?;
    ensure!(seat.phone.route_out(&seat.bridge)? == "wlan0");
    Ok(())
}

/// With a VPN that takes all apps, by default the guest's packets go through it as well.
fn s5v(seat: &mut Seat) -> Result<()> {
    seat.leaves_by(WLAN)?;
    for _ in 0..2 {
        seat.phone.set_vpn(Vpn::On)?;
        seat.leaves_by(TUNNEL)?;
        seat.others_are_where_they_were("tun1")?;
        seat.phone.set_vpn(Vpn::Off)?;
        seat.leaves_by(WLAN)?;
        seat.others_are_where_they_were("wlan0")?;
    }
    Ok(())
}

fn s5v_block(seat: &mut Seat) -> Result<()> {
    seat.leaves_by(WLAN)?;
    seat.phone.set_vpn(Vpn::On)?;
    seat.agent()?.expect("exits {V4: None(Blocked)}")?;
    seat.phone.is_silent(Way::PingOut)?;
    ensure!(seat.phone.route_out(&seat.bridge)? == "unreachable");
    seat.phone.answers(Way::TcpIn)?;
    seat.others_are_where_they_were("tun1")?;
    seat.phone.set_vpn(Vpn::Off)?;
    seat.leaves_by(WLAN)
}

fn s5v_bypass(seat: &mut Seat) -> Result<()> {
    seat.phone.set_vpn(Vpn::On)?;
    seat.leaves_by(WLAN)?;
    seat.others_are_where_they_were("tun1")?;
    seat.phone.set_vpn(Vpn::Off)?;
    seat.leaves_by(WLAN)
}

/// The default network becomes cellular because Wi-Fi goes down, and comes back.
fn s5s(seat: &mut Seat) -> Result<()> {
    seat.leaves_by(WLAN)?;
    seat.phone.link_down(Uplink::Wlan0)?;
    seat.phone.switch_default(Uplink::Rmnet1)?;
    seat.leaves_by(CELL)?;
    seat.others_are_where_they_were("rmnet1")?;
    seat.phone.link_up(Uplink::Wlan0)?;
    seat.phone.switch_default(Uplink::Wlan0)?;
    seat.leaves_by(WLAN)?;
    seat.others_are_where_they_were("wlan0")
}

/// The hotspot that goes off takes forwarding with it.
fn s8(seat: &mut Seat) -> Result<()> {
    for _ in 0..3 {
        seat.phone.hotspot_off()?;
        seat.agent()?
            .expect("repaired sysctl net.ipv4.ip_forward: set to 1 from 0")?;
        seat.leaves_by(WLAN)?;
    }
    Ok(())
}

/// A restart of netd removes everybody's rules and chains, and forwarding.
fn s9(seat: &mut Seat) -> Result<()> {
    for _ in 0..2 {
        seat.netd_restart()?;
        seat.leaves_by(WLAN)?;
        seat.others_are_where_they_were("wlan0")?;
    }
    // With a VPN, on another network, and with a vendor's chain before ours.
    seat.phone.netd_rules(Uplink::Rmnet1, Vpn::On)?;
    seat.leaves_by(TUNNEL)?;
    seat.others_are_where_they_were("tun1")?;
    seat.phone.set_vpn(Vpn::Off)?;
    seat.leaves_by(CELL)?;
    seat.phone.switch_default(Uplink::Wlan0)?;
    seat.leaves_by(WLAN)
}

/// An agent that was away while all of that happened.
fn away(seat: &mut Seat) -> Result<()> {
    seat.restart_agent(|phone| {
        phone.hotspot_off()?;
        phone.link_down(Uplink::Wlan0)?;
        phone.switch_default(Uplink::Rmnet1)
    })?;
    seat.leaves_by(CELL)?;
    seat.restart_agent(|phone| {
        phone.link_up(Uplink::Wlan0)?;
        phone.switch_default(Uplink::Wlan0)
    })?;
    seat.leaves_by(WLAN)
}

/// What each neighbour of the phone asks of, and the link there.
const ASKED: [(&str, &str); 3] = [(WLAN, "wlan_gw"), (CELL, "cell_gw"), (TUNNEL, "vpn_gw")];

/// Neighbours, and who is behind them: an answer by another link than that of the question is dropped out there, as it
/// would not arrive at all.
fn answers_go_back(seat: &Seat) -> Result<()> {
    let internet = seat.phone.internet();
    for (address, link) in ASKED {
        for source in ["", " src 8.8.8.8"] {
            internet.ip(&format!("route replace {address}/32 dev {link}{source}\n"))?;
            let what = || format!("{address} asked by {link}{source}");
            let until = Instant::now() + ANSWER;
            loop {
                match internet.ask_tcp(format!("{address}:15432").parse()?, SILENCE) {
                    Ok(said) if said.starts_with("hello-from-guest") => break,
                    other => ensure!(Instant::now() < until, "{}: {other:?}", what()),
                }
            }
        }
    }
    Ok(())
}

fn asked(seat: &mut Seat) -> Result<()> {
    let internet = seat.phone.internet();
    let wrong = ASKED.map(|(address, link)| format!("ip saddr {address} iifname != {link} drop"));
    internet.sh(&format!(
        "nft 'table inet wrong {{ chain c {{ type filter hook prerouting priority -300; {}; }}; }}'",
        wrong.join("; ")
    ))?;
    let _service = seat
        .phone
        .guest()
        .space()
        .serve_udp(([0, 0, 0, 0], 6000).into(), "guest")?;
    let caller = internet.enter(|| -> std::io::Result<UdpSocket> {
        let caller = UdpSocket::bind("0.0.0.0:0")?;
        caller.connect((WLAN, 5000))?;
        caller.set_read_timeout(Some(SILENCE))?;
        Ok(caller)
    })??;
    let call = |what: &str| -> Result<()> {
        let until = Instant::now() + ANSWER;
        caller.set_nonblocking(true)?;
        while caller.recv(&mut [0; 64]).is_ok() {} // late answers to what was said before
        caller.set_nonblocking(false)?;
        loop {
            let _ = caller.send(b"hello"); // an error of the last one is told here
            match caller.recv(&mut [0; 64]) {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(Instant::now() < until, "{what}: {error}"),
            }
        }
    };
    call("before")?;
    answers_go_back(seat)?;
    seat.phone.set_vpn(Vpn::On)?;
    call("with a VPN that came later")?;
    answers_go_back(seat).context("with a VPN")?;
    seat.phone.set_vpn(Vpn::Off)?;
    seat.phone.switch_default(Uplink::Rmnet1)?;
    call("with another default network")?;
    answers_go_back(seat).context("with another default network")?;
    seat.netd_restart()?;
    call("after netd's restart")?;
    answers_go_back(seat).context("after netd's restart")?;
    seat.phone.switch_default(Uplink::Wlan0)?;
    seat.leaves_by(WLAN)?;
    seat.others_are_where_they_were("wlan0")
}

/// A network beside the way out comes and goes: that is followed, and nobody's fault.
fn beside(seat: &mut Seat) -> Result<()> {
    let cellular = format!("lookup {}", seat.phone.table(Uplink::Rmnet1));
    for is_there in [false, true, false, true] {
        match is_there {
            true => seat.phone.link_up(Uplink::Rmnet1)?,
            false => seat.phone.link_down(Uplink::Rmnet1)?,
        }
        let until = Instant::now() + ANSWER;
        loop {
            let rules = seat.phone.machine().sh("ip rule")?;
            let mut answers = rules.lines().filter(|line| line.starts_with("9005:"));
            if answers.any(|line| line.contains(&cellular)) == is_there {
                break;
            }
            ensure!(Instant::now() < until, "{is_there}: {rules}");
        }
    }
    seat.leaves_by(WLAN)?;
    let told = seat.agent()?.rest();
    ensure!(told.iter().all(|line| !line.starts_with("repaired")), "{told:#?}");
    Ok(())
}

macro_rules! both {
    ($($name:ident: $body:path, $words:literal;)*) => { $(
        mod $name {
            use super::*;

            #[test]
            fn with_iptables() -> Result<()> {
                scenario(concat!(stringify!($name), " with iptables"), Filter::Iptables, $words, $body)
            }

            #[test]
            fn with_nf_tables() -> Result<()> {
                scenario(concat!(stringify!($name), " with nf_tables"), Filter::Owned, $words, $body)
            }
        }
    )* };
}

both! {
    s5_the_guest_works_and_nobody_elses_packets_move: s5, "";
    s5v_the_guest_follows_a_vpn: s5v, "";
    s5v_or_is_cut_off_while_it_is_up: s5v_block, "vpn=block";
    s5v_or_goes_past_it: s5v_bypass, "vpn=bypass";
    s5s_the_guest_follows_the_default_network: s5s, "";
    answers_leave_by_the_link_of_the_question: asked, "forward=tcp:15432:192.168.100.2:5432 forward=udp:5000:192.168.100.2:6000";
    a_network_beside_the_way_out_comes_and_goes: beside, "forward=tcp:15432:192.168.100.2:5432";
    answers_leave_while_a_vpn_blocks: asked, "vpn=block forward=tcp:15432:192.168.100.2:5432 forward=udp:5000:192.168.100.2:6000";
    s8_forwarding_is_kept_when_the_hotspot_goes_off: s8, "";
    s9_a_restart_of_netd_is_survived: s9, "";
    an_agent_that_was_away_goes_on_from_what_is_there: away, "";
}

/// Of two programs that filter, the one that drops has the last word: on a phone whose kernel has nf_tables (none has so
/// far) netd's DROP in iptables stops what our tables accept. The agent does not see it: for doctor.
#[test]
fn netds_drop_is_stronger_than_our_tables() -> Result<()> {
    scenario("netds_drop", Filter::Owned, "", |seat| {
        seat.leaves_by(WLAN)?;
        seat.phone.netd_restart()?;
        seat.agent()?.expect("repaired")?;
        seat.phone.is_silent(Way::PingOut)?;
        seat.phone.answers(Way::TcpIn)?;
        without_drop(&seat.phone, Filter::Owned)?;
        seat.leaves_by(WLAN)
    })
}
