//! `sovereign-host`: the host agent, and the shims it starts.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use sovereign_host_agent::net::{NetworkSpec, gc, look, pasta};
use sovereign_host_agent::store::Store;
use sovereign_host_agent::{clock, control, engine, files, inspect, netns, resolver, shim};
use sovereign_protocol::handshake::random_hex;
use sovereign_protocol::layout::{Layout, STORE};
use sovereign_protocol::name::Name;
use sovereign_protocol::record::Record;
use sovereign_protocol::transport::bind_unix;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

/// The file that is read in the place of this host's resolv.conf; then no other is looked at.
const RESOLV_CONF: &str = "SOVEREIGN_RESOLV_CONF";

/// The host agent of sovereign. It is started by `sovereign up`.
#[derive(Parser)]
#[command(
    version,
    after_help = "Example: sovereign-host run --instance default --run-dir /run/sovereign/default --state-dir /var/lib/sovereign/default"
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs the agent of one instance until `sovereign down`.
    Run {
        /// The instance.
        #[arg(long)]
        instance: Name,
        /// Where its sockets are.
        #[arg(long)]
        run_dir: PathBuf,
        /// Where its lasting files are.
        #[arg(long)]
        state_dir: PathBuf,
        /// Leaves the terminal's session.
        #[arg(long)]
        detach: bool,
    },
    /// Prints the events that an instance's store keeps, one JSON object a line; only while no agent runs.
    Events {
        /// Where its lasting files are.
        #[arg(long)]
        state_dir: PathBuf,
    },
    /// Removes what instances left in this network namespace and prints one JSON object (started by `sovereign gc`).
    #[command(hide = true)]
    Gc {
        /// Of this instance only; without it of all that are not in use.
        #[arg(long)]
        instance: Option<Name>,
        /// The file that keeps what that instance's switches were.
        #[arg(long, requires = "instance")]
        switched: Option<PathBuf>,
        /// The directory of all instances' lasting files: those of dead ones keep what their switches were.
        #[arg(long, conflicts_with = "instance")]
        states: Option<PathBuf>,
        /// Only tells.
        #[arg(long)]
        dry_run: bool,
    },
    /// Looks at an instance past its agent and prints one JSON object (started by `sovereign doctor`).
    #[command(hide = true)]
    Inspect {
        /// The instance.
        #[arg(long, default_value = "default")]
        instance: Name,
        /// Where its sockets are.
        #[arg(long)]
        run_dir: PathBuf,
        /// Where its lasting files are.
        #[arg(long)]
        state_dir: PathBuf,
    },
    /// Looks at this network namespace for a plan and prints one JSON object; changes nothing. What the network is to be
    /// comes as JSON over standard input, `null` for nothing (started by `sovereign plan`).
    #[command(hide = true)]
    Look {
        /// The instance.
        #[arg(long)]
        instance: Name,
        /// The file that keeps what that instance's switches were.
        #[arg(long)]
        switched: PathBuf,
    },
    /// Runs one boot of one guest (started by `run`).
    #[command(hide = true)]
    Shim {
        /// The guest, for people who read process lists.
        guest: Name,
        /// Its configuration.
        #[arg(long)]
        config: PathBuf,
    },
    /// Makes a private network namespace and hands out what it opens there (started by `run`).
    #[command(hide = true)]
    Netns {
        /// The instance, for people who read process lists.
        instance: Name,
        /// Where it listens.
        #[arg(long)]
        socket: PathBuf,
        /// The namespace comes over standard input: that of a helper which died.
        #[arg(long)]
        passed: bool,
    },
    /// Becomes pasta, which leads out of a private network namespace (started by `run`).
    #[command(hide = true)]
    Pasta {
        /// The instance, for people who read process lists.
        instance: Name,
        /// Where its record goes.
        #[arg(long)]
        record: PathBuf,
        /// The agent's process.
        #[arg(long)]
        parent: u32,
        /// What it is attached to.
        #[arg(long)]
        attachment: String,
        /// pasta and its words.
        #[arg(last = true, required = true)]
        argv: Vec<OsString>,
    },
    /// Tries in this process whether a private network namespace works here.
    #[command(hide = true)]
    NetnsProbe,
    /// Becomes a VMM that dies with its shim (started by `shim`).
    #[command(hide = true)]
    BecomeVmm {
        /// The shim's process.
        parent: i32,
        /// The VMM.
        #[arg(last = true, required = true)]
        argv: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let outcome = match Arguments::parse().verb {
        Verb::Run {
            instance,
            run_dir,
            state_dir,
            detach,
        } => {
            let layout = Layout {
                instance,
                run: run_dir,
                state: state_dir,
            };
            leave_session(detach).and_then(|()| block_on(run(layout)))
        }
        Verb::Events { state_dir } => print_events(&state_dir),
        Verb::Inspect {
            instance,
            run_dir,
            state_dir,
        } => {
            let layout = Layout {
                instance,
                run: run_dir,
                state: state_dir,
            };
            block_on(print_inspection(layout))
        }
        Verb::Gc {
            instance,
            switched,
            states,
            dry_run,
        } => {
            let dead = states.iter().flat_map(|states| gc::dead_records(states));
            block_on(collect(
                instance,
                switched.into_iter().chain(dead).collect(),
                dry_run,
            ))
        }
        Verb::Look { instance, switched } => block_on(print_look(instance, switched)),
        Verb::Shim { config, .. } => leave_session(true).and_then(|()| block_on(shim::run::run(&config))),
        Verb::Netns { socket, passed, .. } => {
            let origin = if passed {
                netns::Origin::Passed
            } else {
                netns::Origin::Fresh
            };
            leave_session(true).and_then(|()| netns::run(&socket, origin))
        }
        Verb::Pasta {
            record,
            parent,
            attachment,
            argv,
            ..
        } => pasta::launch(&record, parent, attachment, &argv).map(|never| match never {}),
        Verb::NetnsProbe => netns::probe::run().context("cannot report"),
        Verb::BecomeVmm { parent, argv } => shim::vmm::become_vmm(parent, &argv).map(|never| match never {}),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}

/// The main thread is the only one that spawns: PR_SET_PDEATHSIG follows it.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(work)
}

