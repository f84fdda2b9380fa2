//! Looks now and then for programs that wait on ports which the kernel leads to guests: nobody tells when one begins.

use std::collections::BTreeMap;
use std::time::Duration;

use sovereign_protocol::name::Name;
use sovereign_protocol::port::Taken;
use tokio::sync::{mpsc, watch};

use crate::core::Event;
use crate::listeners::{Listener, listeners, ours};
use crate::port_owner::owner;
use crate::shared_ports::SharedPorts;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(10);
/// Before the look that tells whether what was just seen stays.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// What each forward of the kernel takes of this host, by guest and name.
pub(super) type Claimed = BTreeMap<(Name, Name), Taken>;

/// Tells what changes, and all anew after other forwards were claimed. Ends with the engine.
pub(super) async fn watch(mut claimed: watch::Receiver<Claimed>, events: mpsc::Sender<Event>) {
    let mut shared = SharedPorts::default();
    let mut told = None;
    loop {
        let forwards = claimed.borrow_and_update().clone();
        let looked;
        (shared, looked) = look(shared, forwards.clone()).await;
        let now = looked.map(|found| (forwards.clone(), found));
        if let Some((_, found)) = now.as_ref().filter(|_| now != told) {
            if events.send(Event::SharedPorts(found.clone())).await.is_err() {
                return;
            }
            told = now;
        }
        let pause = async {
            match forwards.is_empty() {
                true => std::future::pending().await,
                false if shared.is_doubtful() => tokio::time::sleep(LOOK_AGAIN).await,
                false => tokio::time::sleep(LOOK).await,
            }
        };
        // Losing an arm is safe: a change is still one at the next turn.
        tokio::select! {
            changed = claimed.changed() => if changed.is_err() { return },
            () = pause => {}
        }
    }
}

/// Who waits where, in words; `None` when nobody could look.
async fn look(
    mut shared: SharedPorts,
    forwards: Claimed,
) -> (SharedPorts, Option<BTreeMap<(Name, Name), String>>) {
    if forwards.is_empty() {
        return (SharedPorts::default(), Some(BTreeMap::new()));
    }
    let look = move || {
        let before = ours();
        let found =
            listeners().inspect_err(|error| tracing::debug!(%error, "nobody sees who waits on ports"));
        let own = before.union(&ours()).copied().collect();
        let found = found.ok().map(|found| shared.judge(&forwards, &found, &own));
        let words = |(key, listener): ((Name, Name), Listener)| (key, words(&listener));
        (shared, found.map(|found| found.into_iter().map(words).collect()))
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default() // a look that panicked saw nothing
}

fn words(listener: &Listener) -> String {
    format!(
        "{} waits at {} {}, and what comes for that port goes to the guest",
        owner(listener),
        listener.transport,
        listener.local
    )
}
