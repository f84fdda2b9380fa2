//! Floor 2: what real packets do under our tables, between a host, two guests and another machine.

use std::path::Path;

use anyhow::{Result, ensure};
use sovereign_tests::net::{Agent, Lan, Place, TAG, can_run};

const AGENT: &str = env!("CARGO_BIN_EXE_nft-agent");

/// A host whose agent was told this.
fn world(wanted: &str) -> Result<(Lan, Agent)> {
    let lan = Lan::new(Path::new(AGENT))?;
    let mut agent = lan.filter(TAG)?;
    told(&mut agent, wanted)?;
    Ok((lan, agent))
}

fn told(agent: &mut Agent, wanted: &str) -> Result<()> {
    agent.say(wanted)?;
    agent.expect("want: done")?;
    agent.say("replace")?;
    agent.expect("replace: done").map(drop)
}

fn expect(lan: &Lan, place: Place, question: &str, answer: &str) -> Result<()> {
    let seen = lan.ask(place, question)?;
    ensure!(
        seen.starts_with(answer),
        "{place:?} asked {question}: {seen}, not {answer}"
    );
    Ok(())
}

/// An answer is the address that the asker has there.
#[test]
fn guests_go_out_as_the_host_and_come_in_only_by_forwarded_ports() -> Result<()> {
    if !can_run("guests_go_out_as_the_host") {
        return Ok(());
    }
    use Place::{Host, Outside, Sql, Web};
    let (lan, mut agent) = world(
        "want out forward=tcp,*,8080,10.9.0.2,80 forward=tcp,*,9000-9001,10.9.0.2,7000 \
         forward=tcp,192.0.2.1,80,10.9.0.2,80 forward=tcp,*,8080,fd00:9::2,80",
    )?;
    let _sql = (lan.answers(Sql, "tcp 80")?, lan.answers(Sql, "tcp 7001")?);
    let _outside = (lan.answers(Outside, "tcp 80")?, lan.answers(Outside, "udp 53")?);
    // Out, as this host.
    expect(&lan, Sql, "tcp 192.0.2.2 80", "answered 192.0.2.1")?;
    expect(&lan, Sql, "udp 192.0.2.2 53", "answered 192.0.2.1")?;
    expect(&lan, Sql, "tcp fd00:8::2 80", "answered fd00:8::1")?;
    // In, by the forwarded ports, each of a moved range to its own.
    expect(&lan, Outside, "tcp 192.0.2.1 8080", "answered 192.0.2.2")?;
    expect(&lan, Outside, "tcp 192.0.2.1 9001", "answered 192.0.2.2")?;
    expect(&lan, Outside, "tcp 192.0.2.1 9000", "refused ConnectionRefused")?;
    expect(&lan, Outside, "tcp 192.0.2.1 80", "answered 192.0.2.2")?;
    expect(&lan, Outside, "tcp fd00:8::1 8080", "answered fd00:8::2")?;
    expect(&lan, Outside, "tcp 192.0.2.1 81", "refused ConnectionRefused")?;
    // From the host itself, by every address but the loopback's; the bound one only by its own.
    expect(&lan, Host, "tcp 192.0.2.1 8080", "answered 192.0.2.1")?;
    expect(&lan, Host, "tcp fd00:8::1 8080", "answered fd00:8::1")?;
    expect(&lan, Host, "tcp 127.0.0.1 8080", "refused ConnectionRefused")?;
    expect(&lan, Host, "tcp ::1 8080", "refused ConnectionRefused")?;
    expect(&lan, Host, "tcp 10.9.0.1 80", "refused ConnectionRefused")?;
    // From a sibling, by way of the host; and from itself.
    expect(&lan, Web, "tcp 192.0.2.1 8080", "answered 10.9.0.1")?;
    expect(&lan, Web, "tcp 10.9.0.1 8080", "answered 10.9.0.1")?;
    expect(&lan, Web, "tcp fd00:8::1 8080", "answered fd00:9::1")?;
    // With br_netfilter this is a bridged frame, which goes back by its own port only in hairpin mode.
    lan.at(
        Host,
        "! [ -e /proc/sys/net/bridge ] || echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables",
    )?;
    expect(&lan, Sql, "tcp 192.0.2.1 8080", "answered 10.9.0.1")?;
    expect(&lan, Web, "tcp 10.9.0.2 80", "answered 10.9.0.3")?;
    // A neighbour that knows the guests' subnet has no way in.
    lan.at(Outside, "ip route add 10.9.0.0/24 via 192.0.2.1")?;
    expect(&lan, Outside, "tcp 10.9.0.2 80", "silence")?;
    agent.say("remove")?;
    agent.expect("remove: done")?;
    expect(&lan, Outside, "tcp 10.9.0.2 80", "answered 192.0.2.2")
}

