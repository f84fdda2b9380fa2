//! Floor 2: our nf_tables beside those of others, and what packets then do, in private namespaces.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use sovereign_tests::net::{Agent, Lan, Place, TAG, can_run, signal};
use sovereign_tests::seat::{NOBODY, copy_program};

const AGENT: &str = env!("CARGO_BIN_EXE_nft-agent");
/// Tables of others, with what ours do not have.
const FOREIGN: &str = "table inet foreign { set s { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.7 }; }; \
     chain c { type filter hook forward priority 5; policy accept; ip saddr @s drop; }; }; \
     table ip nat { chain POSTROUTING { type nat hook postrouting priority 100; oifname eth9 masquerade; }; }";

fn lan() -> Result<Lan> {
    Lan::new(Path::new(AGENT))
}

/// Gives a command and returns what came of it.
fn tell(agent: &mut Agent, line: &str) -> Result<String> {
    agent.say(line)?;
    let word = line.split(' ').next().unwrap_or_default();
    let answer = agent.expect(&format!("{word}: "))?;
    Ok(answer[word.len() + 2..].to_owned())
}

fn done(agent: &mut Agent, line: &str) -> Result<()> {
    let answer = tell(agent, line)?;
    ensure!(answer == "done", "{line}: {answer}");
    Ok(())
}

fn as_wanted(agent: &mut Agent) -> Result<()> {
    let seen = tell(agent, "observe")?;
    ensure!(seen == "as wanted", "{seen}");
    Ok(())
}

/// Runs `nft` on the host, and its process.
fn nft(lan: &Lan, words: &str) -> Result<u32> {
    let said = lan.at(Place::Host, &format!("echo $$; exec nft '{words}'"))?;
    let pid = said.lines().next().context("no pid")?;
    Ok(pid.parse()?)
}

#[test]
fn foreign_changes_are_seen_named_and_repaired_and_foreign_tables_stay() -> Result<()> {
    if !can_run("foreign_changes_are_seen") {
        return Ok(());
    }
    let lan = lan()?;
    nft(&lan, FOREIGN)?;
    let before = lan.at(Place::Host, "nft list ruleset")?;
    let mut agent = lan.filter(TAG)?;
    done(
        &mut agent,
        "want out forward=tcp,*,80-82,10.9.0.2,8080 sender=svlan-sql,02:00:00:00:00:0a,10.9.0.2,fd00:9::2",
    )?;
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)?;
    for (change, difference) in [
        ("delete table inet svlan", "inet svlan: missing"),
        ("delete table bridge svlan", "bridge svlan: missing"),
        (
            "add rule inet svlan forward drop",
            "inet svlan forward: a rule without a name is not ours",
        ),
        (
            "insert rule inet svlan forward accept comment \"in the way\"",
            "inet svlan forward: \"in the way\" is not ours",
        ),
        (
            "flush chain bridge svlan prerouting",
            "bridge svlan prerouting: \"from svlan-sql\" is missing",
        ),
        ("add chain inet svlan theirs", "inet svlan theirs: not ours"),
        (
            "add set inet svlan s { type ipv4_addr; }",
            "inet svlan: 1 objects of others",
        ),
        (
            "add table inet svlan { flags dormant; }",
            "inet svlan: switched off",
        ),
        (
            "add chain inet svlan forward { policy drop; }",
            "inet svlan forward: hooked in another way",
        ),
        (
            "add rule inet svlan postrouting oifname eth0 masquerade random",
            "inet svlan postrouting: a rule without a name is not ours",
        ),
    ] {
        // Neither our own changes nor those of foreign tables are told: the first news is this one's.
        nft(&lan, "add rule inet foreign c accept")?;
        nft(
            &lan,
            "flush chain inet foreign c; add rule inet foreign c ip saddr @s drop",
        )?;
        let pid = nft(&lan, change)?;
        let told = agent.expect("changed by").with_context(|| change.to_owned())?;
        ensure!(
            told == format!("changed by {pid} nft"),
            "{change} of {pid}: {told}"
        );
        let seen = tell(&mut agent, "observe")?;
        ensure!(seen == difference, "{change}: {seen}");
        done(&mut agent, "replace")?;
        as_wanted(&mut agent)?;
    }
    let pid = nft(&lan, "flush ruleset")?;
    ensure!(agent.expect("changed by")? == format!("changed by {pid} nft"));
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)?;
    nft(&lan, FOREIGN)?;
    done(&mut agent, "remove")?;
    ensure!(
        lan.at(Place::Host, "nft list ruleset")? == before,
        "others' tables"
    );
    Ok(())
}

