//! Many guests: a look at everything of a hundred, and a hundred that come at once.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use sovereign_host_agent::net::NetworkEvent;

use super::agent::{Agent, Turns};
use super::ground;

/// The guests of the budget.
pub(super) const MANY: usize = 100;
/// Times that they come.
const ROUNDS: usize = 9;
/// Looks whose time is taken.
const LOOKS: usize = 200;

/// Times in milliseconds.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Figures {
    /// From the spec to the event Ready.
    pub(super) added: Vec<f64>,
    /// `ip -batch` over as many TAPs.
    pub(super) batch: Vec<f64>,
    /// Between two looks at everything that are made without a pause.
    pub(super) verify: Vec<f64>,
}

/// Prints [`Figures`].
pub(super) fn run() -> Result<()> {
    let (turns, directory) = (Turns::default(), tempfile::tempdir()?);
    turns.install();
    ground::uplink()?;
    let mut figures = Figures::default();
    let (none, many) = (ground::spec(0)?, ground::spec(MANY)?);
    let mut agent = Agent::start(directory.path(), none.clone(), |_| ())?;
    agent.settle()?;
    let is_ready = |count| move |event: &NetworkEvent| matches!(event, NetworkEvent::Ready { guests, .. } if guests.len() == count);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        agent.specs.send_replace(many.clone());
        let ready = agent.wait(is_ready(MANY))?;
        figures
            .added
            .push(ready.duration_since(begun).as_secs_f64() * 1e3);
        agent.specs.send_replace(none.clone());
        agent.wait(is_ready(0))?;
        figures.batch.push(batch()?.as_secs_f64() * 1e3);
    }
    agent.specs.send_replace(many.clone());
    agent.wait(is_ready(MANY))?;
    agent.end()?;
    // The next one finds all of it, and looks at everything again and again.
    let mut agent = Agent::start(directory.path(), many, |config| config.resync = Duration::ZERO)?;
    agent.settle()?;
    std::thread::sleep(Duration::from_millis(300)); // a way out is told when it has lasted
    agent.hear();
    turns.take();
    let mut looks = Vec::new();
    while looks.len() <= LOOKS {
        std::thread::sleep(Duration::from_millis(100));
        looks.extend(turns.take());
    }
    let told = agent.hear();
    ensure!(told == 0, "{told} events: the plan was not empty");
    let pairs = looks.windows(2).map(|pair| pair[1].duration_since(pair[0]));
    figures.verify.extend(pairs.map(|time| time.as_secs_f64() * 1e3));
    agent.end()?;
    println!("{}", serde_json::to_string(&figures)?);
    Ok(())
}

/// What a script would do: as many TAPs in a bridge, up. They are removed untimed.
fn batch() -> Result<Duration> {
    let mut make = "link add peer type bridge\nlink set peer up\n".to_owned();
    let mut remove = "link del peer\n".to_owned();
    for n in 0..MANY {
        writeln!(make, "tuntap add dev peer{n} mode tap")?;
        writeln!(make, "link set peer{n} master peer")?;
        writeln!(make, "link set peer{n} up")?;
        writeln!(remove, "link del peer{n}")?;
    }
    let begun = Instant::now();
    ground::batch(&make)?;
    let took = begun.elapsed();
    ground::batch(&remove)?;
    Ok(took)
}
