//! Steps as requests to the kernel. Thin: a step is a function, and none decides.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{
    InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction as Verb, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{AddressMessageBuilder, LinkBridge, LinkMessageBuilder, LinkUnspec};
use sovereign_protocol::interface::Prefix;
use sovereign_reconcile::family::Family;
use sovereign_reconcile::filter::Filter;
use sovereign_reconcile::route::{Route, RouteKind, WantedRoute};
use sovereign_reconcile::rule::{Rule, RuleAction};

use super::filter::{Enforcer, FilterError};
use super::kernel::{Kernel, KernelError};
use super::names::LinkName;
use super::observed::{ADDRESS_PROTOCOL, LABEL_END, Observed};
use super::plan::{Plan, Step};
use super::switches::{SwitchError, Switches};
use super::taps::TunPool;
use super::tun;
use crate::netns::StageFailure;

const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// Why a step was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    /// The kernel said no, or nothing.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// An ioctl on the TAP failed.
    #[error("cannot make the TAP")]
    Tap(#[source] io::Error),
    /// A switch cannot be set, or what it was cannot be kept.
    #[error(transparent)]
    Switch(SwitchError),
    /// The packet filter was not made.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// No tun descriptor was to be had.
    #[error(transparent)]
    NoTun(#[from] StageFailure),
    /// The link that the step is about is not there: an earlier step failed.
    #[error("there is no link {0}")]
    NoLink(LinkName),
}

/// A step that was not made.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(super) struct Failure {
    /// The step.
    pub(super) step: Step,
    /// Why.
    #[source]
    pub(super) error: StepError,
}

/// Makes every step of a plan that can be made, and tells of all others. Ends early only when
/// the socket is of no use any more. Not cancel safe, but whoever plans anew goes on from there.
pub(super) async fn apply(plan: &Plan, observed: &Observed, means: Means<'_>) -> Vec<Failure> {
    let indices = observed
        .links
        .values()
        .map(|link| (link.name.clone(), link.index));
    let mut hands = Hands {
        means,
        indices: indices.collect(),
    };
    let mut failures = Vec::new();
    for step in &plan.steps {
        if let Err(error) = hands.make(step).await {
            let dead = match &error {
                StepError::Kernel(error) => !error.socket_lives(),
                StepError::Filter(error) => !error.socket_lives(),
                _ => false,
            };
            failures.push(Failure {
                step: step.clone(),
                error,
            });
            if dead {
                break;
            }
        }
    }
    failures
}

/// What steps are made with.
pub(super) struct Means<'a> {
    pub(super) kernel: &'a mut Kernel,
    pub(super) tuns: &'a TunPool,
    pub(super) switches: &'a mut Switches,
    pub(super) enforcer: &'a mut Enforcer,
    /// What the packet filter is to be.
    pub(super) filter: Option<&'a Filter>,
}

struct Hands<'a> {
    means: Means<'a>,
    /// As planned, and as made since: a name that somebody took over meanwhile is not followed.
    indices: BTreeMap<String, u32>,
}

