//! The loop: observe, plan, apply, verify, report; then wait for a reason to look again.
//!
//! No error ends it. A turn that failed is a state that is reported, and is tried again with
//! growing pauses; broken sockets are replaced, a dead helper too. Each turn knows why it woke.

use std::fmt;
use std::time::Duration;

use sovereign_protocol::name::Name;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::{Failure, StepError};
use super::network::{NetworkConfig, Seen};
use super::pace::{Pace, Retry};
use super::plan::{Plan, Step, plan};
use super::report::{NetworkEvent, Reporter};
use super::session::{Broken, Place, Session};
use super::wanted::{NetworkSpec, Wanted};
use crate::netns::StageFailure;

/// Plans that one turn carries out, at most.
const ROUNDS: u32 = 4;
/// Failures that evidence names beside the first.
const NAMED_FAILURES: usize = 3;

/// Why a turn began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    /// The agent has just started.
    Started,
    /// Something else is wanted.
    Spec,
    /// The kernel told of a change.
    Notified,
    /// The helper's process has ended.
    HelperEnded,
    /// The sockets broke.
    Broken,
    /// It was time: for another attempt, a repair that had to wait, or the slow look at everything.
    Due,
}

impl fmt::Display for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Started => "started",
            Self::Spec => "something else is wanted",
            Self::Notified => "the kernel told of a change",
            Self::HelperEnded => "the netns helper ended",
            Self::Broken => "the sockets broke",
            Self::Due => "it was time",
        })
    }
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Everything is as wanted.
    AsWanted,
    /// There is something to do, but not yet.
    Waits,
}

/// Why a turn did not end as wanted.
struct Trouble {
    step: String,
    evidence: String,
}

impl From<StageFailure> for Trouble {
    fn from(failure: StageFailure) -> Self {
        Self {
            step: failure.stage.to_string(),
            evidence: failure.evidence,
        }
    }
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Self {
        Self {
            step: "speak to the kernel".to_owned(),
            evidence: chain(&broken),
        }
    }
}

/// What the loop owns.
pub(super) struct Reconciler {
    instance: Name,
    receive_buffer: usize,
    resync: Duration,
    spec: watch::Receiver<NetworkSpec>,
    events: mpsc::Sender<NetworkEvent>,
    seen: watch::Sender<Seen>,
    place: Place,
    /// Why there is no helper, when there is none.
    helper: Result<(), StageFailure>,
    session: Option<Session>,
    reporter: Reporter,
    pace: Pace,
    retry: Retry,
    began: Instant,
    /// The next turn, whatever happens.
    due: Instant,
    /// A repair waits until `due`: until then notifications stay in the kernel's buffer.
    held: bool,
    /// The last turn ended with everything as wanted: what differs now was changed by others.
    settled: bool,
    /// The plan that could not be carried out: it is not tried again on each notification.
    stuck: Option<Plan>,
}

impl Reconciler {
    pub(super) fn new(
        config: &NetworkConfig,
        spec: watch::Receiver<NetworkSpec>,
        events: mpsc::Sender<NetworkEvent>,
        seen: watch::Sender<Seen>,
    ) -> Self {
        Self {
            instance: config.helper.instance.clone(),
            receive_buffer: config.receive_buffer,
            resync: config.resync,
            spec,
            events,
            seen,
            place: Place::new(config.helper.clone()),
            helper: Ok(()),
            session: None,
            reporter: Reporter::default(),
            pace: Pace::default(),
            retry: Retry::default(),
            began: Instant::now(),
            due: Instant::now(),
            held: false,
            settled: false,
            stuck: None,
        }
    }

