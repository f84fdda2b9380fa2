//! The one task that owns the world: requests in by one bounded queue, effects out to the [`Hands`], news to watchers.

use std::collections::BTreeMap;
use std::time::Duration;

use sovereign_protocol::event::{Events, Start};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::limits::EVENTS_BATCH;
use sovereign_protocol::spec::{GuestSpec, SpecError};
use sovereign_protocol::v1::Refusal;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::core::apply;
use crate::core::world::{Effect, Event, World};
use crate::handover::ALIVE_EVERY;
use crate::{clock, log};

/// Requests that may wait for the engine.
pub const QUEUE: usize = 256;

/// What the engine is asked.
#[derive(Debug)]
pub enum Request {
    /// Something happened.
    Event(Event),
    /// Take over this document; answered with its revision or a refusal in words.
    Apply(Vec<u8>, oneshot::Sender<Result<u64, Refusal>>),
    /// What changed after the cursor?
    Changes(Option<Cursor>, oneshot::Sender<Changes>),
    /// What happened?
    Events(Start, oneshot::Sender<Events>),
}

/// What carries out effects; everything that comes of one returns as a [`Request`].
pub trait Hands {
    /// Begins an effect; never waits.
    fn begin(&mut self, effect: Effect);
    /// Tells PID 1 that the engine still turns.
    fn alive(&mut self);
}

/// How others reach the engine.
#[derive(Debug, Clone)]
pub struct Handle {
    requests: mpsc::Sender<Request>,
    news: watch::Receiver<u64>,
}

/// The engine has ended.
#[derive(Debug, thiserror::Error)]
#[error("the agent is ending")]
pub struct Ended;

impl Handle {
    /// Where adapters send their events.
    #[must_use]
    pub fn requests(&self) -> mpsc::Sender<Request> {
        self.requests.clone()
    }

    /// Tells that something happened.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn event(&self, event: Event) -> Result<(), Ended> {
        self.requests.send(Request::Event(event)).await.map_err(|_| Ended)
    }

    /// Applies a document.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for the document, [`Refusal::Failed`] when it cannot be reached; all is as before.
    pub async fn apply(&self, document: Vec<u8>) -> Result<u64, Refusal> {
        self.ask(|reply| Request::Apply(document, reply))
            .await
            .unwrap_or_else(|ended| Err(Refusal::Failed(ended.to_string())))
    }

    /// What changed after the cursor, at the latest after `hold`. Cancel safe.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn watch(&self, cursor: Option<Cursor>, hold: Duration) -> Result<Changes, Ended> {
        self.held(hold, |reply| Request::Changes(cursor, reply), Changes::is_empty)
            .await
    }

    /// What happened from `start` on, at the latest after `hold`. Cancel safe.
    ///
    /// # Errors
    /// [`Ended`].
    pub async fn events(&self, start: Start, hold: Duration) -> Result<Events, Ended> {
        // Only who knows a place in the journal waits for what comes after it.
        let waits = matches!(start, Start::After(_));
        let request = |reply| Request::Events(start, reply);
        self.held(hold, request, |e| waits && e.events.is_empty()).await
    }

    async fn held<T>(
        &self,
        hold: Duration,
        request: impl Fn(oneshot::Sender<T>) -> Request,
        is_empty: impl Fn(&T) -> bool,
    ) -> Result<T, Ended> {
        let deadline = Instant::now() + hold;
        let mut news = self.news.clone();
        loop {
            news.mark_unchanged(); // before the look: what comes later wakes the wait
            let answer = self.ask(&request).await?;
            if !is_empty(&answer) {
                return Ok(answer);
            }
            match tokio::time::timeout_at(deadline, news.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Ended),
                Err(_) => return Ok(answer),
            }
        }
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, Ended> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| Ended)?;
        answer.await.map_err(|_| Ended)
    }
}

/// The engine's own side.
#[derive(Debug)]
pub struct Engine {
    world: World,
    requests: mpsc::Receiver<Request>,
    news: watch::Sender<u64>,
    begun: Instant,
    begun_ms: u64,
    /// Who waits for the answer to a document; the world answers the old one before it takes a new one.
    applying: BTreeMap<u64, oneshot::Sender<Result<u64, Refusal>>>,
    tickets: u64,
}

/// Makes an engine over a world, and the handle to it.
#[must_use]
pub fn new(world: World) -> (Engine, Handle) {
    let (sender, requests) = mpsc::channel(QUEUE);
    let (news, receiver) = watch::channel(0);
    let engine = Engine {
        world,
        requests,
        news,
        begun: Instant::now(),
        begun_ms: clock::boot_ms(),
        applying: BTreeMap::new(),
        tickets: 0,
    };
    (
        engine,
        Handle {
            requests: sender,
            news: receiver,
        },
    )
}

