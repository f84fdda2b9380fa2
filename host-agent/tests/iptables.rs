//! The real programs, legacy and nft, on real tables of a namespace; and programs that misbehave.

#![allow(clippy::unwrap_used)] // helpers of tests are tests: clippy.toml excepts only functions marked as such
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sovereign_host_agent::net::iptables::{
    Found, Iptables, IptablesError, Namespace, Variant, probe, probe_in,
};
use sovereign_protocol::port::{Ports, Transport};
use sovereign_reconcile::filter::{Filter, PortForward, WayOut};
use sovereign_reconcile::iptables::{Able, Family, Observed, Table, Wanted, plan, remove, tags, wanted};
use sovereign_reconcile::names::LinkName;

const TAG: &str = "sv5pkj";
const INSIDE: &str = "SOVEREIGN_TEST_INSIDE";

/// Runs the test of this name in namespaces of its own, with a lock file of its own; true when this is there already.
fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some_and(|name| name == test) {
        sh("mount -t tmpfs none /run; ip link set lo up");
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount"]);
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let status = command
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, test)
        .status()
        .unwrap();
    assert!(status.success(), "{test} inside its namespaces: {status}");
    false
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

fn forward(transport: Transport, listen: Option<&str>, ports: &str, to: &str, to_port: u16) -> PortForward {
    PortForward {
        transport,
        listen: listen.map(|text| text.parse().unwrap()),
        ports: Ports::parse(ports).unwrap(),
        to: to.parse().unwrap(),
        to_port,
    }
}

fn all() -> Able {
    Able {
        tables: Table::ALL.into(),
        marks: true,
    }
}

fn filter() -> Filter {
    use Transport::{Tcp, Udp};
    Filter {
        tag: TAG.to_owned(),
        bridge: LinkName::parse(TAG).unwrap(),
        subnets: [
            "192.168.100.0/24",
            "10.9.0.0/16",
            "fd00:1::/64",
            "fd00:0:0:2::/64",
        ]
        .map(|text| text.parse().unwrap())
        .into(),
        way_out: WayOut::Masquerade,
        forwards: [
            forward(Tcp, None, "15432", "192.168.100.2", 5432),
            forward(Tcp, None, "80", "192.168.100.2", 80),
            forward(Udp, None, "5000-5010", "192.168.100.2", 6000),
            forward(Udp, Some("10.0.0.5"), "53", "192.168.100.3", 53),
            forward(Tcp, Some("10.0.0.5"), "8000-8009", "192.168.100.3", 8000),
            forward(Tcp, None, "443", "fd00:1::3", 8443),
            forward(Udp, Some("fd01::5"), "7-9", "fd00:1::3", 17),
            forward(Udp, Some("fd01:0:0:1::"), "70-90", "fd00:1::3", 70),
        ]
        .into(),
        answers: [("eth0", 0x0400_0000), ("wlan0", 0x1c00_0000)]
            .map(|(link, mark)| (LinkName::parse(link).unwrap(), mark))
            .into(),
        senders: [].into(),
    }
}

/// Other people's rules, in both tables that we share with them, with a comment that no line can hold.
const FOREIGN: &str = r#"
    R=$1; S=$2
    printf '%s\n' '*filter' ':theirs - [0:0]' '-A FORWARD -j theirs' \
        '-A theirs -m comment --comment "not '"sv5pkj-forward"' \"ours\"" -j DROP' \
        ':svabcd-forward - [0:0]' '-I FORWARD -m comment --comment svabcd -j svabcd-forward' COMMIT \
        '*nat' '-A POSTROUTING -s 10.0.0.0/8 -j MASQUERADE' COMMIT | $R --noflush
"#;

fn programs(found: &Found, variant: Variant) -> &Iptables {
    let working = found
        .working
        .iter()
        .find(|iptables| iptables.variant() == variant);
    working.unwrap_or_else(|| panic!("{variant:?} does not work: {:?}", found.failures))
}

async fn observe(iptables: &Iptables, family: Family) -> Observed {
    iptables.observe(family, TAG).await.unwrap()
}

