//! Miniflux: from an action of the core to a file, a process and a question over HTTP, and back to an event.
//!
//! Nothing of it is kept here: all that it knows is in the database of another guest.

pub mod conf;
pub mod probe;

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use sovereign_protocol::condition::Status;
use sovereign_protocol::mesh::Requirement;
use sovereign_protocol::secret::Secret;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::cgroup::Cgroup;
use crate::core::brief::Brief;
use crate::core::service::{Action, Adjusted, Event, LaunchError, Probe};
use crate::users::{self, User};
use crate::{clock, log, places, process};

/// The user that it runs as.
const USER: &str = "miniflux";
const PROGRAM: &str = "/usr/bin/miniflux";
/// Its process, as a number.
const PID: &str = "pid";
/// What it says; moved to the console while it is well.
const LOG: &str = "log";
/// More of a log than this is not moved, only its end.
const LOG_BYTES: usize = 64 << 10;
/// Its database must take a connection within this time before it is started.
const REACH: Duration = Duration::from_secs(3);

/// One Miniflux as it is to run.
#[derive(Debug, Clone)]
pub struct Miniflux {
    brief: Brief,
}

impl Miniflux {
    /// A Miniflux by its part of the specification.
    #[must_use]
    pub fn new(brief: Brief) -> Self {
        Self { brief }
    }

    /// Does it and sends what came of it; for [`Action::Launch`] also the end of the process.
    pub async fn act(self, action: Action, events: mpsc::Sender<Event>) {
        let event = match action {
            Action::Launch => return self.launch(events).await,
            Action::Probe => Event::Probed(self.probe().await),
            Action::Adjust => Event::Adjusted(self.adjust().unwrap_or_else(Adjusted::Failed)),
            Action::Stop => return process::stop(&self.cgroup(), main_pid(), Signal::SIGTERM),
            Action::Kill => return process::kill(&self.cgroup()),
        };
        let _ = events.send(event).await; // nobody listens when the agent ends
    }

    async fn launch(self, events: mpsc::Sender<Event>) {
        let running = match self.bring_up(&events).await {
            Ok(running) => running,
            Err(error) => {
                let _ = events.send(Event::Launched(Err(error))).await;
                return;
            }
        };
        let _ = events.send(Event::Launched(Ok(()))).await;
        let how = running.ended().await;
        let how = match last_line(&move_log()) {
            Some(last) => format!("{how}; it said: {last}"),
            None => how,
        };
        let _ = events.send(Event::Ended(how)).await;
    }

    async fn bring_up(&self, events: &mpsc::Sender<Event>) -> Result<process::Running, LaunchError> {
        let user = installed()?;
        let cgroup = self.cgroup();
        let failed =
            |what: &'static str| move |error: io::Error| LaunchError::Failed(format!("{what}: {error}"));
        let adopted = process::adopt(&cgroup, main_pid())
            .await
            .map_err(failed("adopt"))?;
        if let Some(running) = adopted {
            return Ok(running);
        }
        let exits = Path::new(places::EXITS);
        if let Some(how) = main_pid().and_then(|pid| process::missed(exits, pid, clock::agent_since_ms())) {
            let _ = events.send(Event::Missed(how)).await; // nobody listens when the agent ends
        }
        let (database, text) = self.configuration().map_err(LaunchError::Failed)?;
        if database.status != Status::True {
            return Err(LaunchError::Waits);
        }
        reach(database).await?;
        let directory = Path::new(places::RUN_MINIFLUX);
        let written = failed("write the configuration");
        conf::write(directory, &text, &user).map_err(written)?;
        conf::mark_started(directory, &text).map_err(written)?;
        cgroup.make().map_err(failed("cgroup"))?;
        if let Err(error) = cgroup.limit(&self.brief.service.limits.clone().unwrap_or_default()) {
            // It starts all the same; the adjustment, which follows, fails and is told.
            log::line("a limit cannot be set", &[("error", &error)]);
        }
        let config = directory.join(conf::FILE);
        let command = (PROGRAM.into(), vec!["-config-file".into(), config.into()]);
        let output = Some(new_log(directory).map_err(failed("log"))?);
        let running = process::start(&cgroup, USER, &command, output).map_err(failed("start miniflux"))?;
        if let Some(pid) = running.pid() {
            fs::write(directory.join(PID), pid.to_string()).map_err(failed("note its process"))?;
        }
        Ok(running)
    }

    async fn probe(&self) -> Probe {
        let found = probe::probe(conf::own_address(self.brief.service.kind.port())).await;
        if matches!(found, Probe::Ready(_)) {
            move_log();
        }
        found
    }

