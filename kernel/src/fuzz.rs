//! Parsers of this crate as plain functions for the fuzz workspace.

use std::sync::Arc;

use crate::{ModuleSet, module_info::ModuleInfo, xz};

/// A module file: what it says of itself, and a catalogue of it alone.
pub fn module(data: &[u8]) {
    let _ = xz::needs(data);
    if let Ok(info) = ModuleInfo::read(data) {
        let _ = info.soft_before();
    }
    for path in ["lib/modules/6/kernel/a.ko", "lib/modules/6/kernel/b.ko.xz"] {
        let set = ModuleSet::new([(path.to_owned(), Arc::from(data))]);
        let _ = set.catalogue();
    }
}
