//! What a host agent leaves running when it is killed: a guest's run directory lives as long as its shim.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;

use sovereign_protocol::layout::{Layout, SHIM_SOCKET};
use sovereign_protocol::name::Name;

/// True when the guest's shim answers, with a host agent or without.
pub(crate) fn runs(layout: &Layout, name: &Name) -> bool {
    UnixStream::connect(layout.guest_run(name).join(SHIM_SOCKET)).is_ok()
}

/// The guests whose shim answers.
pub(crate) fn running(layout: &Layout) -> BTreeSet<Name> {
    let entries = std::fs::read_dir(&layout.run).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Name::parse(entry.file_name().to_str()?).ok())
        .filter(|name| runs(layout, name))
        .collect()
}
