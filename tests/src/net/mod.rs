//! A network agent in a world of its own: an outer network namespace that plays the machine,
//! a mount namespace with a tun node of the wanted mode, root or a user that exists nowhere.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sovereign_host_agent::net::names;
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::name::Name;

use crate::guard;
pub use crate::instance::signal;
use crate::instance::{command_line, kill};
use crate::seat::{self, NOBODY};
use crate::space::Space;

mod agent;
mod findings;
mod hosted;
mod lan;
mod links;
mod picture;
mod router;

pub use agent::Agent;
pub use findings::{Findings, until_stopped_by};
pub use hosted::{Filter, Hosted};
pub use lan::{Lan, Place, TAG};
pub use links::{Links, WANT, world};
pub use picture::{Picture, holders, inside, namespace_of};
pub use router::{Router, left_by_the_kernel};

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
        seat::copy_program(program, &dir.path().join("agent"))?; // its own directory may be closed to the user
        let run = dir.path().join("run");
        std::fs::create_dir(&run)?;
        if user == User::Ordinary {
            chown(&run, Some(NOBODY), Some(NOBODY))?;
        }
        let script = format!("{}; ip link set lo up", seat::open_tun(tun_mode));
        let holder = seat::hold(&["--net", "--mount"], &dir.path().join("dev"), &script)?;
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
        if let Ok(number) = hosted::machines_own() {
            command.env("SOVEREIGN_TEST", number); // where nothing of ours may be
        }
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

    /// Processes whose command line names this world's directory or what leads out of it, but for its holder.
    #[must_use]
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.dir.path().to_string_lossy().into_owned();
        let leads_out = self.way_out();
        let is_ours = |line: &str| line.contains(&needle) || line.contains(&leads_out);
        all_processes()
            .into_iter()
            .map(|pid| (pid, command_line(pid)))
            .filter(|(pid, line)| *pid != self.holder.id() && is_ours(line))
            .collect()
    }

    /// The link by which guests of the private namespace leave.
    #[must_use]
    pub fn way_out(&self) -> String {
        let instance = Name::parse(&self.instance);
        instance
            .map(|instance| names::way_out(&instance).to_string())
            .unwrap_or_default()
    }

    /// The outer namespace, which plays the machine.
    ///
    /// # Errors
    /// The system's own.
    pub fn machine(&self) -> Result<Space> {
        Space::of(self.holder.id())
    }

    /// The private namespace.
    ///
    /// # Errors
    /// When there is not exactly one helper.
    pub fn private(&self) -> Result<Space> {
        Space::of(self.helper()?)
    }

    /// A namespace in the place of a guest, on the bridge of a private network of 192.168.100.1/24 and fd00:9::1/64.
    ///
    /// # Errors
    /// The system's own, or that there is no bridge.
    pub fn guest(&self) -> Result<Space> {
        let (private, space) = (self.private()?, Space::new()?);
        let bridge = names::bridge(&Name::parse(self.instance())?);
        private.ip(&format!(
            "link add vguest type veth peer name eth0 netns {}\nlink set vguest up master {bridge}\n",
            space.pid()
        ))?;
        space.ip(
            "link set eth0 up\naddress add 192.168.100.9/24 dev eth0\naddress add fd00:9::9/64 dev eth0 nodad\n\
             route add default via 192.168.100.1\n-6 route add default via fd00:9::1\n",
        )?;
        Ok(space)
    }

    /// The process of pasta, where exactly one runs.
    #[must_use]
    pub fn pasta(&self) -> Option<u32> {
        let mut found = self.processes();
        found.retain(|(_, line)| line.contains("--netns"));
        match found[..] {
            [(pid, _)] => Some(pid),
            _ => None,
        }
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

/// Runs a test for both kinds of users at once, where it can run.
///
/// # Errors
/// The first of the test, with the user.
pub fn for_both(test: &str, body: impl Fn(User) -> Result<()> + Sync) -> Result<()> {
    if !can_run(test) {
        return Ok(());
    }
    std::thread::scope(|scope| {
        let users = [User::Root, User::Ordinary];
        let body = &body;
        let running = users.map(|user| (user, scope.spawn(move || body(user))));
        for (user, thread) in running {
            let outcome = thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.with_context(|| format!("as {user:?}"))?;
        }
        Ok(())
    })
}

/// Looks again until there is something.
///
/// # Errors
/// After [`SOON`], with `what` is lacking.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        if let Some(seen) = look() {
            return Ok(seen);
        }
        ensure!(begun.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(10)); // polls /proc
    }
}

fn all_processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}
