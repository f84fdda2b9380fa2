//! Keeps the loopback and the interface as they must be: looks when the kernel tells of a change, at the latest
//! every [`LOOK_MS`], repairs, looks again, and tells what was found.
//!
//! What is wrong and what to do about it is decided in `core::net`, how often in `core::pace`.

pub mod diag;
pub mod former;
pub mod kernel;
pub mod loopback;
pub mod socket;
pub mod wire;

use std::io;
use std::time::Duration;

use sovereign_protocol::condition::{Key, Layer, Verdict};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

use crate::clock;
use crate::core::net::{self, Change, Order, Seen, Wanted};
use crate::core::pace::Pace;
use crate::core::world::{Event, LOOK_MS};
use crate::engine::Request;
use crate::log;
use kernel::{Files, Kernel};
use socket::News;

/// Rounds of acting and looking until a plan must be empty; removing one thing may take others with it.
const ROUNDS: usize = 3;
/// Looks within [`WINDOW`] that are made at once; then the kernel's news are gathered until it is over.
const LOOKS: u32 = 8;
/// See [`LOOKS`].
const WINDOW: Duration = Duration::from_millis(100);
/// Between tries to open the sockets.
const AGAIN: Duration = Duration::from_secs(1);

/// Keeps the network, for ever; ends when nobody listens.
pub async fn run(files: Files, mut orders: mpsc::Receiver<Order>, requests: mpsc::Sender<Request>) {
    let mut keeper = loop {
        match Keeper::open(files.clone()) {
            Ok(keeper) => break keeper,
            Err(error) => {
                let verdicts = vec![(loopback_key(), Some(unseen(&error)))];
                if send(&requests, Event::Seen(verdicts)).await.is_err() {
                    return;
                }
            }
        }
        sleep(AGAIN).await;
    };
    let mut next = Instant::now();
    let mut open = true;
    let (mut window, mut looks) = (Instant::now(), 0);
    loop {
        // Losing an arm is safe: news and orders stay in their sockets and queues, a lost sleep is a later look.
        let order = tokio::select! {
            order = orders.recv(), if open => {
                open = order.is_some();
                order
            }
            _ = keeper.news.wait() => None,
            () = sleep_until(next) => None,
        };
        let taken = order.map(|order| keeper.obey(order));
        // What is true now is told before the answer: who hears "applied" finds no older condition.
        let seen = keeper.turn().await;
        for event in std::iter::once(seen).chain(taken) {
            if send(&requests, event).await.is_err() {
                return;
            }
        }
        next = Instant::now() + keeper.until_next();
        if window.elapsed() > WINDOW {
            (window, looks) = (Instant::now(), 0);
        }
        looks += 1;
        if looks >= LOOKS {
            sleep_until(window + WINDOW).await;
        }
    }
}

async fn send(requests: &mpsc::Sender<Request>, event: Event) -> Result<(), ()> {
    requests.send(Request::Event(event)).await.map_err(drop)
}

/// The condition of the loopback.
#[must_use]
pub fn loopback_key() -> Key {
    Key::new(Layer::Loopback, "lo")
}

/// The condition of the interface; its name is in the evidence, as it may differ from kernel to kernel.
#[must_use]
pub fn interface_key() -> Key {
    Key::new(Layer::Interface, "net")
}

/// One thing that is kept.
#[derive(Debug, Default)]
struct Subject {
    pace: Pace,
    /// It was as wanted at the last look, so that a difference is somebody's doing.
    settled: bool,
}

/// How one attempt to make a plan empty came out.
#[derive(Debug)]
struct Outcome {
    seen: Seen,
    lacks: Vec<Change>,
    rest: Vec<Change>,
    errors: Vec<String>,
    /// When it may be repaired next, if that was too often.
    held_ms: Option<u64>,
    /// News were thrown away.
    dropped: bool,
    took: Duration,
    /// What undoes the changes, the last one first.
    undo: Vec<Change>,
}

struct Keeper {
    kernel: Kernel,
    news: News,
    wanted: Wanted,
    loopback: Subject,
    interface: Subject,
    /// News came after the interface was looked at and were thrown away with those of the loopback.
    missed: bool,
}