/// Plans and applies, then nothing must be left to plan.
async fn converge(iptables: &Iptables, family: Family, wanted: &Wanted) -> bool {
    let Some(change) = plan(wanted, &observe(iptables, family).await) else {
        return false;
    };
    iptables
        .apply(family, &change)
        .await
        .unwrap_or_else(|error| panic!("{error}\n{change}"));
    let left = plan(wanted, &observe(iptables, family).await);
    let left = left.map(|left| left.to_string()).unwrap_or_default();
    assert_eq!(left, "", "after\n{change}");
    true
}

/// A text without what is ours and without times.
fn foreign(save: &str) -> Vec<&str> {
    let lasting = save.lines().filter(|line| !line.starts_with('#'));
    lasting
        .filter(|line| {
            !line.contains(":sv5pkj") && !line.contains("-j sv5pkj") && !line.contains("-A sv5pkj")
        })
        .collect()
}

async fn both_families(variant: Variant, name: &str) {
    let found = probe(Namespace::Own).await.unwrap();
    let iptables = programs(&found, variant);
    for (family, program) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
        assert_eq!(iptables.able(family), all(), "{:?}", found.failures);
        let v4 = family == Family::V4;
        if v4 {
            let set = format!("set -- {program}-{name}-restore {program}-{name}-save; {FOREIGN}");
            sh(&set);
        }
        let all = wanted(&filter(), family, &iptables.able(family)).unwrap();
        assert!(converge(iptables, family, &all).await);
        assert!(
            !converge(iptables, family, &all).await,
            "up; up changes something"
        );

        // Somebody flushes, adds, and puts his own rule first; then it is as before.
        let rule = if v4 { "-s 10.1.0.0/16" } else { "-s fd09::/64" };
        for disturbance in [
            format!("{program}-{name} -F FORWARD"),
            format!("{program}-{name} -t nat -F"),
            format!("{program}-{name} -t mangle -F; {program}-{name} -t mangle -X"),
            format!("{program}-{name} -t nat -I PREROUTING {rule} -j RETURN"),
            format!("{program}-{name} -A sv5pkj-forward -j ACCEPT"),
            format!("{program}-{name} -A FORWARD -m comment --comment sv5pkj -j sv5pkj-forward"),
        ] {
            sh(&disturbance);
            let others = iptables.save(family).await.unwrap();
            assert!(converge(iptables, family, &all).await, "{disturbance}");
            let now = iptables.save(family).await.unwrap();
            assert_eq!(foreign(&others), foreign(&now), "{disturbance}");
        }
        let mut less = filter();
        less.way_out = WayOut::None;
        less.forwards.clear();
        let less = wanted(&less, family, &iptables.able(family)).unwrap();
        assert!(converge(iptables, family, &less).await);
        assert!(converge(iptables, family, &all).await);

        let before = iptables.save(family).await.unwrap();
        assert!(tags(&before).contains(TAG));
        let gone = remove(&observe(iptables, family).await).unwrap();
        iptables.apply(family, &gone).await.unwrap();
        let after = iptables.save(family).await.unwrap();
        let all = after.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(
            all.collect::<Vec<_>>(),
            foreign(&before),
            "all of ours is gone, and nothing else"
        );
        assert!(
            !v4 || after.contains("-A theirs -m comment --comment \"not sv5pkj"),
            "{after}"
        );
    }
}

fn on_this_thread(future: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future);
}

#[test]
fn the_legacy_programs_take_and_print_what_we_mean() {
    if inside("the_legacy_programs_take_and_print_what_we_mean") {
        on_this_thread(both_families(Variant::Legacy, "legacy"));
    }
}

#[test]
fn the_nft_programs_take_and_print_what_we_mean() {
    if inside("the_nft_programs_take_and_print_what_we_mean") {
        on_this_thread(both_families(Variant::Nft, "nft"));
    }
}

/// Programs that are scripts.
struct Fakes(tempfile::TempDir);

impl Fakes {
    fn new(scripts: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, script) in scripts {
            let path = dir.path().join(name);
            std::fs::write(
                &path,
                format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display()),
            )
            .unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(dir)
    }

    async fn probe(&self) -> Found {
        probe_in(&[self.0.path().to_owned()], Namespace::Own)
            .await
            .unwrap()
    }

    fn count(&self, file: &str) -> usize {
        std::fs::read_to_string(self.0.path().join(file))
            .unwrap_or_default()
            .lines()
            .count()
    }
}

fn change() -> sovereign_reconcile::iptables::Restore {
    let wanted = wanted(&filter(), Family::V4, &all()).unwrap();
    let nothing = Observed {
        tag: TAG.to_owned(),
        ..Observed::default()
    };
    plan(&wanted, &nothing).unwrap()
}

