//! Whether the kernel would send guests' packets as meant.

use sovereign_protocol::condition::Layer;

use super::look::Look;
use super::probe::{Probe, Refused, Reply, Way};
use super::reverse_path::is_refused;
use super::{Code, Finding, of_family};
use crate::family::Family;
use crate::route::OURS;
use crate::rule::Rule;
use crate::uplink::{Exit, working};

/// Whether a rule is not ours; that of priority 0 (`lookup local`) is everybody's.
pub(super) fn is_foreign(rule: &Rule) -> bool {
    rule.protocol != OURS && rule.priority > 0
}

/// The probes of a family whose answer is not as meant: out and in by the link of the way out, and from this host. While
/// our own routes and rules are not as wanted nothing is said: that is told elsewhere.
pub(super) fn astray(look: &Look, family: Family) -> impl Iterator<Item = &Probe> {
    let bridge = look.ours.bridge().map_or("", |bridge| bridge.as_str());
    let exit = look.ours.wanted.exits.get(&family);
    let by_exit = move |link: Option<&str>| exit.and_then(Exit::link).map(|exit| exit.as_str()) == link;
    let as_meant = move |probe: &Probe| match probe.question.way {
        Way::Out => match (exit, probe.link()) {
            // Whoever rules main means guests as well: any link that works will do.
            (Some(Exit::Main(_)), Some(link)) => look
                .observed
                .link(link)
                .is_some_and(|link| working(&look.observed, link.index).is_some()),
            (_, link) => link.is_some() && by_exit(link),
        },
        Way::In if !by_exit(probe.question.iif.as_deref()) => true, // good to know, and no way that guests need
        Way::In | Way::Host => probe.link() == Some(bridge),
    };
    let probes = look
        .probes
        .iter()
        .filter(move |probe| probe.question.family == family);
    probes.filter(move |probe| !look.unsettled.contains(&family) && !as_meant(probe))
}

/// What nothing else explains.
pub(super) fn findings(look: &Look, others: &[Finding]) -> Vec<Finding> {
    let explained = |family: Family| {
        let explains = [Code::AddressConflict, Code::RouteConflict, Code::ForeignRule];
        let about = |finding: &&Finding| finding.family.is_none_or(|of| of == family);
        let mut others = others.iter().filter(about);
        others.any(|finding| {
            explains.contains(&finding.code) || (finding.code == Code::LookupMain && finding.stops)
        })
    };
    let of = |family: Family| {
        let astray = astray(look, family).filter(|probe| !is_refused(look, probe));
        let astray: Vec<&Probe> = astray.collect();
        (!astray.is_empty() && !explained(family)).then(|| finding(family, &astray))
    };
    look.families().filter_map(of).collect()
}

fn finding(family: Family, astray: &[&Probe]) -> Finding {
    let first = astray[0];
    let (what, fix) = match (first.question.way, &first.reply) {
        (_, Reply::Refused(Refused::NotForwarded)) => (
            "this host does not forward guests' packets".to_owned(),
            "sovereign status".to_owned(),
        ),
        (Way::Out, _) => (
            "the kernel would not send guests' packets by the way out that was chosen".to_owned(),
            "ip rule show; ip route show table all default".to_owned(),
        ),
        (Way::In | Way::Host, _) => (
            "the kernel would not send packets for guests to their bridge".to_owned(),
            "ip rule show; ip route show table all".to_owned(),
        ),
    };
    Finding {
        layer: Layer::Routing,
        code: Code::WrongWay,
        family: Some(family),
        subject: of_family(family, "way"),
        what: format!("{family}: {what}."),
        evidence: astray.iter().map(|probe| probe.text.clone()).collect(),
        check: command(first),
        wrong_if: "it names the link that is meant".to_owned(),
        fix,
        leftover: None,
        risk: "none: it shows who decides".to_owned(),
        stops: true,
    }
}

/// The question as a command.
pub(super) fn command(probe: &Probe) -> String {
    probe
        .text
        .split_once(": ")
        .map_or_else(String::new, |(command, _)| command.to_owned())
}