impl Engine {
    /// Turns until every handle is gone.
    pub async fn run(mut self, mut hands: impl Hands) {
        let mut next_alive = Instant::now();
        let mut last_tick = Instant::now();
        loop {
            let now = Instant::now();
            if now >= next_alive {
                hands.alive();
                next_alive = now + ALIVE_EVERY;
            }
            let next_tick = last_tick + Duration::from_millis(self.world.tick_ms());
            if now >= next_tick {
                last_tick = now;
                self.act(Request::Event(Event::Tick), &mut hands);
                continue;
            }
            // Losing either arm is safe: recv is cancel safe, a lost sleep is the next tick.
            let request = tokio::select! {
                request = self.requests.recv() => match request {
                    Some(request) => request,
                    None => return,
                },
                () = sleep_until(next_tick.min(next_alive)) => continue,
            };
            self.act(request, &mut hands);
        }
    }

    fn act(&mut self, request: Request, hands: &mut impl Hands) {
        for effect in self.turn(request) {
            hands.begin(effect);
        }
        self.tell();
    }

    fn turn(&mut self, request: Request) -> Vec<Effect> {
        let effects = match request {
            Request::Event(event) => self.world.step(event, self.now_ms()),
            Request::Apply(document, reply) => self.apply(&document, reply),
            Request::Events(start, reply) => {
                let journal = self.world.feed.journal();
                let wall_ms = u64::try_from(clock::wall_ns() / 1_000_000).unwrap_or(0);
                let _ = reply.send(journal.read(start, EVENTS_BATCH, self.now_ms(), wall_ms)); // or nobody waits
                Vec::new()
            }
            Request::Changes(cursor, reply) => {
                let _ = reply.send(self.world.feed.since(cursor, self.now_ms()));
                Vec::new()
            }
        };
        let mut begun = Vec::new();
        for effect in effects {
            match effect {
                Effect::Answer(ticket, answer) => {
                    if let Some(reply) = self.applying.remove(&ticket) {
                        let answer = answer.map_err(Refusal::Failed);
                        let _ = reply.send(answer); // a caller that is gone had its document applied: it was sent
                    }
                }
                effect => begun.push(effect),
            }
        }
        begun
    }

    fn apply(&mut self, document: &[u8], reply: oneshot::Sender<Result<u64, Refusal>>) -> Vec<Effect> {
        match admit(document) {
            Ok(spec) => {
                self.tickets += 1;
                self.applying.insert(self.tickets, reply);
                self.world
                    .step(Event::Apply(Box::new(spec), self.tickets), self.now_ms())
            }
            Err(refusal) => {
                let _ = reply.send(Err(Refusal::Invalid(refusal))); // or nobody waits
                Vec::new()
            }
        }
    }

    /// CLOCK_BOOTTIME by way of tokio's clock, so that tests can turn it; they agree but for suspends.
    fn now_ms(&self) -> u64 {
        let elapsed = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        if cfg!(test) {
            self.begun_ms.saturating_add(elapsed)
        } else {
            clock::boot_ms()
        }
    }

    fn tell(&self) {
        let revision = self.world.feed.cursor().revision;
        self.news.send_if_modified(|told| {
            let news = *told != revision;
            *told = revision;
            news
        });
    }
}

fn admit(document: &[u8]) -> Result<GuestSpec, String> {
    let spec = GuestSpec::parse(document).map_err(|error: SpecError| log::chain(&error))?;
    apply::admit(&spec)?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::BootFacts;
    use sovereign_protocol::condition::{Key, Layer, Verdict};
    use sovereign_protocol::feed::Feed;

    struct NoHands;

    impl Hands for NoHands {
        fn begin(&mut self, _: Effect) {}
        fn alive(&mut self) {}
    }

    fn start() -> Handle {
        let (engine, handle) = new(World::new(Feed::new(7, 16), BootFacts::default()));
        tokio::spawn(engine.run(NoHands));
        handle
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_is_held_until_something_changes() {
        let handle = start();
        let first = handle.watch(None, Duration::from_secs(8)).await.unwrap();
        assert!(first.reset);
        let waiting = {
            let handle = handle.clone();
            tokio::spawn(async move {
                handle
                    .watch(Some(first.cursor), Duration::from_secs(8))
                    .await
                    .unwrap()
            })
        };
        tokio::task::yield_now().await;
        handle
            .event(Event::Seen(vec![(
                Key::new(Layer::Loopback, "lo"),
                Some(Verdict::yes("Answers", "")),
            )]))
            .await
            .unwrap();
        let changes = waiting.await.unwrap();
        assert_eq!(changes.conditions.len(), 1);
        let begun = Instant::now();
        let quiet = handle
            .watch(Some(changes.cursor), Duration::from_secs(1))
            .await
            .unwrap();
        assert!(quiet.is_empty());
        assert_eq!(begun.elapsed().as_secs(), 1);
    }

    #[tokio::test]
    async fn a_bad_document_is_refused_in_words() {
        let refusal = start().apply(b"{}".to_vec()).await.unwrap_err();
        assert!(matches!(&refusal, Refusal::Invalid(why) if why.contains("missing field")));
    }
}
