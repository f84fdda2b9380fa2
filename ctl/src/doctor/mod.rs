//! What is broken, how that is known, how it could be wrong, what to do: from facts to findings.
//!
//! Pure: [`Facts`] were gathered by the verb, [`diagnose()`] decides, [`mod@report`] and [`picture()`] show. Nothing here looks
//! at a clock, a socket or a file.

mod diagnose;
mod evidence;
mod facts;
mod network;
mod observed;
mod picture;
mod report;
mod table;
mod words;

pub(crate) use diagnose::diagnose;
pub(crate) use facts::{Agent, Configuration, Facts, Failure};
pub(crate) use observed::contradicts;
pub(crate) use picture::picture;
pub(crate) use report::Diagnosis;

#[cfg(test)]
mod examples;
#[cfg(test)]
mod host_tests;
#[cfg(test)]
mod network_tests;
