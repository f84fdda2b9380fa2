//! The texts of the table with this instance's names in them.

use sovereign_protocol::name::Name;

use super::facts::{Configuration, Facts};
use super::observed::Observation;

/// Fills in `{sovereign}`, `{instance}`, `{guest}`, `{subject}`, `{code}`, `{pid}`, `{disk}`, `{state}`, `{port}`,
/// `{config}` and `{next}`.
pub(super) fn fill(text: &str, facts: &Facts, guest: Option<&Name>, about: &Observation) -> String {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        filled += before;
        match after.split_once('}') {
            Some((name, tail)) if known(name) => {
                filled += &word(name, facts, guest, about);
                rest = tail;
            }
            _ => {
                filled.push('{'); // a brace of its own, such as a shell's
                rest = after;
            }
        }
    }
    filled + rest
}

const NAMES: [&str; 11] = [
    "sovereign",
    "instance",
    "guest",
    "subject",
    "code",
    "pid",
    "disk",
    "state",
    "port",
    "config",
    "next",
];

pub(super) fn known(name: &str) -> bool {
    NAMES.contains(&name)
}

fn word(name: &str, facts: &Facts, guest: Option<&Name>, about: &Observation) -> String {
    let layout = &facts.layout;
    match name {
        "sovereign" => facts.sovereign.clone(),
        "instance" => layout.instance.to_string(),
        "guest" => guest.map_or_else(|| "NAME".to_owned(), ToString::to_string),
        "subject" => about.subject.clone(),
        "code" => about.reason.clone(),
        "pid" => pid(facts, guest).map_or_else(|| "PID".to_owned(), |pid| pid.to_string()),
        "disk" => guest.map_or_else(String::new, |guest| layout.data_disk(guest).display().to_string()),
        "state" => layout.state.display().to_string(),
        "port" => port(facts, guest, &about.subject),
        "config" => config(facts),
        _ => next(facts),
    }
}

/// The VMM of a guest, or the host agent.
fn pid(facts: &Facts, guest: Option<&Name>) -> Option<u32> {
    let Some(guest) = guest else {
        return facts
            .inspection
            .as_ref()
            .ok()?
            .agent
            .holder
            .map(|holder| holder.pid);
    };
    let reported = facts.reported(guest).and_then(|status| status.vmm.as_ref());
    let seen = || facts.seen(guest).and_then(|seen| seen.vmm.as_ref());
    reported.or_else(seen).map(|vmm| vmm.pid)
}

fn port(facts: &Facts, guest: Option<&Name>, forward: &str) -> String {
    let forward = forward.strip_suffix(".port").unwrap_or(forward); // what is true of its port beside it
    let forwards = guest.and_then(|guest| Some(&facts.reported(guest)?.forwards));
    let found = forwards.and_then(|all| all.iter().find(|status| status.name == forward));
    let port = found.and_then(|status| status.listen.rsplit_once(':'));
    port.map_or_else(|| "PORT".to_owned(), |(_, port)| port.to_owned())
}

fn config(facts: &Facts) -> String {
    let path = match &facts.configuration {
        Configuration::Valid { path, .. } => Some(path),
        Configuration::Unusable { path, .. } => path.as_ref(),
    };
    path.map_or_else(
        || crate::config::FILE.to_owned(),
        |path| path.display().to_string(),
    )
}

fn next(facts: &Facts) -> String {
    match &facts.configuration {
        Configuration::Unusable { next, .. } => next.clone(),
        Configuration::Valid { .. } => format!("{} up", facts.sovereign),
    }
}
