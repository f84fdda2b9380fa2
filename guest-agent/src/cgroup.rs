//! cgroup v2: one per service, its processes, its limits. Nothing here knows what the service is.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sovereign_protocol::spec::Limits;

use crate::places;

/// What limits need; init hands them down.
const CONTROLLERS: &[&str] = &["cpu", "memory", "pids"];
/// The period of `cpu.max`, in microseconds; the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// The cgroup of one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// That of a service of this guest.
    #[must_use]
    pub fn of_service(name: &str) -> Self {
        Self(Path::new(places::CGROUP).join(name))
    }

    /// Any directory. Tests have their own.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes it, if it is not there.
    ///
    /// # Errors
    /// The system's own.
    pub fn make(&self) -> io::Result<()> {
        fs::create_dir_all(&self.0)
    }

    /// Its processes; none when it is not there.
    ///
    /// # Errors
    /// The system's own.
    pub fn members(&self) -> io::Result<Vec<u32>> {
        match fs::read_to_string(self.0.join("cgroup.procs")) {
            Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Ends all its processes now.
    ///
    /// # Errors
    /// The system's own.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.0.join("cgroup.kill"), "1")
    }

    /// Sets what its processes may use together, from now on.
    ///
    /// # Errors
    /// Every limit that cannot be set, in words. A missing controller is no error where nothing is limited.
    pub fn limit(&self, limits: &Limits) -> Result<(), String> {
        let failed = |(file, value): (&str, String)| {
            let set = fs::read_to_string(self.0.join(file)).and_then(|now| {
                if now.trim() == value {
                    Ok(())
                } else {
                    fs::write(self.0.join(file), &value)
                }
            });
            match set {
                Err(error) if error.kind() == io::ErrorKind::NotFound && value.starts_with("max") => None,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Some(format!("{file} = {value}: the kernel does not offer this limit"))
                }
                Err(error) => Some(format!("{file} = {value}: {error}")),
                Ok(()) => None,
            }
        };
        let failures: Vec<String> = files(limits).into_iter().filter_map(failed).collect();
        if failures.is_empty() {
            Ok(())
        } else {
            Err(failures.join("; "))
        }
    }
}

/// The files of a cgroup and what stands in them.
fn files(limits: &Limits) -> [(&'static str, String); 3] {
    let or_max = |value: Option<u64>| value.map_or_else(|| "max".to_owned(), |value| value.to_string());
    let memory = limits.memory_max_mib.map(|mib| u64::from(mib) << 20);
    let quota = limits
        .cpu_percent
        .map(|percent| u64::from(percent) * CPU_PERIOD_US / 100);
    [
        ("memory.max", or_max(memory)),
        ("cpu.max", format!("{} {CPU_PERIOD_US}", or_max(quota))),
        ("pids.max", or_max(limits.pids_max.map(u64::from))),
    ]
}

/// PID 1's part: makes the cgroup of all services and hands the controllers down to it.
///
/// # Errors
/// Every controller that cannot be handed down, in words.
pub fn delegate() -> Result<(), String> {
    let services = Path::new(places::CGROUP);
    let top = services.parent().unwrap_or(services);
    fs::create_dir_all(services).map_err(|error| format!("{}: {error}", services.display()))?;
    let failures: Vec<String> = [top, services].into_iter().flat_map(hand_down).collect();
    if failures.is_empty() {
        Ok(())
    } else {
        Err(failures.join("; "))
    }
}

/// One by one: a single unknown name would refuse them all.
fn hand_down(cgroup: &Path) -> Vec<String> {
    let enable = |name: &&str| {
        let enabled = fs::write(cgroup.join("cgroup.subtree_control"), format!("+{name}"));
        enabled
            .err()
            .map(|error| format!("{} {name}: {error}", cgroup.display()))
    };
    CONTROLLERS.iter().filter_map(enable).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits {
            memory_max_mib: Some(128),
            cpu_percent: Some(150),
            pids_max: Some(40),
        }
    }

    /// A directory that looks like a cgroup with these files.
    fn cgroup(names: &[&str]) -> (tempfile::TempDir, Cgroup) {
        let directory = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(directory.path().join(name), "max\n").unwrap();
        }
        let cgroup = Cgroup::at(directory.path());
        (directory, cgroup)
    }

    fn read(cgroup: &Cgroup) -> [String; 3] {
        ["memory.max", "cpu.max", "pids.max"]
            .map(|name| fs::read_to_string(cgroup.path().join(name)).unwrap())
    }

    #[test]
    fn limits_are_set_changed_and_lifted() {
        let (_directory, cgroup) = cgroup(&["memory.max", "cpu.max", "pids.max"]);
        cgroup.limit(&limits()).unwrap();
        assert_eq!(read(&cgroup), ["134217728", "150000 100000", "40"]);
        cgroup.limit(&Limits::default()).unwrap();
        assert_eq!(
            read(&cgroup),
            ["max\n", "max 100000", "max"].map(|s| s.trim_end_matches('\n'))
        );
    }

    #[test]
    fn a_kernel_without_controllers_is_told_only_when_something_is_limited() {
        let (_directory, cgroup) = cgroup(&["pids.max"]);
        cgroup.limit(&Limits::default()).unwrap();
        let error = cgroup.limit(&limits()).unwrap_err();
        assert_eq!(
            error,
            "memory.max = 134217728: the kernel does not offer this limit; \
             cpu.max = 150000 100000: the kernel does not offer this limit"
        );
        assert_eq!(fs::read_to_string(cgroup.path().join("pids.max")).unwrap(), "40");
    }

    #[test]
    fn a_cgroup_that_is_not_there_has_no_members() {
        let (_directory, cgroup) = cgroup(&[]);
        assert_eq!(cgroup.members().unwrap(), [0u32; 0]);
        fs::write(cgroup.path().join("cgroup.procs"), "7\n8\n").unwrap();
        assert_eq!(cgroup.members().unwrap(), [7, 8]);
        cgroup.kill().unwrap();
        assert_eq!(
            fs::read_to_string(cgroup.path().join("cgroup.kill")).unwrap(),
            "1"
        );
    }
}
