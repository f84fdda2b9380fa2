//! The namespace as the agent holds it: its helper, its sockets, and what was seen through them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use sovereign_protocol::name::Name;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::filter::{Filter, PortForward};
use sovereign_reconcile::sysctl::Sysctl;
use sovereign_reconcile::wanted::Switched;
use sovereign_reconcile::way::Way;
use tokio::time::Instant;

use super::apply::{self, Failure};
use super::conntrack::Stale;
use super::filter::{Enforcer, FilterError};
use super::forget::Forgetter;
use super::former::Former;
use super::gap::Gap;
use super::ground::{self, Ground, Opened};
use super::iptables;
use super::kernel::{Kernel, KernelError};
use super::names::{self, Mark};
use super::network::NetworkConfig;
use super::notify::{Drained, Notifications};
use super::observed::Observed;
use super::outside::Families;
use super::pasta::{Attachment, Pasta, PastaFailure, Started};
use super::plan::{Part, Plan, Step, plan};
use super::report::Enforced;
use super::switches::{Place, Switches};
use super::taps::{Source, TunPool};
use super::wanted::{NetworkSpec, Wanted};
use super::ways::WAYS;
use crate::netns::{Helper, HelperConfig, Namespaces, Set, Stage, StageFailure};

/// The largest process id there is (PID_MAX_LIMIT, linux/threads.h).
const PROCESSES: u32 = 4 << 20;

/// The sockets are of no use any more: take fresh ones.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// Requests are not answered.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The packet filter cannot be looked at.
    #[error("the packet filter cannot be looked at")]
    Filter(#[from] FilterError),
    /// The subscription cannot be read.
    #[error("no notifications")]
    Notifications(#[from] io::Error),
}

/// Where the network is: a namespace of our own with the helper that holds it, or the one that we are in.
#[derive(Debug)]
pub(super) enum Seat {
    /// Of our own.
    Private(Box<Held>),
    /// The one that we are in.
    Host,
}

/// What of a seat wants to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changed {
    /// The helper has ended.
    Helper,
    /// What leads out has ended, or may be started again.
    Pasta,
}

/// The helper, and the namespace that outlives it.
#[derive(Debug)]
pub(super) struct Held {
    config: HelperConfig,
    helper: Option<Helper>,
    /// While this is held, a helper that died can be replaced in the same namespace.
    kept: Option<Namespaces>,
    /// What leads out of it.
    pasta: Pasta,
}

impl Seat {
    pub(super) fn new(ground: &Ground) -> Self {
        match ground {
            Ground::Private(config) => Self::Private(Box::new(Held {
                pasta: Pasta::beside(config),
                config: config.clone(),
                helper: None,
                kept: None,
            })),
            Ground::Host => Self::Host,
        }
    }

    /// Makes sure that there is a helper, where one is needed; its process.
    pub(super) async fn helper(&mut self) -> Result<Option<u32>, StageFailure> {
        match self {
            Self::Private(held) => Ok(Some(held.helper().await?.pid())),
            Self::Host => Ok(None),
        }
    }

    /// Waits until the helper that we know has ended, and forgets it, or until pasta has ended or is due. Cancel safe.
    pub(super) async fn changed(&mut self) -> Changed {
        let Self::Private(held) = self else {
            return std::future::pending().await;
        };
        let Held { helper, pasta, .. } = &mut **held;
        let ended = async {
            match &helper {
                Some(helper) => helper.ended().await,
                None => std::future::pending().await,
            }
        };
        // Losing an arm is safe: what it waits for stays so.
        tokio::select! {
            () = ended => {}
            () = pasta.changed() => return Changed::Pasta,
        }
        *helper = None;
        Changed::Helper
    }

    /// Whether the network has to be led out by somebody on the machine around it.
    pub(super) fn is_led_out(&self, spec: &NetworkSpec) -> bool {
        matches!(self, Self::Private(_)) && spec.is_led_out()
    }

    /// Sees to it that pasta leads out of a namespace of our own where `spec` wants it, and only then; what was started
    /// now. A session was opened before.
    pub(super) async fn keep_pasta(
        &mut self,
        instance: &Name,
        spec: &NetworkSpec,
        families: Families,
    ) -> Result<Option<Started>, PastaFailure> {
        let Self::Private(held) = self else {
            return Ok(None);
        };
        let namespaces = held.kept.as_ref().filter(|_| spec.is_led_out());
        let wanted = namespaces.map(|namespaces| Attachment {
            link: names::way_out(instance),
            namespaces,
            resolvers: &spec.resolvers,
            families,
        });
        held.pasta.keep(wanted).await
    }

