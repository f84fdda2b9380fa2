//! One throw-away instance of the product, driven through its command line.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sovereign_host_agent::net::names;
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::name::Name;

use crate::guard;
use crate::seat::{Seat, Who};

/// An instance with one PostgreSQL guest named `sql`; stopped when dropped.
pub struct Instance {
    dir: tempfile::TempDir,
    seat: Seat,
    name: String,
    port: u16,
}

impl Instance {
    /// Prepares directories and a configuration; starts nothing.
    ///
    /// # Errors
    /// When a directory cannot be made or no port is free.
    pub fn new() -> Result<Self> {
        Self::run_by(Who::Ourselves)
    }

    /// As [`Self::new`], for a user.
    ///
    /// # Errors
    /// As [`Self::new`]; what an ordinary user needs is made by root.
    pub fn run_by(who: Who) -> Result<Self> {
        guard::refuse_vsock();
        // What is orphaned below us stays below us: the harness ends nothing that it did not start.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        let dir = tempfile::Builder::new().prefix("sv").tempdir_in("/tmp")?;
        let instance = Self {
            seat: Seat::new(who, dir.path(), binaries())?,
            dir,
            name: format!("t{}", random_hex::<4>()?),
            port: free_port()?,
        };
        instance.configure("256MiB", "")?;
        // The machine's own would make each test depend on it.
        std::fs::write(instance.path("resolv.conf"), "nameserver 192.0.2.53\n")?;
        Ok(instance)
    }

    /// Goes through a chain of steps; shows the logs when one fails, so that CI's output tells why.
    ///
    /// # Errors
    /// The step's own.
    pub fn go_through(&self, steps: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let done = steps(self);
        if done.is_err() {
            show(&self.state_from_here());
        }
        done
    }

    /// Writes the configuration with this memory and these settings of postgresql.conf.
    ///
    /// # Errors
    /// The system's own.
    pub fn configure(&self, memory: &str, settings: &str) -> Result<()> {
        self.write(&format!(
            "[guest.sql]\nmemory = \"{memory}\"\ndata = \"512MiB\"\n\n{}\n\
             [guest.sql.service.postgres.settings]\n{settings}\n",
            self.service()
        ))
    }

    /// Writes the configuration with this network, and these keys of the guest.
    ///
    /// # Errors
    /// The system's own.
    pub fn configure_network(&self, network: &str, guest: &str) -> Result<()> {
        self.write(&format!(
            "[network]\n{network}\n\n[guest.sql]\nmemory = \"256MiB\"\ndata = \"512MiB\"\n{guest}\n\n{}",
            self.service()
        ))
    }

    /// PostgreSQL and its forward.
    fn service(&self) -> String {
        format!(
            "[[guest.sql.forward]]\nname = \"postgres\"\nlisten = \"127.0.0.1:{}\"\nport = 5432\n\n\
             [guest.sql.service.postgres]\nkind = \"postgres\"\nport = 5432\n",
            self.port
        )
    }

