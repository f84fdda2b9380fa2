//! Strict `rp_filter` on a link by which answers of guests would not leave.
//!
//! For the way back the kernel asks as if the packet came from the bridge (`oif` of the packet is `iif` of that lookup,
//! net/ipv4/fib_frontend.c), so rules of ours count, and the link of the way out is never refused in steady state. What is
//! refused are connections to forwarded ports that come by another link.

use sovereign_protocol::condition::Layer;

use super::look::Look;
use super::probe::{Probe, Refused, Reply, Way};
use super::way::command;
use super::{Code, Finding, of_family};
use crate::family::Family;

/// Strict by either switch: the larger one counts (Documentation/networking/ip-sysctl.rst).
const STRICT: i64 = 1;

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let refused = look.probes.iter().filter(|probe| is_refused(look, probe));
    let harms = |probe: &&Probe| is_by_exit(look, probe) || has_forwards(look, probe.question.family);
    refused.filter(harms).map(|probe| finding(look, probe)).collect()
}

/// Whether a packet to a guest is dropped because an answer would leave by another link.
pub(super) fn is_refused(look: &Look, probe: &Probe) -> bool {
    let link = probe.question.iif.as_deref().unwrap_or_default();
    let switch = |name: &str| look.switches.reverse_path.get(name).copied().unwrap_or_default();
    let is_strict = probe.question.family == Family::V4 && switch("all").max(switch(link)) == STRICT;
    let dropped = matches!(probe.reply, Reply::Refused(Refused::WrongLink | Refused::Dropped));
    let is_out =
        |other: &&Probe| (other.question.family, other.question.way) == (probe.question.family, Way::Out);
    let out = look.probes.iter().find(is_out).and_then(Probe::link);
    probe.question.way == Way::In && dropped && is_strict && out != Some(link)
}

fn is_by_exit(look: &Look, probe: &Probe) -> bool {
    let exit = look.ours.wanted.exits.get(&probe.question.family);
    let exit = exit.and_then(|exit| exit.link()).map(|link| link.as_str());
    probe.question.iif.as_deref() == exit
}

fn has_forwards(look: &Look, family: Family) -> bool {
    let mut forwards = look.ours.wanted.filter.iter().flat_map(|filter| &filter.forwards);
    forwards.any(|forward| Family::of(forward.to) == family)
}

fn finding(look: &Look, probe: &Probe) -> Finding {
    let link = probe.question.iif.as_deref().unwrap_or_default();
    let family = probe.question.family;
    let switch = |name: &str| {
        let value = look.switches.reverse_path.get(name);
        value.map_or_else(|| "unknown".to_owned(), ToString::to_string)
    };
    let key = |name: &str| format!("net.ipv4.conf.{}.rp_filter", name.replace('.', "/"));
    let link_key = key(link);
    Finding {
        layer: Layer::Routing,
        code: Code::StrictReversePath,
        family: Some(family),
        subject: of_family(family, link),
        what: format!(
            "{family}: packets for guests that come by {link} are dropped there, because answers would leave by another link and rp_filter is strict."
        ),
        evidence: vec![
            probe.text.clone(),
            format!(
                "{} = {}, {link_key} = {}: the larger one counts, and 1 is strict",
                key("all"),
                switch("all"),
                switch(link)
            ),
        ],
        check: command(probe),
        wrong_if: "it names the guests' bridge".to_owned(),
        fix: format!("sysctl -w {link_key}=2"),
        leftover: None,
        risk: "forged senders are told apart on that link only by whether this host knows any way to them"
            .to_owned(),
        stops: is_by_exit(look, probe),
    }
}