/// In order: what was wrong before how it is now.
type Verdicts = Vec<(Key, Option<Verdict>)>;
type Planner<'a> = &'a dyn Fn(&Seen) -> Vec<Change>;

impl Keeper {
    fn open(files: Files) -> io::Result<Self> {
        Ok(Self {
            news: News::subscribe()?, // first: what changes from here on is told
            kernel: Kernel::open(files)?,
            wanted: Wanted::default(),
            loopback: Subject::default(),
            interface: Subject::default(),
            missed: false,
        })
    }

    /// Until the next look is due although nothing changes.
    fn until_next(&self) -> Duration {
        if self.missed {
            return Duration::ZERO;
        }
        let now = clock::boot_ms();
        let held = [&self.loopback, &self.interface].map(|subject| subject.pace.may(now).err());
        let next = held.into_iter().flatten().fold(now + LOOK_MS, u64::min);
        Duration::from_millis(next.saturating_sub(now).max(1))
    }

    /// Takes over what is wanted, or with `strict` leaves everything as it was.
    fn obey(&mut self, order: Order) -> Event {
        let old = std::mem::replace(&mut self.wanted, order.wanted);
        self.interface = Subject::default();
        let outcome = match self.reach() {
            Err((reason, undo)) if order.strict => {
                self.wanted = old;
                self.undo(&undo);
                Err(match self.reach() {
                    Ok(()) => reason,
                    Err((error, _)) => format!("{reason}; the old state cannot be restored: {error}"),
                })
            }
            Err((reason, _)) => {
                log::line("the interface is not as wanted", &[("reason", &reason)]);
                Ok(()) // the condition says it, and every look tries again
            }
            Ok(()) => {
                self.interface.pace = Pace::default(); // that was no repair
                Ok(())
            }
        };
        Event::NetworkTaken(order.attempt, outcome)
    }

    /// The error comes with what undoes what was done.
    fn reach(&mut self) -> Result<(), (String, Vec<Change>)> {
        let wanted = self.wanted.clone();
        let (kernel, news) = (&mut self.kernel, &self.news);
        let outcome = heal(kernel, news, &mut self.interface, &|seen| {
            net::plan(&wanted, seen)
        })
        .map_err(|error| (format!("rtnetlink: {error}"), Vec::new()))?;
        match net::lacking(&outcome.rest) {
            None => Ok(()),
            Some((_, lacks)) => Err((format!("{lacks}: {}", outcome.errors.join("; ")), outcome.undo)),
        }
    }

    /// Puts back what the old document says nothing about, too, such as an MTU. What fails is seen by the next look.
    fn undo(&mut self, changes: &[Change]) {
        for change in changes {
            if let Err(error) = self.kernel.act(change) {
                let change = change.to_string();
                log::line(
                    "a change is not undone",
                    &[("change", &change), ("error", &error.to_string())],
                );
            }
        }
    }

    /// Looks at both, repairs, and tells; first what was wrong, then how it is now.
    async fn turn(&mut self) -> Event {
        self.missed = false;
        let mut verdicts = self.keep_interface();
        verdicts.extend(self.keep_loopback().await);
        Event::Seen(verdicts)
    }

    fn keep_interface(&mut self) -> Verdicts {
        let (key, wanted) = (interface_key(), &self.wanted);
        let plan = |seen: &Seen| net::plan(wanted, seen);
        let mut verdicts = Vec::new();
        match heal(&mut self.kernel, &self.news, &mut self.interface, &plan) {
            Ok(outcome) => {
                let mut now = net::judge(wanted, &outcome.seen, &outcome.errors);
                if now.is_some() {
                    tell(&mut verdicts, &key, &outcome, &mut self.interface, &mut now);
                }
                verdicts.push((key, now));
                // A device that appears is no one's meddling.
                self.interface.settled &= net::device(&outcome.seen).is_some();
            }
            Err(error) if matches!(wanted, Wanted::Spec(_)) => verdicts.push((key, Some(unseen(&error)))),
            Err(_) => {}
        }
        verdicts
    }

