//! One plan carried out, and what is to be said of what did not come of it.

use std::collections::{BTreeMap, BTreeSet};

use sovereign_protocol::name::Name;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::names::LinkName;
use sovereign_reconcile::route::WantedRoute;
use sovereign_reconcile::rule::Rule;
use sovereign_reconcile::uplink::Exit;

use super::apply::{Failure, StepError};
use super::chain;
use super::families;
use super::plan::{Part, Plan};
use super::session::{Broken, Session};
use super::wake::Wake;
use super::wanted::{NetworkSpec, Wanted};
use crate::netns::StageFailure;

/// Plans that one turn carries out, at most.
pub(super) const ROUNDS: u32 = 4;
/// Failures that evidence names beside the first.
const NAMED_FAILURES: usize = 3;

/// How a turn ended.
#[derive(Default)]
pub(super) struct Turn {
    /// What is not as wanted.
    pub(super) left: Plan,
    /// Why, of what was tried.
    pub(super) failures: Vec<Failure>,
    /// The rest is not tried yet.
    pub(super) waits: bool,
}

/// What of a network follows the host: ways out, our own table and what leads there, and by which links answers go back.
pub(super) type Followed = (
    BTreeMap<Family, Exit>,
    BTreeSet<WantedRoute>,
    BTreeSet<Rule>,
    BTreeMap<LinkName, u32>,
);

/// That of a wanted state.
pub(super) fn followed(wanted: &Wanted) -> Followed {
    let answers = wanted.filter.as_ref().map(|filter| filter.answers.clone());
    (
        wanted.exits.clone(),
        wanted.routes.clone(),
        wanted.rules.clone(),
        answers.unwrap_or_default(),
    )
}

/// Why a part of the network is not as wanted.
pub(super) struct Trouble {
    pub(super) part: Part,
    pub(super) step: String,
    pub(super) evidence: String,
}

impl From<StageFailure> for Trouble {
    fn from(failure: StageFailure) -> Self {
        Self {
            part: Part::Links,
            step: failure.stage.to_string(),
            evidence: failure.evidence,
        }
    }
}

impl From<Broken> for Trouble {
    fn from(broken: Broken) -> Self {
        Self {
            part: Part::Links,
            step: "speak to the kernel".to_owned(),
            evidence: chain(&broken),
        }
    }
}

/// What came of a plan.
pub(super) struct Work {
    /// The steps that were made.
    pub(super) made: Vec<String>,
    /// What is still to do, by a look afterwards.
    pub(super) left: Plan,
    /// Why the last steps failed, if some did.
    pub(super) failures: Vec<Failure>,
}

/// Carries out a plan and looks at the result. A step may fail only because the plan was made
/// of a state that was just passing (a link tells that it is down before it tells that it is
/// gone): as long as looking again brings another plan, that one is tried at once.
///
/// After news the kernel's own news of the change are the look, unless they are not as planned.
pub(super) async fn work(
    session: &mut Session,
    instance: &Name,
    spec: &NetworkSpec,
    wanted: &mut Wanted,
    mut todo: Plan,
    (wake, by_others, by): (Wake, bool, Option<&str>),
) -> Result<Work, Broken> {
    let mut made = Vec::new();
    for round in 1.. {
        let failures = session.apply(&todo, wanted, by_others).await;
        if round == 1 {
            // Not before: a repair waits for no log.
            let steps = todo.to_string().trim_end().replace('\n', "; ");
            tracing::info!(%wake, by_others, by, steps, "changed the network");
        }
        let mut left = todo.clone();
        if wake.is_news() && failures.is_empty() {
            session.catch_up(instance, spec).await?;
            if session.is_doubtful() {
                wanted.follow(spec, session.switched(), &session.observed);
            }
            left = session.plan(wanted);
        }
        if !left.is_done() {
            session.look(instance, spec).await?;
            wanted.follow(spec, session.switched(), &session.observed);
            left = session.plan(wanted);
        }
        let failed = |step: &&super::plan::Step| failures.iter().any(|failure| failure.step == **step);
        let steps = todo.steps.iter().filter(|step| !failed(step));
        made.extend(steps.map(ToString::to_string));
        if failures.is_empty() || left.steps.is_empty() || left == todo || round == ROUNDS {
            return Ok(Work { made, left, failures });
        }
        todo = left;
    }
    unreachable!("the rounds end")
}

