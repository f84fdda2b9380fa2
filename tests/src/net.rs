//! A network agent in a world of its own: an outer network namespace that plays the machine,
//! a mount namespace with a tun node of the wanted mode, root or a user that exists nowhere.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sovereign_protocol::handshake::random_hex;

use crate::guard;
use crate::instance::kill;

/// A user id that no machine gives to anybody; nothing is written to its user database.
const NOBODY: u32 = 65_432;
/// What an agent does must show within this time.
pub const SOON: Duration = Duration::from_secs(20);

/// Who runs the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Root.
    Root,
    /// A user without any right.
    Ordinary,
}

/// Whether tests of namespaces can run here; says so when not.
#[must_use]
pub fn can_run(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: {test} (needs root for its outer namespaces)");
    }
    root
}

/// The outer namespaces, a directory, and what runs in them. Ends all of it when dropped.
pub struct World {
    dir: tempfile::TempDir,
    holder: Child,
    user: User,
    instance: String,
}

impl World {
    /// Makes the namespaces; `tun_mode` is that of /dev/net/tun in them. Starts no agent.
    ///
    /// # Errors
    /// The system's own.
    pub fn new(program: &Path, user: User, tun_mode: &str) -> Result<Self> {
        guard::refuse_vsock();
        let dir = tempfile::Builder::new().prefix("svn").tempdir_in("/tmp")?;
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
        std::fs::copy(program, dir.path().join("agent"))?; // its own directory may be closed to the user
        let run = dir.path().join("run");
        std::fs::create_dir(&run)?;
        if user == User::Ordinary {
            chown(&run, Some(NOBODY), Some(NOBODY))?;
        }
        std::fs::create_dir(dir.path().join("dev"))?;
        let script = "set -e; mount -t tmpfs none \"$0/dev\"; mknod \"$0/dev/tun\" c 10 200; \
            chmod \"$1\" \"$0/dev/tun\"; mount --bind \"$0/dev/tun\" /dev/net/tun; \
            ip link set lo up; echo made; exec cat";
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--", "sh", "-c", script])
            .arg(dir.path())
            .arg(tun_mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(holder.stdout.as_mut().context("no pipe")?).read_line(&mut line)?;
        ensure!(line == "made\n", "the outer namespaces cannot be made: {line}");
        Ok(Self {
            dir,
            holder,
            user,
            instance: format!("t{}", random_hex::<4>()?),
        })
    }

    /// A path in the agent's own directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("run").join(name)
    }

    /// The instance.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.instance
    }

    /// A command in the outer namespaces, as the world's user.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let holder = self.holder.id().to_string();
        command.args(["--target", &holder, "--net", "--mount", "--"]);
        if self.user == User::Ordinary {
            let nobody = NOBODY.to_string();
            command.args([
                "setpriv",
                "--reuid",
                &nobody,
                "--regid",
                &nobody,
                "--clear-groups",
            ]);
        }
        command.args(words);
        command
    }

    /// The agent's program, which is any other verb of it, too.
    #[must_use]
    pub fn program(&self) -> String {
        self.dir.path().join("agent").to_string_lossy().into_owned()
    }

    /// Starts an agent that wants `spec` (`want ADDRESS MTU GUEST...`).
    ///
    /// # Errors
    /// The system's own.
    pub fn agent(&self, spec: &str) -> Result<Agent> {
        self.agent_under(&[], "-", spec)
    }

    /// Starts an agent under another program, with its buffer for notifications.
    ///
    /// # Errors
    /// The system's own.
    pub fn agent_under(&self, over: &[&str], receive_buffer: &str, spec: &str) -> Result<Agent> {
        let (program, run) = (self.program(), self.path(""));
        let run = run.to_str().context("a path that is no text")?;
        let mut words = over.to_vec();
        words.extend([program.as_str(), "run", run, &self.instance, receive_buffer]);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("agent.log"))?;
        let child = self
            .command(&words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut agent = Agent::of(child)?;
        agent.say(spec)?;
        Ok(agent)
    }

    /// Processes whose command line names this world's directory, but for its holder.
    #[must_use]
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.dir.path().to_string_lossy().into_owned();
        all_processes()
            .into_iter()
            .map(|pid| (pid, command_line(pid)))
            .filter(|(pid, line)| *pid != self.holder.id() && line.contains(&needle))
            .collect()
    }

    /// The process of the netns helper.
    ///
    /// # Errors
    /// When there is not exactly one.
    pub fn helper(&self) -> Result<u32> {
        let found: Vec<_> = self
            .processes()
            .into_iter()
            .filter(|(_, line)| line.contains("/agent netns "))
            .collect();
        match &found[..] {
            [(pid, _)] => Ok(*pid),
            _ => bail!("not one helper: {found:?}"),
        }
    }

    /// Runs a command line in the private namespace, as root.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn inside(&self, line: &str) -> Result<String> {
        inside(self.helper()?, line)
    }

    /// Runs a command line in the outer network namespace, as root.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn outside(&self, line: &str) -> Result<String> {
        inside(self.holder.id(), line)
    }

    /// What an independent observer sees in the private namespace.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn picture(&self) -> Result<Picture> {
        Picture::of(self.helper()?)
    }

    /// Looks again until what an independent observer sees is as `wanted`.
    ///
    /// # Errors
    /// After [`SOON`], with what was seen last.
    pub fn wait(&self, what: &str, wanted: impl Fn(&Picture) -> bool) -> Result<Picture> {
        let begun = Instant::now();
        loop {
            let picture = self.picture()?;
            if wanted(&picture) {
                return Ok(picture);
            }
            ensure!(begun.elapsed() < SOON, "{what}: {picture:#?}");
            std::thread::sleep(Duration::from_millis(10)); // polls a program, waits for nothing else
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            kill(pid);
        }
        let _ = self.holder.kill(); // it has usually not ended
        let _ = self.holder.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            tail.iter()
                .rev()
                .for_each(|line| eprintln!("{}", line.escape_debug()));
        }
    }
}