    /// Where the former values of switches are kept; other records are beside it. Those of a namespace of our own end with
    /// it, and are nobody else's to put back: not those of this machine.
    pub(super) fn record(&self, config: &NetworkConfig) -> PathBuf {
        match self {
            Self::Private(held) => held.record(),
            Self::Host => config.switched.clone(),
        }
    }

    /// Opens a session with sockets that nobody used before.
    pub(super) async fn open(&mut self, config: &NetworkConfig) -> Result<Session, StageFailure> {
        let (set, source) = match self {
            Self::Private(held) => held.open().await?,
            Self::Host => (ground::open_own()?, Source::Own),
        };
        let notifications = Notifications::over(set.events, config.receive_buffer)
            .map_err(|error| StageFailure::io(Stage::Netlink, &error))?;
        let tag = Mark::of(&config.instance).prefix;
        // A program acts in the namespace that it runs in: in that of the machine, not in one of our own.
        let programs = matches!(self, Self::Host).then_some(iptables::Namespace::Own);
        let filter = Enforcer::open(
            set.netfilter,
            config.receive_buffer,
            &tag,
            config.filter,
            programs,
        )
        .await
        .map_err(|error| StageFailure::io(Stage::Netlink, &error))?;
        let mut switches = Switches::open(set.switches, self.record(config))
            .map_err(|error| StageFailure::io(Stage::Proc, &error))?;
        if let Some(told) = switches.set_aside() {
            tracing::warn!(told, "what this host's switches were is not known");
        }
        Ok(Session {
            kernel: Kernel::over(set.requests),
            notifications,
            switches,
            filter,
            forgetter: set.conntrack.and_then(|socket| Forgetter::start(socket).ok()),
            enforced: None,
            remade: None,
            by: None,
            doubtful: true,
            heard: true,
            tuns: Arc::new(TunPool::new(source, set.tuns)),
            observed: Observed::default(),
        })
    }

    /// Ends the helper; the namespace goes with the last descriptor in it.
    pub(super) async fn end(self) -> Result<(), StageFailure> {
        let Self::Private(mut held) = self else {
            return Ok(());
        };
        let ended = held.pasta.end().await;
        drop(held.kept.take());
        for record in [held.record(), held.record().with_file_name(WAYS)] {
            crate::files::remove(&record)
                .map_err(|error| StageFailure::new(Stage::Leave, format!("{error:#}")))?;
        }
        let helper = match held.helper {
            Some(helper) => Some(helper),
            None => Helper::find(&held.config).await?,
        };
        match helper {
            Some(helper) => helper.end().await?,
            None => crate::netns::remove_socket(&held.config)?, // of one that was killed
        }
        ended.map_err(|error| StageFailure::new(Stage::Leave, error.to_string()))
    }
}

impl Held {
    /// The helper: the one we know, the one that runs, or a new one in the namespace we kept.
    async fn helper(&mut self) -> Result<&Helper, StageFailure> {
        let helper = match self.helper.take() {
            Some(helper) => helper,
            None => match Helper::find(&self.config).await? {
                Some(helper) => helper,
                None => Helper::start(&self.config, self.kept.as_ref()).await?,
            },
        };
        Ok(self.helper.insert(helper))
    }

    fn record(&self) -> PathBuf {
        self.config.socket.with_file_name("switched.json")
    }

    async fn open(&mut self) -> Result<(Opened, Source), StageFailure> {
        let Set {
            requests,
            events,
            forward: [four, six],
            namespaces,
            netfilter,
            tuns,
        } = self.helper().await?.take().await?;
        let number = namespaces
            .number()
            .map_err(|error| StageFailure::io(Stage::Proc, &error))?;
        self.kept = Some(namespaces);
        let (netfilter, conntrack) = match netfilter {
            Some([requests, events, connections]) => (Some((requests, events)), Some(connections)),
            None => (None, None),
        };
        let opened = Opened {
            requests,
            events,
            netfilter,
            conntrack,
            switches: Place::Files(
                [(Sysctl::ForwardV4, four), (Sysctl::ForwardV6, six)]
                    .into_iter()
                    .filter_map(|(sysctl, file)| Some((sysctl, file?.into())))
                    .collect(),
            ),
            tuns,
        };
        Ok((opened, Source::Helper(self.config.clone(), number)))
    }
}