#[test]
fn a_foreign_table_with_our_name_is_a_conflict_and_stays() -> Result<()> {
    if !can_run("a_foreign_table_with_our_name") {
        return Ok(());
    }
    let lan = lan()?;
    for comment in ["", "comment \"sovereign svother v1\";"] {
        nft(
            &lan,
            &format!("table bridge svlan {{ {comment} chain c {{ }}; }}"),
        )?;
        let before = lan.at(Place::Host, "nft -a list ruleset")?;
        let mut agent = lan.filter(TAG)?;
        for command in ["replace", "remove", "observe", "adopt"] {
            let answer = tell(&mut agent, command)?;
            ensure!(
                answer.starts_with("the table bridge svlan is not ours"),
                "{command}: {answer}"
            );
        }
        ensure!(lan.at(Place::Host, "nft -a list ruleset")? == before);
        nft(&lan, "flush ruleset")?;
        done(&mut agent, "replace")?;
        nft(&lan, "flush ruleset")?;
    }
    Ok(())
}

#[test]
fn two_instances_live_side_by_side_and_leftovers_are_found_by_their_mark() -> Result<()> {
    if !can_run("two_instances") {
        return Ok(());
    }
    let lan = lan()?;
    nft(&lan, FOREIGN)?;
    let before = lan.at(Place::Host, "nft -a list ruleset")?;
    let (mut one, mut two) = (lan.filter(TAG)?, lan.filter("svother")?);
    done(&mut one, "want senders=3")?;
    for agent in [&mut one, &mut two] {
        done(agent, "replace")?;
    }
    as_wanted(&mut one)?;
    as_wanted(&mut two)?;
    done(&mut one, "replace")?;
    ensure!(tell(&mut two, "leftovers")? == "inet svlan None; inet svother None; bridge svlan None");
    done(&mut one, "remove")?;
    as_wanted(&mut two)?;
    let news: Vec<_> = two
        .rest()
        .into_iter()
        .filter(|line| line.starts_with("changed"))
        .collect();
    ensure!(news.is_empty(), "{news:?}");
    done(&mut one, "replace")?;
    let mut collector = lan.filter("svgc")?;
    ensure!(tell(&mut collector, "collect")? == "removed 3");
    ensure!(lan.at(Place::Host, "nft -a list ruleset")? == before);
    Ok(())
}

#[test]
fn an_owned_table_is_out_of_reach_and_is_taken_over_from_the_dead() -> Result<()> {
    if !can_run("an_owned_table") {
        return Ok(());
    }
    let lan = lan()?;
    let mut agent = lan.filter(TAG)?;
    let traces = lan.at(Place::Host, "nft list ruleset")?;
    match tell(&mut agent, "probe")?.as_str() {
        "Owned" => {}
        "Plain" => {
            eprintln!("SKIPPED: an_owned_table (this kernel's tables cannot outlive their owner)");
            return Ok(());
        }
        other => anyhow::bail!("{other}"),
    }
    ensure!(
        lan.at(Place::Host, "nft list ruleset")? == traces,
        "a probe leaves nothing"
    );
    done(&mut agent, "own")?;
    done(&mut agent, "want senders=2")?;
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)?;
    for change in [
        "delete table inet svlan",
        "add rule inet svlan forward drop",
        "flush table bridge svlan",
    ] {
        let refused = nft(&lan, change)
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        ensure!(refused.contains("Operation not permitted"), "{change}: {refused}");
    }
    nft(&lan, "flush ruleset")?;
    as_wanted(&mut agent)?;
    let mut second = lan.filter(TAG)?;
    let answer = tell(&mut second, "replace")?;
    ensure!(
        answer.starts_with("the table inet svlan is owned by another"),
        "{answer}"
    );
    drop(agent); // SIGKILL
    done(&mut second, "own")?;
    done(&mut second, "want senders=2")?;
    let seen = tell(&mut second, "observe")?;
    ensure!(
        seen == "inet svlan: owned by nobody; bridge svlan: owned by nobody",
        "{seen}"
    );
    done(&mut second, "adopt")?;
    as_wanted(&mut second)?;
    ensure!(nft(&lan, "delete table bridge svlan").is_err());
    // A third replaces what the second left, without taking it over first.
    drop(second);
    let mut third = lan.filter(TAG)?;
    done(&mut third, "own")?;
    done(&mut third, "replace")?;
    as_wanted(&mut third)?;
    ensure!(nft(&lan, "delete table inet svlan").is_err());
    // And one that does not own them any more wants them plain.
    drop(third);
    let mut plain = lan.filter(TAG)?;
    let seen = tell(&mut plain, "observe")?;
    ensure!(seen == "inet svlan: owned, or kept for an owner", "{seen}");
    done(&mut plain, "replace")?;
    as_wanted(&mut plain)
}