    /// Writes this configuration.
    ///
    /// # Errors
    /// The system's own.
    pub fn write(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(self.path("sovereign.toml"), text)?)
    }

    /// A path in the instance's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The process that holds the namespaces it runs in.
    ///
    /// # Errors
    /// When it runs in those of the tests.
    pub fn machine(&self) -> Result<u32> {
        self.seat.holder().context("it runs on the machine itself")
    }

    /// The forwarded port of PostgreSQL.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `sovereign` for this instance, with these arguments.
    ///
    /// # Panics
    /// When the binaries were not built (`make build`).
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.words(self.seat.command("sovereign"), arguments)
    }

    /// The same where the tests run, whatever machine the instance is on: for what only prepares.
    ///
    /// # Panics
    /// As [`Self::command`].
    #[must_use]
    pub fn outside(&self, arguments: &[&str]) -> Command {
        self.words(Command::new(binaries().join("sovereign")), arguments)
    }

    fn words(&self, mut command: Command, arguments: &[&str]) -> Command {
        command
            .arg("--config")
            .arg(self.path("sovereign.toml"))
            .args(["--instance", &self.name])
            .args(arguments)
            .env("SOVEREIGN_STATE_DIR", self.path("state"))
            .env("SOVEREIGN_RUN_DIR", self.path("run"))
            .env("SOVEREIGN_RESOLV_CONF", self.path("resolv.conf"))
            .env("SOVEREIGN_TEST", machines_network());
        command
    }

    /// Runs a command to its end, whatever that is.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().context("cannot run sovereign")
    }

    /// Runs a command that must succeed; its standard output.
    ///
    /// # Errors
    /// With both outputs, when it failed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.run(arguments)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        ensure!(
            output.status.success(),
            "{arguments:?}: {}\n{out}\n{err}",
            output.status
        );
        Ok(out)
    }

    /// The events so far, oldest first.
    ///
    /// # Errors
    /// When `events` fails or prints no JSON.
    pub fn events(&self) -> Result<Vec<Value>> {
        let text = self.ok(&["events", "--json"])?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Lets a later instance begin with this one's data disk and secrets; the guest must be down.
    ///
    /// # Errors
    /// The system's own.
    pub fn inherit(&self, from: &Self) -> Result<()> {
        let (old, new) = (from.state(), self.state());
        std::fs::create_dir_all(new.join("guests/sql"))?;
        std::fs::copy(old.join("secrets.json"), new.join("secrets.json"))?;
        let copied = Command::new("cp")
            .args(["--sparse=always", "--"])
            .arg(old.join("guests/sql/data.img"))
            .arg(new.join("guests/sql/data.img"))
            .status()?;
        ensure!(copied.success(), "cp: {copied}");
        Ok(())
    }

    /// The instance's state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path("state").join(&self.name)
    }

    /// The state directory where the product has one of its own; for files that a test makes there.
    #[must_use]
    pub fn state_from_here(&self) -> PathBuf {
        self.seat.seen_from_here(&self.state())
    }

    /// `status --json`.
    ///
    /// # Errors
    /// When it fails or is no JSON.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["status", "--json"])?)?)
    }

    /// The guest `sql` in `status --json`.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn guest(&self) -> Result<Value> {
        Ok(self.status()?["guests"][0].take())
    }

    /// A guest of this name in `status --json`.
    ///
    /// # Errors
    /// As [`Self::status`], or when there is none.
    pub fn guest_named(&self, name: &str) -> Result<Value> {
        let mut status = self.status()?;
        let guests = status["guests"].as_array_mut().context("no guests")?;
        let found = guests.iter_mut().find(|guest| guest["name"] == name);
        Ok(found.with_context(|| format!("no guest {name}"))?.take())
    }

    /// The instance's name.
    ///
    /// # Errors
    /// Never: it is a name.
    pub fn name(&self) -> Result<Name> {
        Ok(Name::parse(&self.name)?)
    }

    /// `doctor --json`.
    ///
    /// # Errors
    /// When it fails or is no JSON.
    pub fn doctor(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["doctor", "--json"])?)?)
    }

    /// Diagnoses again until the [`findings`] are as wanted.
    ///
    /// # Errors
    /// After `limit`, with the last diagnosis.
    pub fn until_found(&self, limit: Duration, wanted: impl Fn(&[String]) -> bool) -> Result<Value> {
        let begun = Instant::now();
        loop {
            let diagnosis = self.doctor()?;
            if wanted(&findings(&diagnosis)) {
                return Ok(diagnosis);
            }
            ensure!(
                begun.elapsed() < limit,
                "not within {limit:?}; last: {diagnosis:#}"
            );
            std::thread::sleep(Duration::from_millis(200)); // polls a process, waits for nothing else
        }
    }

    /// Asks again until the guest satisfies `wanted`.
    ///
    /// # Errors
    /// After `limit`, with what was seen last.
    pub fn wait(&self, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let begun = Instant::now();
        loop {
            let guest = self.guest()?;
            if wanted(&guest) {
                return Ok(guest);
            }
            if begun.elapsed() > limit {
                bail!("{what}: not within {limit:?}; last: {guest:#}");
            }
            std::thread::sleep(Duration::from_millis(100)); // polls a process, waits for nothing else
        }
    }

    /// Processes below this test whose command line names this instance's directory or what leads out of its namespace.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let needle = self.dir.path().to_string_lossy().into_owned();
        let leads_out = self.name().map(|name| names::way_out(&name).to_string());
        let leads_out = leads_out.unwrap_or_else(|_| needle.clone());
        let mut ours = descendants();
        ours.retain(|pid| {
            let line = command_line(*pid);
            line.contains(&needle) || line.contains(&leads_out)
        });
        ours
    }

    /// The pid of the one process whose command line holds all `words` and this instance's directory.
    ///
    /// # Errors
    /// When there is none or more than one.
    pub fn process(&self, words: &[&str]) -> Result<u32> {
        let found: Vec<u32> = self
            .processes()
            .into_iter()
            .filter(|pid| words.iter().all(|word| command_line(*pid).contains(word)))
            .collect();
        match found[..] {
            [pid] => Ok(pid),
            _ => bail!("{words:?}: {found:?}"),
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let stopped = self.run(&["down"]).is_ok_and(|output| output.status.success());
        for pid in self.processes() {
            eprintln!("{}: left over after down: {pid} {}", self.name, command_line(pid));
            kill(pid);
        }
        if !stopped && !std::thread::panicking() {
            eprintln!("{}: down failed", self.name);
        }
        if std::thread::panicking() {
            show(&self.state_from_here());
        }
    }
}

