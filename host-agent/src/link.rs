//! The link to one guest agent: dial until the hello, keep the spec applied, carry conditions up.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures::FutureExt;
use sovereign_protocol::codec;
use sovereign_protocol::event::{Events, Start};
use sovereign_protocol::feed::{Changes, Cursor};
use sovereign_protocol::handshake::{self, Channel, HandshakeError, Identity};
use sovereign_protocol::limits::{CALL, CALL_GRACE, WATCH_HOLD};
use sovereign_protocol::name::Name;
use sovereign_protocol::service::{GuestClient, GuestRequest, GuestResponse};
use sovereign_protocol::transport::{self, Address, BoxStream};
use sovereign_protocol::v1::{self, Document};
use tarpc::{ClientMessage, Response, client, context};
use tokio::sync::{mpsc, watch};

use crate::core::{Allowance, Edition, Event};
use crate::document;
use crate::timekeeper::Timekeeper;

/// Between dials that nobody answered.
const DIAL_PAUSE: Duration = Duration::from_millis(25);
/// Between pings; also the deadline of one.
pub(crate) const PING: Duration = Duration::from_secs(2);
/// Pings without an answer that end a session.
const MISSES: u32 = 3;
/// A guest that always has something to say is heard so often at once, and then this often: what it says costs the host's
/// processor and disk. Nothing is lost by it but what the guest's own journal cannot hold.
const ANSWERS: (u32, u64) = (64, 1_000);
/// Sessions that a guest takes and ends at once.
const SESSIONS: (u32, u64) = (16, 1_000);

/// Where a guest's agent is, and what proves it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The listener.
    pub address: Address,
    /// The boot's identity.
    pub identity: Identity,
}

/// What the guest is to run.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// A GuestSpec.
    pub document: Vec<u8>,
    /// Which one it is.
    pub edition: Edition,
    /// The MTU that it says.
    pub mtu: Option<u32>,
    /// True when the guest is to power off.
    pub shutdown: bool,
    /// True when its VMM is to end at once.
    pub kill: bool,
}

/// Opens a stream of one channel to the guest agent.
///
/// # Errors
/// The dial's or the handshake's own.
pub async fn open(target: &Target, channel: Channel) -> anyhow::Result<(BoxStream, handshake::Session)> {
    let mut stream = transport::dial(&target.address).await?;
    let session = handshake::dial(&mut stream, &target.identity, channel).await?;
    Ok((stream, session))
}

/// Keeps a session with the guest for as long as it is polled.
pub async fn keep(
    guest: Name,
    target: Target,
    mut wanted: watch::Receiver<Wanted>,
    events: mpsc::Sender<Event>,
) {
    let mut sessions = Paced::new(SESSIONS);
    loop {
        let (stream, session) = dial_until_answered(&guest, &target, &events).await;
        let evidence = format!("agent {} speaks version {}", session.peer_agent, session.version);
        if events
            .send(Event::SessionUp(guest.clone(), evidence))
            .await
            .is_err()
        {
            return;
        }
        let knows = &session.peer_capabilities;
        let Err(error) = serve(&guest, &target, (stream, knows), &mut wanted, &events).await;
        let lost = Event::SessionLost(guest.clone(), format!("{error:#}"));
        if events.send(lost).await.is_err() {
            return;
        }
        tokio::time::sleep(DIAL_PAUSE).await;
        sessions.spend().await;
    }
}

/// An allowance on the runtime's clock.
struct Paced(Allowance, tokio::time::Instant);

impl Paced {
    fn new((burst, every_ms): (u32, u64)) -> Self {
        Self(Allowance::new(burst, every_ms), tokio::time::Instant::now())
    }

    async fn spend(&mut self) {
        let now_ms = u64::try_from(self.1.elapsed().as_millis()).unwrap_or(u64::MAX);
        tokio::time::sleep(Duration::from_millis(self.0.spend(now_ms))).await;
    }
}

