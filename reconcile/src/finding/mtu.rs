//! A way out that carries less than guests send, with nobody to tell their peers.

use sovereign_protocol::condition::Layer;

use super::look::Look;
use super::probe::{Probe, Reply, Way};
use super::way::command;
use super::{Code, Finding, of_family};
use crate::family::Family;

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    look.families().filter_map(|family| of(look, family)).collect()
}

fn of(look: &Look, family: Family) -> Option<Finding> {
    let is_out = |probe: &&Probe| (probe.question.family, probe.question.way) == (family, Way::Out);
    let out = look.probes.iter().find(is_out)?;
    let Reply::Sent { link, mtu, .. } = &out.reply else {
        return None;
    };
    let link = look.observed.link(link.as_deref()?)?;
    let narrow = mtu.unwrap_or(link.mtu).min(link.mtu);
    let ours = look.ours.wanted.mtu;
    if narrow >= ours || look.clamps(family) {
        return None;
    }
    Some(Finding {
        layer: Layer::Routing,
        code: Code::MtuBlackHole,
        family: Some(family),
        subject: of_family(family, &link.name),
        what: format!(
            "{family}: guests send packets of {ours} bytes, the way out by {} carries {narrow}, and nothing tells their peers (no MSS clamp): large answers may never arrive.",
            link.name.escape_debug()
        ),
        evidence: vec![
            format!("link {} has mtu {}", link.name.escape_debug(), link.mtu),
            out.text.clone(),
            "no rule of ours clamps the MSS of TCP in this family".to_owned(),
        ],
        check: command(out),
        wrong_if: format!(
            "it says mtu {ours} or more, or `sovereign status` shows a packet filter that lacks nothing"
        ),
        fix: "sovereign status".to_owned(),
        leftover: None,
        risk: "none: it shows what the packet filter lacks, such as the kernel's table mangle".to_owned(),
        stops: false,
    })
}
