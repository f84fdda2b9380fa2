//! From a filter to tables.
//!
//! ```text
//!  forward      MSS of TCP; guest to guest; out or refused; in only what answers or was forwarded
//!  postrouting  out: this host's address; hairpin: the bridge's
//!  answers     what answers who asked by another link is marked for our rules of routing
//!  prerouting ┐
//!  output     ┴─> ports   not the loopback; ports of one address; ports of every address of this host
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sovereign_protocol::port::Ports;

use super::expression::Comparison::{Equal, NotEqual};
use super::expression::{MetaKey, Refusal, Verdict};
use super::matches::{self, End};
use super::{Chain, Expression, Family, Point, SENDER_ADDRESSES, Table, Tables, senders};
use crate::answers::MASK;
use crate::filter::{Filter, PortForward, WayOut};

/// Forwarded ports that change their number within a range, of all forwards together: the kernel's own NAT of a
/// range takes any free port of it, so each of these is a rule.
pub const SHIFTED_PORTS: usize = 4_096;
/// Before the usual place of filters, so that its drops are not after others' accepts.
const FORWARD: i32 = -10;
const DSTNAT: i32 = -100;
const SRCNAT: i32 = 100;
/// NF_IP_PRI_MANGLE: connections are known, and no way was chosen.
const MANGLE: i32 = -150;
/// Called by both hooks where destinations are translated.
const PORTS: &str = "ports";

/// Why a filter cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// The loopback's packets never leave it.
    #[error(
        "a port of {0} cannot be forwarded by the kernel: nothing that listens on the loopback is translated"
    )]
    Loopback(IpAddr),
    /// NAT does not translate between families.
    #[error("a port of {listen} cannot lead to {to}: both must be IPv4 or both IPv6")]
    Families {
        /// The address here.
        listen: IpAddr,
        /// The guest's.
        to: IpAddr,
    },
    /// The ports there go beyond the last.
    #[error("as many ports as {ports} do not fit from {to_port} on")]
    Beyond {
        /// The ports here.
        ports: Ports,
        /// The first there.
        to_port: u16,
    },
    /// More than [`SHIFTED_PORTS`].
    #[error(
        "{0} forwarded ports change their number within a range: {SHIFTED_PORTS} may, or use the same ports there"
    )]
    Shifted(usize),
    /// More than [`SENDER_ADDRESSES`].
    #[error("{link} has more than {SENDER_ADDRESSES} addresses of one family")]
    Addresses {
        /// The guest's link.
        link: String,
    },
}

/// The tables that enforce a filter: `inet TAG`, and `bridge TAG` if there are senders.
///
/// # Errors
/// The first part of it that nf_tables cannot do.
pub fn tables(filter: &Filter) -> Result<Tables, FilterError> {
    check(filter)?;
    let mut table = Table::new(Family::Inet, &filter.tag);
    let mut add = |name: &str, chain: Chain| table.chains.insert(name.to_owned(), chain);
    add("forward", forward(filter));
    add("postrouting", postrouting(filter));
    if !filter.answers.is_empty() {
        add("answers", answers(filter));
    }
    if !filter.forwards.is_empty() {
        for (name, point) in [("prerouting", Point::Prerouting), ("output", Point::Output)] {
            let mut chain = Chain::at("nat", point, DSTNAT);
            chain.push("forwarded ports", [matches::end(Verdict::Jump(PORTS.to_owned()))]);
            add(name, chain);
        }
        add(PORTS, ports(filter));
    }
    Ok(BTreeSet::from_iter(
        [Some(table), senders::table(filter)].into_iter().flatten(),
    ))
}

/// The forwards of a filter that cannot be made, and why. One of them keeps nobody else from what he asked for: see to
/// it that the filter goes without them to [`tables`].
#[must_use]
pub fn impossible(filter: &Filter) -> BTreeMap<PortForward, FilterError> {
    let mut shifted = 0;
    let forwards = filter.forwards.iter();
    let refused = forwards.filter_map(|forward| Some((forward, check_forward(forward, &mut shifted).err()?)));
    refused.map(|(forward, error)| (forward.clone(), error)).collect()
}

/// `shifted` is how many ports change their number, those of a forward that can be made included.
fn check_forward(forward: &PortForward, shifted: &mut usize) -> Result<(), FilterError> {
    if let Some(listen) = forward.listen {
        if listen.is_loopback() {
            return Err(FilterError::Loopback(listen));
        }
        if listen.is_ipv4() != forward.to.is_ipv4() {
            let to = forward.to;
            return Err(FilterError::Families { listen, to });
        }
    }
    let (ports, to_port) = (forward.ports, forward.to_port);
    let there = ports
        .moved_to(to_port)
        .ok_or(FilterError::Beyond { ports, to_port })?;
    let more = match there != ports && ports.span() > 0 {
        true => 1 + usize::from(ports.span()),
        false => 0,
    };
    if *shifted + more > SHIFTED_PORTS {
        return Err(FilterError::Shifted(*shifted + more));
    }
    *shifted += more;
    Ok(())
}

fn check(filter: &Filter) -> Result<(), FilterError> {
    let mut shifted = 0;
    filter
        .forwards
        .iter()
        .try_for_each(|forward| check_forward(forward, &mut shifted))?;
    for (link, sender) in &filter.senders {
        let four = sender.addresses.iter().filter(|ip| ip.is_ipv4()).count();
        if four.max(sender.addresses.len() - four) > SENDER_ADDRESSES {
            let link = link.to_string();
            return Err(FilterError::Addresses { link });
        }
    }
    Ok(())
}