#[test]
fn a_change_that_others_overtook_is_refused_and_made_again() -> Result<()> {
    if !can_run("a_change_that_others_overtook") {
        return Ok(());
    }
    let lan = lan()?;
    let record = tempfile::NamedTempFile::new()?;
    let path = record.path().to_str().context("a path that is no text")?;
    let strace = [
        "strace",
        "-f",
        "-o",
        path,
        "-e",
        "trace=recvfrom",
        AGENT,
        "run",
        TAG,
    ];
    let mut agent = lan.program(Place::Host, &strace)?;
    agent.expect("runs")?;
    let storm = "while :; do nft add table inet foreign; nft delete table inet foreign; done";
    let mut storm = lan
        .command(Place::Host, &["sh", "-c", storm])
        .stdin(Stdio::null())
        .spawn()?;
    // Until it was overtaken once, or 20 times 50 changes were not.
    let mut outcome = Ok(false);
    for _ in 0..20 {
        outcome = done(&mut agent, "replace 50").and_then(|()| {
            as_wanted(&mut agent)?;
            Ok(std::fs::read_to_string(path)?.contains("ERESTART"))
        });
        if !matches!(outcome, Ok(false)) {
            break;
        }
    }
    storm.kill()?;
    storm.wait()?;
    ensure!(outcome?, "nobody was faster in 1,000 tries");
    Ok(())
}

#[test]
fn lost_news_are_told_and_a_thousand_objects_are_one_batch() -> Result<()> {
    if !can_run("lost_news") {
        return Ok(());
    }
    let lan = lan()?;
    let mut agent = lan.agent(Place::Host, &["run", TAG, "1"])?;
    agent.expect("runs")?;
    // 20,000 messages of one change, more than any small buffer holds.
    let many = "(echo 'table ip t { set s { type inet_service; elements = {'; seq -s, 1 20000; echo '}; }; }') | nft -f -";
    signal(agent.pid(), Signal::STOP)?;
    lan.at(Place::Host, many)?;
    signal(agent.pid(), Signal::CONT)?;
    agent.expect("lost")?;
    let mut agent = lan.filter(TAG)?;
    done(
        &mut agent,
        "want out senders=1000 forwards=1000 forward=udp,*,20000-24095,10.9.0.2,30000",
    )?;
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)?;
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)
}

#[test]
fn a_probe_names_the_first_thing_that_does_not_work() -> Result<()> {
    if !can_run("a_probe_names") {
        return Ok(());
    }
    let lan = lan()?;
    // No name of a table is that long.
    let tag = "a".repeat(300);
    let answer = tell(&mut lan.filter(&tag)?, "probe")?;
    let expected = format!("nf_tables is of no use here: table inet {tag}-probe");
    ensure!(answer.starts_with(&expected), "{answer}");
    // Without the right, nothing is heard of changes and none is made.
    let words = ["setpriv", "--bounding-set", "-net_admin", AGENT, "run", TAG];
    ensure!(lan.program(Place::Host, &words)?.expect("runs").is_err());
    Ok(())
}

#[test]
fn an_ordinary_user_has_all_of_it_in_a_namespace_of_its_own() -> Result<()> {
    if !can_run("an_ordinary_user_has_all_of_it") {
        return Ok(());
    }
    let lan = lan()?;
    let copy = tempfile::Builder::new().prefix("svl").tempdir_in("/tmp")?;
    std::fs::set_permissions(copy.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let program = copy.path().join("agent");
    copy_program(Path::new(AGENT), &program)?; // its own directory may be closed to the user
    let program = program.to_str().context("a path that is no text")?;
    let user = NOBODY.to_string();
    let words = [
        "setpriv",
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
        "--",
    ];
    let words = [
        &words[..],
        &[
            "unshare",
            "--user",
            "--map-root-user",
            "--net",
            "--",
            program,
            "run",
            TAG,
        ],
    ]
    .concat();
    let mut agent = lan.program(Place::Host, &words)?;
    agent.expect("runs")?;
    let probed = tell(&mut agent, "probe")?;
    ensure!(["Owned", "Plain"].contains(&probed.as_str()), "{probed}");
    if probed == "Owned" {
        done(&mut agent, "own")?;
    }
    // Larger than the socket's own buffer.
    done(&mut agent, "want out senders=200 forwards=1000")?;
    done(&mut agent, "replace")?;
    as_wanted(&mut agent)
}
