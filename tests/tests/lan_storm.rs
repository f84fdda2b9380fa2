//! Floor 3: ten thousand changes by other software while another machine of the LAN uses the PostgreSQL of a real guest.
//!
//! The guest's TAP is not deleted: its VM has that very link open, and no agent can give it another one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sovereign_tests::client::{self, Session};
use sovereign_tests::machine::{self, Machine, SOON, until};
use sovereign_tests::net::{can_run, left_by_the_kernel};
use sovereign_tests::storm::{CHANGES, left_by_it, storm};

/// The port on the LAN.
const PORT: u16 = 15_432;
/// Between two probes, which are begun at this pace unless one takes longer.
const EVERY: Duration = Duration::from_millis(100);
/// A probe that takes longer has failed: emulated guests are slow, and a lost packet is sent again after 1, 2 and 4 s.
const PROBE: Duration = Duration::from_secs(10);
/// The storm is as long as a hundred of these, and what its changes take.
const PAUSE: Duration = Duration::from_millis(200);

#[test]
fn postgres_stays_reachable_from_the_lan_through_ten_thousand_foreign_changes() -> Result<()> {
    if !can_run("lan_storm") {
        return Ok(());
    }
    let machine = Machine::new()?;
    machine.instance.go_through(|_| stormed(&machine))
}

/// What harms ours and everybody else's alike.
const FLUSH: &str = "nft flush ruleset";

/// What others may do to ours, one after another.
fn harms(machine: &Machine) -> Result<Vec<String>> {
    let bridge = machine.bridge()?;
    Ok(vec![
        "echo 0 > /proc/sys/net/ipv4/ip_forward".to_owned(),
        FLUSH.to_owned(),
        format!("ip address del 192.168.100.1/24 dev {bridge}"),
        format!("ip link set {bridge}-sql nomaster"),
        format!("ip link set {bridge}-sql down"),
        format!("nft delete table inet {bridge} 2>/dev/null || true"), // no for whom it does not belong
        format!("ip link del {bridge}"),
        format!("ip link set {bridge} down"),
    ])
}

/// What the probes found.
#[derive(Debug, Default)]
struct Probes {
    begun: usize,
    failed: Vec<String>,
    /// Failures one after another, at most.
    row: usize,
    longest: Duration,
}

fn probe(machine: &Machine, over: &AtomicBool) -> Probes {
    let (mut probes, mut row) = (Probes::default(), 0);
    while !over.load(Ordering::Relaxed) {
        let begun = Instant::now();
        probes.begun += 1;
        let heard = loop {
            match machine.from_peer(PORT, PROBE).and_then(client::answers) {
                Ok(true) => break Ok(true),
                other if begun.elapsed() > PROBE => break other,
                _ => std::thread::sleep(EVERY), // refused at once: its pace
            }
        };
        match heard {
            Ok(true) => row = 0,
            other => {
                row += 1;
                probes.failed.push(format!("{}: {other:?}", probes.begun));
            }
        }
        probes.row = probes.row.max(row);
        probes.longest = probes.longest.max(begun.elapsed());
        std::thread::sleep(EVERY.saturating_sub(begun.elapsed())); // ten a second
    }
    probes
}

/// One row after another in the one session, each acknowledged; how many.
fn insert(session: &mut Session, over: &AtomicBool) -> Result<usize> {
    for n in 1.. {
        session.query(&format!("insert into rows values ({n})"))?;
        if over.load(Ordering::Relaxed) {
            return Ok(n);
        }
        std::thread::sleep(EVERY / 2); // its pace
    }
    Ok(0)
}

/// Whether a line is ours, or follows what we switch, while the product runs.
fn is_ours(bridge: &str) -> impl Fn(&str) -> bool {
    let switched = ["forwarding", "ip_forward", "accept_redirects", "accept_ra "];
    move |line| {
        line.contains(bridge) || switched.iter().any(|key| line.contains(key)) || left_by_the_kernel(line)
    }
}

