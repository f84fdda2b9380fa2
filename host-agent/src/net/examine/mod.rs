//! Findings: a look at all that others did to this host's network, beside the loop that repairs.
//!
//! A task of its own with sockets of its own, opened for each look and on a thread of its own: no repair waits for it.
//! It looks when somebody asks, and by itself a moment after the loop had news, at a pace that costs at most a fiftieth of
//! a processor. What surely stops guests is told as an event when it begins and when it ends. Changes nothing, but for
//! leftovers that somebody asks for by name.

use std::sync::Arc;
use std::time::Duration;

use sovereign_protocol::condition::Layer;
use sovereign_reconcile::finding::{Cards, Code, FindingsView, Leftover, Look, judge, leftover};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ground::Ground;
use super::network::NetworkConfig;
use super::plan::Part;
use super::report::NetworkEvent;
use super::wanted::NetworkSpec;
use crate::netns::StageFailure;

mod eyes;
mod filters;
mod probes;
mod removal;

pub use removal::{Mode, Removal};

/// After news: more of them may follow.
const QUIET: Duration = Duration::from_millis(300);
/// Between two looks that nobody asked for.
const PAUSE: Duration = Duration::from_secs(3);
/// A look that took long is followed by a pause so many times as long.
const SHARE: u32 = 50;

/// Things of one leftover that are told; more are removed when it is asked for.
const ITEMS: usize = 64;

/// Why nothing can be said.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExamineError {
    /// The network cannot be looked at.
    #[error("the network cannot be looked at: {0}")]
    Look(StageFailure),
    /// There is no leftover of this name.
    #[error("there is no leftover {name:?} here; there {}", names(.there))]
    NotThere {
        /// What was asked for.
        name: String,
        /// What could be.
        there: Vec<String>,
    },
    /// The network has ended.
    #[error("the network has ended")]
    Ended,
}

fn names(all: &[String]) -> String {
    match all {
        [] => "is none".to_owned(),
        [one] => format!("is {one}"),
        many => format!("are {}", many.join(", ")),
    }
}

/// Something that surely stops guests' packets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stop {
    /// What does not work for it.
    pub part: Part,
    /// The finding's code.
    pub code: Code,
    /// What was seen.
    pub evidence: String,
}

/// What is asked.
pub(super) enum Ask {
    /// A look, with what is known of guests' cards.
    Look(Cards, oneshot::Sender<Result<FindingsView, ExamineError>>),
    /// The removal of leftovers by their names.
    Remove(Vec<String>, Mode, oneshot::Sender<Result<Removal, ExamineError>>),
}

/// The task.
pub(super) struct Examiner {
    pub(super) config: NetworkConfig,
    pub(super) spec: watch::Receiver<NetworkSpec>,
    pub(super) asked: mpsc::Receiver<Ask>,
    /// The loop had news.
    pub(super) news: Arc<Notify>,
    pub(super) events: mpsc::Sender<NetworkEvent>,
    /// What was told last.
    pub(super) told: Vec<Stop>,
}

impl Examiner {
    /// Runs until it is stopped, or nobody is left who could ask. Ends nothing but itself.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let mut due: Option<Instant> = None;
        let mut earliest = Instant::now();
        loop {
            let sleeps = tokio::time::sleep_until(due.unwrap_or(earliest));
            // Losing an arm is safe: a question stays in its queue, news leave a permit.
            let ask = tokio::select! {
                () = stop.cancelled() => return,
                ask = self.asked.recv() => match ask {
                    Some(ask) => Some(ask),
                    None => return,
                },
                () = self.news.notified(), if due.is_none() => {
                    due = Some((Instant::now() + QUIET).max(earliest));
                    continue;
                }
                () = sleeps, if due.is_some() => None,
            };
            let began = Instant::now();
            // One that is cut off changes nothing, or no more than it has.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.answer(ask) => {}
            }
            due = None;
            earliest = Instant::now() + PAUSE.max(began.elapsed() * SHARE);
        }
    }

    async fn answer(&mut self, ask: Option<Ask>) {
        match ask {
            None => {
                if let Err(error) = self.look(Cards::default()).await {
                    tracing::debug!(%error, "no look at what others did");
                }
            }
            Some(Ask::Look(cards, reply)) => {
                let _ = reply.send(self.look(cards).await); // who asked may be gone
            }
            Some(Ask::Remove(names, mode, reply)) => {
                let removed = self.remove(names, mode).await;
                let _ = reply.send(removed);
            }
        }
    }

    async fn look(&mut self, cards: Cards) -> Result<FindingsView, ExamineError> {
        let began = Instant::now();
        let spec = self.spec.borrow().clone();
        let config = self.config.clone();
        let seen = apart(move || async move { eyes::look(&config, &spec, cards).await }).await?;
        let findings = judge(&seen.look);
        if matches!(self.config.ground, Ground::Host) {
            self.tell(&findings).await; // in a namespace of our own nothing would take it back
        }
        Ok(FindingsView {
            findings,
            leftovers: named(leftover::leftovers(&seen.look)),
            probes: seen.look.probes,
            unseen: seen.unseen,
            took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
        })
    }

    async fn remove(&mut self, names: Vec<String>, mode: Mode) -> Result<Removal, ExamineError> {
        let spec = self.spec.borrow().clone();
        let config = self.config.clone();
        let removed =
            apart(move || async move { removal::remove(&config, &spec, &names, mode).await }).await?;
        if mode == Mode::Remove && !removed.removed.is_empty() {
            let what = removed.removed.clone();
            let _ = self.events.send(NetworkEvent::Removed { what }).await; // an engine that is gone hears nothing
            self.news.notify_one();
        }
        Ok(removed)
    }

    /// Tells what stops guests, when that is other than what was told.
    async fn tell(&mut self, findings: &[sovereign_reconcile::finding::Finding]) {
        let stops = findings.iter().filter(|finding| finding.stops);
        let mut by: Vec<Stop> = stops.filter_map(stop_of).collect();
        by.dedup_by(|a, b| a.part == b.part); // the first of each part: lowest layer, lowest code
        if by != self.told {
            self.told.clone_from(&by);
            let _ = self.events.send(NetworkEvent::Stopped { by }).await; // an engine that is gone hears nothing
        }
    }
}

/// What is told of leftovers: there may be thousands of one name.
fn named(mut all: Vec<Leftover>) -> Vec<Leftover> {
    for leftover in &mut all {
        leftover.items.truncate(ITEMS);
    }
    all
}

fn stop_of(finding: &sovereign_reconcile::finding::Finding) -> Option<Stop> {
    let part = match finding.layer {
        Layer::Routing => Part::Routing,
        Layer::Nat => Part::Filter,
        _ => return None, // links that are not as wanted are told by the loop itself
    };
    Some(Stop {
        part,
        code: finding.code,
        evidence: finding.evidence.join("; "),
    })
}

/// Does something on a thread of its own, with a runtime of its own for sockets and programs.
async fn apart<T, F>(act: impl FnOnce() -> F + Send + 'static) -> Result<T, ExamineError>
where
    T: Send + 'static,
    F: Future<Output = Result<T, ExamineError>>,
{
    let failed =
        |error: std::io::Error| ExamineError::Look(StageFailure::io(crate::netns::Stage::Answer, &error));
    let outcome = tokio::task::spawn_blocking(move || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().map_err(failed)?;
        runtime.block_on(act())
    });
    outcome.await.map_err(|error| failed(error.into()))?
}

/// A look, and what could not be looked at.
pub(super) struct Seen {
    pub(super) look: Look,
    pub(super) unseen: Vec<String>,
}
