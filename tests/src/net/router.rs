//! A plain Linux machine with two uplinks and an agent: [`Lan`] with a [`Hosted`] instance.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::{Agent, Filter, Hosted, can_run};
use crate::lan::{Lan, Nic, Way};
use crate::space::{ANSWER, SILENCE, State};

/// A machine with an agent, and its guest.
pub struct Router {
    /// The machine and what is around it.
    pub lan: Lan,
    /// Its instance.
    pub hosted: Hosted,
    /// The agent that runs.
    pub agent: Option<Agent>,
}

/// A line of what the kernel and the programs of iptables make when they are first used, and leave there, empty.
#[must_use]
pub fn left_by_the_kernel(line: &str) -> bool {
    let declared = line.contains("tables-") && line.contains(" :") && line.ends_with(" ACCEPT");
    let kernels = |kind: &str, words: &[&str]| {
        line.starts_with(&format!("nft {{\"{kind}\"")) && words.iter().any(|word| line.contains(word))
    };
    declared
        || kernels(
            "table",
            &["\"name\":\"nat\"", "\"name\":\"filter\"", "\"name\":\"mangle\""],
        )
        || line.contains("\"policy\":\"accept\"") && kernels("chain", &["PUT\"", "ROUTING\"", "FORWARD\""])
}

impl Router {
    /// A machine, disturbed by `before`, with an agent that has made what it wants; and how it was without.
    ///
    /// # Errors
    /// The system's own, or that the agent does not come that far.
    pub fn new(
        program: &str,
        filter: Filter,
        want: &str,
        before: impl FnOnce(&Lan) -> Result<()>,
    ) -> Result<(Self, State)> {
        let lan = Lan::new()?;
        before(&lan)?;
        let hosted = Hosted::new(program, filter)?;
        let clean = lan.foreign_state(left_by_the_kernel)?;
        let agent = hosted.up(lan.machine(), want)?;
        lan.plug(&hosted.bridge())?;
        let seat = Self {
            lan,
            hosted,
            agent: Some(agent),
        };
        Ok((seat, clean))
    }

    /// The agent.
    ///
    /// # Errors
    /// When there is none.
    pub fn agent(&mut self) -> Result<&mut Agent> {
        self.agent.as_mut().context("no agent")
    }

    /// Has the agent take everything away, and the machine is as it was.
    ///
    /// # Errors
    /// With what is not.
    pub fn down(mut self, clean: &State) -> Result<()> {
        let agent = self.agent.take().context("no agent")?;
        self.hosted.down(self.lan.machine(), agent)?;
        let left = clean.difference(&self.lan.foreign_state(left_by_the_kernel)?);
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    }

    /// The guest's packets soon leave by this link.
    ///
    /// # Errors
    /// When they do not.
    pub fn leaves_by(&self, nic: Nic) -> Result<()> {
        let (until, sees) = (
            Instant::now() + ANSWER,
            format!("sees [::ffff:{}]", nic.address()),
        );
        loop {
            let seen = self
                .lan
                .tcp_out(SILENCE)
                .unwrap_or_else(|error| error.to_string());
            if seen.contains(&sees) {
                return self.lan.answers(Way::PingOut);
            }
            ensure!(Instant::now() < until, "not by {nic}: {seen}");
        }
    }

    /// The other machine in the LAN soon reaches the guest by this forward.
    ///
    /// # Errors
    /// When it does not.
    pub fn forward_works(&self, to: &str) -> Result<()> {
        let (until, to): (_, SocketAddr) = (Instant::now() + ANSWER, to.parse()?);
        loop {
            match self.lan.from_peer(to, SILENCE) {
                Ok(said) if said.starts_with("hello-from-guest") => return Ok(()),
                other => ensure!(Instant::now() < until, "{to}: {other:?}"),
            }
        }
    }

    /// Runs a test from [`new`](Self::new) to [`down`](Self::down); when it fails, what the agent logged is told.
    ///
    /// # Errors
    /// The test's own.
    pub fn run(
        program: &str,
        name: &str,
        filter: Filter,
        want: &str,
        before: impl FnOnce(&Lan) -> Result<()>,
        body: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        if !can_run(name) {
            return Ok(());
        }
        let (mut seat, clean) = Self::new(program, filter, want, before)?;
        if let Err(error) = body(&mut seat) {
            eprintln!("{}", seat.hosted.log());
            return Err(error);
        }
        seat.down(&clean)
    }
}
