//! What the world is told, and what it wants done.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::condition::Verdict;
use sovereign_protocol::event::Events;
use sovereign_protocol::feed::Changes;
use sovereign_protocol::name::Name;
use sovereign_protocol::spec::{GuestConfig, HostSpec, Namespace};
use sovereign_protocol::status::VmmStatus;
use sovereign_reconcile::resolver::HostResolver;
use sovereign_reconcile::view::NetworkMode;

use crate::net::NetworkEvent;
use crate::shim::contract::{ExitRecord, Machine, VmmState};

/// Which document a guest was given. The revision is that of the configuration alone; what the host agent puts in of
/// its own judgement (whether a requirement can be used) changes without one.
///
/// It is the host agent's own and never leaves it: a guest that took over the document of an older edition has the
/// same revision, and is not ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Edition {
    /// The revision of the wanted state that changed it last.
    pub revision: u64,
    /// How often what was judged of others changed in it, since this host agent began.
    pub judged: u64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// ctl replaced the wanted state; the document was validated and kept.
    Applied(HostSpec),
    /// The guest boots without the card that it should have; the text says why.
    NoCard(Name, String),
    /// A shim runs with this boot.
    Booted {
        /// The guest.
        guest: Name,
        /// The boot.
        boot_id: String,
        /// Its VMM.
        vmm: VmmStatus,
        /// What it was started with.
        machine: Machine,
    },
    /// What the VMM does.
    VmmState(Name, VmmState),
    /// The guest agent answered the hello.
    SessionUp(Name, String),
    /// The link to the guest agent is gone; the text says why.
    SessionLost(Name, String),
    /// A fresh connection was taken and not answered.
    SessionSilent(Name, String),
    /// The guest agent took over this document.
    SpecApplied(Name, Edition),
    /// The guest agent refused the spec.
    SpecRefused(Name, String),
    /// What changed in the guest.
    Conditions(Name, Changes),
    /// What happened in the guest, by its own journal.
    Happened(Name, Events),
    /// The guest's clock was measured.
    Clock(Name, Verdict),
    /// A forward listens or does not.
    Forward(Name, String, Verdict),
    /// Programs that wait on ports which the kernel leads to guests, by guest and forward: all that there are now.
    SharedPorts(BTreeMap<(Name, Name), String>),
    /// The guest's shim has ended.
    Ended(Name, ExitRecord),
    /// Shims run for these guests: they are adopted at once, whatever the network does.
    Running(BTreeSet<Name>),
    /// A shim runs for a guest that nobody wants: what another agent left behind.
    Found(Name, GuestConfig),
    /// It is known whether there is a network.
    NetworkMode(NetworkMode),
    /// The network told something.
    Network(NetworkEvent),
    /// This host asks other name servers, or can be seen to ask none.
    Resolver(HostResolver),
    /// The agent began; the text says which.
    Started(String),
    /// Time has passed.
    Tick,
    /// ctl wants everything stopped.
    StopAll,
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Start or adopt a guest's shim and talk to it; its document is made after the step.
    Start(Name, GuestConfig),
    /// Give a running guest its new document, made after the step.
    Push(Name, GuestConfig),
    /// Stop a guest in order.
    Stop(Name),
    /// End a guest's VMM at once.
    Kill(Name),
    /// Find out whether there can be a network of this kind.
    DecideNetwork(Namespace),
    /// Make the network.
    OpenNetwork,
    /// Let a guest's forwards listen, or not.
    Forwards(Name, bool),
}
