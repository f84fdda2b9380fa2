//! The steps of a boot, in order.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout};
use sovereign_protocol::boot::{AGENT_SERIAL, BootRecord, PATH, ROOT_SERIAL};

use super::{Tried, data, disks, mounts};
use crate::net::loopback;
use crate::{cgroup, clock, log, places};

const NEW_ROOT: &str = "/newroot";
const MODULES_ORDER: &str = "/modules.order";
const MODULES: &str = "/modules";
/// How long the kernel may take to show a disk.
const DISK_WAIT: Duration = Duration::from_secs(10);

/// Everything up to the switch into the read-only root; an error ends the boot.
pub(super) fn root(tried: &mut Tried) -> Result<BootRecord, String> {
    let bytes = fs::read(PATH).map_err(|error| {
        format!("{PATH} cannot be read ({error}): the host adds it to the initramfs of each boot")
    })?;
    let record = BootRecord::parse(&bytes).map_err(|error| log::chain(&error))?;
    let stepped = step_clock(record.wall_ns);
    tried.facts.clock_step_ns = tried.note("clock", stepped).unwrap_or(0);
    for (source, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let _ = fs::create_dir(target);
        let mounted = mounts::mount(source, target, source, mounts::PLAIN, "");
        // devtmpfs may be there already (CONFIG_DEVTMPFS_MOUNT)
        tried.must(
            target,
            mounted.or_else(|error| if error == Errno::EBUSY { Ok(()) } else { Err(error) }),
        )?;
    }
    tried.note("console", console());
    load_modules(tried);
    tried.note("entropy", seed(&record.seed));
    for (serial, target) in [
        (ROOT_SERIAL, NEW_ROOT.to_owned()),
        (AGENT_SERIAL, format!("{NEW_ROOT}{}", places::AGENT)),
    ] {
        let device = tried.must(serial, disks::wait(serial, DISK_WAIT))?;
        let _ = fs::create_dir(&target);
        tried.must(
            &target,
            mounts::mount(&device.to_string_lossy(), &target, "erofs", mounts::READ_ONLY, ""),
        )?;
    }
    tried.must("switch to the root disk", switch_root())?;
    Ok(record)
}

/// Everything after it; failures are facts.
pub(super) fn rest(tried: &mut Tried, record: &BootRecord) {
    for mount in mounts::WRITABLE {
        tried.note(mount.target, mount.apply());
    }
    for directory in [places::RUN, places::ETC] {
        tried.note(directory, fs::create_dir_all(directory));
    }
    tried.note("cgroup controllers", cgroup::delegate());
    tried.note("/dev/net/tun", tun());
    tried.note("lo", loopback::raise());
    let fact = data::bring(record.format_data);
    log::line(
        "data disk",
        &[
            ("mounted", &fact.mounted),
            ("reason", &fact.reason),
            ("evidence", &fact.evidence),
        ],
    );
    if fact.mounted {
        for (name, outcome) in data::bind_services() {
            tried.note(name, outcome);
        }
    }
    tried.facts.data = Some(fact);
    tried.note("/etc", etc());
}

/// Moves the clock forward to the host's; never back.
fn step_clock(host_ns: i64) -> nix::Result<i64> {
    let behind = host_ns.saturating_sub(clock::wall_ns());
    if behind <= 0 {
        return Ok(0);
    }
    clock::set_wall_ns(host_ns)?;
    Ok(behind)
}

/// The kernel opens /dev/console before devtmpfs is there; without one these would be closed.
fn console() -> io::Result<()> {
    let console = File::options().read(true).write(true).open("/dev/console")?;
    dup2_stdin(&console)?;
    dup2_stdout(&console)?;
    dup2_stderr(&console)?;
    Ok(())
}