/// What is wrong with each part that is not as wanted.
pub(super) fn troubles(left: &Plan, failures: &[Failure]) -> Vec<Trouble> {
    let of = |part| {
        let left = left.of(part);
        let failures: Vec<&Failure> = failures.iter().filter(|f| f.step.part() == part).collect();
        (!left.is_done()).then(|| trouble(part, &left, &failures))
    };
    Part::ALL.into_iter().filter_map(of).collect()
}

/// The first thing that is in the way, with its reason, and the others by name.
fn trouble(part: Part, left: &Plan, failures: &[&Failure]) -> Trouble {
    let is_root = |failure: &&&Failure| !matches!(failure.error, StepError::NoLink(_));
    let roots: Vec<&&Failure> = failures.iter().filter(is_root).collect();
    if let Some(first) = roots.first() {
        let others = roots[1..].iter().take(NAMED_FAILURES);
        let others: String = others
            .map(|f| format!("; {}: {}", f.step, families::cause(f)))
            .collect();
        let more = roots.len().saturating_sub(1 + NAMED_FAILURES);
        let more = if more > 0 {
            format!("; and {more} more")
        } else {
            String::new()
        };
        return Trouble {
            part,
            step: first.step.to_string(),
            evidence: format!("{}{others}{more}", families::cause(first)),
        };
    }
    match (left.conflicts.first(), left.steps.first()) {
        (Some(conflict), _) => Trouble {
            part,
            step: conflict.on.clone(),
            evidence: conflict.evidence.clone(),
        },
        (None, step) => Trouble {
            part,
            step: step.map(ToString::to_string).unwrap_or_default(),
            evidence: "it was made, and was gone again when we looked".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernel::KernelError;
    use super::super::names::LinkName;
    use super::super::plan::{Conflict, Step};
    use super::*;

    fn link(name: &str) -> LinkName {
        LinkName::parse(name).unwrap()
    }

    fn failure(name: &str, error: StepError) -> Failure {
        Failure {
            step: Step::SetUp { name: link(name) },
            error,
        }
    }

    fn refused() -> StepError {
        StepError::Kernel(KernelError::Refused(std::io::Error::from_raw_os_error(1)))
    }

    /// What is said of links that are not as wanted.
    fn said(conflicts: &[Conflict], failures: &[Failure]) -> Trouble {
        let mut left = Plan::default();
        left.steps.insert(Step::SetUp { name: link("a") });
        left.conflicts.extend(conflicts.iter().cloned());
        let mut troubles = troubles(&left, failures);
        assert_eq!(troubles.len(), 1);
        troubles.remove(0)
    }

    #[test]
    fn the_first_cause_is_named_and_its_consequences_are_not() {
        let failures = [
            failure("a", StepError::NoLink(link("a"))),
            failure("b", refused()),
            failure("c", refused()),
        ];
        let trouble = said(&[], &failures);
        assert_eq!(trouble.step, "link b: set up");
        assert_eq!(
            trouble.evidence,
            "the kernel refused: Operation not permitted (os error 1); \
             link c: set up: the kernel refused: Operation not permitted (os error 1)"
        );
        let many: Vec<Failure> = (0..9).map(|n| failure(&format!("l{n}"), refused())).collect();
        assert!(said(&[], &many).evidence.ends_with("; and 5 more"));
    }

    #[test]
    fn without_a_failure_the_conflict_or_what_is_left_is_named() {
        assert_eq!(said(&[], &[]).step, "link a: set up");
        let conflict = Conflict {
            part: Part::Links,
            on: "link b".to_owned(),
            evidence: "not ours".to_owned(),
        };
        assert_eq!(said(&[conflict], &[]).step, "link b");
    }

    #[test]
    fn each_part_has_its_own_trouble() {
        let mut left = Plan::default();
        left.steps.insert(Step::SetFilter { tag: "t".to_owned() });
        left.conflicts.insert(Conflict {
            part: Part::Links,
            on: "link b".to_owned(),
            evidence: "not ours".to_owned(),
        });
        let parts: Vec<Part> = troubles(&left, &[]).iter().map(|trouble| trouble.part).collect();
        assert_eq!(parts, [Part::Links, Part::Filter]);
    }
}
