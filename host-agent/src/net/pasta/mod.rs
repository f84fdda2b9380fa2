//! A way out of a private namespace, by `pasta` (package passt): it has a TAP inside, and opens sockets of its own outside.
//!
//! It runs beside the host agent as the netns helper does, and outlives it. No port of it is open outside, and nothing of
//! the machine's loopback is shown inside but its name server, and that only where no other is known. Its addresses are
//! ours, so that nothing depends on those of the machine.

mod arguments;
mod keeper;
mod launch;
mod record;

pub(super) use keeper::{Attachment, Pasta, PastaFailure, Started};
pub use launch::{VERB, launch};