fn load_modules(tried: &mut Tried) {
    let Some(order) = tried.note(MODULES_ORDER, fs::read_to_string(MODULES_ORDER)) else {
        return;
    };
    for line in module_lines(&order) {
        let loaded = match module_name(line) {
            Some(name) => load_module(&Path::new(MODULES).join(name)),
            None => Err(io::Error::new(io::ErrorKind::InvalidInput, "no file name")),
        };
        if let Err(error) = loaded {
            tried.note(format!("module {line}"), Err::<(), _>(error));
        }
    }
}

fn module_lines(order: &str) -> impl Iterator<Item = &str> {
    order
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// The file name of a line, which may name its directory; nothing outside of it.
fn module_name(line: &str) -> Option<&str> {
    let name = line.strip_prefix('/').unwrap_or(line);
    let name = name.strip_prefix("modules/").unwrap_or(name);
    (!name.contains('/') && name != "..").then_some(name)
}

fn load_module(path: &Path) -> io::Result<()> {
    match finit_module(File::open(path)?, &CString::default(), ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn seed(hex: &str) -> io::Result<()> {
    let bytes = unhex(hex).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the seed is no hex"))?;
    File::options()
        .write(true)
        .open("/dev/urandom")?
        .write_all(&bytes)
}

fn unhex(hex: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = hex
        .chars()
        .map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok()))
        .collect::<Option<_>>()?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty()
        .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// switch_root(8): frees the initramfs, then the new root becomes /.
fn switch_root() -> io::Result<()> {
    for directory in ["/proc", "/sys", "/dev"] {
        mounts::move_to(directory, &format!("{NEW_ROOT}{directory}"))?;
    }
    free_initramfs()?;
    chdir(NEW_ROOT)?;
    mounts::move_to(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Removes the files of the initramfs, which would hold memory for ever; its mount points stay.
fn free_initramfs() -> io::Result<()> {
    for entry in fs::read_dir("/")? {
        let path: PathBuf = entry?.path();
        if path == Path::new(NEW_ROOT) {
            continue;
        }
        let removed = if fs::symlink_metadata(&path)?.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        if let Err(error) = removed {
            log::line(
                "left in the initramfs",
                &[("path", &path.display()), ("error", &error)],
            );
        }
    }
    Ok(())
}

/// Absent while tun is an unloaded module; opening the node loads it.
fn tun() -> io::Result<()> {
    fs::create_dir_all("/dev/net")?;
    match mknod(
        "/dev/net/tun",
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        makedev(10, 200),
    ) {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The files that /etc links to. The machine id lasts as long as the data disk.
fn etc() -> io::Result<()> {
    let etc = Path::new(places::ETC);
    fs::write(etc.join("hostname"), "guest\n")?;
    fs::write(etc.join("hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    fs::write(etc.join("resolv.conf"), "")?;
    let kept = Path::new(places::DATA).join(".machine-id");
    let id = match fs::read_to_string(&kept) {
        Ok(id) if id.trim().len() == 32 => id,
        _ => {
            let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?.replace('-', "");
            if nix::sys::statvfs::statvfs(Path::new(places::DATA))
                .is_ok_and(|s| !s.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
                && let Err(error) = write_synced(&kept, id.as_bytes())
            {
                log::line(
                    "the machine id will be another after the next boot",
                    &[("error", &error)],
                );
            }
            id
        }
    };
    fs::write(etc.join("machine-id"), id)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_list_holds_names_of_one_directory() {
        let order =
            "# order\nvirtio.ko\n\n  modules/000-virtio_blk.ko \n/modules/erofs.ko\n../evil.ko\n/abs.ko\n";
        let names: Vec<_> = module_lines(order).map(module_name).collect();
        let want = [
            Some("virtio.ko"),
            Some("000-virtio_blk.ko"),
            Some("erofs.ko"),
            None,
            Some("abs.ko"),
        ];
        assert_eq!(names, want);
    }

    #[test]
    fn a_seed_is_pairs_of_hex_digits() {
        assert_eq!(unhex("00ffA5"), Some(vec![0, 255, 0xa5]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
        assert_eq!(unhex("éé"), None);
    }
}
