//! PostgreSQL: from an action of the core to files, processes and sessions, and back to an event.
//!
//! `conf` writes texts, `cluster` owns the data directory, `session` talks to the server. What is to be done is decided in `core`.

pub mod client;
pub mod cluster;
pub mod conf;
pub mod scram;
pub mod session;

use std::path::Path;

use nix::sys::signal::Signal;
use sovereign_protocol::mesh::Client;
use sovereign_protocol::secret::Secret;
use sovereign_protocol::spec::{Limits, ServiceKind};
use tokio::sync::mpsc;

use crate::cgroup::Cgroup;
use crate::core::brief::Brief;
use crate::core::service::{Action, Adjusted, Event, LaunchError, Probe};
use crate::{clock, log, places, process};
use cluster::Cluster;

/// One PostgreSQL as it is to run.
#[derive(Debug, Clone)]
pub struct Postgres {
    brief: Brief,
}

impl Postgres {
    /// A PostgreSQL by its part of the specification.
    #[must_use]
    pub fn new(brief: Brief) -> Self {
        Self { brief }
    }

    /// Does it and sends what came of it; for [`Action::Launch`] also the end of the process.
    pub async fn act(self, action: Action, events: mpsc::Sender<Event>) {
        let event = match action {
            Action::Launch => return self.launch(events).await,
            Action::Probe => Event::Probed(self.probe().await),
            Action::Adjust => Event::Adjusted(self.adjust().await.unwrap_or_else(Adjusted::Failed)),
            Action::Stop => {
                process::stop(&self.cgroup(), cluster::any_main_pid(), Signal::SIGINT);
                return;
            }
            Action::Kill => {
                process::kill(&self.cgroup());
                return;
            }
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
        let _ = events.send(Event::Ended(how)).await;
    }

    async fn bring_up(&self, events: &mpsc::Sender<Event>) -> Result<process::Running, LaunchError> {
        let cluster = Cluster::find()?;
        let cgroup = self.cgroup();
        let failed =
            |what: &'static str| move |error: std::io::Error| LaunchError::Failed(format!("{what}: {error}"));
        if let Some(running) = process::adopt(&cgroup, cluster.main_pid())
            .await
            .map_err(failed("adopt"))?
        {
            return Ok(running);
        }
        if let Some(how) = self.missed(&cluster) {
            let _ = events.send(Event::Missed(how)).await; // nobody listens when the agent ends
        }
        cluster.prepare(self.password()).await?;
        let settings = self.settings(self.is_reached());
        conf::write(places::RUN_POSTGRES.as_ref(), &settings, &cluster.user_name())
            .map_err(failed("write the configuration"))?;
        if !settings.lines.is_empty() {
            cluster.check_settings(places::RUN_POSTGRES.as_ref()).await?;
        }
        conf::mark_loaded(places::RUN_POSTGRES.as_ref()).map_err(failed("write the configuration"))?;
        cgroup.make().map_err(failed("cgroup"))?;
        if let Err(error) = cgroup.limit(&self.limits()) {
            // It starts all the same; the adjustment, which follows, fails and is told.
            log::line("a limit cannot be set", &[("error", &error)]);
        }
        process::start(&cgroup, cluster::USER, &cluster.command(), None).map_err(failed("start postgres"))
    }

    async fn probe(&self) -> Probe {
        session::probe(&self.target()).await
    }

    /// Looks whether PostgreSQL understands the settings before anything is changed.
    async fn adjust(&self) -> Result<Adjusted, String> {
        let directory = Path::new(places::RUN_POSTGRES);
        let written = |error: std::io::Error| format!("write the configuration: {error}");
        // The last client that goes is no reason for a restart: pg_hba.conf lets nobody in by the card.
        let settings = self.settings(self.is_reached() || conf::is_everywhere(directory));
        if !conf::is_written(directory, &settings) {
            let candidate = directory.join("candidate");
            conf::write(&candidate, &settings, cluster::USER).map_err(written)?;
            let cluster = Cluster::find().map_err(|error| error.to_string())?;
            cluster
                .check_settings(&candidate)
                .await
                .map_err(|error| error.to_string())?;
        }
        self.cgroup().limit(&self.limits())?;
        conf::write(directory, &settings, cluster::USER).map_err(written)?;
        let reload = !conf::is_loaded(directory);
        if reload {
            // From here on it is not known what the server has read, until it says so.
            conf::forget_loaded(directory).map_err(written)?;
        }
        let adjusted = session::adjust(&self.target(), self.password(), &self.grants(), reload).await?;
        if adjusted == Adjusted::Done {
            conf::mark_loaded(directory).map_err(written)?;
        }
        Ok(adjusted)
    }

    /// Whether anybody comes by the card.
    fn is_reached(&self) -> bool {
        self.brief.open || !self.brief.clients.is_empty()
    }

    fn settings(&self, everywhere: bool) -> conf::Settings {
        let lines = match &self.brief.service.kind {
            ServiceKind::Postgres { settings, .. } => settings.clone(),
            ServiceKind::Miniflux { .. } => std::collections::BTreeMap::new(), // never this one's
        };
        conf::Settings {
            port: self.brief.service.kind.port(),
            shared_memory: conf::SharedMemory::probe(Path::new("/dev/shm")),
            lines,
            clients: self.clients().cloned().collect(),
            open: self.brief.open,
            everywhere,
        }
    }

    /// Where the running server listens, which is not yet the specified port after a change of port.
    fn target(&self) -> session::Target {
        session::Target {
            sockets: places::PG_SOCKETS.into(),
            port: cluster::running_port().unwrap_or(self.brief.service.kind.port()),
        }
    }

    /// How the server that an agent before this one started in this boot ended.
    fn missed(&self, cluster: &Cluster) -> Option<String> {
        if !conf::was_loaded(places::RUN_POSTGRES.as_ref()) {
            return None; // the process file on the data disk is of another boot
        }
        process::missed(
            Path::new(places::EXITS),
            cluster.main_pid()?,
            clock::agent_since_ms(),
        )
    }

    fn password(&self) -> Option<&Secret> {
        self.brief.password.as_ref().map(|password| &password.0)
    }

    fn clients(&self) -> impl Iterator<Item = &Client> {
        self.brief.clients.iter().map(|(client, _)| client)
    }

    /// One without a password could not log in: it is not made.
    fn grants(&self) -> Vec<session::Grant> {
        let clients = self.brief.clients.iter();
        let grants = clients.filter_map(|(client, password)| {
            Some(session::Grant {
                role: client.role.clone(),
                password: password.as_ref()?.0.clone(),
            })
        });
        grants.collect()
    }

    fn limits(&self) -> Limits {
        self.brief.service.limits.clone().unwrap_or_default()
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup::of_service(self.brief.service.name.as_str())
    }
}
