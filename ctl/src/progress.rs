//! How far `up` is: pure decisions on status reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sovereign_protocol::condition::{Layer, Status};
use sovereign_protocol::name::Name;
use sovereign_protocol::status::{ConditionStatus, GuestStatus, Phase, StatusReport};

use crate::clock::seconds;
use crate::context::escaped;
use crate::picture::mark;

/// Where `up` stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All wanted guests are ready on what was asked for.
    Ready,
    /// Not yet, and nothing says that it never will be.
    Waiting,
    /// It will not become ready by itself.
    Broken(Broken),
}

/// The first broken layer of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken {
    /// The guest.
    pub(crate) guest: Name,
    /// The layer.
    pub(crate) layer: Layer,
    /// The subject in it.
    pub(crate) subject: String,
    /// `False`, or `Unknown` when nothing was seen to be broken.
    pub(crate) status: Status,
    /// The condition's reason.
    pub(crate) reason: String,
    /// The condition's evidence.
    pub(crate) evidence: String,
}

/// Decides whether `up` can end.
pub(crate) fn decide(report: &StatusReport, wanted: &BTreeSet<Name>, revision: u64) -> Outcome {
    if let Some(broken) =
        guests(report, wanted).find_map(|guest| hopeless(guest).then(|| first_broken_of(guest)))
    {
        return Outcome::Broken(broken);
    }
    let all_there = guests(report, wanted).count() == wanted.len();
    if report.revision >= revision && all_there && guests(report, wanted).all(is_ready) {
        Outcome::Ready
    } else {
        Outcome::Waiting
    }
}

/// True when a guest is ready on its wanted revision and each of its forwards listens or says why not.
pub(crate) fn is_ready(guest: &GuestStatus) -> bool {
    let switched = guest
        .forwards
        .iter()
        .all(|forward| forward.status != Status::Unknown || stays_unknown(guest, &forward.name));
    guest.ready == Status::True && guest.applied_revision == guest.spec_revision && switched
}

/// Whether something keeps anybody from saying more about a forward: waiting would not help.
fn stays_unknown(guest: &GuestStatus, forward: &str) -> bool {
    let is_it = |c: &&ConditionStatus| c.layer == Layer::Forward && c.subject == forward;
    let condition = guest.conditions.iter().find(is_it);
    condition.is_some_and(|condition| condition.reason == "Unconfirmed")
}

/// The lowest layer that keeps a wanted guest from being ready, in the first such guest that does not only wait for
/// another one.
pub(crate) fn first_broken(report: &StatusReport, wanted: &BTreeSet<Name>) -> Option<Broken> {
    let all: Vec<Broken> = wanted.iter().filter_map(|name| broken_in(report, name)).collect();
    let own = all.iter().position(|broken| broken.reason != "WaitsFor");
    all.into_iter().nth(own.unwrap_or(0))
}

fn broken_in(report: &StatusReport, name: &Name) -> Option<Broken> {
    let Some(guest) = report.guests.iter().find(|guest| guest.name == *name) else {
        let evidence = "the host agent does not report it";
        return Some(broken(
            name,
            Layer::Vmm,
            "",
            Status::Unknown,
            "NotReported",
            evidence,
        ));
    };
    (!is_ready(guest)).then(|| first_broken_of(guest))
}

fn guests<'r>(report: &'r StatusReport, wanted: &'r BTreeSet<Name>) -> impl Iterator<Item = &'r GuestStatus> {
    report.guests.iter().filter(|guest| wanted.contains(&guest.name))
}

/// The agents have given up on it: no more tries by themselves.
fn hopeless(guest: &GuestStatus) -> bool {
    let stopped_service = guest
        .conditions
        .iter()
        .any(|c| !c.layer.advisory_for(&c.subject) && c.status == Status::False && c.reason == "CrashLoop");
    guest.phase == Phase::CrashLoop || stopped_service
}

