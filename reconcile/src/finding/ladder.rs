//! Foreign rules that are asked before ours, or beside netd's.

use sovereign_protocol::condition::Layer;

use super::leftover::LeftoverName;
use super::look::Look;
use super::probe::{Probe, shown};
use super::way::{astray, is_foreign};
use super::{Code, Finding, of_family};
use crate::family::Family;
use crate::route::MAIN;
use crate::rule::{FROM_GUESTS, KERNEL_MAIN, Rule, RuleAction};
use crate::uplink::{Platform, platform};

/// Rules that look everything up in main where nobody but a script does: on a host that netd rules, and before our own.
pub(super) fn lookups_of_main(look: &Look, family: Family) -> impl Iterator<Item = &Rule> {
    let netd = platform(&look.observed, family) == Platform::Netd;
    let limit = match (netd, look.ours.is_scoped(family)) {
        (true, _) => KERNEL_MAIN,
        (false, true) => FROM_GUESTS,
        (false, false) => 0,
    };
    look.rules.iter().filter(move |rule| {
        let everything = rule.to.is_none()
            && rule.from.is_none()
            && rule.iif.is_none()
            && rule.mark.is_none()
            && rule.uids.is_none()
            && !rule.narrower;
        let there = rule.family == family && rule.priority < limit;
        there && everything && is_foreign(rule) && rule.action == RuleAction::Lookup(MAIN)
    })
}

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let mut found = Vec::new();
    for family in look.families() {
        let rules: Vec<&Rule> = lookups_of_main(look, family).collect();
        found.extend((!rules.is_empty()).then(|| lookup_main(look, family, &rules)));
        let decided: Vec<&Probe> = astray(look, family)
            .filter(|probe| {
                let by = probe.decided.as_ref().map(|decided| &decided.rule);
                by.is_some_and(|rule| is_foreign(rule) && !rules.contains(&rule))
                    && look.ours.is_scoped(family)
            })
            .collect();
        found.extend((!decided.is_empty()).then(|| foreign_rule(family, &decided)));
    }
    found
}

fn lookup_main(look: &Look, family: Family, rules: &[&Rule]) -> Finding {
    let by_it = |probe: &&Probe| {
        probe
            .decided
            .as_ref()
            .is_some_and(|decided| rules.contains(&&decided.rule))
    };
    let decided: Vec<&Probe> = look.probes.iter().filter(by_it).collect();
    let stops = astray(look, family).any(|probe| by_it(&probe));
    let texts = rules.iter().map(|rule| format!("ip rule: {}", shown(rule)));
    let what = if stops {
        format!(
            "{family}: a rule that looks everything up in main leads guests' packets another way than the one chosen for them."
        )
    } else {
        format!(
            "{family}: a rule looks everything up in main before all others: with a default route there, every packet of this host leaves its VPN and its network."
        )
    };
    Finding {
        layer: Layer::Routing,
        code: Code::LookupMain,
        family: Some(family),
        subject: of_family(family, "rule"),
        what,
        evidence: texts.chain(decided.iter().map(|probe| probe.text.clone())).collect(),
        check: "ip rule show".to_owned(),
        wrong_if: "no rule without a condition looks up main before ours".to_owned(),
        fix: format!("sovereign doctor --fix={}", LeftoverName::RuleLookupMain),
        leftover: Some(LeftoverName::RuleLookupMain),
        risk: "whatever relied on the rule, such as an old script, goes other ways then; guests need no such rule".to_owned(),
        stops,
    }
}

fn foreign_rule(family: Family, decided: &[&Probe]) -> Finding {
    let rule = decided
        .iter()
        .find_map(|probe| Some(&probe.decided.as_ref()?.rule));
    let priority = rule.map_or(0, |rule| rule.priority);
    Finding {
        layer: Layer::Routing,
        code: Code::ForeignRule,
        family: Some(family),
        subject: of_family(family, &format!("rule {priority}")),
        what: format!(
            "{family}: a rule of another program, {priority}, decides about guests' packets in the place of ours."
        ),
        evidence: decided.iter().map(|probe| probe.text.clone()).collect(),
        check: "ip rule show".to_owned(),
        wrong_if: "no such rule is before ours".to_owned(),
        fix: format!(
            "find out who made rule {priority}, or: ip {}rule delete priority {priority}",
            flag(family)
        ),
        leftover: None,
        risk: "whoever made the rule may need it".to_owned(),
        stops: decided
            .iter()
            .any(|probe| probe.decided.as_ref().is_some_and(|decided| decided.surely)),
    }
}

fn flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "",
        Family::V6 => "-6 ",
    }
}