    async fn keep_loopback(&mut self) -> Verdicts {
        let (key, mut verdicts) = (loopback_key(), Vec::new());
        for last in [false, false, true] {
            let healed = heal(
                &mut self.kernel,
                &self.news,
                &mut self.loopback,
                &net::plan_loopback,
            );
            let outcome = match healed {
                Ok(outcome) => outcome,
                Err(error) => {
                    verdicts.push((key, Some(unseen(&error))));
                    break;
                }
            };
            self.missed |= outcome.dropped;
            // A dial during which something changes proves nothing; losing it is safe.
            let dialled = tokio::select! {
                dialled = loopback::dial() => {
                    Some(dialled).filter(|dialled| dialled.is_ok() || !self.news.forget())
                }
                _ = self.news.wait(), if !last => None,
            };
            self.missed |= dialled.is_none();
            let mut now = dialled.map(|dialled| loopback::judge(&outcome.rest, &outcome.errors, dialled));
            tell(&mut verdicts, &key, &outcome, &mut self.loopback, &mut now);
            if now.is_some() {
                verdicts.push((key, now));
                break;
            }
        }
        verdicts
    }
}

fn unseen(error: &io::Error) -> Verdict {
    Verdict::unknown("Unobserved", format!("rtnetlink: {error}"))
}

/// Looks, and acts until the plan is empty, a limit is reached, or it would be too often.
fn heal(kernel: &mut Kernel, news: &News, subject: &mut Subject, plan: Planner<'_>) -> io::Result<Outcome> {
    let begun = Instant::now();
    let now_ms = clock::boot_ms();
    let mut dropped = news.forget();
    let mut seen = kernel.look()?;
    let mut lacks = plan(&seen);
    let mut rest = lacks.clone();
    let (mut errors, mut undo) = (Vec::new(), Vec::new());
    let held_ms = if rest.is_empty() {
        None
    } else {
        subject.pace.may(now_ms).err()
    };
    if held_ms.is_none() && !rest.is_empty() {
        subject.pace.repaired(now_ms);
        for _ in 0..ROUNDS {
            errors.clear();
            for change in &rest {
                let before = seen;
                let made = kernel.act(change);
                dropped |= news.forget(); // our own doing; whatever else came before the look is seen by it
                seen = kernel.look()?;
                match made {
                    Ok(()) => drop(undo.splice(0..0, change.inverse(&before, &seen))),
                    Err(error) => errors.push(format!("{change}: {error}")),
                }
            }
            rest = plan(&seen);
            if rest.is_empty() {
                break;
            }
            // The lists are not made at one moment: what only shows now was there before.
            lacks.extend(
                rest.iter()
                    .filter(|change| !lacks.contains(change))
                    .cloned()
                    .collect::<Vec<_>>(),
            );
        }
        lacks.sort();
    }
    Ok(Outcome {
        seen,
        lacks,
        rest,
        errors,
        held_ms,
        dropped,
        took: begun.elapsed(),
        undo,
    })
}

/// Adds what somebody did before what is true now, and to that what became of it.
fn tell(
    verdicts: &mut Verdicts,
    key: &Key,
    outcome: &Outcome,
    subject: &mut Subject,
    now: &mut Option<Verdict>,
) {
    let settled = outcome.rest.is_empty() || (subject.settled && outcome.held_ms.is_some());
    let was_settled = std::mem::replace(&mut subject.settled, settled);
    let Some((reason, lacks)) = net::lacking(&outcome.lacks).filter(|_| was_settled) else {
        return;
    };
    let recent = subject.pace.recent(clock::boot_ms());
    if let Some(held_ms) = outcome.held_ms {
        let wait = held_ms.saturating_sub(clock::boot_ms());
        let text = format!(
            "{lacks}: somebody changes it again and again; repaired {recent} times within 10 s, next in {wait} ms"
        );
        *now = Some(Verdict::no("Contested", text));
        return;
    }
    log::line(
        "the network was changed",
        &[("lacks", &lacks), ("errors", &outcome.errors.join("; "))],
    );
    if !outcome.rest.is_empty() {
        return; // what is true now says it all
    }
    verdicts.push((
        key.clone(),
        Some(Verdict::no(reason, format!("{lacks}: somebody changed it"))),
    ));
    if let Some(verdict) = now {
        let took = outcome.took.as_millis();
        let text = format!("{}; {lacks}, put back within {} ms", verdict.evidence, took + 1);
        *verdict = Verdict::new(verdict.status, verdict.reason.as_str(), text);
    }
}