/// Sockets into the namespace.
pub(super) struct Session {
    pub(super) kernel: Kernel,
    notifications: Notifications,
    switches: Switches,
    /// What is filtered and translated.
    pub(super) filter: Enforcer,
    /// Absent where the kernel remembers no connections.
    forgetter: Option<Forgetter>,
    /// The filter for which connections were looked at last.
    enforced: Option<Filter>,
    /// The filter was made since.
    remade: Option<Remade>,
    /// Who changed the filter last.
    by: Option<String>,
    /// For TAPs.
    pub(super) tuns: Arc<TunPool>,
    /// As of the last look, and of all notifications since.
    pub(super) observed: Observed,
    /// Links, addresses, routes, rules or switches may have changed since a plan of them was empty.
    doubtful: bool,
    /// The last look was not for nothing: there were news, or everything was looked at.
    heard: bool,
}

/// Why the filter was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Remade {
    /// Another one was wanted, or there was none.
    Meant,
    /// Somebody had taken it away or changed it.
    Gone,
}

impl Session {
    /// Waits for news. Cancel safe.
    pub(super) async fn changed(&mut self) -> Result<(), Broken> {
        // Losing an arm is safe: what it read stays in its buffer.
        tokio::select! {
            told = self.notifications.wait() => Ok(told?),
            told = self.filter.wait() => Ok(told?),
        }
    }

    /// The program, none of ours, that made the last of the changes that were taken in since this was asked, where the
    /// kernel told; by its name, too, if it still runs.
    pub(super) fn changed_by(&mut self) -> Option<String> {
        if let Some(by) = self.by.take() {
            return Some(by);
        }
        // Further sockets of a program have numbers that no process has.
        let port = self
            .notifications
            .take_author()
            .filter(|port| *port <= PROCESSES)?;
        // A program's first netlink socket has its process id as its port (net/netlink/af_netlink.c, netlink_autobind).
        let name = std::fs::read_to_string(format!("/proc/{port}/comm")).ok();
        let name = name.map(|name| format!(" ({})", name.trim_end().escape_debug()));
        Some(format!("process {port}{}", name.unwrap_or_default()))
    }

    /// What was changed of the kernel's switches.
    pub(super) fn switched(&self) -> &Switched {
        self.switches.switched()
    }

    /// Takes the news in; looks at everything where some were lost.
    pub(super) async fn catch_up(&mut self, instance: &Name, spec: &NetworkSpec) -> Result<(), Broken> {
        self.by = self.filter.take().await?.or(self.by.take());
        if self.filter.due().is_some_and(|due| due <= Instant::now()) {
            self.filter.look().await?;
        }
        let drained = self
            .notifications
            .drain(&mut self.observed, &self.kernel.own_ports())?;
        self.doubtful |= drained != Drained::Nothing;
        // Where the filter tells of nothing it is looked at now and then for nothing.
        self.heard = drained != Drained::Nothing || self.filter.due().is_none();
        match drained {
            Drained::Nothing => Ok(()),
            Drained::All => {
                // Another uplink has switches of its own.
                let watched = self.watched(instance, spec);
                if !watched.iter().eq(self.observed.sysctls.keys()) {
                    self.observed.sysctls = self.switches.read(&watched);
                }
                Ok(())
            }
            Drained::AllAndSwitches => {
                self.observed.sysctls = self.switches.read(&self.watched(instance, spec));
                Ok(())
            }
            Drained::Lost => self.look(instance, spec).await,
        }
    }

    /// Looks at everything. News that are older than the look are dropped first; those that
    /// come later are still there for the next turn.
    pub(super) async fn look(&mut self, instance: &Name, spec: &NetworkSpec) -> Result<(), Broken> {
        self.notifications
            .drain(&mut self.observed, &self.kernel.own_ports())?;
        (self.doubtful, self.heard) = (true, true);
        self.observed = self.kernel.observe().await?;
        let observed = &self.observed;
        self.switches.forget_gone(|name| observed.link(name).is_some());
        self.observed.sysctls = self.switches.read(&self.watched(instance, spec));
        Ok(self.filter.look().await?)
    }