#[test]
fn without_a_way_out_guests_are_refused_at_once_and_answer_what_was_forwarded() -> Result<()> {
    if !can_run("without_a_way_out") {
        return Ok(());
    }
    use Place::{Outside, Sql, Web};
    let (lan, mut agent) =
        world("want closed forward=tcp,*,8080,10.9.0.2,80 forward=tcp,*,8080,fd00:9::2,80")?;
    let _answers = (lan.answers(Sql, "tcp 80")?, lan.answers(Outside, "tcp 80")?);
    for question in ["udp 192.0.2.2 80", "udp fd00:8::2 80"] {
        let seen = lan.ask(Sql, question)?;
        let millis = seen.rsplit(' ').next().unwrap_or_default().parse();
        ensure!(
            seen.starts_with("refused") && millis.unwrap_or(u32::MAX) < 500,
            "{question}: {seen}"
        );
    }
    // Between namespaces the refusal is back before TCP has left its system call, and counts only the second time.
    expect(&lan, Sql, "tcp 192.0.2.2 80", "refused HostUnreachable")?;
    expect(&lan, Sql, "tcp fd00:8::2 80", "refused PermissionDenied")?;
    expect(&lan, Outside, "tcp 192.0.2.1 8080", "answered 192.0.2.2")?;
    expect(&lan, Outside, "tcp fd00:8::1 8080", "answered fd00:8::2")?;
    expect(&lan, Web, "tcp 192.0.2.1 8080", "answered 10.9.0.1")?;
    expect(&lan, Web, "tcp 10.9.0.2 80", "answered 10.9.0.3")?;
    told(&mut agent, "want out")?;
    expect(&lan, Sql, "tcp 192.0.2.2 80", "answered 192.0.2.1")
}

#[test]
fn a_sender_that_calls_itself_something_else_is_not_heard() -> Result<()> {
    if !can_run("a_sender_that_calls_itself") {
        return Ok(());
    }
    use Place::{Sql, Web};
    let (lan, mut agent) = world("want out")?;
    let _sql = lan.answers(Sql, "tcp 80")?;
    lan.at(
        Web,
        "ip address add 10.9.0.77/24 dev eth0; ip address add fd00:9::77/64 dev eth0 nodad",
    )?;
    let others = [
        "tcp 10.9.0.2 80 from 10.9.0.77",
        "tcp fd00:9::2 80 from fd00:9::77",
    ];
    expect(&lan, Web, others[0], "answered 10.9.0.77")?;
    expect(&lan, Web, others[1], "answered fd00:9::77")?;
    let forget = |place| lan.at(place, "ip neigh flush all").map(drop);
    let senders = |place| {
        let number = if place == Sql { 2 } else { 3 };
        let (link, mac) = (Lan::link_of(place), Lan::mac_of(place));
        format!("sender={link},{mac},10.9.0.{number},fd00:9::{number}")
    };
    told(&mut agent, &format!("want {} {}", senders(Sql), senders(Web)))?;
    for question in others {
        expect(&lan, Web, question, "silence")?;
    }
    // Its own addresses pass, and neighbours still find each other.
    for place in [Sql, Web] {
        forget(place)?;
    }
    expect(&lan, Web, "tcp 10.9.0.2 80 from 10.9.0.3", "answered 10.9.0.3")?;
    expect(&lan, Web, "tcp fd00:9::2 80 from fd00:9::3", "answered fd00:9::3")?;
    // Nobody finds an address that is not its own, even if the frames themselves are honest.
    for place in [Sql, Web] {
        forget(place)?;
    }
    let unknown = |place, what: &str| -> Result<()> {
        let seen = lan.ask(place, what)?;
        ensure!(
            seen == "silence" || seen.starts_with("refused HostUnreachable"),
            "{what}: {seen}"
        );
        Ok(())
    };
    let _web = lan.answers(Web, "tcp 80")?;
    unknown(Sql, "tcp 10.9.0.77 80")?;
    unknown(Sql, "tcp fd00:9::77 80")?;
    expect(&lan, Sql, "tcp 10.9.0.3 80", "answered 10.9.0.2")?;
    // Another's MAC, where nobody asks for it by ARP.
    let known = |place, ip: &str, mac: &str| {
        lan.at(
            place,
            &format!("ip neigh replace {ip} lladdr {mac} dev eth0 nud permanent"),
        )
        .map(drop)
    };
    known(Web, "10.9.0.2", Lan::mac_of(Sql))?;
    for (mac, answer) in [
        ("02:00:00:00:00:0c", "silence"),
        (Lan::mac_of(Web), "answered 10.9.0.3"),
    ] {
        lan.at(Web, &format!("ip link set eth0 address {mac}"))?;
        known(Sql, "10.9.0.3", mac)?;
        expect(&lan, Web, "tcp 10.9.0.2 80 from 10.9.0.3", answer)?;
    }
    let tagged = |place, number: u8| {
        let address = format!("ip address add 10.7.0.{number}/24 dev v7");
        lan.at(
            place,
            &format!("ip link add link eth0 name v7 type vlan id 7; ip link set v7 up; {address}"),
        )
    };
    if let Err(error) = tagged(Sql, 2).and_then(|_| tagged(Web, 3)) {
        eprintln!("SKIPPED: a VLAN's tag in a_sender_that_calls_itself ({error})");
        return Ok(());
    }
    unknown(Web, "tcp 10.7.0.2 80")?;
    agent.say("remove")?;
    agent.expect("remove: done")?;
    for place in [Sql, Web] {
        forget(place)?;
    }
    expect(&lan, Web, "tcp 10.7.0.2 80", "answered 10.7.0.3")
}

