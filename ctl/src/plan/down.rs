//! What `down` would change. Pure.

use std::collections::BTreeSet;

use sovereign_protocol::name::Name;
use sovereign_protocol::spec::HostSpec;
use sovereign_reconcile::plan::Plan;

use super::Step;

/// What goes beside guests.
#[derive(Debug, Clone, Default)]
pub(crate) struct Going {
    /// A private network.
    pub(crate) namespace: bool,
    /// Links, rules and whatever else is removed or put back where the network stays.
    pub(crate) network: Plan,
    /// The host agent.
    pub(crate) agent: bool,
}

/// The steps that stop these guests, who needs another one before it, and what then goes.
pub(crate) fn down(spec: Option<&HostSpec>, guests: &BTreeSet<Name>, going: Going) -> Vec<Step> {
    let mut steps: Vec<Step> = in_order(spec, guests)
        .into_iter()
        .map(|guest| Step::StopGuest { guest })
        .collect();
    if going.namespace {
        steps.push(Step::EndNetwork);
    }
    steps.extend(going.network.steps.into_iter().map(Step::Network));
    steps.extend(going.network.conflicts.into_iter().map(Step::Conflict));
    if going.agent {
        steps.push(Step::StopAgent);
    }
    steps
}

fn in_order(spec: Option<&HostSpec>, guests: &BTreeSet<Name>) -> Vec<Name> {
    let needs = spec.map(HostSpec::needs).unwrap_or_default();
    let mut left = guests.clone();
    let mut order = Vec::new();
    while !left.is_empty() {
        let is_needed = |name: &&Name| {
            let mut others = left.iter().filter(|other| other != name);
            others.any(|other| needs.get(other).is_some_and(|of| of.contains(*name)))
        };
        // A cycle is refused with the document; one that is there all the same has no order.
        let next = left.iter().find(|name| !is_needed(name)).or(left.first());
        let Some(next) = next.cloned() else { break };
        left.remove(&next);
        order.push(next);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use sovereign_protocol::spec::Image;

    #[test]
    fn who_needs_a_guest_stops_before_it_and_the_agent_goes_last() {
        let text = "[guest.a.service.postgres]\nkind = \"postgres\"\n[guest.other]\n\
            [guest.web.service.miniflux]\nkind = \"miniflux\"\nrequires = \"a/postgres\"\n";
        let settings = config::parse(std::path::Path::new("s.toml"), text).unwrap();
        let image = Image {
            kernel: "k".into(),
            initramfs: "i".into(),
            root: "r".into(),
            agent: "a".into(),
            digest: "d".into(),
        };
        let spec = settings.host_spec(&image.into(), None);
        let guests = spec.guests.keys().cloned().collect();
        let going = Going {
            namespace: true,
            network: Plan::default(),
            agent: true,
        };
        let said: Vec<String> = down(Some(&spec), &guests, going)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            said,
            [
                "other: stop in order; its data stays",
                "web: stop in order; its data stays",
                "a: stop in order; its data stays",
                "network: remove the private network namespace with all in it",
                "stop the host agent",
            ]
        );
        assert!(down(None, &BTreeSet::new(), Going::default()).is_empty());
    }
}