impl Hands<'_> {
    async fn make(&mut self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::RemoveLink { name, index } => {
                self.indices.remove(name);
                let message = LinkUnspec::new_with_index(*index).build();
                self.change(RouteNetlinkMessage::DelLink(message), 0).await
            }
            Step::CreateBridge { name, mac, group } => {
                let bridge = LinkBridge::new(name.as_str())
                    .address(mac.0.to_vec())
                    .link_group(*group)
                    .build();
                self.change(RouteNetlinkMessage::NewLink(bridge), NEW).await?;
                self.find(name).await
            }
            Step::CreateTap { name, group } => self.create_tap(name, *group).await,
            Step::SetMac { name, mac } => self.set(name, |link| link.address(mac.0.to_vec())).await,
            Step::SetMtu { name, mtu } => self.set(name, |link| link.mtu(*mtu)).await,
            Step::SetController { name, bridge } => {
                let bridge = self.index(bridge)?;
                self.set(name, |link| link.controller(bridge)).await
            }
            Step::LeaveController { name } => self.set(name, LinkMessageBuilder::nocontroller).await,
            Step::SetUp { name } => self.set(name, LinkMessageBuilder::up).await,
            Step::SetDown { name } => self.set(name, LinkMessageBuilder::down).await,
            Step::RemoveAddress { link, address } => {
                let message = address_message(self.index(link)?, *address);
                self.change(RouteNetlinkMessage::DelAddress(message), 0).await
            }
            Step::AddAddress { link, address } => {
                let message = marked_address(self.index(link)?, link, *address);
                self.change(RouteNetlinkMessage::NewAddress(message), NEW).await
            }
            Step::AddRoute { route } => {
                let message = RouteNetlinkMessage::NewRoute(wanted_route(route, self.index(&route.link)?));
                let flags = if route.replaces() {
                    NLM_F_CREATE | NLM_F_REPLACE
                } else {
                    NEW
                };
                self.change(message, flags).await
            }
            Step::RemoveRoute { route } => {
                let message = RouteNetlinkMessage::DelRoute(seen_route(route));
                self.change(message, 0).await
            }
            Step::AddRule { rule } => {
                let message = RouteNetlinkMessage::NewRule(rule_message(rule));
                self.change(message, NEW).await
            }
            Step::RemoveRule { rule } => {
                let message = RouteNetlinkMessage::DelRule(rule_message(rule));
                self.change(message, 0).await
            }
            Step::SetIsolated { name, isolated } => {
                let port = InfoPortData::BridgePort(vec![InfoBridgePort::Isolated(*isolated)]);
                let info = vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(port)];
                let mut message = LinkUnspec::new_with_index(self.index(name)?).build();
                message.attributes.push(LinkAttribute::LinkInfo(info));
                self.change(RouteNetlinkMessage::SetLink(message), 0).await
            }
            Step::SetSysctl { sysctl, from, to } => Ok(self
                .means
                .switches
                .set(sysctl, *from, *to)
                .map_err(StepError::Switch)?),
            Step::RestoreSysctl { sysctl, to, .. } => Ok(self
                .means
                .switches
                .restore(sysctl, *to)
                .map_err(StepError::Switch)?),
            Step::SetFilter { .. } | Step::RemoveFilter { .. } => {
                Ok(self.means.enforcer.set(self.means.filter).await?)
            }
        }
    }

    /// Lasting only after it is marked: killed in between, the TAP goes with the descriptor.
    async fn create_tap(&mut self, name: &LinkName, group: u32) -> Result<(), StepError> {
        let unattached = self.means.tuns.take().await?;
        tun::create(&unattached, name).map_err(StepError::Tap)?;
        self.find(name).await?;
        self.set(name, |link| link.link_group(group)).await?;
        let owner = rustix::process::geteuid().as_raw();
        tun::persist(&unattached, owner).map_err(StepError::Tap)
    }

    async fn set(
        &mut self,
        name: &LinkName,
        change: impl FnOnce(LinkMessageBuilder<LinkUnspec>) -> LinkMessageBuilder<LinkUnspec>,
    ) -> Result<(), StepError> {
        let message = change(LinkUnspec::new_with_index(self.index(name)?)).build();
        self.change(RouteNetlinkMessage::SetLink(message), 0).await
    }

    async fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), StepError> {
        Ok(self.means.kernel.change(message, flags).await?)
    }

    fn index(&self, name: &LinkName) -> Result<u32, StepError> {
        let index = self.indices.get(name.as_str()).copied();
        index.ok_or_else(|| StepError::NoLink(name.clone()))
    }

    /// Learns the number of a link that was just made.
    async fn find(&mut self, name: &LinkName) -> Result<(), StepError> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.as_str().to_owned()));
        let found = self
            .means
            .kernel
            .get(RouteNetlinkMessage::GetLink(message))
            .await?;
        let RouteNetlinkMessage::NewLink(link) = found else {
            return Err(StepError::NoLink(name.clone()));
        };
        self.indices.insert(name.as_str().to_owned(), link.header.index);
        Ok(())
    }
}