fn first_broken_of(guest: &GuestStatus) -> Broken {
    let counts = |status: Status| {
        let conditions = guest
            .conditions
            .iter()
            .filter(move |c| !c.layer.advisory_for(&c.subject) && c.status == status);
        conditions.min_by_key(|c| c.layer)
    };
    if let Some(c) = counts(Status::False).or_else(|| counts(Status::Unknown)) {
        return broken(&guest.name, c.layer, &c.subject, c.status, &c.reason, &c.evidence);
    }
    let (layer, status, evidence) = match guest.phase {
        Phase::Stopped | Phase::Stopping => (Layer::Vmm, Status::False, "no VMM runs".to_owned()),
        Phase::Failed | Phase::CrashLoop => (Layer::Vmm, Status::False, "the VMM ended".to_owned()),
        Phase::Starting => (
            Layer::Session,
            Status::Unknown,
            "the guest agent has not answered yet".to_owned(),
        ),
        Phase::Running => {
            let text = format!(
                "revision {} is wanted, {} is applied",
                guest.spec_revision, guest.applied_revision
            );
            (Layer::Session, Status::Unknown, text)
        }
    };
    broken(
        &guest.name,
        layer,
        "",
        status,
        &format!("{:?}", guest.phase),
        &evidence,
    )
}

fn broken(guest: &Name, layer: Layer, subject: &str, status: Status, reason: &str, evidence: &str) -> Broken {
    Broken {
        guest: guest.clone(),
        layer,
        subject: subject.to_owned(),
        status,
        reason: reason.to_owned(),
        evidence: evidence.to_owned(),
    }
}

/// Remembers what was told, so that each change is told once.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    told: Option<Told>,
}

/// The status and reason last told, by guest, layer and subject.
type Told = BTreeMap<(Name, Layer, String), (Status, String)>;

