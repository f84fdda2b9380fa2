//! A network namespace that plays a machine: programs and sockets of ours in it, and all that is to be seen there.
//!
//! Nothing of it is known by name to the machine (no /run/netns); it ends with the [`Space`].

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::{guard, seat};

mod guest;
mod probe;
mod service;
mod state;

pub use guest::{GUEST_PORT, Guest};
pub(crate) use probe::soon;
pub use probe::{ANSWER, SILENCE, Way};
pub use service::Service;
pub use state::State;

/// A network namespace of ours, with a /run of its own: the programs of iptables lock a file there.
pub struct Space {
    /// A process inside.
    pid: u32,
    /// The same, where it is ours to end.
    holder: Option<Child>,
    dir: tempfile::TempDir,
    /// Directories that come before PATH.
    first: Vec<String>,
}

impl Space {
    /// A fresh one, with `lo` up. Needs root.
    ///
    /// # Errors
    /// The system's own.
    pub fn new() -> Result<Self> {
        guard::refuse_vsock();
        let dir = tempfile::Builder::new().prefix("svs").tempdir_in("/tmp")?;
        let script = "mount -t tmpfs none /run; ip link set lo up";
        let holder = seat::hold(&["--net", "--mount"], &dir.path().join("hold"), script)?;
        Ok(Self {
            pid: holder.id(),
            holder: Some(holder),
            dir,
            first: Vec::new(),
        })
    }

    /// That of a process, which others hold.
    ///
    /// # Errors
    /// The system's own.
    pub fn of(pid: u32) -> Result<Self> {
        Ok(Self {
            pid,
            holder: None,
            dir: tempfile::Builder::new().prefix("svs").tempdir_in("/tmp")?,
            first: Vec::new(),
        })
    }

    /// A process in the namespace; `ip link set ... netns PID` takes it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets programs of these names be found before others, for [`command`](Self::command) and [`sh`](Self::sh).
    ///
    /// # Errors
    /// The system's own.
    pub fn prefer(&mut self, links: &[(&str, &str)]) -> Result<()> {
        let bin = self.dir.path().join(format!("bin{}", self.first.len()));
        std::fs::create_dir(&bin)?;
        for (name, program) in links {
            std::os::unix::fs::symlink(program, bin.join(name))?;
        }
        self.first.push(bin.to_string_lossy().into_owned());
        Ok(())
    }

    /// A command inside, such as a whole host agent.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let pid = self.pid().to_string();
        command
            .args(["--target", &pid, "--net", "--mount", "--"])
            .args(words);
        if !self.first.is_empty() {
            let rest = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{rest}", self.first.join(":")));
        }
        command
    }

    /// Runs a command line inside.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.feed(&["sh", "-ec", line], "")
    }

    /// Runs a program inside with this input.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn feed(&self, words: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(words);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("{words:?}"))?;
        let mut pipe = child.stdin.take().context("no pipe")?;
        let output = std::thread::scope(|scope| {
            scope.spawn(move || pipe.write_all(input.as_bytes())); // one that does not read says why
            child.wait_with_output()
        })?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{words:?}: {} {said}{input}",
            output.status
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Runs lines of `ip` (without the word, with `-6` or `-4` before them or not), the first that fails ends it.
    ///
    /// # Errors
    /// With what it said, when one failed.
    pub fn ip(&self, lines: &str) -> Result<()> {
        let family = |line: &str| {
            line.split(' ')
                .next()
                .filter(|word| word.starts_with('-'))
                .map(str::to_owned)
        };
        let lines: Vec<&str> = lines.lines().collect();
        for run in lines.chunk_by(|one, other| family(one) == family(other)) {
            let option = family(run[0]);
            let bare = run.iter().map(|line| match &option {
                Some(option) => format!("{}\n", line[option.len()..].trim_start()),
                None => format!("{line}\n"),
            });
            let words: Vec<&str> = ["ip"]
                .into_iter()
                .chain(option.as_deref())
                .chain(["-batch", "-"])
                .collect();
            self.feed(&words, &bare.collect::<String>())?;
        }
        Ok(())
    }

    /// What `ip -json` says.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn ip_json(&self, line: &str) -> Result<Vec<Value>> {
        let said = self.sh(&format!("ip -json {line}"))?;
        Ok(if said.trim().is_empty() {
            Vec::new()
        } else {
            serde_json::from_str(&said)?
        })
    }

    /// Does something on a thread that is inside: sockets opened there stay inside wherever they are used.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.pid()))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), network)?;
                Ok(act())
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes a sysctl, such as `net.ipv4.ip_forward`; a link's name has no dots then.
    ///
    /// # Errors
    /// The system's own.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.enter(|| std::fs::write(&path, value))?
            .with_context(|| path.clone())
    }

    /// Reads a sysctl.
    ///
    /// # Errors
    /// The system's own.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let text = self
            .enter(|| std::fs::read_to_string(&path))?
            .with_context(|| path.clone())?;
        Ok(text.trim().to_owned())
    }

    /// The number of a link.
    ///
    /// # Errors
    /// When there is no such link.
    pub fn index(&self, link: &str) -> Result<u64> {
        let shown = self.ip_json(&format!("link show dev {link}"))?;
        shown
            .first()
            .and_then(|link| link["ifindex"].as_u64())
            .with_context(|| link.to_owned())
    }

    /// How a packet would go: the link, or `unreachable`, `prohibit`, `blackhole`.
    ///
    /// `question` is what follows `ip route get`, such as `9.9.9.9 mark 0x30065`.
    ///
    /// # Errors
    /// When the answer is none of these.
    pub fn route(&self, question: &str) -> Result<String> {
        let output = self
            .command(&["sh", "-c", &format!("ip route get {question} 2>&1")])
            .output()?;
        let said = String::from_utf8(output.stdout)?;
        let mut words = said.split_whitespace().skip_while(|word| *word != "dev");
        if let Some(link) = words.nth(1) {
            return Ok(link.to_owned());
        }
        for (says, means) in [
            ("unreachable", "unreachable"),
            ("prohibit", "prohibit"),
            ("Permission denied", "prohibit"),
            ("Invalid argument", "blackhole"),
        ] {
            if said.to_ascii_lowercase().contains(&says.to_ascii_lowercase()) {
                return Ok(means.to_owned());
            }
        }
        anyhow::bail!("ip route get {question}: {said}")
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        if let Some(holder) = &mut self.holder {
            let _ = holder.kill(); // it has usually not ended
            let _ = holder.wait();
        }
    }
}

/// How often something that other programs bring about is looked at.
pub(crate) const PACE: Duration = Duration::from_millis(10);
