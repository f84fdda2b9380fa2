//! Floor 2: our agent on a plain Linux machine when it is told twice, killed, fought and deafened.

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::lan::{Forwarded, Lan, Nic, Way};
use sovereign_tests::net::{Filter, Hosted, Router, SOON, can_run, left_by_the_kernel, signal};

const AGENT: &str = env!("CARGO_BIN_EXE_network-agent");
const WANT: &str = "want 192.168.100.1/24 1500 sql=192.168.100.2 host uplink=eth0,eth1 \
    forward=tcp:15432:192.168.100.2:5432";
/// The same in both families, for what is told twice.
const TWICE: &str = "want 192.168.100.1/24,fd00:64::1/64 1500 sql=192.168.100.2,fd00:64::2 host uplink=eth0,eth1 \
    forward=tcp:15432:192.168.100.2:5432";
const CALLS: &str = "trace=sendto,sendmsg,ioctl,openat,execve,rename,unlink,mkdir";
/// `-probe` as strace shows it: a batch of nf_tables with this name in it is refused whole, and shows what it would do.
const PROBE: &str = r"\x2d\x70\x72\x6f\x62\x65";

/// What of strace's record changes something.
fn changes(record: &str) -> Vec<&str> {
    let is_change = |line: &&str| {
        let has = |kinds: &[&str]| kinds.iter().any(|kind| line.contains(kind));
        // What is said first on a socket that strace does not know is a number; RTM_GET* end in binary 10.
        let raw = line
            .split("nlmsg_type=0x")
            .nth(1)
            .and_then(|rest| u32::from_str_radix(rest.split([' ', ',']).next()?, 16).ok());
        let of_routes = has(&["RTM_NEW", "RTM_DEL", "RTM_SET"]) || raw.is_some_and(|kind| kind % 4 != 2);
        let of_tables = has(&["NFT_MSG_NEW", "NFT_MSG_DEL"]) && !line.contains(PROBE);
        let written = has(&["O_WRONLY", "O_RDWR"]) && !has(&["/dev/null", "/dev/net/tun", "xtables.lock"]);
        of_routes || of_tables || written || has(&["TUNSET", "rename(", "unlink(", "mkdir("])
    };
    record.lines().filter(is_change).collect()
}

/// An agent takes tables over that have no owner: they get one, and nothing in them is another.
fn takes_over(line: &str) -> bool {
    line.contains("NFT_MSG_NEWTABLE")
        && !["NFT_MSG_NEWCHAIN", "NFT_MSG_NEWRULE", "NFT_MSG_DEL"]
            .iter()
            .any(|kind| line.contains(kind))
}

/// Runs an agent under strace until it said `ready`, tells it the same again, and ends it.
fn record(router: &mut Router, name: &str) -> Result<String> {
    let dir = router.hosted.record().with_file_name(name);
    let file = dir.to_str().context("a path that is no text")?;
    let over = ["strace", "-f", "-o", file, "-e", CALLS];
    let mut agent = router
        .hosted
        .start_under(router.lan.machine(), &over, "-", TWICE)?;
    agent.expect("works Filter")?;
    let looks = || std::fs::read_to_string(&dir).map(|text| text.matches("RTM_GETLINK").count());
    let (before, until) = (looks()?, Instant::now() + SOON);
    agent.say(TWICE)?;
    while looks()? == before {
        ensure!(
            Instant::now() < until,
            "it does not look again: {}",
            std::fs::read_to_string(&dir)?
        );
        std::thread::sleep(Duration::from_millis(20)); // polls a file
    }
    agent.restart_ends()?;
    Ok(std::fs::read_to_string(dir)?)
}

/// Rules without the packets that they have seen, and who holds them.
fn steady(rules: &str) -> Vec<String> {
    let line = |line: &str| line.split(" counter packets").next().unwrap_or(line).to_owned();
    let stays = |line: &&str| !line.trim_start().starts_with("flags");
    let last = |line: &str| line.rsplit(" # handle").next().unwrap_or_default().to_owned();
    rules
        .lines()
        .filter(stays)
        .map(|text| line(text) + &last(text))
        .collect()
}