impl Progress {
    /// Lines for what is new in a report. What holds already in the first one is no news.
    pub(crate) fn lines(
        &mut self,
        report: &StatusReport,
        wanted: &BTreeSet<Name>,
        elapsed: Duration,
    ) -> Vec<String> {
        let first = self.told.is_none();
        let told = self.told.get_or_insert_default();
        let mut lines = Vec::new();
        for guest in guests(report, wanted) {
            for c in &guest.conditions {
                let key = (guest.name.clone(), c.layer, c.subject.clone());
                let news = (c.status, c.reason.clone());
                let unseen = !told.contains_key(&key);
                if told.get(&key) == Some(&news) {
                    continue;
                }
                told.insert(key, news);
                let silent = if unseen {
                    c.status == Status::Unknown || (first && c.status == Status::True)
                } else {
                    false
                };
                if !silent {
                    let text =
                        escaped(&format!("{} {}: {}", c.subject, c.reason, c.evidence)).replace('\n', " ");
                    lines.push(format!(
                        "{:>8}  {}  {} {:<9} {text}",
                        seconds(elapsed),
                        guest.name,
                        mark(c.status),
                        c.layer
                    ));
                }
            }
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::picture::examples::{condition, guest, report};

    fn wanted() -> BTreeSet<Name> {
        BTreeSet::from([Name::parse("sql").unwrap()])
    }

    fn one(change: impl FnOnce(&mut GuestStatus)) -> StatusReport {
        let mut guest = guest();
        change(&mut guest);
        report(vec![guest])
    }

    #[test]
    fn a_forward_that_is_not_made_is_waited_for_only_while_something_may_come_of_it() {
        let with = |status: Status, reason: &str| {
            one(|guest| {
                guest.forwards[0].status = status;
                let mut said = condition(Layer::Forward, status, reason);
                said.subject.clone_from(&guest.forwards[0].name);
                guest.conditions.push(said);
            })
        };
        for (status, reason, outcome) in [
            (Status::Unknown, "Translating", Outcome::Waiting),
            (Status::Unknown, "Reserved", Outcome::Waiting),
            (Status::Unknown, "Unconfirmed", Outcome::Ready),
            (Status::False, "NotTranslated", Outcome::Ready),
            (Status::False, "PortUnavailable", Outcome::Ready),
        ] {
            assert_eq!(decide(&with(status, reason), &wanted(), 3), outcome, "{reason}");
        }
    }

    #[test]
    fn ready_means_ready_on_the_wanted_revision() {
        assert_eq!(decide(&one(|_| {}), &wanted(), 3), Outcome::Ready);
        for not_yet in [
            one(|g| g.ready = Status::Unknown),
            one(|g| g.ready = Status::False),
            one(|g| g.applied_revision = 1),
            report(vec![]),
        ] {
            assert_eq!(decide(&not_yet, &wanted(), 3), Outcome::Waiting, "{not_yet:?}");
        }
        assert_eq!(
            decide(&one(|_| {}), &wanted(), 4),
            Outcome::Waiting,
            "a report from before the apply"
        );
    }

    #[test]
    fn a_crash_loop_ends_the_wait() {
        let vmm = one(|g| {
            g.phase = Phase::CrashLoop;
            g.ready = Status::False;
            g.conditions = vec![];
        });
        let Outcome::Broken(broken) = decide(&vmm, &wanted(), 3) else {
            panic!()
        };
        assert_eq!((broken.layer, broken.reason.as_str()), (Layer::Vmm, "CrashLoop"));
        let service = one(|g| g.conditions = vec![condition(Layer::Service, Status::False, "CrashLoop")]);
        assert!(matches!(
            decide(&service, &wanted(), 3),
            Outcome::Broken(Broken {
                layer: Layer::Service,
                ..
            })
        ));
        let advisory = one(|g| g.conditions = vec![condition(Layer::Tailscale, Status::False, "CrashLoop")]);
        assert_eq!(decide(&advisory, &wanted(), 3), Outcome::Ready);
        let foreign = one(|g| {
            g.name = Name::parse("other").unwrap();
            g.phase = Phase::CrashLoop;
        });
        assert_eq!(
            decide(&foreign, &wanted(), 3),
            Outcome::Waiting,
            "a guest that was not asked for"
        );
    }

    #[test]
    fn the_first_broken_layer_is_the_lowest_false_one() {
        let layers = |conditions: Vec<_>| {
            let report = one(|g| {
                g.ready = Status::False;
                g.conditions = conditions;
            });
            first_broken(&report, &wanted()).unwrap()
        };
        let found = layers(vec![
            condition(Layer::Service, Status::False, "Refused"),
            condition(Layer::Disk, Status::False, "Full"),
            condition(Layer::Clock, Status::False, "Off"),
            condition(Layer::Kernel, Status::Unknown, "Stale"),
            condition(Layer::Vmm, Status::True, "Running"),
        ]);
        assert_eq!(
            (found.layer, found.status),
            (Layer::Disk, Status::False),
            "clock is advisory, kernel was not seen broken"
        );
        let found = layers(vec![
            condition(Layer::Session, Status::Unknown, "Silent"),
            condition(Layer::Service, Status::Unknown, "Stale"),
        ]);
        assert_eq!(found.layer, Layer::Session);
        assert_eq!(
            first_broken(&report(vec![]), &wanted()).unwrap().reason,
            "NotReported"
        );
        assert_eq!(first_broken(&one(|_| {}), &wanted()), None);
        // Who waits for another guest is not the one to look at.
        let unready = |name: &str, reason: &str| {
            let mut guest = guest();
            (guest.name, guest.ready) = (Name::parse(name).unwrap(), Status::False);
            guest.conditions = vec![condition(Layer::Service, Status::False, reason)];
            guest
        };
        let both = report(vec![unready("a", "WaitsFor"), unready("b", "Recovering")]);
        let names = ["a", "b"].map(|name| Name::parse(name).unwrap());
        let found = first_broken(&both, &names.clone().into()).unwrap();
        assert_eq!((found.guest.as_str(), found.reason.as_str()), ("b", "Recovering"));
        assert_eq!(
            first_broken(&both, &names[..1].iter().cloned().collect())
                .unwrap()
                .reason,
            "WaitsFor"
        );
    }

    #[test]
    fn each_change_is_told_once_and_what_held_before_is_no_news() {
        let mut progress = Progress::default();
        let at = Duration::from_millis(2_140);
        let mut now = one(|g| {
            g.conditions = vec![
                condition(Layer::Vmm, Status::True, "Running"),
                condition(Layer::Service, Status::Unknown, "Starting"),
            ];
        });
        assert!(progress.lines(&now, &wanted(), at).is_empty());
        now.guests[0].conditions[1] = condition(Layer::Service, Status::True, "Ready");
        assert_eq!(
            progress.lines(&now, &wanted(), at),
            ["   2.1 s  sql  ✓ service   it Ready: seen"]
        );
        assert!(progress.lines(&now, &wanted(), at).is_empty());
        now.guests[0]
            .conditions
            .push(condition(Layer::Disk, Status::True, "Mounted"));
        assert_eq!(progress.lines(&now, &wanted(), at).len(), 1);
    }
}
