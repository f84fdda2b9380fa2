//! A network agent inside a [`Space`], whose network is that of the space itself: what `namespace = "host"` does.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use sovereign_host_agent::net::names;
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::name::Name;

use super::Agent;
use crate::space::Space;

/// By what an agent filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// nf_tables, owned by the agent.
    Owned,
    /// nf_tables that everybody may change.
    Plain,
    /// The `iptables` that is found first.
    Iptables,
}

/// An instance whose agents run in spaces, one after another.
pub struct Hosted {
    dir: tempfile::TempDir,
    program: PathBuf,
    filter: Filter,
    instance: Name,
}

impl Hosted {
    /// An instance of a name of its own; `program` is the network-agent. Starts nothing.
    ///
    /// # Errors
    /// The system's own.
    pub fn new(program: &str, filter: Filter) -> Result<Self> {
        Ok(Self {
            dir: tempfile::Builder::new().prefix("svh").tempdir_in("/tmp")?,
            program: program.into(),
            filter,
            instance: Name::parse(&format!("t{}", random_hex::<4>()?))?,
        })
    }

    /// Its bridge, and the tag of its tables and chains.
    #[must_use]
    pub fn bridge(&self) -> String {
        names::bridge(&self.instance).to_string()
    }

    /// The TAP of a guest.
    ///
    /// # Errors
    /// When there can be no such guest.
    pub fn tap(&self, guest: &str) -> Result<String> {
        Ok(names::tap(&self.instance, &Name::parse(guest)?).to_string())
    }

    /// Its routing table.
    #[must_use]
    pub fn table(&self) -> u32 {
        names::Mark::of(&self.instance).table
    }

    /// Where former values of switches are kept.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.dir.path().join("switched.json")
    }

    /// Starts an agent that wants `spec` (`want ADDRESS MTU GUEST... host`).
    ///
    /// # Errors
    /// The system's own.
    pub fn start(&self, space: &Space, spec: &str) -> Result<Agent> {
        self.start_under(space, &[], "-", spec)
    }

    /// Starts an agent under another program, with its buffer for notifications.
    ///
    /// # Errors
    /// The system's own.
    pub fn start_under(&self, space: &Space, over: &[&str], buffer: &str, spec: &str) -> Result<Agent> {
        let (program, dir) = (self.program.to_string_lossy(), self.dir.path().to_string_lossy());
        let mut words = over.to_vec();
        words.extend([&*program, "run", &*dir, self.instance.as_str(), buffer]);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("agent.log"))?;
        let mut command = space.command(&words);
        let choice = match self.filter {
            Filter::Owned => "auto",
            Filter::Plain => "plain",
            Filter::Iptables => "iptables",
        };
        command
            .env("NETWORK_AGENT_FILTER", choice)
            .env("NETWORK_AGENT_HOST", "1");
        command.env("SOVEREIGN_TEST", machines_own()?);
        let mut agent = Agent::of(
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(log)
                .spawn()?,
        )?;
        agent.say(spec)?;
        Ok(agent)
    }

    /// Starts an agent and waits until all parts of its network work.
    ///
    /// # Errors
    /// When they do not in time.
    pub fn up(&self, space: &Space, spec: &str) -> Result<Agent> {
        let mut agent = self.start(space, spec)?;
        agent.expect("ready")?;
        agent.expect("works Filter")?;
        Ok(agent)
    }

    /// Has an agent take everything away, and looks whether it did.
    ///
    /// # Errors
    /// With what is left.
    pub fn down(&self, space: &Space, mut agent: Agent) -> Result<()> {
        agent.say("end")?;
        agent.expect("ended")?;
        agent.restart_ends()?;
        let left = self.leftovers(space)?;
        ensure!(left.is_empty(), "{left:#?}");
        ensure!(!self.record().exists(), "switches are not put back");
        Ok(())
    }

    /// What `gc` finds of this instance, without a change.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn leftovers(&self, space: &Space) -> Result<Vec<String>> {
        let program = self.program.to_string_lossy();
        let mut command = space.command(&[&*program, "gc-dry", self.instance.as_str()]);
        let output = command.env("SOVEREIGN_TEST", machines_own()?).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} {said}", output.status);
        Ok(String::from_utf8(output.stdout)?
            .lines()
            .map(str::to_owned)
            .collect())
    }

    /// Has `gc` take away what a dead agent left, switches included.
    ///
    /// # Errors
    /// With what it said, when it failed or could not remove something.
    pub fn collect(&self, space: &Space) -> Result<()> {
        let (program, dir) = (self.program.to_string_lossy(), self.dir.path().to_string_lossy());
        let mut command = space.command(&[&*program, "gc", &*dir, self.instance.as_str()]);
        let output = command.env("SOVEREIGN_TEST", machines_own()?).output()?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        ensure!(output.status.success(), "{} {said}", output.status);
        ensure!(said.lines().any(|line| line == "failed []"), "{said}");
        Ok(())
    }

    /// What an agent would do that begins now, a line for each step; `nothing` for one that takes all away. It is run
    /// under another program, and no agent runs.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn look(&self, space: &Space, over: &[&str], want: &str) -> Result<Vec<String>> {
        let (program, dir) = (self.program.to_string_lossy(), self.dir.path().to_string_lossy());
        let mut words = over.to_vec();
        words.extend([&*program, "look", &*dir, self.instance.as_str(), want]);
        let output = space.command(&words).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} {said}", output.status);
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// What its agents logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("agent.log")).unwrap_or_default()
    }
}

/// The number of the network namespace that the tests run in, which is out of bounds.
pub(super) fn machines_own() -> Result<String> {
    let link = std::fs::read_link("/proc/self/ns/net")?;
    let number: String = link
        .to_string_lossy()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    number.parse::<u64>().context("no number of a namespace")?;
    Ok(number)
}