fn told_twice(filter: Filter) -> Result<()> {
    Router::run(
        AGENT,
        "told_twice",
        filter,
        TWICE,
        |_| Ok(()),
        |router| {
            router.leaves_by(Nic::Eth0)?;
            // It is on disk then by which way guests leave.
            let agent = router.agent()?;
            if agent.told("ways").is_err() {
                agent.expect("ways")?;
            }
            // The guest's link was somebody's when the agent began, and has become a port of our bridge.
            let until = Instant::now() + SOON;
            while router.lan.machine().sysctl("net.ipv6.conf.vm_sql.accept_ra")? != "1" {
                ensure!(Instant::now() < until, "{}", router.hosted.log());
                std::thread::sleep(Duration::from_millis(20)); // polls a file
            }
            router.agent.take().context("no agent")?.restart_ends()?;
            // A handle is given once: what is made again has another. Those of iptables are such rules, too.
            let rules = |router: &Router| router.lan.machine().sh("nft -a list ruleset");
            let before = rules(router)?;
            let again = record(router, "again")?;
            for request in ["RTM_GETRULE", "NFT_MSG_GET"] {
                ensure!(again.contains(request), "the record shows requests: {again}");
            }
            let mut changed = changes(&again);
            changed.retain(|line| filter != Filter::Owned || !takes_over(line));
            ensure!(changed.is_empty(), "{changed:#?}");
            ensure!(
                steady(&before) == steady(&rules(router)?),
                "{before} is now {}",
                rules(router)?
            );
            // The same look at an agent that has something to do.
            router.lan.machine().ip(&format!(
                "link del {}\nrule del pref 9010\n",
                router.hosted.tap("sql")?
            ))?;
            router.lan.machine().set_sysctl("net.ipv4.ip_forward", "0")?;
            let tag = router.hosted.bridge();
            router.lan.machine().sh(&match filter {
                Filter::Owned | Filter::Plain => format!("nft flush chain inet {tag} forward"),
                Filter::Iptables => format!("iptables -F {tag}-forward"),
            })?;
            let busy = record(router, "busy")?;
            for kind in ["RTM_NEWRULE", "TUNSET", "RTM_SETLINK", "ip_forward", "NFT_MSG_"] {
                let mut seen = changes(&busy).into_iter().filter(|line| !takes_over(line));
                ensure!(seen.any(|line| line.contains(kind)), "{kind} is not seen: {busy}");
            }
            router.agent = Some(router.hosted.up(router.lan.machine(), TWICE)?);
            router.leaves_by(Nic::Eth0)
        },
    )
}

#[test]
fn what_is_as_wanted_is_not_changed_with_owned_tables() -> Result<()> {
    told_twice(Filter::Owned)
}

#[test]
fn what_is_as_wanted_is_not_changed_with_plain_tables() -> Result<()> {
    told_twice(Filter::Plain)
}

#[test]
fn what_is_as_wanted_is_not_changed_with_iptables() -> Result<()> {
    told_twice(Filter::Iptables)
}

#[test]
fn a_fight_is_slowed_down_and_the_other_side_named() -> Result<()> {
    Router::run(
        AGENT,
        "fight",
        Filter::Owned,
        WANT,
        |_| Ok(()),
        |router| {
            // One process that goes on, so that it can be named.
            let mut command = router.lan.machine().command(&["ip", "-force", "-batch", "-"]);
            let mut other = command.stdin(Stdio::piped()).stderr(Stdio::null()).spawn()?;
            let mut input = other.stdin.take().context("no pipe")?;
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(3) {
                writeln!(input, "rule del pref 9010")?;
                std::thread::sleep(Duration::from_millis(2)); // its pace
            }
            drop(input);
            other.wait()?;
            router.leaves_by(Nic::Eth0)?;
            let agent = router.agent()?;
            let told = agent.expect("fight")?;
            // Each repair names him, however quick he was; that of his last change may come after his end.
            let named = format!("changed by process {}", other.id());
            ensure!(
                told.contains("9010: iif") && told.contains(&format!("{named} (ip)")),
                "{told}"
            );
            let more = agent.rest();
            let lines = agent.seen().iter().chain(&more);
            let mut repairs_told = lines.filter(|line| line.starts_with("repaired"));
            ensure!(
                repairs_told.all(|line| line.contains(&named)),
                "{:#?} {more:#?}",
                agent.seen()
            );
            let repairs = 6 + more.iter().filter(|line| line.starts_with("repaired")).count();
            ensure!(
                repairs <= 10,
                "{repairs} repairs in three seconds: they are not slowed down"
            );
            router.leaves_by(Nic::Eth0)
        },
    )
}

