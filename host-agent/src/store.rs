//! What must outlive the agent: the accepted spec and the journal of events, in one transactional file.
//!
//! One thread owns the file. Everything that waits goes into one transaction; a commit is on disk before it is
//! acknowledged. A kill can leave a commit that was stored and not acknowledged: whoever asked repeats it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use sovereign_protocol::condition::{Key, Layer, Status, Verdict};
use sovereign_protocol::event::Event;
use sovereign_protocol::feed::Cursor;
use sovereign_protocol::name::Name;
use thiserror::Error;
use tokio::sync::oneshot;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const EVENTS: TableDefinition<u64, &[u8]> = TableDefinition::new("events");
const READ: TableDefinition<&str, &[u8]> = TableDefinition::new("read");

/// The only format so far.
const FORMAT: u64 = 1;
/// redb's own default is 1 GiB (FACTS section 11).
const CACHE_BYTES: usize = 4 << 20;
/// A reader (`sovereign events` without an agent) may hold the file for a moment.
const BUSY: Duration = Duration::from_secs(2);
const BUSY_PAUSE: Duration = Duration::from_millis(20);
/// Batches that may wait for the disk before the engine does.
const QUEUE: usize = 64;
/// Between tries to write what could not be written.
const AGAIN: Duration = Duration::from_secs(5);

/// Why the store cannot be used.
#[derive(Debug, Error)]
pub enum StoreError {
    /// It cannot be opened.
    #[error(
        "cannot open the store {path}; if it is damaged, move it away: specification and events are in it, guests' data and secrets are not"
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<redb::Error>,
    },
    /// A later version wrote it.
    #[error("the store {path} has format {found}, this agent knows {FORMAT}: run the newer version")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// It cannot be read or written.
    #[error("the store failed: {0}")]
    Failed(Box<redb::Error>),
    /// What it holds is no JSON of ours.
    #[error("the store holds something else than expected")]
    Content(#[from] serde_json::Error),
    /// A batch could not be written.
    #[error("cannot write the store: {0}")]
    NotWritten(String),
    /// The disk is too far behind.
    #[error("the store waits for its disk")]
    Behind,
    /// The writing thread is gone.
    #[error("the store is closed")]
    Closed,
}

/// What is wanted to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: everything was stopped on request.
    Nothing,
    /// A HostSpec.
    Spec(Vec<u8>),
}

/// What one agent leaves to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Of the journal.
    pub incarnation: u64,
    /// Of the wanted state.
    pub revision: u64,
    /// The accepted spec.
    pub wanted: Wanted,
    /// The last events with the wall time at which each happened, in milliseconds since 1970.
    pub events: Vec<(Event, u64)>,
    /// How far each guest's journal was read.
    pub read: BTreeMap<Name, Cursor>,
}

/// Something to keep; all of it or nothing.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// The wanted state and its revision, when it changed.
    pub wanted: Option<(u64, Wanted)>,
    /// New events, with wall times as in [`Kept::events`].
    pub events: Vec<(Event, u64)>,
    /// Numbers of events that the journal keeps no longer: without them the store would only ever grow.
    pub displaced: BTreeSet<u64>,
    /// How far guests' journals were read.
    pub read: BTreeMap<Name, Cursor>,
}

impl Batch {
    /// True when there is nothing to keep.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wanted.is_none() && self.events.is_empty() && self.displaced.is_empty() && self.read.is_empty()
    }

    fn merge(&mut self, later: Self) {
        self.wanted = later.wanted.or(self.wanted.take());
        self.events.extend(later.events);
        self.displaced.extend(later.displaced);
        self.read.extend(later.read);
        // What was displaced before it was written needs neither: so this is bounded as the journal is.
        let displaced = &mut self.displaced;
        self.events.retain(|(event, _)| !displaced.remove(&event.seq));
    }
}

