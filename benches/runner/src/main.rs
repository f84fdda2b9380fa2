//! Runs the measurements that this machine can run, prints one table and writes the same as JSON.
//!
//! No figure is a test: nothing here fails because something is slow. What cannot be measured is said aloud as
//! SKIPPED. It opens no AF_VSOCK socket: that happens in guests only.

mod clock;
mod fleet;
mod image;
mod interrupt;
mod machine;
mod network;
mod places;
mod product;
mod report;
mod rpc;
mod samples;
mod size;
mod vm;
mod vsock;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use machine::Machine;
use places::Places;
use report::Report;

/// The parts, in the order in which they run.
const PARTS: [&str; 6] = ["size", "rpc", "vsock", "network", "product", "fleet"];

/// One run, as JSON.
#[derive(Serialize)]
struct Run {
    machine: Machine,
    #[serde(flatten)]
    report: Report,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    sovereign_tests::guard::refuse_vsock(); // of this process and of all that it starts
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    match &words[..] {
        [verb, vhost, front] if verb == vsock::VERB => {
            return vsock::serve_device(vhost.as_ref(), front.as_ref());
        }
        [verb, count] if verb == fleet::VERB => {
            return fleet::run(count.to_str().context("not a number")?.parse()?);
        }
        [verb, words @ ..] if verb == network::VERB => {
            let words: Option<Vec<&str>> = words.iter().map(|word| word.to_str()).collect();
            return network::run(&words.context("not a text")?);
        }
        _ => {}
    }
    let (places, parts) = places::arguments(words.into_iter())?;
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(&part.as_str())) {
        anyhow::bail!("no part {unknown}; there are {}", PARTS.join(", "));
    }
    interrupt::watch()?;
    let mut machine = Machine::read();
    let mut report = Report::default();
    for part in PARTS.into_iter().filter(|part| wanted(part)) {
        eprintln!("-- {part}");
        measure(part, &places, &mut report);
    }
    machine.load.push(machine::load());
    finish(&places, Run { machine, report })
}

fn measure(part: &str, places: &Places, report: &mut Report) {
    match part {
        "size" => report.part(part, size::measure(places)),
        "rpc" => report.part(part, rpc::measure()),
        "vsock" => report.part(part, vsock::measure(places)),
        "network" => network::measure(report),
        "fleet" => report.part(part, fleet::measure()),
        _ => {
            if let Err(error) = product::measure(places, report) {
                report.skip(part, format!("{error:#}"));
            }
        }
    }
}

fn finish(places: &Places, run: Run) -> anyhow::Result<()> {
    let machine = &run.machine;
    println!(
        "{}, {} cores, {} MiB, Linux {}; load before and after: {}",
        machine.cpu,
        machine.cores,
        machine.memory_mib,
        machine.kernel,
        machine.load.join(" | ")
    );
    print!("{}", run.report.table());
    let path = places.out.join("results.json");
    std::fs::create_dir_all(&places.out)?;
    std::fs::write(&path, serde_json::to_vec_pretty(&run)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}
