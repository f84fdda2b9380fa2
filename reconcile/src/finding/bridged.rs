//! br_netfilter: frames from guest to guest that the machine's FORWARD is asked about.

use sovereign_protocol::condition::Layer;

use super::chain::Fate;
use super::look::Look;
use super::packet::{Packet, State};
use super::question::{guest_of, sibling_of};
use super::{Code, Finding, of_family};
use crate::family::Family;

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    if look.ours.wanted.isolated {
        return Vec::new(); // no frame goes from port to port
    }
    look.families().filter_map(|family| of(look, family)).collect()
}

fn of(look: &Look, family: Family) -> Option<Finding> {
    if !look
        .switches
        .bridge_calls
        .get(&family)
        .copied()
        .unwrap_or_default()
    {
        return None;
    }
    let bridge = look.ours.bridge()?.as_str();
    let guest = guest_of(&look.ours, family)?;
    let packet = Packet {
        family,
        iif: bridge.to_owned(),
        oif: bridge.to_owned(),
        from: guest,
        to: sibling_of(&look.ours, guest)?,
        state: State::New,
        translated: false,
        bridged: true,
    };
    let filters = look.filters(family);
    let by = filters.iter().find_map(|chains| match chains.fate(&packet) {
        Fate::Drops(by) => Some(by),
        Fate::Passes | Fate::MayDrop(_) => None, // that one is told of what goes elsewhere
    })?;
    let switch = match family {
        Family::V4 => "net.bridge.bridge-nf-call-iptables",
        Family::V6 => "net.bridge.bridge-nf-call-ip6tables",
    };
    Some(Finding {
        layer: Layer::Nat,
        code: Code::BridgeFiltered,
        family: Some(family),
        subject: of_family(family, bridge),
        what: format!(
            "{family}: frames from guest to guest pass this machine's FORWARD chains, and a foreign one stops them."
        ),
        evidence: vec![format!("{switch} = 1"), by],
        check: format!("sysctl {switch}"),
        wrong_if: "it is 0, or one guest reaches another".to_owned(),
        fix: format!("sysctl -w {switch}=0"),
        leftover: None,
        risk: "programs that filter frames of their own bridges by it, such as Kubernetes, no longer do"
            .to_owned(),
        stops: false,
    })
}