fn forward(filter: &Filter) -> Chain {
    let bridge = &filter.bridge;
    let (from, to) = (|| matches::comes_by(bridge), || matches::leaves_by(bridge));
    let accept = || matches::end(Verdict::Accept);
    let mut chain = Chain::at("filter", Point::Forward, FORWARD);
    for (way, link) in [("out", from()), ("in", to())] {
        let comment = format!("TCP segments fit the route's MTU, {way}");
        chain.push(comment, [link, matches::opens_tcp(), matches::clamp_mss()]);
    }
    for (link, mark) in &filter.answers {
        let asked = [
            matches::comes_by(link),
            to(),
            matches::was_forwarded(),
            matches::questions(),
        ]
        .concat();
        chain.push(
            format!("who asks by {link} is answered there"),
            [asked, matches::mark_connection(*mark, MASK)],
        );
    }
    chain.push("guest to guest", [from(), to(), accept()]);
    match filter.way_out {
        WayOut::Masquerade => {
            // Translation does not see them: they would leave with a guest's own address.
            let invalid = matches::state(matches::INVALID);
            chain.push("of no connection", [from(), invalid, matches::end(Verdict::Drop)]);
            chain.push("out", [from(), accept()]);
        }
        WayOut::None => {
            chain.push(
                "answers to what was forwarded",
                [from(), matches::answers(), accept()],
            );
            let reject = vec![Expression::Reject(Refusal::Prohibited)];
            chain.push("no way out", [from(), reject]);
        }
    }
    let known = matches::state(matches::ESTABLISHED | matches::RELATED);
    chain.push("answers", [to(), known, accept()]);
    chain.push("forwarded ports", [to(), matches::was_forwarded(), accept()]);
    chain.push("nothing else comes in", [to(), matches::end(Verdict::Drop)]);
    chain
}

/// What a guest answers to connections with a mark.
fn answers(filter: &Filter) -> Chain {
    let mut chain = Chain::at("filter", Point::Prerouting, MANGLE);
    for (link, mark) in &filter.answers {
        let answer = [
            matches::comes_by(&filter.bridge),
            matches::was_forwarded(),
            matches::answers(),
            matches::connection_is_marked(*mark, MASK),
        ]
        .concat();
        chain.push(
            format!("back by {link}"),
            [answer, matches::mark_packet(*mark, MASK)],
        );
    }
    chain
}

fn postrouting(filter: &Filter) -> Chain {
    let mut chain = Chain::at("nat", Point::Postrouting, SRCNAT);
    for subnet in &filter.subnets {
        let source = || matches::subnet(End::Source, subnet);
        let by_bridge = |how| matches::link(MetaKey::OutName, how, &filter.bridge);
        if filter.way_out == WayOut::Masquerade {
            let masquerade = vec![Expression::Masquerade];
            chain.push("out as this host", [source(), by_bridge(NotEqual), masquerade]);
        }
        if filter.forwards.iter().any(|forward| subnet.contains(forward.to)) {
            let ip = subnet.network();
            let there = matches::address_in(End::Destination, Equal, ip, subnet.prefix());
            let forwarded = matches::was_forwarded();
            let masquerade = vec![Expression::Masquerade];
            chain.push(
                "a sibling's answer comes back through here",
                [source(), there, by_bridge(Equal), forwarded, masquerade],
            );
        }
    }
    chain
}

fn ports(filter: &Filter) -> Chain {
    let back = || matches::end(Verdict::Return);
    let mut chain = Chain::default();
    for (ip, prefix) in [
        (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
        (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    ] {
        let loopback = matches::address_in(End::Destination, Equal, ip, prefix);
        chain.push("not the loopback", [matches::family_of(ip), loopback, back()]);
    }
    let (of_one, of_all): (Vec<_>, Vec<_>) = filter
        .forwards
        .iter()
        .partition(|forward| forward.listen.is_some());
    for forward in of_one {
        translate(&mut chain, forward);
    }
    if !of_all.is_empty() {
        chain.push("only to this host", [matches::to_this_host(NotEqual), back()]);
    }
    for forward in of_all {
        translate(&mut chain, forward);
    }
    chain
}

/// A rule, or one for each port where a range is moved.
fn translate(chain: &mut Chain, forward: &PortForward) {
    let &PortForward {
        transport,
        listen,
        ports,
        to,
        to_port,
    } = forward;
    let destination = match listen {
        Some(listen) => matches::address(End::Destination, listen),
        None => matches::family_of(to),
    };
    let mut rule = |ports: Ports, port: Option<u16>| {
        let there = port.unwrap_or(ports.first());
        let shown = ports.moved_to(there).unwrap_or(ports);
        let comment = match to {
            IpAddr::V4(to) => format!("{transport} {ports} to {to}:{shown}"),
            IpAddr::V6(to) => format!("{transport} {ports} to [{to}]:{shown}"),
        };
        let which = matches::ports(transport, ports);
        chain.push(comment, [destination.clone(), which, matches::dnat(to, port)]);
    };
    if to_port == ports.first() {
        return rule(ports, None);
    }
    for (port, there) in (ports.first()..=ports.last()).zip(to_port..=u16::MAX) {
        if let Some(port) = Ports::one(port) {
            rule(port, Some(there));
        }
    }
}
