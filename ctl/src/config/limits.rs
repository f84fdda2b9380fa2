//! What a service may use: as written, and as the contract has it.

use sovereign_protocol::spec::Limits;

use super::source::Source;
use super::{Problem, keys, values, written};

/// The limits at `path`; `None` when none is set.
///
/// # Errors
/// The first value that is none, or is out of its limits.
pub(super) fn of(
    source: &Source<'_>,
    path: &[&str],
    written: Option<written::Limits>,
) -> Result<Option<Limits>, Box<Problem>> {
    let written = written.unwrap_or_default();
    let at = |key| [path, &[key]].concat();
    let (memory, cpu) = (written.memory.as_deref(), written.cpu.as_deref());
    let limits = Limits {
        memory_max_mib: values::size(source, &at("memory"), memory, &keys::LIMIT_MEMORY)?,
        cpu_percent: values::percent(source, &at("cpu"), cpu, &keys::LIMIT_CPU)?,
        pids_max: values::count(source, &at("tasks"), written.tasks, &keys::LIMIT_TASKS)?,
    };
    Ok((limits != Limits::default()).then_some(limits))
}
