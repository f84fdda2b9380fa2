//! `down`: stops all guests in order, then the host agent, and sees it gone.

use std::time::{Duration, Instant};

use crate::agent::Process;
use crate::clock::seconds;
use crate::context::{Context, talk};
use crate::error::{CommandError, Kind};
use crate::link::Link;

/// All guests, PostgreSQL's own stop included.
const STOP: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(10);

pub(super) async fn run(context: &Context) -> Result<(), CommandError> {
    let layout = &context.layout;
    let Some(link) = Link::connect_if_running(layout).await? else {
        talk("nothing is running");
        return context.done("NotRunning", "nothing is running", "sovereign up");
    };
    let begun = Instant::now();
    let process = Process::listening(layout).await;
    link.stop().await?;
    context.when_interrupted("interrupted; the stop goes on", "sovereign down");
    let gone = async {
        if let Some(process) = &process {
            process.ended().await;
        }
        // A clean end removes the socket; one that refuses has nobody behind it either.
        while std::os::unix::net::UnixStream::connect(layout.control()).is_ok() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    if tokio::time::timeout(STOP, gone).await.is_err() {
        let pid = process.map_or_else(String::new, |process| format!(" (pid {})", process.pid));
        let message = format!("the host agent{pid} has not ended within {} s", STOP.as_secs());
        return Err(CommandError::new(Kind::TimedOut, "NotStopped", message)
            .next(format!("less {}", layout.log().display())));
    }
    let evidence = format!("stopped in {}", seconds(begun.elapsed()));
    talk(&evidence);
    context.done("Stopped", &evidence, "sovereign up")
}