    /// By what the filter is enforced, and what of it is not.
    pub(super) fn enforced(&self, wanted: &Wanted) -> Enforced {
        let Some(filter) = &wanted.filter else {
            return Enforced::default();
        };
        let lacks = self.filter.lacks(Some(filter));
        let parts = std::iter::once(self.filter.name()).chain(lacks);
        let refused = self.filter.refused(filter);
        let makes = |forward: &&PortForward| !refused.contains_key(forward);
        Enforced {
            how: Some(parts.collect::<Vec<_>>().join("; ")),
            forwards: filter.forwards.iter().filter(makes).cloned().collect(),
            refused,
        }
    }

    /// Whether the host may have changed in what a wanted state follows since a plan found everything as wanted. Where
    /// only the filter was touched, neither is worked out again.
    pub(super) fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Whether the last look took anything in.
    pub(super) fn heard(&self) -> bool {
        self.heard
    }

    /// Something else is wanted.
    pub(super) fn doubt(&mut self) {
        self.doubtful = true;
    }

    /// What is to be done, the packet filter included. If nothing is, who changed something is not named for the next harm.
    pub(super) fn plan(&mut self, wanted: &Wanted) -> Plan {
        let todo = self.todo(wanted);
        if todo.is_done() {
            self.by = None;
            self.notifications.take_author();
        }
        todo
    }

    fn todo(&mut self, wanted: &Wanted) -> Plan {
        let mut todo = Plan::default();
        if self.doubtful {
            todo = plan(wanted, &self.observed);
            self.doubtful = !todo.is_done();
        }
        let filter = wanted.filter.as_ref();
        if wanted.may_be_unfiltered() && self.filter.is_none() {
            return todo; // said in status
        }
        match self.filter.differs(filter) {
            Ok(false) => {}
            Ok(true) => {
                let tag = wanted.mark.prefix.clone();
                todo.steps.insert(match filter {
                    Some(_) => Step::SetFilter { tag },
                    None => Step::RemoveFilter { tag },
                });
            }
            Err(conflict) => drop(todo.conflicts.insert(conflict)),
        }
        todo
    }

    fn watched(&self, instance: &Name, spec: &NetworkSpec) -> BTreeSet<Sysctl> {
        Wanted::watched(instance, spec, self.switches.switched(), &self.observed)
    }

    /// Makes the steps of a plan; `repairs` what others had changed.
    pub(super) async fn apply(&mut self, plan: &Plan, wanted: &Wanted, repairs: bool) -> Vec<Failure> {
        let means = apply::Means {
            kernel: &mut self.kernel,
            tuns: &self.tuns,
            switches: &mut self.switches,
            enforcer: &mut self.filter,
            filter: wanted.filter.as_ref(),
        };
        let failures = apply::apply(plan, &self.observed, means).await;
        let is_filter = |step: &Step| step.part() == Part::Filter;
        if plan.steps.iter().any(is_filter) && !failures.iter().any(|failure| is_filter(&failure.step)) {
            let why = if repairs { Remade::Gone } else { Remade::Meant };
            self.remade = self.remade.max(Some(why));
        }
        failures
    }

    /// Has the connections forgotten that a filter which was made since the last call leads elsewhere, or that began
    /// without it: a sender of UDP would go on to where it led before, for as long as it sends.
    pub(super) fn forget_connections(&mut self, wanted: &Wanted) {
        let Some(why) = self.remade.take() else {
            return;
        };
        let mut stale = Stale::between(self.enforced.as_ref(), wanted.filter.as_ref());
        if let (Remade::Gone, Some(filter)) = (why, &wanted.filter) {
            let own = self.observed.addresses.iter().map(|address| address.ip);
            stale.gap = Gap::of(filter, own.collect());
        }
        self.enforced.clone_from(&wanted.filter);
        if let Some(forgetter) = &self.forgetter {
            forgetter.forget(stale);
        }
    }

    /// Has the flows of guests forgotten that left by a former way: `ways` are those before and now.
    pub(super) fn forget_former(
        &self,
        wanted: &Wanted,
        ways: (&BTreeMap<Family, Way>, &BTreeMap<Family, Way>),
    ) {
        if let (Some(filter), Some(forgetter)) = (&wanted.filter, &self.forgetter) {
            forgetter.forget(Stale {
                former: Former::of(filter, ways, &self.observed),
                ..Stale::default()
            });
        }
    }

    /// Ends with the namespace as it is, and with what was asked for beside the loop done.
    pub(super) async fn close(self) {
        if let Some(forgetter) = self.forgetter {
            forgetter.finish().await;
        }
    }
}
