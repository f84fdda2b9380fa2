//! A way out that carries less than guests send, with nobody to tell their peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sovereign_protocol::condition::Layer;
use sovereign_protocol::name::Name;

use super::look::{Look, Networked};
use super::probe::{Probe, Reply, Way};
use super::way::command;
use super::{Code, Finding, of_family};
use crate::family::Family;

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    look.families().filter_map(|family| of(look, family)).collect()
}

/// Bytes of the largest packet of each guest of a family. Guests are told what fits through the link that they leave by;
/// one that has a value of its own in its configuration, or has not taken it over (yet), sends more, and nobody is told
/// what a route on the way says.
fn sent(look: &Look, family: Family) -> impl Iterator<Item = (&Name, u32)> {
    let Networked {
        wanted,
        guests,
        cards,
    } = &look.ours;
    let speaks = move |addresses: &BTreeSet<IpAddr>| addresses.iter().any(|ip| Family::of(*ip) == family);
    let of_family = guests.iter().filter(move |(_, addresses)| speaks(addresses));
    of_family.map(|(name, _)| (name, cards.mtu.get(name).copied().unwrap_or(wanted.mtu)))
}

fn of(look: &Look, family: Family) -> Option<Finding> {
    let is_out = |probe: &&Probe| (probe.question.family, probe.question.way) == (family, Way::Out);
    let out = look.probes.iter().find(is_out)?;
    let Reply::Sent { link, mtu, .. } = &out.reply else {
        return None;
    };
    let link = look.observed.link(link.as_deref()?)?;
    let narrow = mtu.unwrap_or(link.mtu).min(link.mtu);
    let wide: BTreeMap<&Name, u32> = sent(look, family).filter(|(_, bytes)| *bytes > narrow).collect();
    let ours = wide.values().copied().max()?;
    if look.clamps(family) {
        return None;
    }
    let guest = |(name, bytes): (&&Name, &u32)| format!("guest {name} sends up to {bytes} bytes");
    Some(Finding {
        layer: Layer::Routing,
        code: Code::MtuBlackHole,
        family: Some(family),
        subject: of_family(family, &link.name),
        what: format!(
            "{family}: guests send packets of up to {ours} bytes, the way out by {} carries {narrow}, and nothing tells their peers (no MSS clamp): large answers may never arrive.",
            link.name.escape_debug()
        ),
        evidence: [
            format!("link {} has mtu {}", link.name.escape_debug(), link.mtu),
            out.text.clone(),
            "no rule of ours clamps the MSS of TCP in this family".to_owned(),
        ]
        .into_iter()
        .chain(wide.iter().map(guest))
        .collect(),
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
