//! libFuzzer's entry: the target that FUZZ_TARGET names.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use sovereign_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|target| target.name == name);
    found.unwrap_or_else(|| {
        panic!(
            "FUZZ_TARGET={name:?} is none of {:?}",
            TARGETS.map(|target| target.name)
        )
    })
});

fuzz_target!(|data: &[u8]| (TARGET.run)(data));