    /// Runs until it is stopped, or nobody is left who could want something else. Whoever
    /// holds the place then ends the helper or leaves it for the next agent.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Place {
        let mut wake = Some(Wake::Started);
        while let Some(why) = wake {
            // A turn that is cut off loses nothing: the next agent plans from what is there.
            wake = tokio::select! {
                () = stop.cancelled() => None,
                next = async { self.turn(why).await; self.next().await } => next,
            };
        }
        self.place
    }

    /// The next reason to look; `None` when the agent is gone. Cancel safe.
    async fn next(&mut self) -> Option<Wake> {
        let (session, listens) = (&mut self.session, !self.held);
        let news = async {
            match session {
                Some(session) if listens => session.changed().await,
                _ => std::future::pending().await,
            }
        };
        // Losing an arm is safe: each is cancel safe and keeps what it read.
        let wake = tokio::select! {
            changed = self.spec.changed() => return changed.ok().map(|()| Wake::Spec),
            told = news => if told.is_ok() { Wake::Notified } else { Wake::Broken },
            () = self.place.helper_ended() => Wake::HelperEnded,
            () = tokio::time::sleep_until(self.due) => Wake::Due,
        };
        if wake == Wake::Broken {
            self.session = None;
        }
        Some(wake)
    }

    async fn turn(&mut self, wake: Wake) {
        tracing::debug!(%wake, "looking at the network");
        self.held = false;
        if wake == Wake::Spec {
            self.retry.reset();
            self.settled = false;
            self.stuck = None;
        }
        let outcome = self.reconcile(wake).await;
        if let Err(trouble) = outcome {
            self.settled = false;
            let pause = Duration::from_millis(self.retry.failed());
            self.due = Instant::now() + pause;
            tracing::warn!(%wake, step = trouble.step, evidence = trouble.evidence, ?pause, "the network is not as wanted");
            let told = self.reporter.failed(trouble.step, trouble.evidence);
            self.tell(told).await;
        }
    }

    async fn reconcile(&mut self, wake: Wake) -> Result<(), Trouble> {
        if wake != Wake::Notified {
            self.ensure_helper(wake).await;
        }
        let spec = self.spec.borrow_and_update().clone();
        let wanted = Wanted::private(&self.instance, &spec).map_err(|error| Trouble {
            step: "understand what is wanted".to_owned(),
            evidence: error.to_string(),
        })?;
        let mut session = match self.session.take() {
            Some(session) => session, // good without its helper, too
            None => self.place.open(self.receive_buffer).await?,
        };
        // A session in which something broke is dropped here.
        let outcome = self.converge(&mut session, wake, &wanted).await?;
        let carriers = self.reporter.carriers(&wanted, &session.observed);
        self.seen.send_replace(Seen::of(&session)); // before anybody is told that he can open a TAP
        self.session = Some(session);
        self.tell(carriers).await;
        if outcome? == Outcome::AsWanted {
            self.helper.clone()?; // all is there, but the next agent could not find it
            self.all_is_well(&wanted).await;
        }
        Ok(())
    }

    async fn ensure_helper(&mut self, wake: Wake) {
        let helper = self.place.helper().await.map(|helper| helper.pid());
        if let (Wake::HelperEnded, Ok(pid)) = (wake, &helper) {
            let what = vec![format!("netns helper: start again as process {pid}")];
            self.tell([NetworkEvent::Repaired { what }]).await;
        }
        self.helper = helper.map(drop);
    }

    /// One turn over a session; the outer error says that the session is of no use any more.
    async fn converge(
        &mut self,
        session: &mut Session,
        wake: Wake,
        wanted: &Wanted,
    ) -> Result<Result<Outcome, Trouble>, Broken> {
        if wake == Wake::Notified {
            session.catch_up().await?;
        } else {
            session.look().await?;
        }
        let todo = plan(wanted, &session.observed);
        if todo.is_done() {
            return Ok(Ok(Outcome::AsWanted));
        }
        let is_news = wake == Wake::Notified;
        if is_news && self.stuck.as_ref() == Some(&todo) {
            return Ok(Ok(Outcome::Waits)); // tried already, and `due` stands
        }
        let by_others = self.settled || (is_news && self.stuck.is_some());
        if by_others && self.must_wait() {
            return Ok(Ok(Outcome::Waits));
        }
        let steps = todo.to_string().trim_end().replace('\n', "; ");
        tracing::info!(%wake, by_others, steps, "changing the network");
        let Work { made, left, failures } = work(session, wanted, todo).await?;
        if by_others && !made.is_empty() {
            self.tell_repair(made).await;
        }
        if left.is_done() {
            return Ok(Ok(Outcome::AsWanted));
        }
        if by_others && failures.is_empty() && left.conflicts.is_empty() && self.must_wait() {
            return Ok(Ok(Outcome::Waits)); // they did it again before we looked
        }
        let trouble = trouble(&left, &failures);
        self.stuck = Some(left);
        Ok(Err(trouble))
    }

    /// Whether the next repair is not due yet; the loop then sleeps until it is.
    fn must_wait(&mut self) -> bool {
        let now = self.now_ms();
        let due = self.pace.due_ms(now);
        self.held = now < due;
        if self.held {
            self.due = self.began + Duration::from_millis(due);
        }
        self.held
    }

    async fn all_is_well(&mut self, wanted: &Wanted) {
        self.settled = true;
        self.stuck = None;
        self.retry.reset();
        self.due = Instant::now() + self.resync;
        let told = self.reporter.ready(wanted);
        self.tell(told).await;
    }

    async fn tell_repair(&mut self, what: Vec<String>) {
        let fight = self.pace.repaired(self.now_ms());
        self.tell([NetworkEvent::Repaired { what: what.clone() }]).await;
        if let Some(repairs) = fight {
            tracing::warn!(repairs, ?what, "somebody else keeps changing the network");
            self.tell([NetworkEvent::Fight { what, repairs }]).await;
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn tell(&self, events: impl IntoIterator<Item = NetworkEvent>) {
        for event in events {
            let _ = self.events.send(event).await; // an engine that is gone drops the spec too, which ends the loop
        }
    }
}

/// What came of a plan.
struct Work {
    /// The steps that were made.
    made: Vec<String>,
    /// What is still to do, by a look afterwards.
    left: Plan,
    /// Why the last steps failed, if some did.
    failures: Vec<Failure>,
}

/// Carries out a plan and looks at the result. A step may fail only because the plan was made
/// of a state that was just passing (a link tells that it is down before it tells that it is
/// gone): as long as looking again brings another plan, that one is tried at once.
async fn work(session: &mut Session, wanted: &Wanted, mut todo: Plan) -> Result<Work, Broken> {
    let mut made = Vec::new();
    let mut rounds = ROUNDS;
    loop {
        let failures = session.apply(&todo).await;
        session.look().await?;
        let left = plan(wanted, &session.observed);
        let failed = |step: &&Step| failures.iter().any(|failure| failure.step == **step);
        let steps = todo.steps.iter().filter(|step| !failed(step));
        made.extend(steps.map(ToString::to_string));
        rounds -= 1;
        if failures.is_empty() || left.steps.is_empty() || left == todo || rounds == 0 {
            return Ok(Work { made, left, failures });
        }
        todo = left;
    }
}

/// The first thing that is in the way, with its reason, and the others by name.
fn trouble(left: &Plan, failures: &[Failure]) -> Trouble {
    let is_root = |failure: &&Failure| !matches!(failure.error, StepError::NoLink(_));
    let roots: Vec<&Failure> = failures.iter().filter(is_root).collect();
    if let Some(first) = roots.first() {
        let others = roots[1..].iter().take(NAMED_FAILURES);
        let others: String = others
            .map(|f| format!("; {}: {}", f.step, chain(&f.error)))
            .collect();
        let more = roots.len().saturating_sub(1 + NAMED_FAILURES);
        let more = if more > 0 {
            format!("; and {more} more")
        } else {
            String::new()
        };
        return Trouble {
            step: first.step.to_string(),
            evidence: format!("{}{others}{more}", chain(&first.error)),
        };
    }
    match (left.conflicts.first(), left.steps.first()) {
        (Some(conflict), _) => Trouble {
            step: format!("link {}", conflict.name),
            evidence: conflict.evidence.clone(),
        },
        (None, step) => Trouble {
            step: step.map(ToString::to_string).unwrap_or_default(),
            evidence: "it was made, and was gone again when we looked".to_owned(),
        },
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::kernel::KernelError;
    use super::super::names::LinkName;
    use super::super::plan::Conflict;
    use super::*;

    fn link(name: &str) -> LinkName {
        LinkName::parse(name).unwrap()
    }

    fn failure(name: &str, error: StepError) -> Failure {
        Failure {
            step: Step::SetUp { name: link(name) },
            error,
        }
    }

    fn refused() -> StepError {
        StepError::Kernel(KernelError::Refused(std::io::Error::from_raw_os_error(1)))
    }

    #[test]
    fn the_first_cause_is_named_and_its_consequences_are_not() {
        let failures = [
            failure("a", StepError::NoLink(link("a"))),
            failure("b", refused()),
            failure("c", refused()),
        ];
        let said = trouble(&Plan::default(), &failures);
        assert_eq!(said.step, "link b: set up");
        assert_eq!(
            said.evidence,
            "the kernel refused: Operation not permitted (os error 1); \
             link c: set up: the kernel refused: Operation not permitted (os error 1)"
        );
        let many: Vec<Failure> = (0..9).map(|n| failure(&format!("l{n}"), refused())).collect();
        assert!(
            trouble(&Plan::default(), &many)
                .evidence
                .ends_with("; and 5 more")
        );
    }

    #[test]
    fn without_a_failure_the_conflict_or_what_is_left_is_named() {
        let mut left = Plan::default();
        left.steps.insert(Step::SetUp { name: link("a") });
        assert_eq!(trouble(&left, &[]).step, "link a: set up");
        let (name, evidence) = (link("b"), "not ours".to_owned());
        left.conflicts.insert(Conflict { name, evidence });
        assert_eq!(trouble(&left, &[]).step, "link b");
    }
}
