//! Questions to the kernel about packets that nobody sends (RTM_GETROUTE).
//!
//! The answers are never folded into what is observed: they are no routes, but what a route would do.

use std::net::IpAddr;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use sovereign_protocol::interface::Prefix;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::finding::Look;
use sovereign_reconcile::finding::probe::{Probe, Question, Refused, Reply};
use sovereign_reconcile::finding::question::questions;
use sovereign_reconcile::route::Route;

use super::super::kernel::{Kernel, KernelError};

/// Asks all questions that a look has.
pub(super) async fn ask(kernel: &mut Kernel, look: &Look) -> Result<Vec<Probe>, KernelError> {
    let routes: Vec<&Route> = look.observed.routes.iter().collect();
    let uid = rustix::process::geteuid().as_raw();
    let mut probes = Vec::new();
    for question in questions(&look.ours, &look.observed) {
        let iif = match &question.iif {
            Some(name) => match look.observed.link(name) {
                Some(link) => Some(link.index),
                None => continue, // it is gone
            },
            None => None,
        };
        let reply = match one(kernel, look, &question, iif).await {
            Err(KernelError::Unreadable) => continue, // nothing is known of this one
            other => other?,
        };
        probes.push(Probe::of(question, reply, &look.rules, &routes, uid));
    }
    Ok(probes)
}

async fn one(
    kernel: &mut Kernel,
    look: &Look,
    question: &Question,
    iif: Option<u32>,
) -> Result<Reply, KernelError> {
    let mut reply = match kernel.get(message(question, iif, RouteFlags::LookupTable)).await {
        Ok(RouteNetlinkMessage::NewRoute(route)) => reply(look, &route),
        Ok(_) => return Err(KernelError::Unreadable),
        Err(KernelError::Refused(error)) => {
            Reply::Refused(Refused::of(error.raw_os_error().unwrap_or_default()))
        }
        Err(error) => return Err(error),
    };
    if let Reply::Sent { route, .. } = &mut reply {
        let flags = RouteFlags::LookupTable | RouteFlags::FibMatch;
        *route = match kernel.get(message(question, iif, flags)).await {
            Ok(RouteNetlinkMessage::NewRoute(matched)) => destination(question.family, &matched),
            Err(error) if !error.socket_lives() => return Err(error),
            _ => None, // a kernel that does not know this, or one that changed its mind
        };
    }
    Ok(reply)
}

fn message(question: &Question, iif: Option<u32>, flags: RouteFlags) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    let (family, bits) = match question.family {
        Family::V4 => (AddressFamily::Inet, 32),
        Family::V6 => (AddressFamily::Inet6, 128),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = bits;
    message.header.flags = flags;
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Destination(question.to.into()));
    if let Some(from) = question.from {
        message.header.source_prefix_length = bits;
        attributes.push(RouteAttribute::Source(from.into()));
    }
    attributes.extend(iif.map(RouteAttribute::Iif));
    RouteNetlinkMessage::GetRoute(message)
}

fn reply(look: &Look, message: &RouteMessage) -> Reply {
    let mut table = u32::from(message.header.table);
    let (mut link, mut gateway, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Oif(index) => link = look.observed.links.get(index).map(|link| link.name.clone()),
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => gateway = Some(IpAddr::V6(*ip)),
            RouteAttribute::Via(RouteVia::Inet6(ip)) => gateway = Some(IpAddr::V6(*ip)),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(bytes) => Some(*bytes).filter(|bytes| *bytes > 0),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    match message.header.kind {
        RouteType::Unicast => Reply::Sent {
            table,
            route: None,
            link,
            gateway,
            mtu,
        },
        RouteType::Unreachable => Reply::Refused(Refused::Unreachable),
        RouteType::Prohibit => Reply::Refused(Refused::Prohibited),
        RouteType::BlackHole => Reply::Refused(Refused::Dropped),
        _ => Reply::Local { table },
    }
}

/// The destination of the route that matched.
fn destination(family: Family, message: &RouteMessage) -> Option<Prefix> {
    let to = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    });
    let to = to.unwrap_or_else(|| family.everywhere().address());
    Prefix::new(to, message.header.destination_prefix_length)
}
