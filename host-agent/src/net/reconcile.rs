//! The loop: observe, plan, apply, verify, report; then wait for a reason to look again.
//!
//! A change that the kernel tells of is folded into what was seen, repaired, and verified by what the kernel tells of
//! the repair: nothing is dumped, so ten thousand foreign rules cost nothing. Everything is looked at again when news
//! were lost, when a repair did not come out as planned, and now and then.
//!
//! No error ends it. A turn that failed is a state that is reported, and is tried again with
//! growing pauses; broken sockets are replaced, a dead helper too. Each turn knows why it woke.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sovereign_reconcile::family::Family;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::chain;
use super::families;
use super::ground::Ground;
use super::network::NetworkConfig;
use super::observed::Observed;
use super::outside::Outside;
use super::pace::{Pace, Retry};
use super::plan::{Part, Plan};
use super::report::{Enforced, NetworkEvent, Reporter};
use super::session::{Broken, Changed, Seat, Session};
use super::taps::TunPool;
use super::wake::Wake;
use super::wanted::{NetworkSpec, Wanted};
use super::ways::{Teller, WAYS, led_out_by, ways};
use super::work::{Followed, ROUNDS, Trouble, Turn, Work, followed, troubles, work};
use crate::netns::{Stage, StageFailure};

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
    /// For a family that does not work beside one that does.
    lacking: Retry,
    /// The last turn took news in, or looked at everything.
    heard: bool,
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
    /// What guests were told of their way out.
    ways: Teller,
    /// The machine around a private network.
    outside: Outside,
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
        let seat = Seat::new(&config.ground);
        Self {
            ways: Teller::open(seat.record(&config).with_file_name(WAYS)),
            outside: Outside::new(config.receive_buffer),
            seat,
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
            lacking: Retry::default(),
            heard: true,
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
            let is_open = session.is_some(); // without a session only a look at everything helps
            let lasts = [self.ways.due_ms(), self.outside.due_ms()].into_iter().flatten();
            let lasts = lasts.min().filter(|_| is_open);
            let lasts = lasts.map(|due| self.began + Duration::from_millis(due));
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
                () = self.outside.heard(), if is_open => match self.outside.take_in().await {
                    true => Wake::Outside,
                    false => continue,
                },
                changed = self.seat.changed() => match changed {
                    Changed::Helper => Wake::HelperEnded,
                    Changed::Pasta => Wake::Uplink,
                },
                () = tokio::time::sleep_until(self.due) => Wake::Due,
                () = tokio::time::sleep_until(lasts.unwrap_or(self.due)), if lasts.is_some() => Wake::WayLasts,
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
        if let Ground::Private(_) = self.config.ground {
            drop(self.session);
            return self.seat.end().await; // its records go with it
        }
        let left = self.leave().await;
        drop(self.session);
        let forgotten = self.ways.forget();
        left?;
        forgotten.map_err(|error| StageFailure::new(Stage::Leave, format!("{error:#}")))
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
                session.forget_connections(&nothing);
                session.close().await;
                return Ok(());
            }
            let failures = session.apply(&todo, &nothing, false).await;
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
        if matches!(self.config.ground, Ground::Host) && self.heard {
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
        self.lacking.reset();
        self.settled = None;
        self.stuck = None;
        self.wanted = None;
    }

    /// What is wrong, part by part; the error says that nothing can be said or done at all.
    async fn reconcile(&mut self, wake: Wake) -> Result<Vec<Trouble>, Trouble> {
        if !wake.is_news() {
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
        let is_led_out = self.seat.is_led_out(&spec);
        self.outside
            .keep(is_led_out, !wake.is_news(), self.now_ms())
            .await;
        // A session in which something broke is dropped here.
        let led_out = self.lead_out(wake, &spec).await;
        let (wanted, turn) = self.converge(&mut session, wake, &spec).await?;
        let carriers = self.reporter.carriers(&wanted, &session.observed);
        // Before anybody is told that he can open a TAP.
        self.tuns.send_if_modified(|tuns| {
            let news = !tuns.as_ref().is_some_and(|tuns| Arc::ptr_eq(tuns, &session.tuns));
            *tuns = Some(session.tuns.clone());
            news
        });
        self.tell(carriers).await;
        let exits = self.reporter.exits(&wanted, &session.observed);
        self.tell(exits).await;
        let enforced = session.enforced(&wanted);
        let polled = session.filter.due();
        let (mut troubles, mut lacking, mut left) = (Vec::new(), BTreeMap::new(), turn.left.clone());
        if !turn.waits {
            lacking = families::lacking(&turn.left, &turn.failures, &wanted);
            left = families::beside(&turn.left, &lacking, &wanted);
            troubles = self::troubles(&left, &turn.failures);
        }
        if let Err(failure) = &self.helper {
            troubles.push(Trouble::from(failure.clone())); // all is there, but the next agent could not find it
        }
        troubles.extend(led_out.err());
        let lacks = !lacking.is_empty();
        self.report(&wanted, &left, (&troubles, lacking), enforced).await;
        session.forget_connections(&wanted);
        let found = match is_led_out {
            true => Ok(led_out_by(&wanted, self.outside.ways())),
            false => ways(&mut session.kernel, &session.observed, &wanted, &spec).await,
        };
        let before = self.ways.told();
        let moved = self.ways.look(found.map_err(Broken::from)?, self.now_ms());
        session.forget_former(&wanted, (&before, &self.ways.told()));
        self.tell(moved.map(|ways| NetworkEvent::Ways { ways })).await;
        self.heard = session.heard();
        self.session = Some(session);
        if left.is_done() && troubles.is_empty() && !turn.waits {
            self.settled = Some(followed(&wanted));
            self.retry.reset();
            self.due = Instant::now() + self.config.resync;
            if wake.is_news() && self.heard {
                self.due = polled.map_or(self.due, |polled| polled.min(self.due));
            }
            if lacks {
                // The other works; this one is tried again.
                let pause = Duration::from_millis(self.lacking.failed());
                self.due = self.due.min(Instant::now() + pause);
            } else {
                self.stuck = None;
                self.lacking.reset();
            }
        }
        self.wanted = Some(wanted);
        Ok(troubles)
    }

    /// Tells of the parts that work, without families that do not.
    async fn report(
        &mut self,
        wanted: &Wanted,
        left: &Plan,
        (troubles, lacking): (&[Trouble], BTreeMap<Family, String>),
        enforced: Enforced,
    ) {
        let works = |part: Part| {
            let troubled = troubles.iter().any(|trouble| trouble.part == part);
            !troubled && left.of(part).is_done()
        };
        let links = works(Part::Links).then(|| self.reporter.ready(wanted, lacking));
        let links = links.flatten();
        if let Some(NetworkEvent::Ready { lacking, .. }) = &links {
            for (family, why) in lacking {
                tracing::warn!(%family, why, "one family of the network is not as wanted");
            }
        }
        self.tell(links).await;
        for part in [Part::Routing, Part::Filter]
            .into_iter()
            .filter(|part| works(*part))
        {
            let enforced = match part {
                Part::Filter => enforced.clone(),
                Part::Links | Part::Routing => Enforced::default(),
            };
            let told = self.reporter.works(part, enforced);
            self.tell(told).await;
        }
    }

    /// Sees to it that guests of a private namespace are led out.
    async fn lead_out(&mut self, wake: Wake, spec: &NetworkSpec) -> Result<(), Trouble> {
        let mut families = self.outside.families();
        // Nobody's connections are ended for what no guest has an address of.
        families.lasting.retain(|family| spec.families().contains(family));
        let kept = self.seat.keep_pasta(&self.config.instance, spec, families);
        let started = kept.await.map_err(|failure| Trouble {
            part: Part::Routing,
            step: failure.step.to_owned(),
            evidence: failure.evidence,
        })?;
        let Some(started) = started else {
            return Ok(());
        };
        self.ways.renew();
        let again = started.again(wake == Wake::Uplink);
        self.tell(again.map(|what| NetworkEvent::Repaired { what: vec![what] }))
            .await;
        Ok(())
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
        if wake.is_news() {
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

    fn wanted_of(&mut self, spec: &NetworkSpec, session: &mut Session) -> Result<Wanted, Trouble> {
        if let Some(mut wanted) = self.wanted.take() {
            if session.is_doubtful() {
                wanted.follow(spec, session.switched(), &session.observed);
            }
            return Ok(wanted);
        }
        session.doubt();
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
        let is_news = wake.is_news();
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
