//! A host with two guests on its bridge and another machine beside it, each a network namespace.
//!
//! ```text
//!  outside 192.0.2.2 ── up0 192.0.2.1 [host] bridge 10.9.0.1 ──┬── sql 10.9.0.2
//!          fd00:8::2         fd00:8::1            fd00:9::1     └── web 10.9.0.3
//! ```

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Result, ensure};

use super::{Agent, inside};
use crate::{guard, seat};

/// The bridge's name, and the tag of what is made for it.
pub const TAG: &str = "svlan";

/// Where something runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The host.
    Host,
    /// The other machine.
    Outside,
    /// The first guest.
    Sql,
    /// The second guest.
    Web,
}

/// The four of them; they end when it is dropped.
pub struct Lan {
    holders: [Child; 4],
    program: PathBuf,
    /// For what runs here to be found; removed at the end.
    dir: tempfile::TempDir,
}

impl Lan {
    /// Makes them, without any rule. `program` is the nft-agent.
    ///
    /// # Errors
    /// The system's own.
    pub fn new(program: &Path) -> Result<Self> {
        guard::refuse_vsock();
        let dir = tempfile::Builder::new().prefix("svl").tempdir_in("/tmp")?;
        let hold = |name: &str| seat::hold(&["--net"], &dir.path().join(name), "ip link set lo up");
        let holders = [hold("host")?, hold("outside")?, hold("sql")?, hold("web")?];
        let lan = Self {
            holders,
            program: program.to_owned(),
            dir,
        };
        lan.at(
            Place::Host,
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding; \
             ip link add svlan address 02:00:00:00:00:01 type bridge; ip link set svlan up; \
             ip address add 10.9.0.1/24 dev svlan; ip address add fd00:9::1/64 dev svlan nodad",
        )?;
        lan.link(Place::Outside, "up0", "eth0", ["192.0.2.2/24", "fd00:8::2/64"])?;
        lan.at(
            Place::Host,
            "ip address add 192.0.2.1/24 dev up0; ip address add fd00:8::1/64 dev up0 nodad",
        )?;
        for (place, number) in [(Place::Sql, 2), (Place::Web, 3)] {
            let link = Self::link_of(place);
            let addresses = [format!("10.9.0.{number}/24"), format!("fd00:9::{number}/64")];
            lan.link(place, link, "eth0", addresses.each_ref().map(String::as_str))?;
            lan.at(Place::Host, &format!("ip link set {link} master svlan"))?;
            lan.at(
                place,
                &format!(
                    "ip link set eth0 address {}; ip route add default via 10.9.0.1; \
                     ip route add default via fd00:9::1",
                    Self::mac_of(place)
                ),
            )?;
        }
        Ok(lan)
    }

    /// A guest's link on the host.
    #[must_use]
    pub fn link_of(guest: Place) -> &'static str {
        if guest == Place::Sql {
            "svlan-sql"
        } else {
            "svlan-web"
        }
    }

    /// A guest's hardware address.
    #[must_use]
    pub fn mac_of(guest: Place) -> &'static str {
        if guest == Place::Sql {
            "02:00:00:00:00:0a"
        } else {
            "02:00:00:00:00:0b"
        }
    }

    fn link(&self, place: Place, here: &str, there: &str, addresses: [&str; 2]) -> Result<()> {
        let pid = self.pid(place);
        self.at(
            Place::Host,
            &format!("ip link add {here} type veth peer name {there} netns {pid}; ip link set {here} up"),
        )?;
        let [four, six] = addresses;
        let script = format!(
            "ip link set {there} up; ip address add {four} dev {there}; ip address add {six} dev {there} nodad"
        );
        self.at(place, &script).map(drop)
    }

    fn pid(&self, place: Place) -> u32 {
        self.holders[place as usize].id()
    }

    /// Runs a script there, as root; the first thing that fails ends it.
    ///
    /// # Errors
    /// With what it said, when it failed.
    pub fn at(&self, place: Place, script: &str) -> Result<String> {
        inside(self.pid(place), &format!("set -e; {script}"))
    }

    /// A program there. Nothing is started.
    #[must_use]
    pub fn command(&self, place: Place, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let pid = self.pid(place).to_string();
        command.args(["--target", &pid, "--net", "--"]).args(words);
        command.current_dir(self.dir.path());
        command
    }

    /// The nft-agent with these words there, spoken to over its standard input.
    ///
    /// # Errors
    /// The system's own.
    pub fn agent(&self, place: Place, words: &[&str]) -> Result<Agent> {
        let program = self.program.to_string_lossy();
        let words: Vec<&str> = [&*program].into_iter().chain(words.iter().copied()).collect();
        self.program(place, &words)
    }

    /// A program there, spoken to over its standard input.
    ///
    /// # Errors
    /// The system's own.
    pub fn program(&self, place: Place, words: &[&str]) -> Result<Agent> {
        let mut command = self.command(place, words);
        Agent::of(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
    }

    /// An agent for the host's tables.
    ///
    /// # Errors
    /// The system's own.
    pub fn filter(&self, tag: &str) -> Result<Agent> {
        let mut agent = self.agent(Place::Host, &["run", tag])?;
        agent.expect("runs")?;
        Ok(agent)
    }

    /// Answers at a place (`tcp 8080`) until it is dropped.
    ///
    /// # Errors
    /// The system's own.
    pub fn answers(&self, place: Place, what: &str) -> Result<Agent> {
        let words: Vec<&str> = ["answer"].into_iter().chain(what.split(' ')).collect();
        let mut agent = self.agent(place, &words)?;
        agent.expect("answers")?;
        Ok(agent)
    }

    /// Asks from a place (`tcp 192.0.2.1 8080`, with an own address `from 10.9.0.77`), and what came of it:
    /// `answered` with the address that was seen there, or `refused` with the error and milliseconds, or `silence`.
    ///
    /// # Errors
    /// The system's own.
    pub fn ask(&self, place: Place, what: &str) -> Result<String> {
        let program = self.program.to_string_lossy();
        let mut command = self.command(place, &[&program, "ask"]);
        let output = command.args(what.split(' ')).output()?;
        ensure!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for holder in &mut self.holders {
            let _ = holder.kill(); // it has usually not ended
            let _ = holder.wait();
        }
    }
}