async fn dial_until_answered(
    guest: &Name,
    target: &Target,
    events: &mpsc::Sender<Event>,
) -> (BoxStream, handshake::Session) {
    let mut told = String::new();
    loop {
        match open(target, Channel::Guest).await {
            Ok(opened) => return opened,
            Err(error) if error.downcast_ref::<HandshakeError>().is_some() => {
                let text = format!("{error:#}");
                let silent = matches!(error.downcast_ref(), Some(HandshakeError::Timeout));
                if text != told {
                    let event = match silent {
                        true => Event::SessionSilent(
                            guest.clone(),
                            format!("a fresh connection was taken, but {text}"),
                        ),
                        false => Event::SessionLost(guest.clone(), text.clone()),
                    };
                    let _ = events.send(event).await; // the engine ends last
                    told = text;
                }
            }
            Err(_) => told.clear(), // nobody listens yet
        }
        tokio::time::sleep(DIAL_PAUSE).await;
    }
}

async fn serve(
    guest: &Name,
    target: &Target,
    (stream, knows): (BoxStream, &[String]),
    wanted: &mut watch::Receiver<Wanted>,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<std::convert::Infallible> {
    let calls = client(stream);
    let (watching, _) = open(target, Channel::Guest)
        .await
        .context("no second stream for watch")?;
    let watching = client(watching);
    // The clock before the spec: services start under the right time.
    let mut time = Timekeeper::new(&calls);
    let clock = time
        .exchange(false)
        .await
        .context("the clock cannot be measured")?;
    events.send(Event::Clock(guest.clone(), clock)).await?;
    let (carried, reaches) = watch::channel(None);
    // Each arm only ever ends with an error, which ends the session; losing the others is the point.
    tokio::select! {
        ended = carry_conditions(guest, &watching, events, &carried) => ended,
        ended = carry_events(guest, &watching, events) => ended,
        ended = keep_time(guest, &mut time, events) => ended,
        ended = push(guest, (&calls, knows), wanted, events, reaches) => ended,
    }
}

fn client(stream: BoxStream) -> GuestClient {
    let transport = codec::transport::<_, Response<GuestResponse>, ClientMessage<GuestRequest>>(stream);
    GuestClient::new(client::Config::default(), transport).spawn()
}

async fn carry_conditions(
    guest: &Name,
    client: &GuestClient,
    events: &mpsc::Sender<Event>,
    carried: &watch::Sender<Option<Cursor>>,
) -> anyhow::Result<std::convert::Infallible> {
    let mut answers = Paced::new(ANSWERS);
    let mut cursor: Option<Cursor> = None;
    let hold_ms = u32::try_from(WATCH_HOLD.as_millis()).unwrap_or(u32::MAX);
    loop {
        let after = cursor.map(v1::Cursor::from);
        let changes = call(WATCH_HOLD + CALL, |context| client.watch(context, after, hold_ms))
            .await
            .context("watch ended")?;
        let changes = Changes::from(changes);
        cursor = Some(changes.cursor);
        if !changes.is_empty() {
            events.send(Event::Conditions(guest.clone(), changes)).await?;
        }
        carried.send_replace(cursor);
        answers.spend().await;
    }
}

/// Waits until the conditions that hold now were carried up by the watch.
async fn caught_up(
    client: &GuestClient,
    reaches: &mut watch::Receiver<Option<Cursor>>,
) -> anyhow::Result<()> {
    let after = reaches.borrow().map(v1::Cursor::from);
    let now = call(CALL, |context| client.watch(context, after, 0)).await?;
    let now = Cursor::from(now.cursor);
    let has = |seen: &Option<Cursor>| {
        seen.is_some_and(|seen| seen.incarnation == now.incarnation && seen.revision >= now.revision)
    };
    tokio::time::timeout(CALL, reaches.wait_for(has)).await??;
    Ok(())
}

async fn carry_events(
    guest: &Name,
    client: &GuestClient,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<std::convert::Infallible> {
    let mut answers = Paced::new(ANSWERS);
    let mut start = Start::Oldest;
    let hold_ms = u32::try_from(WATCH_HOLD.as_millis()).unwrap_or(u32::MAX);
    loop {
        let from = v1::Start::from(start);
        let happened = call(WATCH_HOLD + CALL, |context| client.events(context, from, hold_ms))
            .await
            .context("events ended")?;
        let happened = Events::from(happened);
        start = Start::After(happened.cursor);
        if !happened.events.is_empty() || happened.lost > 0 {
            events.send(Event::Happened(guest.clone(), happened)).await?;
        }
        answers.spend().await;
    }
}

async fn keep_time(
    guest: &Name,
    time: &mut Timekeeper<'_>,
    events: &mpsc::Sender<Event>,
) -> anyhow::Result<std::convert::Infallible> {
    let mut misses = 0;
    loop {
        tokio::time::sleep(PING).await;
        match time.look().await {
            Ok(seen) => {
                misses = 0;
                if let Some(verdict) = seen {
                    events.send(Event::Clock(guest.clone(), verdict)).await?;
                }
            }
            Err(error) => {
                misses += 1;
                if misses == MISSES {
                    return Err(error.context(format!("{MISSES} pings without an answer")));
                }
            }
        }
    }
}

async fn push(
    guest: &Name,
    (client, knows): (&GuestClient, &[String]),
    wanted: &mut watch::Receiver<Wanted>,
    events: &mpsc::Sender<Event>,
    mut reaches: watch::Receiver<Option<Cursor>>,
) -> anyhow::Result<std::convert::Infallible> {
    loop {
        let now = wanted.borrow_and_update().clone();
        if now.shutdown {
            let answer = call(CALL, |context| client.shutdown(context))
                .await
                .context("shutdown")?;
            answer.context("the guest does not shut down")?;
        } else {
            let document = Document::from(document::understood(now.document, knows)?);
            let applied = call(CALL, |context| client.apply(context, document))
                .await
                .context("apply")?;
            // Else "applied" could be heard with conditions from before it.
            caught_up(client, &mut reaches)
                .await
                .context("the conditions do not follow")?;
            let event = match applied {
                Ok(applied) if applied.revision != now.edition.revision => {
                    let (other, given) = (applied.revision, now.edition.revision);
                    let why = format!("the guest took over revision {other} and was given {given}");
                    Event::SpecRefused(guest.clone(), why)
                }
                Ok(_) => Event::SpecApplied(guest.clone(), now.edition, now.mtu),
                Err(refusal) => Event::SpecRefused(guest.clone(), refusal.to_string()),
            };
            events.send(event).await?;
        }
        wanted.changed().await?;
    }
}

/// One call with its own deadline and, beyond that, the outer timeout after which the
/// connection counts as dead (tarpc does not bound calls on an unwritable transport).
pub(crate) async fn call<T, F>(
    deadline: Duration,
    start: impl FnOnce(context::Context) -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = Result<T, client::RpcError>>,
{
    let mut context = context::current();
    context.deadline = Instant::now() + deadline;
    // tarpc panics when a peer answers with another method's response; a guest must not be able to end our task.
    let guarded = AssertUnwindSafe(start(context)).catch_unwind();
    let answered = tokio::time::timeout(deadline + CALL_GRACE, guarded)
        .await
        .context("no answer")?;
    let answered = answered.map_err(|_| anyhow::anyhow!("the peer answered what was not asked"))?;
    Ok(answered?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sovereign_protocol::v1::Ping;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Takes the first request and answers it.
    async fn answer(far: &mut tokio::io::DuplexStream, response: GuestResponse) {
        let length = far.read_u32().await.unwrap();
        far.read_exact(&mut vec![0; length as usize]).await.unwrap();
        let answer = Response {
            request_id: 0,
            message: Ok(response),
        };
        let bytes = codec::encode(&answer).unwrap();
        far.write_u32(u32::try_from(bytes.len()).unwrap()).await.unwrap();
        far.write_all(&bytes).await.unwrap();
    }

    #[tokio::test]
    async fn an_answer_to_another_method_is_an_error_and_no_panic() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let client = client(Box::new(near));
        let ping = call(CALL, |context| client.ping(context, Ping { host_sent_ns: 1 }));
        let (answered, ()) = tokio::join!(ping, async {
            answer(&mut far, GuestResponse::Shutdown(Ok(()))).await;
        });
        assert_eq!(
            answered.unwrap_err().to_string(),
            "the peer answered what was not asked"
        );
    }

    #[tokio::test]
    async fn who_has_caught_up_has_seen_what_held_when_he_asked() {
        let (near, mut far) = tokio::io::duplex(1 << 16);
        let client = client(Box::new(near));
        let at = |revision| Cursor {
            incarnation: 7,
            revision,
        };
        let (carried, mut reaches) = watch::channel(Some(at(3)));
        let mut caught = std::pin::pin!(caught_up(&client, &mut reaches));
        let guest = async {
            let changes = Changes {
                cursor: at(5),
                reset: false,
                conditions: Vec::new(),
                removed: Vec::new(),
            };
            answer(&mut far, GuestResponse::Watch(changes.into())).await;
            std::future::pending::<()>().await
        };
        tokio::pin!(guest);
        for seen in [
            None,
            Some(at(4)),
            Some(Cursor {
                incarnation: 8,
                revision: 9,
            }),
        ] {
            carried.send_replace(seen);
            tokio::select! {
                early = &mut caught => panic!("{seen:?} is not it: {early:?}"),
                () = &mut guest => {}
                () = tokio::time::sleep(Duration::from_millis(50)) => {}
            }
        }
        carried.send_replace(Some(at(5)));
        tokio::select! {
            caught = &mut caught => caught.unwrap(),
            () = &mut guest => {}
        }
    }

    /// Answers every request at once, with a journal that never ends.
    async fn babble(mut far: tokio::io::DuplexStream) -> anyhow::Result<()> {
        let mut seq = 0;
        loop {
            let length = far.read_u32().await?;
            let mut request = vec![0; length as usize];
            far.read_exact(&mut request).await?;
            let ClientMessage::Request(request) = codec::decode::<ClientMessage<GuestRequest>>(&request)?
            else {
                continue;
            };
            let event = |seq| v1::Event {
                seq,
                layer: v1::Layer::Service,
                subject: "postgres".to_owned(),
                from: None,
                to: None,
                age_ms: 0,
            };
            let events = v1::Events {
                cursor: v1::Cursor {
                    incarnation: 1,
                    revision: seq + 2,
                },
                wall_ms: 0,
                lost: 0,
                events: (seq + 1..=seq + 2).map(event).collect(),
            };
            seq += 2;
            let answer = Response {
                request_id: request.id,
                message: Ok(GuestResponse::Events(events)),
            };
            let bytes = codec::encode(&answer)?;
            far.write_u32(u32::try_from(bytes.len())?).await?;
            far.write_all(&bytes).await?;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_never_stops_talking_is_heard_at_a_steady_pace() {
        let (near, far) = tokio::io::duplex(1 << 16);
        let client = client(Box::new(near));
        let (sender, mut events) = mpsc::channel(1);
        let guest = Name::parse("sql").unwrap();
        let begun = tokio::time::Instant::now();
        let carried = carry_events(&guest, &client, &sender);
        let heard = async {
            let mut at = Vec::new();
            while begun.elapsed() < Duration::from_secs(10) && at.len() < 1_000 {
                assert!(matches!(events.recv().await, Some(Event::Happened(..))));
                at.push(begun.elapsed().as_secs());
            }
            at
        };
        let heard = tokio::select! {
            heard = heard => heard,
            ended = carried => panic!("{ended:?}"),
            ended = babble(far) => panic!("{ended:?}"),
        };
        let at_once = heard.iter().filter(|at| **at == 0).count();
        assert!((64..=65).contains(&at_once), "{heard:?}");
        assert!((74..=75).contains(&heard.len()), "{heard:?}");
    }
}

#[cfg(test)]
#[path = "link_tests.rs"]
mod session_tests;