#[tokio::test]
async fn a_program_that_lacks_a_resource_is_asked_again_a_few_times() {
    let taken =
        "mv in last; echo >> runs; test $(wc -l < runs) -ge 6 || { echo 'line 2 failed' >&2; exit 4; }";
    let restore = format!("cat > in; test $(wc -l < in) -le 3 || {{ {taken}; }}");
    let fakes = Fakes::new(&[("iptables-save", "true"), ("iptables-restore", &restore)]);
    let found = fakes.probe().await;
    let iptables = programs(&found, Variant::Plain);
    let failed = iptables.apply(Family::V4, &change()).await.unwrap_err();
    assert_eq!(fakes.count("runs"), 4, "{failed}");
    assert!(
        failed
            .to_string()
            .contains("exit status: 4: line 2 failed (at: :sv5pkj-forward"),
        "{failed}"
    );
    iptables.apply(Family::V4, &change()).await.unwrap();
    assert_eq!(fakes.count("runs"), 6);
    let text = std::fs::read_to_string(fakes.0.path().join("last")).unwrap();
    assert_eq!(text, change().to_string());
    assert!(matches!(
        iptables.apply(Family::V6, &change()).await,
        Err(IptablesError::NoFamily(Family::V6))
    ));
}

#[tokio::test]
async fn a_missing_table_an_old_program_and_an_absent_one_are_told_apart() {
    let save = "case \"$2\" in nat) echo \"can't initialize ip6tables table \\`nat'\" >&2; exit 3;; esac";
    let old = "case \"$*\" in *wait*) echo unrecognized option >&2; exit 2;; esac; echo \"$@\" >> runs; cat > /dev/null";
    let fakes = Fakes::new(&[("iptables-save", save), ("iptables-restore", old)]);
    let found = fakes.probe().await;
    let iptables = programs(&found, Variant::Plain);
    assert_eq!(
        iptables.able(Family::V4).tables,
        [Table::Filter, Table::Mangle].into()
    );
    assert_eq!(iptables.able(Family::V6).tables, [].into());
    assert_eq!(found.working.len(), 1);
    let told: Vec<_> = found.failures.iter().map(ToString::to_string).collect();
    assert!(
        told.iter()
            .any(|told| told.contains("exit status: 3: can't initialize")),
        "{told:?}"
    );
    assert!(
        told.contains(&"ip6tables-save is not installed".to_owned()),
        "{told:?}"
    );
    iptables.apply(Family::V4, &change()).await.unwrap();
    let runs = std::fs::read_to_string(fakes.0.path().join("runs")).unwrap();
    assert_eq!(runs.lines().last(), Some("--noflush"));

    let null = std::fs::File::open("/dev/null").unwrap();
    let other = Namespace::Other(std::os::fd::AsFd::as_fd(&null));
    assert!(matches!(probe(other).await, Err(IptablesError::Unsupported)));
}

#[tokio::test]
async fn a_program_that_hangs_or_floods_is_ended() {
    let save = "test -e bad || exit 0; exec yes x";
    let restore = "test -e bad || { cat > /dev/null; exit 0; }; echo $$ > pid; exec sleep 600";
    let fakes = Fakes::new(&[("iptables-save", save), ("iptables-restore", restore)]);
    let found = fakes.probe().await;
    let iptables = programs(&found, Variant::Plain);
    std::fs::write(fakes.0.path().join("bad"), "").unwrap();
    let flood = iptables.observe(Family::V4, TAG).await.unwrap_err();
    assert!(matches!(flood, IptablesError::TooMuch { .. }), "{flood}");
    let begun = Instant::now();
    let late = iptables.apply(Family::V4, &change()).await.unwrap_err();
    assert!(matches!(late, IptablesError::Late { .. }), "{late}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    let pid = std::fs::read_to_string(fakes.0.path().join("pid")).unwrap();
    let process = PathBuf::from(format!("/proc/{}", pid.trim()));
    assert!(!lives(&process), "the program outlives its deadline");
}

/// Whether a process still runs; a killed one is gone as soon as it is reaped.
fn lives(process: &Path) -> bool {
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let stat = std::fs::read_to_string(process.join("stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return false;
        }
        std::thread::yield_now();
    }
    true
}
