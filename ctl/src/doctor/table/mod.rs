//! What each reason code means: in one sentence, with a counter-test and the next command.
//!
//! Pure data. A code that is not here is still told, by its layer's own entry ([`ANY`]); a test sees to it that every
//! code which the agents' sources can emit is here.

use sovereign_protocol::condition::Layer;
use sovereign_protocol::layers::Level;

mod guest;
mod host;
mod network;
mod service;

/// The code of the entry that speaks for all others of its level.
pub(crate) const ANY: &str = "*";

/// How a code is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Something is broken, also where the status is only Unknown.
    Fault,
    /// It goes on by itself: broken while it is False, no news while it is Unknown.
    Passing,
    /// It only says that something else is not well, and never explains anything.
    Consequence,
}

/// A check that changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Check {
    /// The command.
    pub(crate) run: &'static str,
    /// What it shows if the diagnosis is wrong.
    pub(crate) wrong_if: &'static str,
}

/// The next command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fix {
    /// The command.
    pub(crate) run: &'static str,
    /// It loses nothing and may be run twice.
    pub(crate) automatic: bool,
    /// What it may cost.
    pub(crate) risk: &'static str,
}

/// One code of one level. The texts may hold the placeholders of [`super::words`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) level: Level,
    pub(crate) code: &'static str,
    pub(crate) kind: Kind,
    /// One sentence.
    pub(crate) what: &'static str,
    pub(crate) check: Check,
    pub(crate) fix: Fix,
}

/// All entries, lowest level first.
pub(crate) fn entries() -> impl Iterator<Item = &'static Entry> {
    [host::ENTRIES, network::ENTRIES, guest::ENTRIES, service::ENTRIES]
        .into_iter()
        .flatten()
}

/// The entry of exactly this code.
pub(crate) fn find(level: Level, code: &str) -> Option<&'static Entry> {
    entries().find(|entry| entry.level == level && entry.code == code)
}

/// The entry of a code, or its level's for all others.
pub(crate) fn of(level: Level, code: &str) -> &'static Entry {
    let own = find(level, code).or_else(|| find(level, ANY));
    own.expect("every level has an entry for all codes; a test looks")
}

const fn check(run: &'static str, wrong_if: &'static str) -> Check {
    Check { run, wrong_if }
}

const fn entry(
    layer: Layer,
    code: &'static str,
    kind: Kind,
    what: &'static str,
    check: Check,
    fix: Fix,
) -> Entry {
    Entry {
        level: Level::Layer(layer),
        code,
        kind,
        what,
        check,
        fix,
    }
}

/// For what comes right by itself: `up` waits for it, or says what stands in the way.
const WAIT: Fix = Fix {
    run: "{sovereign} up",
    automatic: true,
    risk: "none: it waits until the guest is ready, and applies the configuration as it is now",
};

/// Everything from the boot on.
const RESTART: Fix = Fix {
    run: "{sovereign} down && {sovereign} up",
    automatic: false,
    risk: "all guests of the instance stop in order and boot again",
};

/// Where the guest's own words are.
const LOGS: Fix = Fix {
    run: "{sovereign} logs {guest}",
    automatic: true,
    risk: "none: it prints the console, which names the cause",
};

const STATUS: Check = check("{sovereign} status", "the condition is ✓");

#[cfg(test)]
#[path = "../table_tests.rs"]
mod tests;
