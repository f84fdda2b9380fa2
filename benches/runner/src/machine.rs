//! What the figures were taken on, and how busy it was. No names: they say nothing about speed.

use std::fs;
use std::time::{Duration, SystemTime};

use serde::Serialize;

/// This machine at one moment.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    /// Its processor.
    pub(crate) cpu: String,
    /// How many of them this process may use.
    pub(crate) cores: usize,
    /// Its memory.
    pub(crate) memory_mib: u64,
    /// Its kernel.
    pub(crate) kernel: String,
    /// Load averages (1, 5, 15 minutes) before and after the run.
    pub(crate) load: Vec<String>,
    /// Seconds since 1970.
    pub(crate) unix_time: u64,
}

impl Machine {
    /// Reads /proc.
    pub(crate) fn read() -> Self {
        let text = |path| fs::read_to_string(path).unwrap_or_default();
        let cpu = field(&text("/proc/cpuinfo"), "model name").unwrap_or_else(|| "unknown".to_owned());
        let memory = field(&text("/proc/meminfo"), "MemTotal").unwrap_or_default();
        let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or(0);
        let since_1970 = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            cpu,
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: kib >> 10,
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: vec![load()],
            unix_time: since_1970.as_secs(),
        }
    }
}

/// The three load averages now.
pub(crate) fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// When a process began, by the wall clock as it is now; the kernel counts in steps of 10 ms.
pub(crate) fn started(pid: u32) -> Option<SystemTime> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): field 22; the name in parentheses may hold anything.
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let since_boot = Duration::from_millis(ticks * 10); // USER_HZ is 100 on every Linux that we run on
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.try_into().ok()?, now.tv_nsec.try_into().ok()?);
    SystemTime::now().checked_sub(now.checked_sub(since_boot)?)
}

/// Resident bytes of a process, in KiB.
pub(crate) fn resident_kib(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    resident_in(&status)
}

/// `VmRSS` in a process's status file (proc_pid_status(5)), in KiB.
pub(crate) fn resident_in(status: &str) -> Option<f64> {
    field(status, "VmRSS")?
        .trim_end_matches(" kB")
        .trim()
        .parse()
        .ok()
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_began_before_now_and_not_long_ago() {
        let begun = started(std::process::id()).unwrap();
        assert!(begun.elapsed().is_ok_and(|age| age < Duration::from_secs(600)));
        assert_eq!(started(0), None);
    }

    #[test]
    fn resident_memory_is_read_from_a_status_file() {
        assert_eq!(resident_in("Name:\tx\nVmRSS:\t    1234 kB\n"), Some(1234.0));
        assert_eq!(resident_in("Name:\tkthread\n"), None);
        assert!(resident_kib(std::process::id()).is_some_and(|kib| kib > 100.0));
    }
}