fn stormed(machine: &Machine) -> Result<()> {
    let instance = &machine.instance;
    machine.configure(&format!(
        "[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n\n\
         [[guest.sql.forward]]\nname = \"lan\"\nservice = \"postgres\"\nlisten = \"0.0.0.0:{PORT}\"\nvia = \"kernel\"\n\n\
         [guest.sql.service.postgres]\nkind = \"postgres\"\n"
    ))?;
    instance.ok(&["up", "--timeout", "300"])?;
    let boot = instance.guest()?["boot_id"].clone();
    until("PostgreSQL answers the LAN", || {
        let heard = client::answers(machine.from_peer(PORT, SOON)?)?;
        Ok((heard, "another answer".to_owned()))
    })?;
    let password = instance.ok(&["secret", "sql/postgres"])?;
    let mut session = Session::new(machine.from_peer(PORT, SOON)?, password.trim())?;
    session.query("create table rows (n int primary key)")?;

    let (over, harms) = (AtomicBool::new(false), harms(machine)?);
    let begun = Instant::now();
    let (probes, rows) = std::thread::scope(|scope| {
        let probes = scope.spawn(|| probe(machine, &over));
        let rows = scope.spawn(|| insert(&mut session, &over));
        let outcome = storm(machine.space(), PAUSE, &harms);
        over.store(true, Ordering::Relaxed);
        let probes = probes
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let rows = rows
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        outcome.map(|()| (probes, rows))
    })?;
    eprintln!(
        "{CHANGES} changes and {} harms in {:.1?}: {} probes, {} failed, at most {} in a row, the longest took {:.1?}; \
         {rows:?} rows",
        harms.len(),
        begun.elapsed(),
        probes.begun,
        probes.failed.len(),
        probes.row,
        probes.longest
    );
    ensure!(probes.begun > 10 && probes.row < 2, "{probes:#?}");
    let rows = rows?;
    let count = session.query("select count(*) || ' to ' || max(n) from rows")?;
    ensure!(
        count == [format!("{rows} to {rows}")],
        "{rows} were acknowledged: {count:?}"
    );
    let there = instance.ok(&["psql", "sql", "--", "-Atc", "select count(*) from rows"])?;
    ensure!(there.trim() == rows.to_string(), "{there}");

    converged(machine)?;
    ensure!(instance.guest()?["boot_id"] == boot, "the guest is another one");
    // The same storm where there is no product.
    let (calm, _beside) = machine::without_the_product()?;
    let all_but_flush = |harm: &String| if harm == FLUSH { FLUSH } else { "true" }.to_owned();
    storm(
        &calm,
        Duration::ZERO,
        &harms.iter().map(all_but_flush).collect::<Vec<_>>(),
    )?;
    let differs = |is_ours: &dyn Fn(&str) -> bool| -> Result<Vec<String>> {
        let without = left_by_it(&calm, is_ours)?;
        Ok(without.difference(&left_by_it(machine.space(), is_ours)?))
    };
    let changed = differs(&is_ours(&machine.bridge()?))?;
    ensure!(changed.is_empty(), "what is not ours is harmed: {changed:#?}");
    instance.ok(&["down"])?;
    let changed = differs(&left_by_the_kernel)?;
    ensure!(changed.is_empty(), "after `down`: {changed:#?}");
    ensure!(instance.processes().is_empty(), "{:?}", instance.processes());
    Ok(())
}

/// Nothing is left to do, and `up` changes nothing.
fn converged(machine: &Machine) -> Result<()> {
    let instance = &machine.instance;
    until("everything is as wanted", || {
        let plan = instance.ok(&["plan"])?;
        Ok((plan.trim() == "nothing to do", plan))
    })?;
    until("the guest is ready", || {
        let guest = instance.guest()?;
        Ok((guest["ready"] == "True", format!("{guest:#}")))
    })?;
    // A handle is given once: what is made again has another. What rules count changes by itself.
    let handles = || {
        machine
            .space()
            .sh("nft -a list ruleset | sed 's/packets [0-9]* bytes [0-9]*//'")
    };
    let before = (machine.state()?, handles()?);
    instance.ok(&["up"])?;
    let after = (machine.state()?, handles()?);
    let changed = before.0.difference(&after.0);
    ensure!(changed.is_empty(), "`up` changed something: {changed:#?}");
    ensure!(
        before.1 == after.1,
        "`up` made rules again: {}\n{}",
        before.1,
        after.1
    );
    Ok(())
}