    /// It reads its file only at its start.
    fn adjust(&self) -> Result<Adjusted, String> {
        self.cgroup()
            .limit(&self.brief.service.limits.clone().unwrap_or_default())?;
        let (database, text) = self.configuration()?;
        if conf::is_started(Path::new(places::RUN_MINIFLUX), &text) {
            return Ok(Adjusted::Done);
        }
        let Requirement {
            of, address, port, ..
        } = database;
        let why = format!("its configuration changed; the database is {of} at {address} port {port}");
        Ok(Adjusted::Restart(why))
    }

    fn configuration(&self) -> Result<(&Requirement, String), String> {
        let Some((database, Some(password))) = &self.brief.requirement else {
            return Err("nothing says where its database is, or its password".to_owned());
        };
        let admin: Option<&Secret> = self.brief.password.as_ref().map(|password| &password.0);
        let text = conf::text(&conf::Settings {
            port: self.brief.service.kind.port(),
            database,
            password: &password.0,
            admin,
        });
        Ok((database, text))
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::of_service(self.brief.service.name.as_str())
    }
}

/// What the image must have.
fn installed() -> Result<User, LaunchError> {
    if !Path::new(PROGRAM).exists() {
        let text = format!("the image has no {PROGRAM}");
        return Err(LaunchError::Hopeless("NoProgram", text));
    }
    users::lookup(USER).map_err(|error| LaunchError::Hopeless("NoUser", error.to_string()))
}

/// It ends when its database does not answer at its start: so nothing is started before that.
async fn reach(database: &Requirement) -> Result<(), LaunchError> {
    let at = SocketAddr::new(database.address, database.port);
    let why = match timeout(REACH, TcpStream::connect(at)).await {
        Ok(Ok(_)) => return Ok(()),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", REACH.as_secs()),
    };
    Err(LaunchError::NotYet(format!("{} at {at}: {why}", database.of)))
}

/// The process that this or an earlier agent started in this boot.
fn main_pid() -> Option<u32> {
    let text = fs::read_to_string(Path::new(places::RUN_MINIFLUX).join(PID)).ok()?;
    text.parse().ok()
}

/// Appended to by the process, so that it can be cut while it runs.
fn new_log(directory: &Path) -> io::Result<File> {
    let path = directory.join(LOG);
    let file = File::options().append(true).create(true).mode(0o600).open(path)?;
    file.set_len(0)?;
    Ok(file)
}

/// Moves what it said to the console. What it says in this very moment may be lost.
fn move_log() -> String {
    let path = Path::new(places::RUN_MINIFLUX).join(LOG);
    let Ok(bytes) = fs::read(&path) else {
        return String::new();
    };
    if let Ok(file) = File::options().write(true).open(&path) {
        let _ = file.set_len(0); // else it is moved again
    }
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(LOG_BYTES)..]).into_owned();
    let mut console = io::stderr().lock();
    for line in text.lines() {
        let line: String = line.chars().filter(|c| !c.is_control()).collect();
        let _ = writeln!(console, "miniflux: {line}"); // nobody reads the console
    }
    text
}

fn last_line(text: &str) -> Option<&str> {
    text.lines().map(str::trim).rfind(|line| !line.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirement(address: SocketAddr) -> Requirement {
        let text = format!(
            r#"{{"of":"sql/postgres","status":"True","evidence":"","address":"{}","port":{},"role":"web_miniflux"}}"#,
            address.ip(),
            address.port()
        );
        serde_json::from_str(&text).unwrap()
    }

    #[tokio::test]
    async fn nothing_is_started_while_its_database_does_not_answer() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        reach(&requirement(address)).await.unwrap();
        drop(listener);
        let Err(LaunchError::NotYet(why)) = reach(&requirement(address)).await else {
            panic!("reached")
        };
        assert!(why.starts_with(&format!("sql/postgres at {address}: ")), "{why}");
    }

    #[test]
    fn the_last_thing_said_is_told() {
        assert_eq!(last_line("a\n  password wrong \n\n"), Some("password wrong"));
        assert_eq!(last_line("\n"), None);
    }

    #[test]
    fn a_log_is_appended_to_and_can_be_cut() {
        let directory = tempfile::tempdir().unwrap();
        let mut log = new_log(directory.path()).unwrap();
        log.write_all(b"one\n").unwrap();
        let mut again = new_log(directory.path()).unwrap();
        again.write_all(b"two\n").unwrap();
        log.write_all(b"three\n").unwrap();
        assert_eq!(fs::read(directory.path().join(LOG)).unwrap(), b"two\nthree\n");
    }
}
