//! TAPs without carrier: exactly, no process holds their descriptor (FACTS section 4).

use sovereign_protocol::condition::Layer;

use super::look::Look;
use super::{Code, Finding};

pub(super) fn findings(look: &Look) -> Vec<Finding> {
    let taps = look.ours.wanted.taps.iter();
    let held = taps.filter(|(_, guest)| look.ours.cards.held.contains(*guest));
    let without = held.filter_map(|(tap, guest)| {
        let link = look.observed.link(tap.as_str())?;
        (!link.carrier).then_some((tap, guest))
    });
    let finding = |(tap, guest): (&crate::names::LinkName, &sovereign_protocol::name::Name)| Finding {
        layer: Layer::Tap,
        code: Code::NoCarrier,
        family: None,
        subject: guest.to_string(),
        what: format!(
            "The TAP of {guest} has no carrier: no virtual machine holds it, so no frame goes in or out."
        ),
        evidence: vec![format!(
            "link {tap}: NO-CARRIER; a TAP has carrier if and only if a process holds its descriptor"
        )],
        check: format!("ip link show dev {tap}"),
        wrong_if: "it says LOWER_UP".to_owned(),
        fix: "sovereign down && sovereign up".to_owned(),
        leftover: None,
        risk: "all guests of the instance stop in order and boot again".to_owned(),
        stops: false,
    };
    without.map(finding).collect()
}