#[derive(Serialize, Deserialize)]
struct StoredEvent {
    wall_ms: u64,
    layer: Layer,
    subject: String,
    from: Option<Status>,
    to: Option<Verdict>,
}

/// The open file.
#[derive(Debug)]
pub struct Store {
    database: Database,
}

impl Store {
    /// Opens the store, or makes an empty one.
    ///
    /// # Errors
    /// With the path, when the file is damaged, of a later format, or stays in use.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let give_up = Instant::now() + BUSY;
        let database = loop {
            match Database::builder().set_cache_size(CACHE_BYTES).create(path) {
                Err(DatabaseError::DatabaseAlreadyOpen) if Instant::now() < give_up => {
                    std::thread::sleep(BUSY_PAUSE)
                }
                Err(error) => {
                    return Err(StoreError::Open {
                        path: path.to_owned(),
                        source: Box::new(error.into()),
                    });
                }
                Ok(database) => break database,
            }
        };
        let store = Self { database };
        store.prepare(path)?;
        Ok(store)
    }

    fn prepare(&self, path: &Path) -> Result<(), StoreError> {
        let change = self.database.begin_write().map_err(failed)?;
        let fresh = {
            let mut meta = change.open_table(META).map_err(failed)?;
            change.open_table(EVENTS).map_err(failed)?;
            change.open_table(READ).map_err(failed)?;
            let found = meta
                .get("format")
                .map_err(failed)?
                .map(|format| number(format.value()));
            match found {
                Some(FORMAT) => false,
                Some(found) => {
                    return Err(StoreError::Format {
                        path: path.to_owned(),
                        found,
                    });
                }
                None => {
                    let incarnation = getrandom::u64().unwrap_or(1); // any number will do
                    meta.insert("format", FORMAT.to_le_bytes().as_slice())
                        .map_err(failed)?;
                    meta.insert("incarnation", incarnation.to_le_bytes().as_slice())
                        .map_err(failed)?;
                    true
                }
            }
        };
        if fresh {
            change.commit().map_err(failed)?;
        }
        Ok(())
    }

    /// Everything that was kept.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(&self) -> Result<Kept, StoreError> {
        let view = self.database.begin_read().map_err(failed)?;
        let meta = view.open_table(META).map_err(failed)?;
        let value = |key: &str| -> Result<Option<Vec<u8>>, StoreError> {
            Ok(meta.get(key).map_err(failed)?.map(|value| value.value().to_vec()))
        };
        let mut kept = Kept {
            incarnation: value("incarnation")?.map_or(1, |bytes| number(&bytes)),
            revision: value("revision")?.map_or(0, |bytes| number(&bytes)),
            wanted: value("spec")?.map_or(Wanted::Nothing, Wanted::Spec),
            events: Vec::new(),
            read: BTreeMap::new(),
        };
        for entry in view.open_table(EVENTS).map_err(failed)?.iter().map_err(failed)? {
            let (seq, bytes) = entry.map_err(failed)?;
            let stored: StoredEvent = serde_json::from_slice(bytes.value())?;
            kept.events.push(stored.event(seq.value()));
        }
        for entry in view.open_table(READ).map_err(failed)?.iter().map_err(failed)? {
            let (guest, cursor) = entry.map_err(failed)?;
            if let Ok(name) = Name::parse(guest.value()) {
                kept.read.insert(name, serde_json::from_slice(cursor.value())?);
            }
        }
        Ok(kept)
    }

    /// Keeps a batch in one transaction; on disk when it returns.
    ///
    /// # Errors
    /// When it could not be written: nothing of it was.
    pub fn keep(&self, batch: &Batch) -> Result<(), StoreError> {
        if batch.is_empty() {
            return Ok(());
        }
        let change = self.database.begin_write().map_err(failed)?;
        if let Some((revision, wanted)) = &batch.wanted {
            let mut meta = change.open_table(META).map_err(failed)?;
            meta.insert("revision", revision.to_le_bytes().as_slice())
                .map_err(failed)?;
            match wanted {
                Wanted::Spec(document) => meta.insert("spec", document.as_slice()).map_err(failed)?,
                Wanted::Nothing => meta.remove("spec").map_err(failed)?,
            };
        }
        if !batch.events.is_empty() || !batch.displaced.is_empty() {
            let mut events = change.open_table(EVENTS).map_err(failed)?;
            for (event, wall_ms) in &batch.events {
                let bytes = serde_json::to_vec(&StoredEvent::of(event, *wall_ms))?;
                events.insert(event.seq, bytes.as_slice()).map_err(failed)?;
            }
            for seq in &batch.displaced {
                events.remove(seq).map_err(failed)?;
            }
        }
        if !batch.read.is_empty() {
            let mut read = change.open_table(READ).map_err(failed)?;
            for (guest, cursor) in &batch.read {
                read.insert(guest.as_str(), serde_json::to_vec(cursor)?.as_slice())
                    .map_err(failed)?;
            }
        }
        change.commit().map_err(failed)?;
        Ok(())
    }
}

