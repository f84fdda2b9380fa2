//! What a thousand guests cost the host agent's core: its world and feed, filled by events alone.
//!
//! Not measured here: links, shims and sockets of real guests. Each size runs in a process of its own, so that one
//! does not find the other's memory.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sovereign_host_agent::core::{Edition, Event, World};
use sovereign_host_agent::shim::contract::{Machine, VmmState};
use sovereign_protocol::condition::{Condition, Key, Layer, Status, Verdict};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{
    Forward, GuestConfig, HostSpec, Image, Restart, Service, ServiceKind, VERSION,
};
use sovereign_protocol::status::VmmStatus;

use crate::machine::resident_kib;
use crate::report::{Row, Target};
use crate::samples::Samples;

/// The argument that makes this program a world of so many guests.
pub(crate) const VERB: &str = "run-fleet";
/// The many guests of the budget.
const MANY: usize = 1_000;
/// Steps whose time is taken, once all guests are there.
const STEPS: usize = 50;
/// What a guest with PostgreSQL tells, as `sovereign status --json` shows it.
const CONDITIONS: [(Layer, &str); 9] = [
    (Layer::Kernel, "contract"),
    (Layer::Clock, "realtime"),
    (Layer::Disk, "data"),
    (Layer::Loopback, "lo"),
    (Layer::Interface, "interface"),
    (Layer::Interface, "route"),
    (Layer::Interface, "resolver"),
    (Layer::Service, "postgres"),
    (Layer::Tailscale, "daemon"),
];

/// One size's figures.
#[derive(Debug, Serialize, Deserialize)]
struct Figures {
    /// Memory that the guests added.
    added_kib: f64,
    /// A changed condition of one guest, in microseconds, sorted.
    step_us: Vec<f64>,
    /// The status of all guests as JSON.
    report_ms: f64,
    /// Guests that are Ready in it.
    ready: usize,
}

/// Runs this program once per size.
pub(crate) fn measure() -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    let how = "core world and feed of the host agent with fake guests of nine conditions, in a process of its own; \
               no links, no shims";
    for count in [1, MANY] {
        let output = Command::new(std::env::current_exe()?)
            .args([VERB, &count.to_string()])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let complaint = String::from_utf8_lossy(&output.stderr);
        let figures: Figures =
            serde_json::from_str(&said).with_context(|| format!("{count} guests: {said}{complaint}"))?;
        let one = |value: f64| {
            let mut samples = Samples::default();
            samples.value(value);
            samples
        };
        let mut steps = Samples::default();
        figures.step_us.iter().for_each(|time| steps.value(*time));
        let what = |what: &str| format!("{what}, {count} fake guests");
        #[allow(clippy::cast_precision_loss)] // a thousand
        let each = figures.added_kib / count as f64;
        rows.push(Row::of(what("one condition changes"), "us", &steps, how));
        rows.push(Row::of(
            what("status as JSON"),
            "ms",
            &one(figures.report_ms),
            how,
        ));
        if count == MANY {
            rows.push(Row::of("memory per fake guest", "KiB", &one(each), how).target(Target::AtMost(64.0)));
            #[allow(clippy::cast_precision_loss)]
            let ready = one(figures.ready as f64);
            rows.push(Row::of(what("Ready"), "", &ready, how).target(Target::AtLeast(1_000.0)));
        }
    }
    Ok(rows)
}

/// The other side of [`measure`]: fills a world and prints its figures.
pub(crate) fn run(count: usize) -> anyhow::Result<()> {
    let pid = std::process::id();
    let names: Vec<Name> = (0..count)
        .map(|number| Name::parse(&format!("guest-{number}")))
        .collect::<Result<_, _>>()?;
    let before = resident_kib(pid).context("no memory of this process")?;
    let mut world = World::new(1);
    let guests: BTreeMap<Name, GuestConfig> = names.iter().map(|name| (name.clone(), config())).collect();
    let spec = HostSpec {
        version: VERSION,
        network: None,
        guests,
    };
    world.step(Event::Applied(spec), 0);
    for name in &names {
        for event in life(name) {
            world.step(event, 1);
        }
    }
    let added_kib = resident_kib(pid).context("no memory of this process")? - before;
    let mut step_us = Vec::new();
    for turn in 0..STEPS {
        let status = if turn % 2 == 0 {
            Status::False
        } else {
            Status::True
        };
        let event = conditions(&names[turn / 2 % count], &[(Layer::Service, "postgres")], status);
        let begun = Instant::now();
        world.step(event, 2);
        step_us.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    let begun = Instant::now();
    let report = world.report(&Name::parse("bench")?, 3, |ms| ms.to_string());
    let bytes = serde_json::to_vec(&report)?;
    let report_ms = begun.elapsed().as_secs_f64() * 1e3;
    anyhow::ensure!(bytes.len() > count, "an empty report");
    let ready = report
        .guests
        .iter()
        .filter(|guest| guest.ready == Status::True)
        .count();
    let figures = Figures {
        added_kib,
        step_us,
        report_ms,
        ready,
    };
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// From the boot to Ready.
fn life(name: &Name) -> Vec<Event> {
    let vmm = VmmStatus {
        kind: "qemu".to_owned(),
        accel: "tcg".to_owned(),
        why: "/dev/kvm is there, but the guest's kernel did not run under it".to_owned(),
        pid: 7,
    };
    let first = Edition {
        revision: 1,
        judged: 0,
    };
    vec![
        Event::Booted {
            guest: name.clone(),
            boot_id: "0123456789abcdef0123456789abcdef".to_owned(),
            vmm,
            machine: Machine::wanted(&config(), false),
        },
        Event::VmmState(name.clone(), VmmState::Says("running".to_owned())),
        Event::SessionUp(name.clone(), "agent 0.1.0 speaks version 1".to_owned()),
        Event::SpecApplied(name.clone(), first, None),
        conditions(name, &CONDITIONS, Status::True),
    ]
}

fn conditions(name: &Name, what: &[(Layer, &str)], status: Status) -> Event {
    let conditions = what
        .iter()
        .map(|(layer, subject)| Condition {
            key: Key::new(*layer, *subject),
            verdict: Verdict::new(
                status,
                "Observed",
                "PostgreSQL 17.12: log-in as sovereign_probe and SELECT 1 answered, not in recovery",
            ),
            age_ms: 0,
            valid_ms: 3_600_000,
            since_ms: 0,
        })
        .collect();
    let cursor = Cursor {
        incarnation: 1,
        revision: 1,
    };
    let changes = Changes {
        cursor,
        reset: false,
        conditions,
        removed: Vec::new(),
    };
    Event::Conditions(name.clone(), changes)
}

fn config() -> GuestConfig {
    let path = |name: &str| {
        format!("/root/.cache/sovereign/images/{name}-0123456789abcdef0123456789abcdef.erofs").into()
    };
    GuestConfig {
        memory_mib: 256,
        vcpus: 1,
        data_mib: 512,
        image: Image {
            kernel: path("kernel"),
            initramfs: path("initramfs"),
            root: path("root"),
            agent: path("agent"),
            digest: "0123456789abcdef0123456789abcdef".to_owned(),
        },
        services: vec![Service {
            name: postgres(),
            kind: ServiceKind::Postgres {
                settings: BTreeMap::new(),
                port: 5432,
            },
            limits: None,
            requires: None,
        }],
        forwards: Vec::<Forward>::new(),
        restart: Restart::default(),
        interface: None,
        tailscale: None,
    }
}

fn postgres() -> Name {
    Name::parse("postgres").unwrap_or_else(|_| unreachable!("a valid name"))
}