fn leave_session(detach: bool) -> anyhow::Result<()> {
    if detach {
        rustix::process::setsid().context("cannot leave the terminal's session")?;
    }
    Ok(())
}

fn print_events(state_dir: &Path) -> anyhow::Result<()> {
    let path = state_dir.join(STORE);
    if !path.exists() {
        return Ok(()); // nothing ever ran
    }
    let mut out = std::io::stdout().lock();
    for (event, wall_ms) in Store::open(&path)?.load()?.events {
        let record = Record::new(event, clock::rfc3339(wall_ms));
        writeln!(out, "{}", serde_json::to_string(&record)?)?;
    }
    Ok(())
}

async fn collect(instance: Option<Name>, switched: Vec<PathBuf>, dry_run: bool) -> anyhow::Result<()> {
    let mode = if dry_run { gc::Mode::Dry } else { gc::Mode::Remove };
    let collected = gc::collect(instance.as_ref(), switched, mode).await?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&collected)?)?;
    Ok(())
}

async fn print_look(instance: Name, switched: PathBuf) -> anyhow::Result<()> {
    let spec = serde_json::from_reader(std::io::stdin().lock()).context("no description of a network")?;
    let spec: Option<NetworkSpec> = spec;
    let seen = look::look(&instance, spec.as_ref(), switched).await?;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&seen)?)?;
    Ok(())
}

async fn print_inspection(layout: Layout) -> anyhow::Result<()> {
    let inspection = inspect::inspect(&layout).await;
    writeln!(std::io::stdout(), "{}", serde_json::to_string(&inspection)?)?;
    Ok(())
}

async fn run(layout: Layout) -> anyhow::Result<()> {
    files::private_dir(&layout.run)?;
    files::private_dir(&layout.state)?;
    let lock = std::fs::File::create(layout.lock()).context("cannot open the lock")?;
    lock.try_lock().context("another host agent runs this instance")?;
    let listener = bind_unix(&layout.control()).context("cannot open the control socket")?;
    let incarnation = u64::from_str_radix(&random_hex::<8>()?, 16)?;
    let (event_sender, events) = mpsc::channel(engine::QUEUE);
    let (request_sender, requests) = mpsc::channel(engine::QUEUE);
    let resolver = resolver::Files::of(std::env::var_os(RESOLV_CONF));
    let (engine, news) = engine::Engine::new(layout.clone(), incarnation, event_sender.clone())?;
    let known = resolver.read();
    let engine = engine.knowing(known.clone());
    let mut terminate = signal(SignalKind::terminate())?;
    tracing::info!(instance = %layout.instance, "host agent runs");
    // Guests outlive an agent that is terminated; only `stop` stops them.
    let outcome = tokio::select! {
        outcome = engine.run(events, requests) => outcome,
        () = control::serve(listener, layout.clone(), request_sender, news) => Ok(()),
        _ = terminate.recv() => Ok(()),
        () = resolver.watch(known, event_sender) => Ok(()), // only after the engine
    };
    files::remove(&layout.control())?;
    let _ = std::fs::remove_dir(&layout.run); // stays while guests run
    outcome
}
