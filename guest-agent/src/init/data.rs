//! The data disk: formatted once, checked, mounted, grown, and bound to the services' directories under /var/lib.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sovereign_protocol::boot::{DATA_LABEL, DATA_SERIAL};

use super::disks::{self, Plan};
use super::mounts;
use crate::facts::DataFact;
use crate::places;

/// How long the data disk may take to show, after the other two have.
const WAIT: Duration = Duration::from_secs(3);
/// Arguments of mkfs.ext4: nothing is written that the kernel can write later.
pub const MKFS: &[&str] = &[
    "-q",
    "-F",
    "-L",
    DATA_LABEL,
    "-m",
    "1",
    "-E",
    "lazy_itable_init=1,lazy_journal_init=1,nodiscard",
];
/// The directories under /var/lib that live on the data disk, where the image has them.
const SERVICE_DIRECTORIES: &[&str] = &[places::PG_DATA];
/// e2fsck's exit status: from this bit on something is left wrong.
const E2FSCK_FAILED: i32 = 4;

/// Brings the data disk up as far as it goes.
pub(super) fn bring(may_format: bool) -> DataFact {
    match try_bring(may_format) {
        Ok(fact) => fact,
        Err(fact) => fact,
    }
}

fn try_bring(may_format: bool) -> Result<DataFact, DataFact> {
    let failed = |reason: &'static str| move |error: io::Error| fact(false, reason, &error.to_string());
    let disk = disks::wait(DATA_SERIAL, WAIT).map_err(failed("Missing"))?;
    let (content, bytes) = disks::inspect(&disk).map_err(failed("Unreadable"))?;
    let (reason, grow) = match disks::plan(&content, bytes, may_format) {
        Plan::Refuse { reason, evidence } => return Err(fact(false, reason, &evidence)),
        Plan::Format => {
            tool("/usr/sbin/mkfs.ext4", MKFS, &disk, 1).map_err(failed("FormatFailed"))?;
            ("Formatted", false)
        }
        Plan::Mount { grow } => {
            tool("/usr/sbin/e2fsck", &["-p"], &disk, E2FSCK_FAILED).map_err(failed("Damaged"))?;
            ("Mounted", grow)
        }
    };
    fs::create_dir_all(places::DATA).map_err(failed("MountFailed"))?;
    mounts::mount(&disk.to_string_lossy(), places::DATA, "ext4", mounts::DATA, "")
        .map_err(|error| fact(false, "MountFailed", &format!("{}: {error}", disk.display())))?;
    let mut evidence = format!("{} of {} MiB as ext4", disk.display(), bytes >> 20);
    if grow {
        match tool("/usr/sbin/resize2fs", &[], &disk, 1) {
            Ok(()) => evidence.push_str(", grown to the disk"),
            Err(error) => evidence = format!("{evidence}, not grown: {error}"),
        }
    }
    Ok(fact(true, reason, &evidence))
}

fn fact(mounted: bool, reason: &str, evidence: &str) -> DataFact {
    DataFact {
        mounted,
        reason: reason.to_owned(),
        evidence: evidence.to_owned(),
    }
}

/// Runs a program on the disk; an exit status from `failed` on is an error with its last line.
fn tool(program: &str, args: &[&str], disk: &Path, failed: i32) -> io::Result<()> {
    let output = Command::new(program)
        .args(args)
        .arg(disk)
        .env("PATH", places::PATH)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| io::Error::new(error.kind(), format!("{program}: {error}")))?;
    let status = output.status.code().unwrap_or(i32::MAX);
    if status < failed {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let last = said
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("no output");
    Err(io::Error::other(format!("{program} ended with {status}: {last}")))
}

/// Binds `<data>/<name>` over the service directories that the image has.
pub(super) fn bind_services() -> Vec<(String, io::Result<()>)> {
    let there = SERVICE_DIRECTORIES
        .iter()
        .filter(|target| Path::new(target).is_dir());
    there
        .map(|target| ((*target).to_owned(), bind_one(Path::new(target))))
        .collect()
}

fn bind_one(target: &Path) -> io::Result<()> {
    let source = Path::new(places::DATA).join(target.file_name().unwrap_or_default());
    if !source.exists() {
        let image = fs::metadata(target)?;
        fs::create_dir(&source)?;
        chown(&source, Some(image.uid()), Some(image.gid()))?;
        fs::set_permissions(&source, fs::Permissions::from_mode(image.mode() & 0o7777))?;
    }
    Ok(mounts::bind(
        &source.to_string_lossy(),
        &target.to_string_lossy(),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tool_that_fails_is_named_with_its_last_line() {
        let error = tool(
            "/bin/sh",
            &["-c", "echo first; echo 'bad block' >&2; exit 4"],
            Path::new("d"),
            4,
        )
        .unwrap_err();
        assert_eq!(error.to_string(), "/bin/sh ended with 4: bad block");
        assert!(tool("/bin/sh", &["-c", "exit 1"], Path::new("d"), 4).is_ok());
        assert!(tool("/nonexistent", &[], Path::new("d"), 1).is_err());
    }
}