#[test]
fn lost_news_are_made_up_for() -> Result<()> {
    if !can_run("lost_news") {
        return Ok(());
    }
    let (lan, hosted) = (Lan::new()?, Hosted::new(AGENT, Filter::Plain)?);
    let clean = lan.foreign_state(left_by_the_kernel)?;
    let machine = lan.machine();
    let mut agent = hosted.start_under(machine, &[], "1", WANT)?;
    agent.expect("works Filter")?;
    lan.plug(&hosted.bridge())?;
    lan.answers(Way::PingOut)?;
    signal(agent.pid(), Signal::STOP)?;
    machine.ip(&"link add storm type bridge\nlink del storm\n".repeat(200))?;
    machine.sh(&format!(
        "ip rule del pref 9010; ip rule del pref 9000; ip route flush table {}; nft delete table inet {}; \
         ip link del {}",
        hosted.table(),
        hosted.bridge(),
        hosted.tap("sql")?
    ))?;
    machine.set_sysctl("net.ipv4.ip_forward", "0")?;
    // The kernel counts what it dropped, in the last column but one; the fourth are the groups.
    let dropped =
        machine.sh("awk '$4 == \"018405d1\" { lost += $9 } END { print lost + 0 }' /proc/net/netlink")?;
    ensure!(dropped.trim() != "0", "nothing was lost, so this shows nothing");
    signal(agent.pid(), Signal::CONT)?;
    let all = ["create tap", "9010", "9000", "packet filter", "ip_forward"];
    let mut told = String::new();
    while !all.iter().all(|what| told.contains(what)) {
        told += &agent
            .expect("repaired")
            .with_context(|| format!("{told}: {}", hosted.log()))?;
    }
    lan.answers(Way::PingOut)?;
    hosted.down(machine, agent)?;
    let left = clean.difference(&lan.foreign_state(left_by_the_kernel)?);
    ensure!(left.is_empty(), "{left:#?}");
    Ok(())
}

/// Software of others that has something of each kind, where ours will be.
fn foreign(lan: &Lan) -> Result<()> {
    lan.firewalld_reload(Forwarded::Accepted)?;
    lan.machine().sh(
        "nft add table inet theirs; nft add chain inet theirs c; nft add rule inet theirs c counter; \
         iptables -A FORWARD -s 203.0.113.7 -j DROP; iptables -t nat -A PREROUTING -s 203.0.113.7 -p tcp -j RETURN; \
         ip rule add priority 9000 iif eth1 lookup 77; ip route add 10.9.0.0/16 dev eth1 table 77",
    )?;
    lan.machine().set_sysctl("net.ipv4.conf.eth1.rp_filter", "1")
}

/// When an agent was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// While it made what it wants.
    Making,
    /// While it took all away.
    Taking,
    /// Not at all: it makes fewer such calls.
    Never,
}