impl StoredEvent {
    fn of(event: &Event, wall_ms: u64) -> Self {
        Self {
            wall_ms,
            layer: event.key.layer,
            subject: event.key.subject.clone(),
            from: event.from,
            to: event.to.clone(),
        }
    }

    fn event(self, seq: u64) -> (Event, u64) {
        let event = Event {
            seq,
            key: Key::new(self.layer, self.subject),
            from: self.from,
            to: self.to,
            age_ms: 0,
        };
        (event, self.wall_ms)
    }
}

fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Failed(Box::new(error.into()))
}

fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

type Write = (Batch, Option<oneshot::Sender<Result<(), StoreError>>>);

/// The store behind its thread.
#[derive(Debug)]
pub struct Writer {
    queue: Option<SyncSender<Write>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts the thread that owns the store.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(store: Store) -> std::io::Result<Self> {
        let (queue, writes) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write_all(&store, &writes))?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Hands a batch over; false when the disk is so far behind that it was not taken.
    #[must_use]
    pub fn keep(&self, batch: Batch) -> bool {
        self.queue
            .as_ref()
            .is_some_and(|queue| queue.try_send((batch, None)).is_ok())
    }

    /// Keeps a batch and waits until it is on disk.
    ///
    /// # Errors
    /// When it could not be written.
    pub async fn keep_now(&self, batch: Batch) -> Result<(), StoreError> {
        let (done, written) = oneshot::channel();
        let queue = self.queue.as_ref().ok_or(StoreError::Closed)?;
        queue
            .try_send((batch, Some(done)))
            .map_err(|_| StoreError::Behind)?;
        written.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Writer {
    /// Waits until all that was handed over is on disk.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it has nothing more to say
        }
    }
}

/// Writes until the queue is closed; what fails is kept and tried again with what comes.
fn write_all(store: &Store, writes: &Receiver<Write>) {
    let mut left = Batch::default();
    let mut complained = false;
    loop {
        let first = match left.is_empty() {
            true => writes.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => writes.recv_timeout(AGAIN),
        };
        let closed = matches!(first, Err(RecvTimeoutError::Disconnected));
        let mut waiting = Vec::new();
        for (batch, done) in first.into_iter().chain(writes.try_iter()) {
            left.merge(batch);
            waiting.extend(done);
        }
        let outcome = store.keep(&left).map_err(|error| error.to_string());
        match &outcome {
            Ok(()) => left = Batch::default(),
            Err(error) if !complained => tracing::warn!(%error, "the store cannot be written; tried again"),
            Err(_) => {}
        }
        complained = outcome.is_err();
        left.wanted = None; // whoever asked for it is told now, and nothing else may bring it back
        for done in waiting {
            let _ = done.send(outcome.clone().map_err(StoreError::NotWritten)); // or nobody waits any more
        }
        if closed {
            return;
        }
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
