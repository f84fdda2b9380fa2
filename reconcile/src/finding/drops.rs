//! Foreign filters that stop what we accept: of several programs that filter, the one that drops has the last word.

use std::net::IpAddr;

use sovereign_protocol::condition::Layer;

use super::chain::{Chains, Fate};
use super::look::Look;
use super::packet::{Packet, State};
use super::question::{elsewhere, guest_of};
use super::{Code, Finding, of_family};
use crate::family::Family;

/// A kind of packet that guests need, in words.
struct Needed {
    what: &'static str,
    packet: Packet,
}

/// Packets out of the guests' subnet and answers to them, and first packets to a forwarded port.
fn needed(look: &Look, family: Family) -> Vec<Needed> {
    let way = || {
        let bridge = look.ours.bridge()?.as_str().to_owned();
        let exit = look.ours.wanted.exits.get(&family)?.link()?.as_str().to_owned();
        Some((
            bridge,
            exit,
            guest_of(&look.ours, family)?,
            elsewhere(&look.observed, family),
        ))
    };
    let Some((bridge, exit, guest, away)) = way() else {
        return Vec::new();
    };
    let packet = |links: (&String, &String), ends: (IpAddr, IpAddr), state, translated| Packet {
        family,
        iif: links.0.clone(),
        oif: links.1.clone(),
        from: ends.0,
        to: ends.1,
        state,
        translated,
        bridged: false,
    };
    let mut needed = vec![
        Needed {
            what: "what guests send elsewhere",
            packet: packet((&bridge, &exit), (guest, away), State::New, false),
        },
        Needed {
            what: "answers to guests",
            packet: packet((&exit, &bridge), (away, guest), State::Established, false),
        },
    ];
    let mut forwards = look.ours.wanted.filter.iter().flat_map(|filter| &filter.forwards);
    if let Some(forward) = forwards.find(|forward| Family::of(forward.to) == family) {
        needed.push(Needed {
            what: "connections to forwarded ports",
            packet: packet((&exit, &bridge), (away, forward.to), State::New, true),
        });
    }
    needed
}

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    look.families().flat_map(|family| of(look, family)).collect()
}

fn of(look: &Look, family: Family) -> Option<Finding> {
    let filters = look.filters(family);
    let (mut surely, mut perhaps): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    let mut culprit: Option<&Chains> = None;
    for Needed { what, packet } in needed(look, family) {
        for chains in &filters {
            let (told, by) = match chains.fate(&packet) {
                Fate::Passes => continue,
                Fate::Drops(by) => (&mut surely, by),
                Fate::MayDrop(by) => (&mut perhaps, by),
            };
            told.push(format!("{family}, {what}: {by}"));
            culprit.get_or_insert(chains);
        }
    }
    let stops = !surely.is_empty();
    let culprit = culprit?;
    let (code, verb) = if stops {
        (Code::ForwardDrop, "stops")
    } else {
        (Code::ForwardMayDrop, "may stop")
    };
    surely.extend(perhaps);
    Some(Finding {
        layer: Layer::Nat,
        code,
        family: Some(family),
        subject: of_family(family, &culprit.base),
        what: format!("{family}: the packet filter of another program {verb} guests' packets: {culprit}."),
        evidence: surely,
        check: check(culprit),
        wrong_if:
            "no packet counter of a drop or of the policy grows while a guest asks for something elsewhere"
                .to_owned(),
        fix: fix(look, culprit, family),
        leftover: None,
        risk: "that program lets guests' packets pass; what else it stops stays as it is".to_owned(),
        stops,
    })
}

fn check(culprit: &Chains) -> String {
    match culprit.program.strip_suffix("-save") {
        Some(program) => format!("{program} -t {} -L -v -n", table_of(culprit)),
        None => format!("nft list table {}", culprit.table),
    }
}

fn table_of(culprit: &Chains) -> &str {
    culprit.table.split_once(' ').map_or("filter", |(_, table)| table)
}

/// How the program itself is told; nothing of it is ours to change.
fn fix(look: &Look, culprit: &Chains, family: Family) -> String {
    let bridge = look.ours.bridge().map_or("BRIDGE", |bridge| bridge.as_str());
    let both = |insert: &dyn Fn(&str) -> String| format!("{} && {}", insert("i"), insert("o"));
    let Some(program) = culprit.program.strip_suffix("-save") else {
        if culprit.table.ends_with(" firewalld") {
            return format!(
                "firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload"
            );
        }
        let insert = |way: &str| {
            format!(
                "nft insert rule {} {} {way}ifname {bridge} accept",
                culprit.table, culprit.base
            )
        };
        return both(&insert);
    };
    // Docker leaves one chain to others and makes all else anew.
    let docker = culprit.chains.contains_key("DOCKER-USER");
    let chain = if docker { "DOCKER-USER" } else { &culprit.base };
    let program = match family {
        Family::V6 if !program.starts_with("ip6") => program.replacen("iptables", "ip6tables", 1),
        _ => program.to_owned(),
    };
    let table = table_of(culprit);
    both(&|way: &str| format!("{program} -t {table} -I {chain} -{way} {bridge} -j ACCEPT"))
}
