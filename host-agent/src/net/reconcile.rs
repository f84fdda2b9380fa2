//! The loop: observe, plan, apply, verify, report; then wait for a reason to look again.
//!
//! A change that the kernel tells of is folded into what was seen, repaired, and verified by what the kernel tells of
//! the repair: nothing is dumped, so ten thousand foreign rules cost nothing. Everything is looked at again when news
//! were lost, when a repair did not come out as planned, and now and then.
//!
//! No error ends it. A turn that failed is a state that is reported, and is tried again with
//! growing pauses; broken sockets are replaced, a dead helper too. Each turn knows why it woke.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use sovereign_protocol::name::Name;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::route::WantedRoute;
use sovereign_reconcile::uplink::Exit;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::{Failure, StepError};
use super::chain;
use super::ground::Ground;
use super::network::NetworkConfig;
use super::observed::Observed;
use super::pace::{Pace, Retry};
use super::plan::{Part, Plan};
use super::report::{NetworkEvent, Reporter};
use super::session::{Broken, Seat, Session};
use super::taps::TunPool;
use super::wanted::{NetworkSpec, Wanted};
use crate::netns::{Stage, StageFailure};

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
#[derive(Default)]
struct Turn {
    /// What is not as wanted.
    left: Plan,
    /// Why, of what was tried.
    failures: Vec<Failure>,
    /// The rest is not tried yet.
    waits: bool,
}

/// Why a part of the network is not as wanted.
struct Trouble {
    part: Part,
    step: String,
    evidence: String,
}

impl From<StageFailure> for Trouble {
    fn from(failure: StageFailure) -> Self {
        Self {
            part: Part::Links,
            step: failure.stage.to_string(),
            evidence: failure.evidence,
        }
    }
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Self {
        Self {
            part: Part::Links,
            step: "speak to the kernel".to_owned(),
            evidence: chain(&broken),
        }
    }
}

/// What of a network follows the host: ways out, and the routes of our own table.
type Followed = (BTreeMap<Family, Exit>, BTreeSet<WantedRoute>);

fn followed(wanted: &Wanted) -> Followed {
    (wanted.exits.clone(), wanted.routes.clone())
}

/// What the loop owns.
pub(super) struct Reconciler {
    config: NetworkConfig,
    spec: watch::Receiver<NetworkSpec>,
    events: mpsc::Sender<NetworkEvent>,
    tuns: watch::Sender<Option<Arc<TunPool>>>,
    asked: mpsc::Receiver<oneshot::Sender<Observed>>,
    /// Told after each turn: who looks at what others did waits for it.
    news: Arc<Notify>,
    seat: Seat,
    /// Why there is no helper, when there is none.
    helper: Result<(), StageFailure>,
    session: Option<Session>,
    /// What the spec means, as of the last turn.
    wanted: Option<Wanted>,
    reporter: Reporter,
    pace: Pace,
    retry: Retry,
    began: Instant,
    /// The next turn, whatever happens.
    due: Instant,
    /// A repair waits until `due`: until then notifications stay in the kernel's buffer.
    held: bool,
    /// The last turn ended with everything as wanted: what differs now was changed by others, unless what follows the
    /// host is other than this.
    settled: Option<Followed>,
    /// The plan that could not be carried out: it is not tried again on each notification.
    stuck: Option<Plan>,
}

impl Reconciler {
    pub(super) fn new(
        config: NetworkConfig,
        spec: watch::Receiver<NetworkSpec>,
        events: mpsc::Sender<NetworkEvent>,
        tuns: watch::Sender<Option<Arc<TunPool>>>,
        asked: mpsc::Receiver<oneshot::Sender<Observed>>,
        news: Arc<Notify>,
    ) -> Self {
        let first_pause = config.first_pause;
        Self {
            seat: Seat::new(&config.ground),
            config,
            spec,
            events,
            tuns,
            asked,
            news,
            helper: Ok(()),
            session: None,
            wanted: None,
            reporter: Reporter::default(),
            pace: Pace::new(u64::try_from(first_pause.as_millis()).unwrap_or(u64::MAX >> 16)),
            retry: Retry::default(),
            began: Instant::now(),
            due: Instant::now(),
            held: false,
            settled: None,
            stuck: None,
        }
    }

    /// Runs until it is stopped, or nobody is left who could want something else. Whoever
    /// holds the place then ends the helper or leaves it for the next agent.
    pub(super) async fn run(mut self, stop: CancellationToken) -> Self {
        let mut wake = Some(Wake::Started);
        while let Some(why) = wake {
            // A turn that is cut off loses nothing: the next agent plans from what is there.
            wake = tokio::select! {
                () = stop.cancelled() => None,
                next = async { self.turn(why).await; self.next().await } => next,
            };
        }
        self
    }