fn address_message(link: u32, address: Prefix) -> AddressMessage {
    match address.address() {
        IpAddr::V4(ip) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(link)
            .address(ip, address.length())
            .build(),
        IpAddr::V6(ip) => AddressMessageBuilder::<Ipv6Addr>::new()
            .index(link)
            .address(ip, address.length())
            .build(),
    }
}

fn marked_address(index: u32, link: &LinkName, address: Prefix) -> AddressMessage {
    let mut message = address_message(index, address);
    if address.address().is_ipv4() {
        let label = format!("{link}{LABEL_END}");
        message.attributes.push(AddressAttribute::Label(label));
    } else {
        let protocol = AddressProtocol::Other(ADDRESS_PROTOCOL);
        message.attributes.push(AddressAttribute::Protocol(protocol));
        // A bridge without carrier would keep it tentative, which is unusable (FACTS section 4).
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

fn wanted_route(route: &WantedRoute, link: u32) -> RouteMessage {
    let mut message = route_message(route.table, route.to, route.protocol());
    message.attributes.push(RouteAttribute::Oif(link));
    let gateway = route.gateway.map(|ip| RouteAttribute::Gateway(ip.into()));
    message.attributes.extend(gateway);
    if route.gateway.is_none() && route.to.address().is_ipv4() {
        message.header.scope = RouteScope::Link;
    }
    match Family::of(route.to.address()) {
        Family::V4 => {
            let source = route.source.map(|ip| RouteAttribute::PrefSource(ip.into()));
            message.attributes.extend(source);
        }
        // An IPv6 address may be tentative still, and then no route may prefer it.
        Family::V6 => message.attributes.push(RouteAttribute::Priority(route.metric())),
    }
    message
}

pub(super) fn seen_route(route: &Route) -> RouteMessage {
    let mut message = route_message(route.table, route.to, route.protocol);
    message.attributes.push(RouteAttribute::Priority(route.metric));
    message.attributes.extend(route.link.map(RouteAttribute::Oif));
    let gateway = route.gateway.map(|ip| RouteAttribute::Gateway(ip.into()));
    message.attributes.extend(gateway);
    if route.kind == RouteKind::Other {
        message.header.kind = RouteType::Unspec; // any
    }
    message.header.scope = RouteScope::NoWhere; // any
    message
}

fn route_message(table: u32, to: Prefix, protocol: u8) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(Family::of(to.address()));
    message.header.destination_prefix_length = to.length();
    message.header.protocol = protocol.into();
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Table(table));
    if to.length() > 0 {
        let address = RouteAttribute::Destination(to.address().into());
        message.attributes.push(address);
    }
    message
}

pub(super) fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(rule.family);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Priority(rule.priority));
    attributes.push(RuleAttribute::Protocol(rule.protocol.into()));
    message.header.action = match rule.action {
        RuleAction::Lookup(table) => {
            attributes.push(RuleAttribute::Table(table));
            Verb::ToTable
        }
        RuleAction::Unreachable => Verb::Unreachable,
        RuleAction::Other => Verb::Unspec,
    };
    if let Some(to) = rule.to {
        message.header.dst_len = to.length();
        attributes.push(RuleAttribute::Destination(to.address()));
    }
    if let Some(from) = rule.from {
        message.header.src_len = from.length();
        attributes.push(RuleAttribute::Source(from.address()));
    }
    attributes.extend(rule.iif.clone().map(RuleAttribute::Iifname));
    if let Some((mark, mask)) = rule.mark {
        attributes.extend([RuleAttribute::FwMark(mark), RuleAttribute::FwMask(mask)]);
    }
    message
}

fn family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}