/// The number of the network namespace that the tests run in, which the product must not change.
///
/// # Panics
/// Without /proc.
#[must_use]
pub fn machines_network() -> String {
    use std::os::unix::fs::MetadataExt;
    let namespace = std::fs::metadata("/proc/self/ns/net").expect("every process has a network namespace");
    namespace.ino().to_string()
}

/// The findings of a diagnosis as `LAYER CODE`, lowest layer first.
#[must_use]
pub fn findings(diagnosis: &Value) -> Vec<String> {
    let all = diagnosis["findings"].as_array().into_iter().flatten();
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
    all.map(|finding| format!("{} {}", text(finding, "layer"), text(finding, "code")))
        .collect()
}

/// All processes below this one; the kernel gives us the orphans (PR_SET_CHILD_SUBREAPER).
fn descendants() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let parents: Vec<(u32, u32)> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut found = vec![std::process::id()];
    let mut looked = 0;
    while let Some(above) = found.get(looked).copied() {
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == above)
                .map(|(pid, _)| *pid),
        );
        looked += 1;
    }
    found.split_off(1)
}

/// The parent of a process that has not ended (proc_pid_stat(5): the name may hold anything but its end is the last parenthesis).
fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    let state = words.next()?;
    words.next()?.parse().ok().filter(|_| state != "Z")
}

/// Sends a signal to a process that this instance started.
///
/// # Errors
/// When it is gone.
pub fn signal(pid: u32, signal: rustix::process::Signal) -> Result<()> {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("no pid")?;
    Ok(rustix::process::kill_process(pid, signal)?)
}

/// Sends SIGKILL to a process that this instance started.
pub fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL); // it may be gone already
    }
}

pub(crate) fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}

/// Logs of a failed test, so that CI's output tells why.
fn show(state: &Path) {
    for name in [
        "host.log",
        "guests/sql/shim.log",
        "guests/sql/console.log",
        "guests/sql/exit.json",
        "guests/web/shim.log",
        "guests/web/console.log",
    ] {
        if let Ok(bytes) = std::fs::read(state.join(name)) {
            let text = String::from_utf8_lossy(&bytes);
            let tail: Vec<&str> = text.lines().rev().take(40).collect();
            eprintln!("--- {name}");
            tail.iter()
                .rev()
                .for_each(|line| eprintln!("{}", line.escape_debug()));
        }
    }
}

/// Where `make build` puts the binaries.
fn binaries() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("SOVEREIGN_BIN").map_or_else(|| root.join("target/sovereign"), |bin| root.join(bin))
}

fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}