    /// The next reason to look; `None` when the agent is gone, or everything was taken away.
    async fn next(&mut self) -> Option<Wake> {
        loop {
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
                () = self.seat.helper_ended() => Wake::HelperEnded,
                () = tokio::time::sleep_until(self.due) => Wake::Due,
                Some(reply) = self.asked.recv() => {
                    let observed = self.session.as_ref().map(|session| session.observed.clone());
                    let _ = reply.send(observed.unwrap_or_default()); // who asked may be gone
                    continue;
                }
            };
            if wake == Wake::Broken {
                self.session = None;
            }
            return Some(wake);
        }
    }

    /// Takes everything of ours away. A private namespace goes with all that is in it.
    pub(super) async fn end(mut self) -> Result<(), StageFailure> {
        let left = match self.config.ground {
            Ground::Private(_) => Ok(()),
            Ground::Host => self.leave().await,
        };
        drop(self.session);
        self.seat.end().await?;
        left
    }

    /// Takes everything of ours out of a namespace that stays.
    async fn leave(&mut self) -> Result<(), StageFailure> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.seat.open(&self.config).await?,
        };
        let failed = |why: String| StageFailure::new(Stage::Leave, why);
        let instance = &self.config.instance;
        let spec = NetworkSpec::default();
        let mut last = Vec::new();
        for _ in 0..ROUNDS {
            let looked = session.look(instance, &spec).await;
            looked.map_err(|broken| failed(chain(&broken)))?;
            let nothing = Wanted::nothing(instance, session.switched(), &session.observed);
            let todo = session.plan(&nothing);
            if todo.is_done() {
                return Ok(());
            }
            let failures = session.apply(&todo, &nothing).await;
            last = troubles(&todo, &failures);
        }
        let whys = last
            .iter()
            .map(|trouble| format!("{}: {}", trouble.step, trouble.evidence));
        Err(failed(whys.collect::<Vec<_>>().join("; ")))
    }

    async fn turn(&mut self, wake: Wake) {
        tracing::debug!(%wake, "looking at the network");
        self.held = false;
        if wake == Wake::Spec {
            self.begin_anew();
        }
        let troubles = self.reconcile(wake).await.unwrap_or_else(|trouble| vec![trouble]);
        if matches!(self.config.ground, Ground::Host) {
            self.news.notify_one(); // in a namespace of our own nobody else is to be met
        }
        if troubles.is_empty() {
            return;
        }
        self.settled = None;
        let pause = Duration::from_millis(self.retry.failed());
        self.due = Instant::now() + pause;
        for Trouble { part, step, evidence } in troubles {
            tracing::warn!(%wake, ?part, step, evidence, ?pause, "the network is not as wanted");
            let told = self.reporter.failed(part, step, evidence);
            self.tell(told).await;
        }
    }

    /// Something else is wanted: what is known of the last attempts says nothing about it.
    fn begin_anew(&mut self) {
        self.retry.reset();
        self.settled = None;
        self.stuck = None;
        self.wanted = None;
    }

    /// What is wrong, part by part; the error says that nothing can be said or done at all.
    async fn reconcile(&mut self, wake: Wake) -> Result<Vec<Trouble>, Trouble> {
        if wake != Wake::Notified {
            self.ensure_helper(wake).await;
        }
        let (spec, is_other) = {
            let spec = self.spec.borrow_and_update();
            (spec.clone(), spec.has_changed())
        };
        if is_other {
            self.begin_anew();
        }
        let mut session = match self.session.take() {
            Some(session) => session, // good without its helper, too
            None => self.seat.open(&self.config).await?,
        };
        // A session in which something broke is dropped here.
        let (wanted, turn) = self.converge(&mut session, wake, &spec).await?;
        let carriers = self.reporter.carriers(&wanted, &session.observed);
        // Before anybody is told that he can open a TAP.
        self.tuns.send_if_modified(|tuns| {
            let news = !tuns.as_ref().is_some_and(|tuns| Arc::ptr_eq(tuns, &session.tuns));
            *tuns = Some(session.tuns.clone());
            news
        });
        self.tell(carriers).await;
        let exits = self.reporter.exits(&wanted);
        self.tell(exits).await;
        let enforced = session.enforced(&wanted);
        let polled = session.filter.due();
        self.session = Some(session);
        let mut troubles = if turn.waits {
            Vec::new()
        } else {
            troubles(&turn.left, &turn.failures)
        };
        if let Err(failure) = &self.helper {
            troubles.push(Trouble::from(failure.clone())); // all is there, but the next agent could not find it
        }
        self.report(&wanted, &turn.left, &troubles, enforced).await;
        if turn.left.is_done() && troubles.is_empty() {
            self.settled = Some(followed(&wanted));
            self.stuck = None;
            self.retry.reset();
            self.due = Instant::now() + self.config.resync;
            if wake == Wake::Notified {
                self.due = polled.map_or(self.due, |polled| polled.min(self.due));
            }
        }
        self.wanted = Some(wanted);
        Ok(troubles)
    }

    /// Tells of the parts that work.
    async fn report(&mut self, wanted: &Wanted, left: &Plan, troubles: &[Trouble], enforced: Option<String>) {
        let works = |part: Part| {
            let troubled = troubles.iter().any(|trouble| trouble.part == part);
            !troubled && left.of(part).is_done()
        };
        let links = works(Part::Links).then(|| self.reporter.ready(wanted)).flatten();
        self.tell(links).await;
        for part in [Part::Routing, Part::Filter]
            .into_iter()
            .filter(|part| works(*part))
        {
            let filter = wanted.filter.as_ref().filter(|_| part == Part::Filter);
            let forwards = filter.map(|filter| filter.forwards.clone()).unwrap_or_default();
            let how = enforced.clone().filter(|_| part == Part::Filter);
            let told = self.reporter.works(part, how, forwards);
            self.tell(told).await;
        }
    }

    async fn ensure_helper(&mut self, wake: Wake) {
        let helper = self.seat.helper().await;
        if let (Wake::HelperEnded, Ok(Some(pid))) = (wake, &helper) {
            let what = vec![format!("netns helper: start again as process {pid}")];
            self.tell([NetworkEvent::Repaired { what }]).await;
        }
        self.helper = helper.map(drop);
    }

    /// One turn over a session; the error says that nothing can be said or done at all.
    async fn converge(
        &mut self,
        session: &mut Session,
        wake: Wake,
        spec: &NetworkSpec,
    ) -> Result<(Wanted, Turn), Trouble> {
        if wake == Wake::Notified {
            session.catch_up(&self.config.instance, spec).await?;
        } else {
            session.look(&self.config.instance, spec).await?;
        }
        let mut wanted = self.wanted_of(spec, session)?;
        let todo = session.plan(&wanted);
        let turn = match todo.is_done() {
            true => Turn::default(),
            false => self.work(session, wake, spec, &mut wanted, todo).await?,
        };
        Ok((wanted, turn))
    }

    fn wanted_of(&mut self, spec: &NetworkSpec, session: &Session) -> Result<Wanted, Trouble> {
        if let Some(mut wanted) = self.wanted.take() {
            wanted.follow(spec, session.switched(), &session.observed);
            return Ok(wanted);
        }
        let wanted = Wanted::of(&self.config.instance, spec, session.switched(), &session.observed);
        wanted.map_err(|error| Trouble {
            part: Part::Links,
            step: "understand what is wanted".to_owned(),
            evidence: error.to_string(),
        })
    }

    async fn work(
        &mut self,
        session: &mut Session,
        wake: Wake,
        spec: &NetworkSpec,
        wanted: &mut Wanted,
        todo: Plan,
    ) -> Result<Turn, Broken> {
        let waits = |left| Turn {
            left,
            waits: true,
            ..Turn::default()
        };
        let is_news = wake == Wake::Notified;
        if is_news && self.stuck.as_ref() == Some(&todo) {
            return Ok(waits(todo)); // tried already, and `due` stands
        }
        // Who moves the host to another uplink or subnet means us to follow, and undoes nothing.
        let follows = self
            .settled
            .as_ref()
            .is_some_and(|then| *then != followed(wanted));
        let by_others = !follows && (self.settled.is_some() || (is_news && self.stuck.is_some()));
        if by_others && self.must_wait() {
            return Ok(waits(todo));
        }
        let by = session.changed_by();
        let why = (wake, by_others, by.as_deref());
        let instance = self.config.instance.clone();
        let Work { made, left, failures } = work(session, &instance, spec, wanted, todo, why).await?;
        let _ = session.changed_by(); // that was us
        if by_others && !made.is_empty() {
            self.tell_repair(made, by).await;
        }
        if left.is_done() {
            return Ok(Turn::default());
        }
        if by_others && failures.is_empty() && left.conflicts.is_empty() {
            if !self.must_wait() {
                self.due = Instant::now();
            }
            return Ok(waits(left)); // they did it again before we looked: no failure of ours
        }
        self.stuck = Some(left.clone());
        Ok(Turn {
            left,
            failures,
            waits: false,
        })
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

    async fn tell_repair(&mut self, mut what: Vec<String>, by: Option<String>) {
        what.extend(by.map(|by| format!("changed by {by}")));
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
///
/// After news the kernel's own news of the change are the look, unless they are not as planned.
async fn work(
    session: &mut Session,
    instance: &Name,
    spec: &NetworkSpec,
    wanted: &mut Wanted,
    mut todo: Plan,
    (wake, by_others, by): (Wake, bool, Option<&str>),
) -> Result<Work, Broken> {
    let mut made = Vec::new();
    for round in 1.. {
        let failures = session.apply(&todo, wanted).await;
        if round == 1 {
            // Not before: a repair waits for no log.
            let steps = todo.to_string().trim_end().replace('\n', "; ");
            tracing::info!(%wake, by_others, by, steps, "changed the network");
        }
        let mut left = todo.clone();
        if wake == Wake::Notified && failures.is_empty() {
            session.catch_up(instance, spec).await?;
            wanted.follow(spec, session.switched(), &session.observed);
            left = session.plan(wanted);
        }
        if !left.is_done() {
            session.look(instance, spec).await?;
            wanted.follow(spec, session.switched(), &session.observed);
            left = session.plan(wanted);
        }
        let failed = |step: &&super::plan::Step| failures.iter().any(|failure| failure.step == **step);
        let steps = todo.steps.iter().filter(|step| !failed(step));
        made.extend(steps.map(ToString::to_string));
        if failures.is_empty() || left.steps.is_empty() || left == todo || round == ROUNDS {
            return Ok(Work { made, left, failures });
        }
        todo = left;
    }
    unreachable!("the rounds end")
}

/// What is wrong with each part that is not as wanted.
fn troubles(left: &Plan, failures: &[Failure]) -> Vec<Trouble> {
    let of = |part| {
        let left = left.of(part);
        let failures: Vec<&Failure> = failures.iter().filter(|f| f.step.part() == part).collect();
        (!left.is_done()).then(|| trouble(part, &left, &failures))
    };
    Part::ALL.into_iter().filter_map(of).collect()
}

/// The first thing that is in the way, with its reason, and the others by name.
fn trouble(part: Part, left: &Plan, failures: &[&Failure]) -> Trouble {
    let is_root = |failure: &&&Failure| !matches!(failure.error, StepError::NoLink(_));
    let roots: Vec<&&Failure> = failures.iter().filter(is_root).collect();
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
            part,
            step: first.step.to_string(),
            evidence: format!("{}{others}{more}", chain(&first.error)),
        };
    }
    match (left.conflicts.first(), left.steps.first()) {
        (Some(conflict), _) => Trouble {
            part,
            step: conflict.on.clone(),
            evidence: conflict.evidence.clone(),
        },
        (None, step) => Trouble {
            part,
            step: step.map(ToString::to_string).unwrap_or_default(),
            evidence: "it was made, and was gone again when we looked".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::KernelError;
    use super::super::names::LinkName;
    use super::super::plan::{Conflict, Step};
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

    /// What is said of links that are not as wanted.
    fn said(conflicts: &[Conflict], failures: &[Failure]) -> Trouble {
        let mut left = Plan::default();
        left.steps.insert(Step::SetUp { name: link("a") });
        left.conflicts.extend(conflicts.iter().cloned());
        let mut troubles = troubles(&left, failures);
        assert_eq!(troubles.len(), 1);
        troubles.remove(0)
    }

    #[test]
    fn the_first_cause_is_named_and_its_consequences_are_not() {
        let failures = [
            failure("a", StepError::NoLink(link("a"))),
            failure("b", refused()),
            failure("c", refused()),
        ];
        let trouble = said(&[], &failures);
        assert_eq!(trouble.step, "link b: set up");
        assert_eq!(
            trouble.evidence,
            "the kernel refused: Operation not permitted (os error 1); \
             link c: set up: the kernel refused: Operation not permitted (os error 1)"
        );
        let many: Vec<Failure> = (0..9).map(|n| failure(&format!("l{n}"), refused())).collect();
        assert!(said(&[], &many).evidence.ends_with("; and 5 more"));
    }

    #[test]
    fn without_a_failure_the_conflict_or_what_is_left_is_named() {
        assert_eq!(said(&[], &[]).step, "link a: set up");
        let conflict = Conflict {
            part: Part::Links,
            on: "link b".to_owned(),
            evidence: "not ours".to_owned(),
        };
        assert_eq!(said(&[conflict], &[]).step, "link b");
    }

    #[test]
    fn each_part_has_its_own_trouble() {
        let mut left = Plan::default();
        left.steps.insert(Step::SetFilter { tag: "t".to_owned() });
        left.conflicts.insert(Conflict {
            part: Part::Links,
            on: "link b".to_owned(),
            evidence: "not ours".to_owned(),
        });
        let parts: Vec<Part> = troubles(&left, &[]).iter().map(|trouble| trouble.part).collect();
        assert_eq!(parts, [Part::Links, Part::Filter]);
    }
}
