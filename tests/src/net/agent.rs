//! The network agent as a child: commands in, events out.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::SOON;

/// An agent that runs; killed when dropped, which leaves its network.
pub struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    /// Every line so far, for messages.
    seen: Vec<String>,
}

impl Agent {
    pub(super) fn of(mut child: Child) -> Result<Self> {
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
        self.expect_any(&[begin])
    }

    /// The same for a line that begins in one of several ways.
    ///
    /// # Errors
    /// After [`SOON`] or when it ended, with all its lines.
    pub fn expect_any(&mut self, begins: &[&str]) -> Result<String> {
        let until = Instant::now() + SOON;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if begins.iter().any(|begin| line.starts_with(begin)) {
                        return Ok(line);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("no {begins:?} in time: {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => bail!("ended without {begins:?}: {:#?}", self.seen),
            }
        }
    }

    /// The last line so far that began so and was waited for or passed over.
    ///
    /// # Errors
    /// With all lines, when there is none.
    pub fn told(&self, begin: &str) -> Result<String> {
        let line = self.seen.iter().rev().find(|line| line.starts_with(begin));
        line.cloned()
            .with_context(|| format!("no {begin:?}: {:#?}", self.seen))
    }

    /// The last line so far that begins so, whether it was waited for or passed over.
    #[must_use]
    pub fn last(&mut self, begin: &str) -> Option<String> {
        self.seen.extend(self.lines.try_iter());
        let mut latest = self.seen.iter().rev();
        latest.find(|line| line.starts_with(begin)).cloned()
    }

    /// The lines that were waited for or passed over.
    #[must_use]
    pub fn seen(&self) -> &[String] {
        &self.seen
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

    /// Closes its input and waits for its end: whether somebody killed it (also as a program that it runs under tells it).
    ///
    /// # Errors
    /// When it failed by itself, or goes on.
    pub fn was_killed(mut self) -> Result<bool> {
        drop(self.input.take());
        let until = Instant::now() + SOON;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < until, "it does not end: {:#?}", self.seen);
            std::thread::sleep(Duration::from_millis(5)); // polls a process
        };
        match (status.signal(), status.code()) {
            (Some(9), _) | (_, Some(137)) => Ok(true),
            (None, Some(0)) => Ok(false),
            _ => bail!("{status}: {:#?}", self.seen),
        }
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
