//! Who runs the product in a test, and with what: we ourselves, or a user that exists nowhere.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A user id that no machine gives to anybody; nothing is written to its user database.
pub const NOBODY: u32 = 65_432;

/// Copies a program that is to be run. Not by ourselves: a child that another thread starts meanwhile has our descriptor
/// of the copy until it runs its own program, and what somebody may write to cannot be run ("text file busy").
///
/// # Errors
/// That `cp` fails.
pub fn copy_program(program: &Path, copy: &Path) -> Result<()> {
    let status = Command::new("cp").args([program, copy]).status()?;
    ensure!(status.success(), "cp to {}: {status}", copy.display());
    Ok(())
}

/// Who runs the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The user of the tests, with the machine as it is.
    Ourselves,
    /// A user without any right, with the machine as it is.
    Ordinary,
    /// The user of the tests, with an instance's state on a small disk of its own.
    OurselvesOnASmallDisk,
    /// The user of the tests, in a network namespace that plays the machine.
    OurselvesOnAnotherMachine,
    /// A user without any right whom the machine lets open /dev/net/tun, as many distributions do.
    OrdinaryWithTun,
}

/// Where the product is run from.
#[derive(Debug)]
pub(crate) struct Seat {
    /// Words before each command.
    before: Vec<String>,
    /// The directory of the binaries.
    bin: PathBuf,
    /// A home of its own, image cache included.
    home: Option<PathBuf>,
    /// Holds a mount namespace.
    holder: Option<Child>,
}

/// The small disk, in MiB: more than a guest's data disk, so that either can be the full one.
const SMALL_DISK_MIB: u32 = 700;

impl Seat {
    /// Prepares `dir` for this user; needs root for anybody but ourselves.
    pub(crate) fn new(who: Who, dir: &Path, bin: PathBuf) -> Result<Self> {
        let mut seat = Self {
            before: Vec::new(),
            bin,
            home: None,
            holder: None,
        };
        if who == Who::Ourselves {
            return Ok(seat);
        }
        if who == Who::OurselvesOnASmallDisk {
            let script = format!("mount -t tmpfs -o size={SMALL_DISK_MIB}m none \"$0\"");
            seat.enter(hold(&["--mount"], &dir.join("state"), &script)?, &["--mount"]);
            return Ok(seat);
        }
        if who == Who::OurselvesOnAnotherMachine {
            // The programs of iptables lock a file in /run.
            let script = format!(
                "{}; mount -t tmpfs none /run; ip link set lo up",
                open_tun("0600")
            );
            let spaces = ["--net", "--mount"];
            seat.enter(hold(&spaces, &dir.join("dev"), &script)?, &spaces);
            return Ok(seat);
        }
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
        seat.furnish(dir)?;
        if who == Who::OrdinaryWithTun {
            let holder = hold(&["--mount"], &dir.join("dev"), &open_tun("0666"))?;
            seat.enter(holder, &["--mount"]);
        }
        let id = NOBODY.to_string();
        let user = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"];
        seat.before.extend(user.map(str::to_owned));
        Ok(seat)
    }

    fn enter(&mut self, holder: Child, spaces: &[&str]) {
        let pid = holder.id().to_string();
        let words = ["nsenter", "--target", &pid].into_iter();
        let words = words.chain(spaces.iter().copied()).chain(["--"]);
        self.before = words.map(str::to_owned).collect();
        self.holder = Some(holder);
    }

    /// The process that holds its namespaces, where it has some.
    pub(crate) fn holder(&self) -> Option<u32> {
        self.holder.as_ref().map(Child::id)
    }

    /// Where a path of the product is for us.
    pub(crate) fn seen_from_here(&self, path: &Path) -> PathBuf {
        match &self.holder {
            Some(holder) => {
                let root = PathBuf::from(format!("/proc/{}/root", holder.id()));
                root.join(path.strip_prefix("/").unwrap_or(path))
            }
            None => path.to_owned(),
        }
    }

    /// Binaries and images where the user can read them: their own directories may be closed to him.
    fn furnish(&mut self, dir: &Path) -> Result<()> {
        let home = dir.join("home");
        std::fs::create_dir_all(home.join(".cache"))?;
        let cache = cache().join("sovereign");
        if cache.is_dir() {
            copy(&cache, &home.join(".cache/sovereign"))?;
        }
        let bin = dir.join("bin");
        copy(&std::mem::replace(&mut self.bin, bin.clone()), &bin)?;
        let owner = format!("{NOBODY}:{NOBODY}");
        let owned = Command::new("chown").arg("-R").arg(owner).arg(&home).status()?;
        ensure!(owned.success(), "chown: {owned}");
        chown(dir, Some(NOBODY), Some(NOBODY))?;
        self.home = Some(home);
        Ok(())
    }

    /// A program of the product, as this user.
    pub(crate) fn command(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        assert!(
            program.is_file(),
            "{} is missing: run `make build`",
            program.display()
        );
        let mut command = match self.before.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        if let Some(home) = &self.home {
            command.env("HOME", home);
            for variable in [
                "XDG_CACHE_HOME",
                "XDG_CONFIG_HOME",
                "XDG_STATE_HOME",
                "XDG_RUNTIME_DIR",
            ] {
                command.env_remove(variable);
            }
        }
        command
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(holder) = &mut self.holder {
            let _ = holder.kill(); // it has usually not ended
            let _ = holder.wait();
        }
    }
}

/// The script that puts a /dev/net/tun of this mode in the place of the machine's.
pub(crate) fn open_tun(mode: &str) -> String {
    format!(
        "mount -t tmpfs none \"$0\"; mknod \"$0/tun\" c 10 200; chmod {mode} \"$0/tun\"; \
         mount --bind \"$0/tun\" /dev/net/tun"
    )
}

/// Namespaces of these kinds in which `script` ran for a new `dir`, its `$0`; they end with the child.
pub fn hold(namespaces: &[&str], dir: &Path, script: &str) -> Result<Child> {
    std::fs::create_dir(dir)?;
    let script = format!("set -e; {script}; echo made; exec cat");
    let mut holder = Command::new("unshare")
        .args(namespaces)
        .args(["--", "sh", "-c", &script])
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(holder.stdout.as_mut().context("no pipe")?).read_line(&mut line)?;
    ensure!(line == "made\n", "the namespaces cannot be made: {line}");
    Ok(holder)
}

/// The user's cache, where images are kept (XDG base directories).
fn cache() -> PathBuf {
    let given = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    given.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = Command::new("cp")
        .args(["-r", "--sparse=always", "--"])
        .arg(from)
        .arg(to)
        .status()?;
    ensure!(copied.success(), "cp {}: {copied}", from.display());
    Ok(())
}
