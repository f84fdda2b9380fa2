//! What a service may use: as written, and as the contract has it.

use std::ops::RangeInclusive;

use sovereign_protocol::limits::{SERVICE_CPU_PERCENT, SERVICE_MEMORY_MIB, SERVICE_TASKS};
use sovereign_protocol::spec::Limits;

use super::source::Source;
use super::{Problem, size, written};

/// The limits at `path`; `None` when none is set.
///
/// # Errors
/// The first value that is none, or is out of its range.
pub(super) fn of(
    source: &Source<'_>,
    path: &[&str],
    written: Option<written::Limits>,
) -> Result<Option<Limits>, Box<Problem>> {
    let written = written.unwrap_or_default();
    let memory = [path, &["memory"]].concat();
    let memory_max_mib = size::of(source, &memory, written.memory.as_deref())?;
    if let Some(mib) = memory_max_mib.filter(|mib| !SERVICE_MEMORY_MIB.contains(mib)) {
        let problem = source.problem(&memory, "OutOfRange", format!("{mib} MiB is no limit of memory"));
        return Err(problem.accepts(words(&SERVICE_MEMORY_MIB, " MiB")));
    }
    let cpu = [path, &["cpu"]].concat();
    let cpu_percent = written.cpu.map(|text| {
        let number = text
            .strip_suffix('%')
            .and_then(|number| number.trim_end().parse().ok());
        number
            .filter(|number| SERVICE_CPU_PERCENT.contains(number))
            .ok_or_else(|| {
                let problem = source.problem(
                    &cpu,
                    "OutOfRange",
                    format!("{text:?} is no limit of processor time"),
                );
                let form = format!(
                    "{}, such as \"150%\": one CPU and a half",
                    words(&SERVICE_CPU_PERCENT, "%")
                );
                problem.accepts(form)
            })
    });
    let tasks = [path, &["tasks"]].concat();
    let pids_max = written.tasks.map(|count| {
        let number = u32::try_from(count)
            .ok()
            .filter(|number| SERVICE_TASKS.contains(number));
        number.ok_or_else(|| {
            let problem = source.problem(&tasks, "OutOfRange", format!("{count} is no limit of processes"));
            problem.accepts(words(&SERVICE_TASKS, ""))
        })
    });
    let limits = Limits {
        memory_max_mib,
        cpu_percent: cpu_percent.transpose()?,
        pids_max: pids_max.transpose()?,
    };
    Ok((limits != Limits::default()).then_some(limits))
}

fn words(range: &RangeInclusive<u32>, unit: &str) -> String {
    format!("{}{unit} to {}{unit}", range.start(), range.end())
}
