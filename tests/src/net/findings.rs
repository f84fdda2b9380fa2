//! Findings of a network agent: asked anew each time, until they are as they should be.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Agent, SOON};

/// One answer.
#[derive(Debug, Clone)]
pub struct Findings(pub Value);

impl Findings {
    /// Asks for one answer, for guests whose VMM holds a card.
    ///
    /// # Errors
    /// That nothing could be looked at.
    pub fn of(agent: &mut Agent, cards: &str) -> Result<Self> {
        let begun = Instant::now();
        loop {
            agent.say(&format!("findings {cards}"))?;
            let line = agent.expect_any(&["found ", "not-looked "])?;
            if let Some(json) = line.strip_prefix("found ") {
                return Ok(Self(serde_json::from_str(json)?));
            }
            ensure!(begun.elapsed() < SOON, "{line}"); // others changed all of it on the way
        }
    }

    /// Asks until an answer is as it should be: what a change brings about shows a moment later.
    ///
    /// # Errors
    /// After [`SOON`], with the last answer.
    pub fn until(agent: &mut Agent, what: &str, is: impl Fn(&Self) -> bool) -> Result<Self> {
        Self::until_with(agent, "", what, is)
    }

    /// The same for guests whose VMM holds a card.
    ///
    /// # Errors
    /// After [`SOON`], with the last answer.
    pub fn until_with(
        agent: &mut Agent,
        cards: &str,
        what: &str,
        is: impl Fn(&Self) -> bool,
    ) -> Result<Self> {
        let begun = Instant::now();
        loop {
            let found = Self::of(agent, cards)?;
            if is(&found) {
                return Ok(found);
            }
            ensure!(begun.elapsed() < SOON, "{what}: {:#}", found.0);
        }
    }

    /// Codes with their families, such as `ForwardDrop v4`.
    #[must_use]
    pub fn codes(&self) -> Vec<String> {
        let findings = self.0["findings"].as_array().into_iter().flatten();
        findings
            .map(|finding| {
                let family = finding["family"].as_str().unwrap_or("all");
                format!("{} {family}", finding["code"].as_str().unwrap_or_default())
            })
            .collect()
    }

    /// Whether these are all that there is.
    #[must_use]
    pub fn are(&self, codes: &[&str]) -> bool {
        self.codes() == codes
    }

    /// A finding.
    ///
    /// # Errors
    /// When there is none of the code.
    pub fn finding(&self, code: &str) -> Result<&Value> {
        let mut findings = self.0["findings"].as_array().into_iter().flatten();
        let found = findings.find(|finding| finding["code"] == code);
        found.with_context(|| format!("no {code}: {:#}", self.0))
    }

    /// What a finding says of itself, whatever part of it.
    ///
    /// # Errors
    /// When there is none of the code.
    pub fn text(&self, code: &str) -> Result<String> {
        Ok(self.finding(code)?.to_string())
    }

    /// The answers of the kernel, one a line.
    #[must_use]
    pub fn probes(&self) -> Vec<&str> {
        let probes = self.0["probes"].as_array().into_iter().flatten();
        probes.filter_map(|probe| probe["text"].as_str()).collect()
    }

    /// The leftovers' names.
    #[must_use]
    pub fn leftovers(&self) -> Vec<&str> {
        let leftovers = self.0["leftovers"].as_array().into_iter().flatten();
        leftovers
            .filter_map(|leftover| leftover["name"].as_str())
            .collect()
    }
}

/// Waits for what the agent tells by itself of what stops guests, until its last word is so.
///
/// # Errors
/// After nine times [`SOON`], with its last word.
pub fn until_stopped_by(agent: &mut Agent, is: impl Fn(&str) -> bool) -> Result<String> {
    let begun = Instant::now();
    loop {
        let last = agent.last("stopped ");
        match &last {
            Some(line) if is(line) => return Ok(line.clone()),
            // A look that took long is followed by a pause fifty times as long.
            _ => ensure!(begun.elapsed() < 9 * SOON, "{last:?}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(20)); // polls a pipe, waits for nothing else
    }
}