#[test]
fn tcp_is_told_of_the_smallest_link_on_its_way() -> Result<()> {
    if !can_run("tcp_is_told") {
        return Ok(());
    }
    use Place::{Host, Outside, Sql};
    let (lan, _agent) = world("want out forward=tcp,*,8080,10.9.0.2,80")?;
    let _answers = (lan.answers(Sql, "tcp 80")?, lan.answers(Outside, "tcp 80")?);
    lan.at(Host, "ip link set up0 mtu 1300")?;
    // 1300 less the headers of IPv4 and TCP.
    let count = "table ip t { chain c { type filter hook prerouting priority 0; \
         tcp flags syn tcp option maxseg size 1260 counter; tcp flags syn tcp option maxseg size != 1260 drop; }; }";
    for (place, question, there) in [
        (Sql, "tcp 192.0.2.2 80", Outside),
        (Outside, "tcp 192.0.2.1 8080", Sql),
    ] {
        lan.at(there, &format!("nft '{count}'"))?;
        expect(&lan, place, question, "answered")?;
        let seen = lan.at(there, "nft list ruleset")?;
        ensure!(!seen.contains("packets 0"), "{there:?}: {seen}");
        lan.at(there, "nft flush ruleset")?;
    }
    Ok(())
}

#[test]
fn a_conversation_that_began_before_a_forward_changed_follows_it_after_a_flush() -> Result<()> {
    if !can_run("a_conversation_that_began") {
        return Ok(());
    }
    use Place::{Outside, Sql, Web};
    let (lan, mut agent) = world("want out forward=udp,*,5300,10.9.0.2,53")?;
    let question = "udp 192.0.2.1 5300";
    let sql = lan.answers(Sql, "udp 53")?;
    expect(&lan, Outside, question, "answered 192.0.2.2")?;
    drop(sql);
    let _web = lan.answers(Web, "udp 53")?;
    told(&mut agent, "want no-forwards forward=udp,*,5300,10.9.0.3,53")?;
    let stale = lan.ask(Outside, question)?;
    ensure!(
        !stale.starts_with("answered"),
        "without a flush it goes where it went: {stale}"
    );
    agent.say("flush")?;
    agent.expect("flush: removed 1")?;
    expect(&lan, Outside, question, "answered 192.0.2.2")?;
    agent.say("flush 10.9.0.3")?;
    agent.expect("flush: removed 1")?;
    agent.say("flush 10.9.0.3")?;
    agent.expect("flush: removed 0").map(drop)
}

/// A guest that answers for a neighbour's address under its own.
#[test]
fn a_guest_advertises_no_address_but_its_own() -> Result<()> {
    if !can_run("a_guest_advertises") {
        return Ok(());
    }
    use Place::{Sql, Web};
    let (lan, mut agent) = world("want out")?;
    lan.at(
        Web,
        "cd /proc/sys/net/ipv6; echo 1 > conf/all/forwarding; echo 1 > conf/eth0/proxy_ndp; \
         echo 0 > neigh/eth0/proxy_delay; ip neigh add proxy fd00:9::88 dev eth0",
    )?;
    let believed = || -> Result<bool> {
        lan.at(Sql, "ip neigh flush all")?;
        lan.ask(Sql, "tcp fd00:9::88 80")?; // nobody is there: only the neighbour is looked for
        Ok(lan.at(Sql, "ip neigh show fd00:9::88")?.contains("lladdr"))
    };
    ensure!(believed()?, "without a rule a neighbour's word is taken");
    let (link, mac) = (Lan::link_of(Web), Lan::mac_of(Web));
    told(
        &mut agent,
        &format!("want sender={link},{mac},10.9.0.3,fd00:9::3"),
    )?;
    ensure!(!believed()?);
    told(
        &mut agent,
        &format!("want sender={link},{mac},10.9.0.3,fd00:9::3,fd00:9::88"),
    )?;
    ensure!(believed()?, "its own address it may");
    Ok(())
}