/// Kills the agent when it makes one of these calls for the `step`th time, while it carries out its plans. What it left is
/// then taken away: by the next agent, which goes on and ends, or, of what was half gone, in turn by `gc` without an agent.
fn killed_at(lan: &Lan, hosted: &Hosted, filter: Filter, calls: &str, step: usize) -> Result<Killed> {
    let (trace, inject) = (
        format!("trace={calls}"),
        format!("inject={calls}:signal=KILL:when={step}"),
    );
    // Calls are counted for each process, so programs that it starts are left out.
    let threads: &[&str] = if filter == Filter::Iptables { &[] } else { &["-f"] };
    let over = ["strace", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    let over = [&over[..], threads].concat();
    let mut first = hosted.start_under(lan.machine(), &over, "-", WANT)?;
    let made = first.expect("works Filter");
    let taken = made.and_then(|_| {
        first.say("end")?;
        first.expect("ended")
    });
    let made = first.told("works Filter").is_ok();
    let killed = match (first.was_killed()?, made) {
        (true, false) => Killed::Making,
        (true, true) => Killed::Taking,
        (false, _) => taken.map(|_| Killed::Never)?,
    };
    if killed == Killed::Taking && step.is_multiple_of(2) {
        hosted.collect(lan.machine())?;
        return Ok(killed);
    }
    let mut next = hosted.up(lan.machine(), WANT)?;
    if step.is_multiple_of(8) {
        lan.plug(&hosted.bridge())?;
        lan.answers(Way::TcpOut)?;
    }
    next.say("end")?;
    next.expect("ended")?;
    next.restart_ends()?;
    Ok(killed)
}

/// Kills the agent at each step of its first plan, and of the one that takes all away: what it says to the kernel, what it
/// writes on disk, and what it starts and says to programs. Whatever was half gone then, nothing of ours is left and
/// nothing of others is another.
fn killed_at_any_step(filter: Filter) -> Result<()> {
    if !can_run("killed_at_any_step") {
        return Ok(());
    }
    let (lan, hosted) = (Lan::new()?, Hosted::new(AGENT, filter)?);
    foreign(&lan)?;
    let clean = lan.foreign_state(left_by_the_kernel)?;
    let is_clean = || {
        let left = hosted.leftovers(lan.machine())?;
        ensure!(left.is_empty() && !hosted.record().exists(), "{left:#?}");
        let left = clean.difference(&lan.foreign_state(left_by_the_kernel)?);
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    };
    let mut told = Vec::new();
    let programs: &[&str] = match filter {
        Filter::Iptables => &["clone,clone3,vfork", "write"],
        Filter::Owned | Filter::Plain => &[],
    };
    for calls in [&["sendto", "sendmsg", "ioctl", "rename", "unlink"], programs].concat() {
        let (mut making, mut taking) = (0, 0);
        loop {
            let step = making + taking + 1;
            let at = || format!("killed at {calls} {step}: {}", hosted.log());
            match killed_at(&lan, &hosted, filter, calls, step).with_context(at)? {
                Killed::Making => making += 1,
                Killed::Taking => {
                    taking += 1;
                    is_clean().with_context(at)?;
                }
                Killed::Never => break,
            }
        }
        told.push((calls, making, taking));
    }
    let (making, taking) = told.iter().fold((0, 0), |all, (_, making, taking)| {
        (all.0 + making, all.1 + taking)
    });
    eprintln!("{filter:?}: killed at {making} steps of making and {taking} of taking away: {told:?}");
    ensure!(making > 20 && taking > 10, "only {told:?} were seen");
    is_clean()
}

#[test]
fn killed_at_any_step_the_next_agent_goes_on_with_owned_tables() -> Result<()> {
    killed_at_any_step(Filter::Owned)
}

#[test]
fn killed_at_any_step_the_next_agent_goes_on_with_plain_tables() -> Result<()> {
    killed_at_any_step(Filter::Plain)
}

#[test]
fn killed_at_any_step_the_next_agent_goes_on_with_iptables() -> Result<()> {
    killed_at_any_step(Filter::Iptables)
}

#[test]
fn a_second_agent_does_not_take_tables_that_are_owned() -> Result<()> {
    Router::run(
        AGENT,
        "second_agent",
        Filter::Owned,
        WANT,
        |_| Ok(()),
        |router| {
            let machine = router.lan.machine();
            let mut second = router.hosted.start(machine, WANT)?;
            let told = second.expect("failed Filter")?;
            ensure!(told.contains("owned by another netlink socket"), "{told}");
            router.leaves_by(Nic::Eth0)?;
            router.agent.take().context("no agent")?.restart_ends()?;
            second.expect("works Filter")?;
            router.agent = Some(second);
            router.leaves_by(Nic::Eth0)
        },
    )
}