/// An agent that runs; killed when dropped, which leaves its network.
pub struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Every line so far, for messages.
    seen: Vec<String>,
}

impl Agent {
    fn of(mut child: Child) -> Result<Self> {
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().context("no pipe")?);
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return; // the agent was dropped
                }
            }
        });
        Ok(Self {
            input: child.stdin.take(),
            child,
            lines,
            seen: Vec::new(),
        })
    }

    /// Its process, or that of the program it runs under.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives it a command.
    ///
    /// # Errors
    /// When it is gone.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("its input was closed")?;
        writeln!(input, "{line}").context("the agent is gone")
    }

    /// Waits for the next line that begins so; the lines before it are passed over.
    ///
    /// # Errors
    /// After [`SOON`] or when it ended, with all its lines.
    pub fn expect(&mut self, begin: &str) -> Result<String> {
        let until = Instant::now() + SOON;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.starts_with(begin) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no {begin:?} in time: {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => bail!("ended without {begin:?}: {:#?}", self.seen),
            }
        }
    }

    /// The lines that have come and were not waited for.
    #[must_use]
    pub fn rest(&mut self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Closes its input and waits for its end: the way of an agent that is restarted.
    ///
    /// # Errors
    /// When it failed.
    pub fn restart_ends(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {:#?}", self.seen);
        Ok(())
    }

    /// Waits for its end, however it comes.
    ///
    /// # Errors
    /// The system's own.
    pub fn ends(mut self) -> Result<std::process::ExitStatus> {
        let status = self.child.wait()?;
        Ok(status)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended
        let _ = self.child.wait();
    }
}

/// What `ip -json` says of a namespace.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    links: Vec<Value>,
    /// Destination and device.
    routes: Vec<(String, String)>,
}

impl Picture {
    fn of(pid: u32) -> Result<Self> {
        let json = |line: &str| -> Result<Vec<Value>> { Ok(serde_json::from_str(&inside(pid, line)?)?) };
        let links = json("ip -json -details address show")?;
        Ok(Self {
            links: links.iter().map(lasting).collect(),
            routes: json("ip -json -4 route show table main")?
                .iter()
                .map(|route| (text(&route["dst"]), text(&route["dev"])))
                .collect(),
        })
    }

    /// A link by its name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Value> {
        self.links.iter().find(|link| link["ifname"] == name)
    }

    /// The names of all links.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.links
            .iter()
            .filter_map(|link| link["ifname"].as_str())
            .collect()
    }

    /// The global addresses of a link, with their prefixes.
    #[must_use]
    pub fn addresses(&self, name: &str) -> Vec<String> {
        let all = self.link(name).and_then(|link| link["addresses"].as_array());
        let shown = |a: &Value| format!("{}/{}", text(&a["ip"]), a["prefix"]);
        all.into_iter().flatten().map(shown).collect()
    }

    /// The destinations of the main table that lead to a link.
    #[must_use]
    pub fn routes(&self, name: &str) -> Vec<&str> {
        let of = self.routes.iter().filter(|(_, dev)| dev == name);
        of.map(|(destination, _)| destination.as_str()).collect()
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A link without what moves by itself: timers, carrier, addresses that the kernel makes.
fn lasting(link: &Value) -> Value {
    let mut kept = serde_json::Map::new();
    for key in ["ifindex", "ifname", "mtu", "group", "master", "address"] {
        kept.insert(key.to_owned(), link[key].clone());
    }
    let info = &link["linkinfo"];
    kept.insert("kind".to_owned(), info["info_kind"].clone());
    if info["info_kind"] == "tun" {
        kept.insert("tun".to_owned(), info["info_data"].clone());
    }
    let flags = link["flags"].as_array().into_iter().flatten();
    kept.insert("up".to_owned(), flags.into_iter().any(|flag| flag == "UP").into());
    let addresses = link["addr_info"].as_array().into_iter().flatten();
    let addresses: Vec<Value> = addresses
        .filter(|a| a["scope"] == "global")
        .map(|a| serde_json::json!({"ip": a["local"], "prefix": a["prefixlen"], "label": a["label"]}))
        .collect();
    kept.insert("addresses".to_owned(), addresses.into());
    kept.into()
}

/// Runs a command line in the network namespace of a process, as root.
///
/// # Errors
/// With what it said, when it failed.
pub fn inside(pid: u32, line: &str) -> Result<String> {
    let target = pid.to_string();
    let output = Command::new("nsenter")
        .args(["--target", &target, "--net", "--", "sh", "-c", line])
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{line}: {} {said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// The number of a process's network namespace.
///
/// # Errors
/// When there is no such process.
pub fn namespace_of(pid: u32) -> Result<String> {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/net"))?;
    Ok(link.to_string_lossy().into_owned())
}

/// Processes that are in a network namespace or hold a descriptor of it.
#[must_use]
pub fn holders(namespace: &str) -> Vec<u32> {
    let points = |path: PathBuf| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy() == namespace);
    let holds = |pid: u32| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"));
        descriptors
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| points(entry.path()))
    };
    let is_in = |pid: u32| points(format!("/proc/{pid}/ns/net").into());
    all_processes()
        .into_iter()
        .filter(|pid| is_in(*pid) || holds(*pid))
        .collect()
}

fn all_processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn command_line(pid: u32) -> String {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&bytes).replace('\0', " ")
}
